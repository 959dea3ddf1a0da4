"""The documentation is true where a machine can tell: its commands run, its links lead somewhere, its options exist."""

from __future__ import annotations

import ast
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import is_dataclass
from pathlib import Path
from typing import get_type_hints

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

from flame_ext.config.manager import table_in_list
from flame_ext.heads.registry import job_config_class
from flame_ext.preflight.reference import reference
from flame_ext.tools.main import main as flame_ext
from tests.documents import DOCUMENTS, Block, blocks, prose
from tests.ranks import REPOSITORY, train

CONFIG_CLASS = job_config_class()
NEEDS = ("cluster", "network", "time", "a run", "an old checkpoint")  # what a marked command may ask for
RUN = {"bash", "python"}
HELP = REPOSITORY / "docs" / "help.md"
NOT_OPTIONS = (
    "json",
    "jsonl",
    "py",
    "safetensors",
    "toml",
    "weight",
)  # files and tensors whose names begin as a section's does
OPTION = re.compile(r"`(?:--)?([a-z_]+)\.([a-z_]+(?:\.[a-z_]+)?)(?: ?=[^`]*)?`")
FILE = re.compile(r"`((?:flame_ext|tests|configs|docs|\.ci)/[\w./-]*|[\w-]+\.(?:md|sh|toml))`")
LINK = re.compile(r"\]\(([^)\s]+)\)")


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The repository as somebody has it who has just cloned it."""
    folder = tmp_path_factory.mktemp("docs") / "flame_ext"
    ignored = shutil.ignore_patterns(".git", "__pycache__", "outputs", ".*_cache", ".venv")
    shutil.copytree(REPOSITORY, folder, ignore=ignored)
    # The command as pip installs it, but of the copy.
    command = folder / ".bin" / "flame-ext"
    command.parent.mkdir()
    command.write_text(f'#!/bin/sh\nexec {sys.executable} -m flame_ext.tools.main "$@"\n')
    command.chmod(0o755)
    return folder


def execute(block: Block, folder: Path) -> None:
    """Run a block with nothing but the copy and no network; raise with its output if it fails."""
    command = ["bash", "-euo", "pipefail", "-c"] if block.language == "bash" else [sys.executable, "-c"]
    path = os.pathsep.join([str(folder / ".bin"), str(Path(sys.executable).parent), os.environ["PATH"]])
    env = {**os.environ, "PATH": path, "PYTHONPATH": str(folder), "NGPU": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([*command, block.text], cwd=folder, env=env, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, (
        f"{block}: exit code {done.returncode}\n{block.text}\n{(done.stdout + done.stderr)[-4000:]}"
    )


def tool_calls(block: Block) -> list[list[str]]:
    """The arguments of each ``flame-ext`` in a block that has nothing else; empty if it has."""
    lines = block.text.replace("\\\n", "").splitlines() if block.language == "bash" else []
    calls = [shlex.split(line, comments=True) for line in lines]
    plain = all(call[:1] == ["flame-ext"] and not {"|", ">", "&&", "--import"} & set(call) for call in calls)
    return [call[1:] for call in calls] if plain else []


@pytest.mark.matrix
@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_commands_run(document: Path, copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In order: a later one may use what an earlier one has left."""
    monkeypatch.chdir(copy)
    for block in blocks(document):
        if block.file is not None:
            (copy / block.file).write_text(block.text)
        elif block.language in RUN and block.needs is None:
            calls = tool_calls(block)
            for call in calls:  # here: a process for each would import torch for seconds
                assert flame_ext(call) == 0, f"{block}: {call}"
            if not calls:
                execute(block, copy)


