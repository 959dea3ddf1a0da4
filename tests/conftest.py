"""Fixtures that more than one module uses."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

# No hub and no surprises from the user's environment; before transformers is imported.
os.environ["HF_HUB_OFFLINE"] = "1"
# A cache of our own; huggingface_hub looks for it once, when it is imported.
_hf_home = tempfile.TemporaryDirectory(prefix="flame_ext-hf-home-")
os.environ["HF_HOME"] = _hf_home.name
os.environ.pop("HF_HUB_CACHE", None)
os.environ.setdefault("OMP_NUM_THREADS", "1")
# What is bit-equal here is so on a CPU, and several ranks need not find several accelerators.
os.environ["CUDA_VISIBLE_DEVICES"] = os.environ["HIP_VISIBLE_DEVICES"] = ""

import pytest  # noqa: E402

import flame_ext  # noqa: E402, F401  (before torchtitan)
from tests.ranks import TrainRun, train  # noqa: E402


@pytest.fixture(scope="session")
def debug_run(tmp_path_factory: pytest.TempPathFactory) -> TrainRun:
    """The debug job as it stands, all its steps, on one process."""
    return train(tmp_path_factory.mktemp("debug") / "run", timeout=300)


@pytest.fixture(scope="session")
def ten_steps(tmp_path_factory: pytest.TempPathFactory) -> TrainRun:
    """The first ten steps of the debug job on one process, saved after the fifth."""
    return train(tmp_path_factory.mktemp("ten") / "run", *TEN_STEPS)


TEN_STEPS = ("--training.steps=10", "--lr_scheduler.total_steps=60", "--checkpoint.interval=5")


@pytest.fixture
def dump_folder(tmp_path: Path) -> Path:
    """A dump folder that does not exist yet."""
    return tmp_path / "run"
