"""Every generator, by what its rows say in words: read and judged here without the generator's own code."""

from __future__ import annotations

import random
import re
from collections import Counter
from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import load_from_disk
from transformers import AutoTokenizer

from flame_ext.errors import UserError
from flame_ext.lab.data import read_task, record_of, vocabulary_size, write_task
from flame_ext.lab.tasks import KINDS
from flame_ext.lab.tasks.creativity import Siblings, Triangles
from flame_ext.lab.tasks.path_star import PathStar
from flame_ext.lab.tasks.task import Task
from flame_ext.tools.main import main

TASKS: dict[str, Task] = {
    "path_star": KINDS["path_star"](train=600, test=100, degree=3, path_length=4, nodes=15),
    "siblings": KINDS["siblings"](train=150, test=50, parents=4, children=12, seed_tokens=2),
    "triangles": KINDS["triangles"](train=60, test=30, nodes=24, neighbours=9),
    "global_constraint": KINDS["global_constraint"](train=300, test=50, early=5, gap=4, modulus=4),
    "countdown": KINDS["countdown"](train=300, test=50, numbers=4, operand=12, largest=60),
    "text": KINDS["text"](train=200, test=40, piece=40),
}


@pytest.fixture(scope="module")
def said(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[list[str], list[str]]]:
    """The rows of each task to train on and held out, as its tokenizer writes them, without EOS."""
    found = {}
    for name, task in TASKS.items():
        folder = tmp_path_factory.mktemp("tasks") / name
        if name == "text":
            documents = folder.with_name("documents")
            documents.mkdir()
            for i in range(20):
                words = random.Random(i).choices(["grün", "blau", "rot", f"n{i}"], k=200)
                (documents / f"{i:02}.txt").write_text(" ".join(words))
            task.documents = str(documents)  # type: ignore[attr-defined]
        write_task(task, folder)
        read, tokenizer = read_task(folder), AutoTokenizer.from_pretrained(folder)
        assert read.task == task and len(tokenizer) == vocabulary_size(task)
        parts = []
        for rows in (read.train, read.test):
            assert (
                rows.shape[1] == task.length
                and (rows[:, -1] == tokenizer.eos_token_id).all()
                and (rows[:, :-1] > 1).all()
            )
            texts = [tokenizer.decode(row[:-1]) for row in rows]
            if name == "text":  # pieces of letters of two bytes need not be texts
                assert (
                    sum(
                        tokenizer(text)["input_ids"] == row[:-1].tolist() for text, row in zip(texts, rows, strict=True)
                    )
                    > 10
                )
            else:
                assert [tokenizer(text)["input_ids"] for text in texts] == rows[:, :-1].tolist()
            parts.append(texts)
        found[name] = (parts[0], parts[1])
    return found


@pytest.mark.parametrize("name", TASKS)
def test_held_out_rows_are_not_trained_on(said: dict[str, Any], name: str) -> None:
    train, test = said[name]
    keys: dict[str, Any] = {  # what makes two rows the same example, however they are written
        "path_star": lambda row: (frozenset(row.split(" / ")[0].split(" | ")), row.split(" = ")[0].split()[-1]),
        "siblings": lambda row: frozenset(row.split()[-3:]),
        "triangles": lambda row: frozenset(row.split()[1:]),
        "global_constraint": lambda row: tuple(row.split()[:5]),  # what follows means nothing
        "countdown": lambda row: (tuple(sorted(row.split(" :")[0].split())), row.split()[5]),
        "text": lambda row: row,
    }
    a, b = ([keys[name](row) for row in rows] for rows in said[name])
    assert len(test) == TASKS[name].test == len(set(b)) and len(set(a)) == len(a)
    assert len(train) == TASKS[name].train or (name == "triangles" and len(train) > TASKS[name].train)
    assert not set(a) & set(b)


def test_a_path_star_is_one_and_its_answer_leads_to_the_goal(said: dict[str, Any]) -> None:
    first_listed = Counter()
    for row in [row for part in said["path_star"] for row in part]:
        prompt, answer = row.split(" = ")
        listed, ends = prompt.split(" / ")
        edges = [tuple(edge.split()) for edge in listed.split(" | ")]
        (start, goal), path, following = ends.split(), answer.split(), dict(edges)
        assert len(edges) == len(set(edges)) == 9 and len({node for edge in edges for node in edge}) == 10
        assert Counter(a for a, _ in edges)[start] == 3 and max(Counter(b for _, b in edges).values()) == 1
        leaves = {b for _, b in edges} - set(following)
        assert len(leaves) == 3 and goal in leaves and path[0] == start and path[-1] == goal and len(path) == 4
        assert all(edge in edges for edge in pairwise(path))
        # Nothing but the graph tells the way: its first edge is at any place among those of the start.
        first_listed[[b for a, b in edges if a == start].index(path[1])] += 1
    assert all(count == pytest.approx(700 / 3, abs=50) for count in first_listed.values()) and len(first_listed) == 3


