"""A task as a folder: rows for the trainer in two forms, the tokenizer, and ``task.json``, written last.

``train.npy`` and ``test.npy`` are flat tokens, of which all are learned. ``train`` and ``test``, of tasks with a prompt, are datasets of
the same rows with a column ``completion_mask``, so that the prompt is read and the answer alone is learned.
"""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from flame_ext.errors import UserError
from flame_ext.files import write_json
from flame_ext.lab.tasks import KINDS
from flame_ext.lab.tasks.task import FIRST_WORD, Array, Task

FLAT = ("train.npy", "test.npy")
_RECORD = "task.json"


class TaskFolder(NamedTuple):
    """A task and its rows."""

    task: Task
    train: Array  # (N, length)
    test: Array  # (M, length)


def vocabulary_size(task: Task) -> int:
    """The number of tokens, EOS and the unknown word included."""
    return FIRST_WORD + len(task.words())


def rows_of(folder: Path, split: str, answer_alone: bool) -> Path:
    """The path of a task's rows for ``data.sources``."""
    return folder / (split if answer_alone else f"{split}.npy")


def record_of(task: Task) -> dict[str, Any]:
    """The kind, the parameters, and what follows from them."""
    kind = next(name for name, of_kind in KINDS.items() if type(task) is of_kind)
    facts = {"length": task.length, "prompt": task.prompt, "vocab_size": vocabulary_size(task)}
    return {"kind": kind, "parameters": asdict(task), **facts}


def is_written(task: Task, folder: Path) -> bool:
    """Whether the folder holds the task, in both forms of rows. Raises a UserError if it holds something else."""
    record = folder / _RECORD
    if record.is_file() and json.loads(record.read_text()) == record_of(task):
        written = [folder / name for name in FLAT]
        if task.prompt:  # a folder of an earlier version has flat tokens alone
            written += [folder / split / "dataset_info.json" for split in ("train", "test")]
        return all(file.is_file() for file in written)
    if folder.is_dir() and (record.is_file() or (not any(folder.glob("*.npy")) and any(folder.iterdir()))):
        raise UserError(
            f"{folder}: holds something else than this task with these parameters; name another folder, or remove it"
        )
    return False


def write_task(task: Task, folder: Path) -> None:
    """Writes a task; nothing if the folder holds it already. Raises a UserError if the folder holds something else."""
    from flame_ext.lab.tokenizer import tokenizer_of

    if is_written(task, folder):
        return
    train, test = task.rows()
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in (("train", train), ("test", test)):
        np.save(folder / f"{name}.npy", rows.reshape(-1).astype(np.uint16 if rows.max() < 2**16 else np.uint32))
        if task.prompt:
            _save_masked(rows, task.prompt, folder / name)
    tokenizer_of(task).save_pretrained(folder)
    write_json(folder / _RECORD, record_of(task))


def _save_masked(rows: Array, prompt: int, folder: Path) -> None:
    from datasets import Dataset, Features, Sequence, Value

    mask = np.broadcast_to(np.arange(rows.shape[1]) >= prompt, rows.shape).astype(np.int8)
    features = Features({"input_ids": Sequence(Value("int32")), "completion_mask": Sequence(Value("int8"))})
    Dataset.from_dict({"input_ids": rows.astype(np.int32), "completion_mask": mask}, features).save_to_disk(folder)


def read_task(folder: Path) -> TaskFolder:
    """Reads what :func:`write_task` has written."""
    values = json.loads((folder / _RECORD).read_text())
    task = KINDS[values["kind"]](**values["parameters"])
    train, test = (
        np.load(folder / f"{name}.npy").astype(np.int64).reshape(-1, task.length) for name in ("train", "test")
    )
    return TaskFolder(task, train, test)
