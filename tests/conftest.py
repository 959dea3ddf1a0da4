"""Fixtures that more than one module uses."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# No hub and no surprises from the user's environment; before transformers is imported.
os.environ["HF_HUB_OFFLINE"] = "1"
# A cache of our own; huggingface_hub looks for it once, when it is imported.
_hf_home = tempfile.TemporaryDirectory(prefix="flame_ext-hf-home-")
os.environ["HF_HOME"] = _hf_home.name
os.environ.pop("HF_HUB_CACHE", None)
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest  # noqa: E402
from hypothesis import settings  # noqa: E402

import flame_ext  # noqa: E402, F401  (before torchtitan)
from tests.ranks import TrainRun, train  # noqa: E402

# How long an example takes depends on what else the machine does.
settings.register_profile("flame_ext", deadline=None)
settings.load_profile("flame_ext")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--quarter", type=int, choices=range(4), help="only every fourth test of the matrix, from this one on"
    )


def pytest_configure(config: pytest.Config) -> None:
    """Hide accelerators from all tests but those that are for them: what is bit-equal is so on a CPU, and ranks need not find one each."""
    assert "torch" not in sys.modules, "it has looked for accelerators already"
    if not config.option.markexpr.startswith("gpu"):
        os.environ["CUDA_VISIBLE_DEVICES"] = os.environ["HIP_VISIBLE_DEVICES"] = ""


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Mark modules that start ranks as slow, give the matrix time, leave a quarter of it if asked to; skip what needs a GPU."""
    import torch  # not before accelerators are hidden

    without_gpu = pytest.mark.skip(reason="needs a GPU, and pytest -m gpu")
    for item in items:
        if {"run_ranks", "train"} & vars(item.module).keys() or {"debug_run", "ten_steps"} & set(item.fixturenames):
            item.add_marker("slow")
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(without_gpu)
        if item.get_closest_marker("matrix"):  # many architectures on up to eight ranks: minutes on two cores
            item.add_marker(pytest.mark.timeout(900))
    if (quarter := config.getoption("--quarter")) is not None:
        matrix = sorted(item.nodeid for item in items if item.get_closest_marker("matrix"))
        chosen = set(matrix[quarter::4])
        config.hook.pytest_deselected(items=[item for item in items if item.nodeid not in chosen])
        items[:] = [item for item in items if item.nodeid in chosen]


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


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for them, filled as they are asked for (:func:`tests.layouts.steps`)."""
    return tmp_path_factory.mktemp("models")


@pytest.fixture(scope="module")
def single(
    request: pytest.FixtureRequest, models: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, dict[str, Any]]:
    """The step of each of the module's ``JOBS`` in a single process, which has no use for what some of them ask for."""
    from tests.layouts import steps  # which imports torch, and must not before accelerators are hidden

    return steps(models, tmp_path_factory.mktemp("single"), "single", request.module.JOBS)[0]


@pytest.fixture(scope="session")
def object_server() -> Iterator[Any]:
    """The session's S3 server; tests take ``object_store``."""
    from tests.object_store import served  # moto takes a second

    with served() as store:
        yield store


@pytest.fixture
def object_store(object_server: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A :class:`tests.object_store.ObjectStore` with an empty bucket, which this process and its ranks find by their environment."""
    from tests.object_store import with_new_bucket

    store = with_new_bucket(object_server)
    for name, value in store.environment.items():
        monkeypatch.setenv(name, value)
    return store