def test_siblings_have_their_parent(said: dict[str, Any]) -> None:
    rows = [row.split() for part in said["siblings"] for row in part]
    for colon, *digits, one, other, parent in rows:
        assert colon == ":" and len(digits) == 2 and all(re.fullmatch(r"s\d", digit) for digit in digits)
        assert {int(child[1:]) // 12 for child in (one, other)} == {int(parent[1:])} and one != other
    assert len({tuple(row[1:3]) for row in rows}) > 50, "seeds differ"


def test_triangles_are_of_edges_that_are_trained_on(said: dict[str, Any]) -> None:
    train, test = ([row.split()[1:] for row in part] for part in said["triangles"])
    edges = {frozenset(row[:2]) for row in train if row[:2] * 3 == row}
    assert len(edges) == len(train) - 60 and edges == {
        frozenset(map(str, e)) for e in np.argwhere(TASKS["triangles"]._linked)
    }
    for a, b, b_again, c, c_again, a_again in [row for row in train if row[:2] * 3 != row] + test:
        assert (a, b, c) == (a_again, b_again, c_again) and {frozenset(e) for e in ((a, b), (b, c), (c, a))} <= edges


def test_the_late_token_is_the_sum_of_the_early_ones(said: dict[str, Any]) -> None:
    answers = Counter()
    for row in [row for part in said["global_constraint"] for row in part]:
        numbers, answer = row.split(" = ")
        assert int(answer) == sum(map(int, numbers.split()[:5])) % 4 and len(numbers.split()) == 9
        answers[answer] += 1
    assert len(answers) == 4 and min(answers.values()) > 50


def test_the_default_has_early_numbers_enough() -> None:
    train, test = (rows[:, :6] for rows in KINDS["global_constraint"]().rows())
    assert len(np.unique(np.concatenate([train, test]), axis=0)) == len(train) + len(test) == 10_500


def test_countdown_reaches_its_target(said: dict[str, Any]) -> None:
    for row in [row for part in said["countdown"] for row in part]:
        assert reaches(row), row


def reaches(row: str) -> bool:
    """By exact fractions."""
    prompt, *equations, end = row.split(" ,")
    numbers, target = prompt.split(" : ")
    left = Counter(map(int, numbers.split()))
    result = None
    for equation in equations:
        a, operator, b, _, result = equation.split()
        x, y = Fraction(int(a)), Fraction(int(b))
        value = {"+": x + y, "-": x - y, "*": x * y, "/": x / y if y else None}[operator]
        if value != int(result) or Counter((int(a), int(b))) - left:
            return False
        left = left - Counter((int(a), int(b))) + Counter((int(result),))
    return not end and result == target and left.total() == 1 and 0 <= int(target) <= 60


def test_pieces_are_of_documents_and_none_is_of_both_parts(said: dict[str, Any]) -> None:
    files = sorted(Path(TASKS["text"].documents).glob("*.txt"))  # type: ignore[attr-defined]
    texts = [file.read_bytes() for file in files]
    folder_rows = TASKS["text"].rows()
    for rows, documents in zip(folder_rows, ([t for i, t in enumerate(texts) if i % 10], texts[::10]), strict=True):
        assert all(any(bytes(row[:-1] - 2) in text for text in documents) for row in rows[:30].astype(np.uint8))


def test_other_solutions_of_countdown_are_right_and_wrong_ones_are_not(tmp_path: Path) -> None:
    task = KINDS["countdown"](train=10, test=10, numbers=3, operand=12, largest=60)
    write_task(task, tmp_path / "task")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "task")
    rows = {
        "3 4 5 : 17 , 3 * 4 = 12 , 12 + 5 = 17 , <eos>": True,
        "3 4 5 : 17 , 4 * 3 = 12 , 5 + 12 = 17 , <eos>": True,
        "3 4 5 : 17 , 3 * 4 = 12 , 12 + 5 = 17 , ,": False,  # does not end
        "3 4 5 : 17 , 3 * 4 = 12 , 12 + 5 = 18 , <eos>": False,
        "3 4 5 : 12 , 3 + 4 = 7 , 5 + 7 = 12 , <eos>": True,
        "3 4 5 : 17 , 3 + 4 = 7 , 5 + 7 = 12 , <eos>": False,  # another target
        "3 4 5 : 17 , 12 + 5 = 17 , 12 + 5 = 17 , <eos>": False,  # 12 is not there yet
        "3 4 5 : 7 , 3 + 4 = 7 , 3 + 4 = 7 , <eos>": False,  # used twice
        "3 4 5 : 17 , 3 * = 4 12 , 12 + 5 = 17 , <eos>": False,
        "3 4 5 : 1 , 4 / 3 = 1 , 5 / 5 = 1 , <eos>": False,
    }
    ids = np.array([tokenizer(row)["input_ids"] for row in rows])
    assert dict(zip(rows, task.right(ids, ids), strict=True)) == rows