@pytest.mark.matrix
def test_commands_that_need_a_run_run(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is said of the debug job's results, without and with adapters, on those of its first step."""
    for name, more in (("lora", ["--model.converters=lora,future_prediction"]), ("debug", [])):
        short = ("--training.steps=1", "--training.seq_len=32", "--seed.verify=none")
        run = train(copy / "outputs" / name, *short, *more)
        (run.dump_folder / "hf" / "step-1").rename(run.dump_folder / "hf" / "step-60")
    monkeypatch.chdir(copy)
    needing = [block for document in DOCUMENTS for block in blocks(document) if block.needs == "a run"]
    assert {block.language for block in needing} == RUN
    for block in needing:
        if block.language == "python":
            exec(compile(block.text, str(block), "exec"), {})  # here: importing torch for each takes seconds
        else:
            calls = tool_calls(block)
            assert calls and all(flame_ext(call) == 0 for call in calls), block
    assert (run.dump_folder / "curves.png").stat().st_size > 10_000


def test_marks_are_known() -> None:
    found = [block for document in DOCUMENTS for block in blocks(document)]
    assert {block.needs for block in found} <= {None, *NEEDS}
    assert any(block.language in RUN and block.needs is None for block in found)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_and_files_exist(document: Path) -> None:
    text = prose(document)
    missing = []
    for target in LINK.findall(text):
        if target.startswith(("https://", "http://")):
            continue
        path, _, anchor = target.partition("#")
        linked = document if not path else document.parent / path
        if not linked.exists() or (anchor and anchor not in anchors(linked)):
            missing.append(target)
    for name in FILE.findall(text):
        # The file map names some by their folder's row.
        if not any((base / name).exists() for base in (REPOSITORY, REPOSITORY / "docs", REPOSITORY / "configs")):
            missing.append(name)
    assert not missing


def test_the_map_of_the_house_names_files_that_are_there() -> None:
    named = set(re.findall(r"`((?:[a-z_]+/)*[a-z_]+\.py|(?:[a-z_]+/)+)`", prose(REPOSITORY / "CONTRIBUTING.md")))
    assert len(named) > 30
    assert not [n for n in named if not any((base / n).exists() for base in (REPOSITORY, REPOSITORY / "flame_ext"))]
    folders = {f.name for f in (REPOSITORY / "flame_ext").iterdir() if f.is_dir() and f.name != "__pycache__"}
    assert {f"{folder}/" for folder in folders} <= named, "every folder has a row"


def test_the_lowest_and_newest_versions_are_those_that_are_tested() -> None:
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    needed = [Requirement(text) for text in project["dependencies"]]
    lowest = {n.name: s.version for n in needed for s in n.specifier if s.operator == ">="}
    installed = subprocess.run(
        ["make", "-s", "lowest-versions"], cwd=REPOSITORY, capture_output=True, text=True, check=True
    )
    assert dict(line.split("==") for line in installed.stdout.split()) == lowest
    _, _, table = prose(REPOSITORY / "docs" / "running.md").partition("\n## Versions\n")
    row = next(line for line in table.splitlines() if "make lowest" in line)
    versions = [Version(cell.strip()) for cell in row.split("|")[1:4]]
    assert versions == [Version(lowest[name]) for name in ("torch", "torchtitan", "transformers")]
    (torch,) = (n.specifier for n in needed if n.name == "torch")
    run = [Version(line.split("|")[1].strip()) for line in table.splitlines() if re.match(r"\| \d", line)]
    assert all(version in torch for version in run)
    beyond = Version(next(s.version for s in torch if s.operator == "<"))
    assert (max(run).major, max(run).minor + 1) == (beyond.major, beyond.minor), "the newest that is allowed was run"
    constraint = Requirement((REPOSITORY / ".ci" / "constraints.txt").read_text().splitlines()[-1])
    assert any(version in constraint.specifier for version in run), "CI takes one that the table names"


def anchors(document: Path) -> set[str]:
    """As GitHub makes them of headings."""
    headings = re.findall(r"^#+ (.+)$", prose(document), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def options(section: type = CONFIG_CLASS, prefix: str = "") -> set[str]:
    """Full names of sections and options."""
    names = set()
    for name, hint in get_type_hints(section).items():
        names.add(prefix + name)
        table = hint if is_dataclass(hint) else table_in_list(hint)
        if table is not None:
            names |= options(table, f"{prefix}{name}.")
    return names


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_options_exist(document: Path) -> None:
    """Those in the text, on command lines, and in TOML that is not a file of its own (a job that runs checks itself)."""
    text = prose(document)
    if document == HELP:
        before, heading, moving = text.partition("\n## Moving from flame\n")
        assert heading
        # The first column has flame's own options.
        text = before + re.sub(r"^\| [^|]* \|", "|", moving, flags=re.MULTILINE)
    known = options()
    sections = {name for name in known if "." not in name}
    named = {f"{section}.{key}" for section, key in OPTION.findall(text) if section in sections}
    named = {name for name in named if name.rpartition(".")[2] not in NOT_OPTIONS}
    for block in blocks(document):
        if block.language == "bash":
            named |= set(re.findall(r"--([a-z_]+\.[a-z_.]+)", block.text))
        elif block.language == "toml" and block.file is None:
            values = tomllib.loads(block.text)
            named |= {f"{section}.{key}" for section, table in values.items() for key in table}
    assert not {name for name in named if name not in known}


def test_configuration_is_that_of_the_code() -> None:
    written = (REPOSITORY / "docs" / "configuration.md").read_text()
    remedy = "python -m flame_ext.preflight.reference > docs/configuration.md"
    assert written == reference(), f"docs/configuration.md is stale: {remedy}"


def texts(tree: ast.AST) -> Iterator[str]:
    """Every string of a module; of an f-string what stands around its values, which are "…"."""
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            yield "".join(str(part.value) if isinstance(part, ast.Constant) else "…" for part in node.values)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value


def test_messages_are_those_of_the_code() -> None:
    files = sorted((REPOSITORY / "flame_ext").rglob("*.py"))
    said = "\n".join(text for file in files for text in texts(ast.parse(file.read_text())))
    shown = [line for block in blocks(HELP) if block.language == "text" for line in block.text.splitlines()]
    assert shown and not [line for line in shown if line not in said]