def test_rows_are_there_with_their_prompts_masked(tmp_path: Path) -> None:
    task = PathStar(train=20, test=5, path_length=3, nodes=9)
    write_task(task, tmp_path / "task")
    found = read_task(tmp_path / "task")
    for split, rows in (("train", found.train), ("test", found.test)):
        data = load_from_disk(tmp_path / "task" / split)
        assert data["input_ids"][:] == rows.tolist()
        equals = [row.index(task.words().index("=") + 2) for row in data["input_ids"]]
        assert [mask.index(1) for mask in data["completion_mask"]] == [at + 1 for at in equals], (
            "from the start node on"
        )
        assert all(mask == sorted(mask) for mask in data["completion_mask"])


def test_creativity_counts_what_is_coherent_new_and_distinct() -> None:
    task = Siblings(train=2, test=1, parents=2, children=4)
    p, c = 2, 4  # ids of the first parent and the first child; the mark of the prompt comes after all of them

    def row(*words: int, end: int = 0) -> list[int]:
        return [task.prompts(1, np.random.default_rng(0))[0, 0], *words, end]

    train = np.array([row(c, c + 1, p), row(c + 4, c + 5, p + 1)])
    made = np.array(
        [
            row(c, c + 2, p),  # creative
            row(c + 2, c, p),  # the same
            row(c + 6, c + 7, p + 1),  # creative
            row(c + 1, c, p),  # trained on, in the other order
            row(c, c + 4, p),  # of two parents
            row(c, c + 2, p + 1),
            row(c, c, p),
            row(c, p, p),
            row(c + 1, c + 2, p, end=p),  # goes on
            row(c + 8, c + 9, p + 2),  # marks
        ]
    )
    assert task.judged(made, train) == {"coherent": 0.4, "new": 0.3, "creative": 0.2}


def test_a_triangle_is_coherent_if_its_edges_are_there() -> None:
    task = Triangles(train=3, test=1, nodes=6, neighbours=4)
    linked = {frozenset((a + 2, b + 2)) for a in range(6) for b in range(6) if task._linked[a, b]}
    for a, b, c in [(a, b, c) for a in range(2, 9) for b in range(2, 9) for c in range(2, 9)]:
        there = {frozenset(pair) for pair in ((a, b), (b, c), (c, a))} <= linked
        assert (task.known((a, b, b, c, c, a)) == frozenset((a, b, c))) == there
        assert task.known((a, b, b, c, c, 8)) is None


@pytest.mark.parametrize("name", TASKS)
def test_rows_are_those_of_the_seed(said: dict[str, Any], name: str) -> None:
    parameters = record_of(TASKS[name])["parameters"] | {"train": 20, "test": 10}
    one, again, other = (KINDS[name](**parameters | {"seed": seed}).rows() for seed in (1, 1, 2))
    assert all(np.array_equal(a, b) for a, b in zip(one, again, strict=True))
    assert not np.array_equal(one[1], other[1])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["path_star", "--nodes", "8"], "nodes must be >= 9, the nodes of G(2, 5), got 8"),
        (["path_star", "--path_length", "1"], "path_length must be >= 2, got 1"),
        (
            ["siblings", "--parents", "2", "--children", "5"],
            "train + test = 5500, but with these parameters only 20 different",
        ),
        (["global_constraint", "--early", "1", "--gap", "1", "--modulus", "3"], "only 3 different examples"),
        (["triangles", "--neighbours", "100"], "neighbours must be < nodes = 100"),
        (["countdown", "--largest", "10"], "largest must be >= operand = 20"),
        (["text", "--documents", "nowhere"], "found 0 files *.txt, expected at least 2"),
        (["countdown", "--test", "0"], "test must be >= 1, got 0"),
    ],
)
def test_what_can_not_be_written_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture, arguments: list[str], message: str
) -> None:
    assert main(["lab", "data", *arguments, "--output", str(tmp_path / "task")]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1 and not (tmp_path / "task").exists()


def test_a_folder_is_written_once(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    command = ["lab", "data", "path_star", "--train=20", "--test=5", f"--output={tmp_path / 'task'}"]
    assert main(command) == 0 and "rows of 33 tokens, of which 27 are the prompt" in capsys.readouterr().out
    before = (tmp_path / "task" / "train.npy").stat().st_mtime_ns
    assert main(command) == 0 and (tmp_path / "task" / "train.npy").stat().st_mtime_ns == before
    with pytest.raises(UserError, match="holds something else than this task"):
        write_task(PathStar(train=21, test=5), tmp_path / "task")
