"""What start-up and tools load, and what they leave alone."""

from __future__ import annotations

import gc
import json
import subprocess
import sys
from types import SimpleNamespace

import pytest
from transformers.models.auto import auto_factory

from flame_ext.heads import registry
from flame_ext.heads.names import HEAD_NAMES
from flame_ext.host.device import DETECTION, prepare_host
from flame_ext.imports import without_collection
from tests.ranks import REPOSITORY, TINY_OLMO


def loaded_by(code: str) -> set[str]:
    """Modules of a fresh process after ``code``."""
    command = [sys.executable, "-c", f"{code}\nimport sys, json; print(json.dumps(list(sys.modules)))"]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True)
    return set(json.loads(done.stdout.splitlines()[-1]))


def test_the_package_alone_loads_nothing_heavy() -> None:
    heavy = {"torch", "torchtitan", "transformers", "datasets", "numpy"}
    with_parsers = "from flame_ext.tools.main import main\ntry:\n    main(['--help'])\nexcept SystemExit:\n    pass"
    assert not loaded_by(with_parsers) & heavy


def test_inspect_loads_neither_the_host_nor_the_trainer() -> None:
    code = f"from flame_ext.tools.main import main; main(['inspect', {str(TINY_OLMO)!r}, '--json'])"
    loaded = loaded_by(code)
    assert "flame_ext.tools.describe" in loaded
    heavy = {"torchtitan", "datasets", "tensorboard", "flame_ext.trainer", "torch._dynamo"}
    if hasattr(auto_factory, "GenerationMixin"):  # transformers 5.17 loads it itself, with whichever class of a model
        heavy.remove("torch._dynamo")
    assert not loaded & heavy


def test_a_host_that_was_imported_first_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.accelerator.is_available", lambda: False)
    prepare_host()
    monkeypatch.setitem(sys.modules, DETECTION, SimpleNamespace(device_type="cuda"))
    with pytest.raises(RuntimeError, match="import flame_ext before torchtitan"):
        prepare_host()


def test_collection_is_as_it_was_after_imports() -> None:
    with without_collection():
        assert not gc.isenabled()
    assert gc.isenabled() and gc.get_freeze_count() == 0
    gc.disable()
    try:
        with without_collection():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()


def test_names_of_heads_are_those_that_are_built() -> None:
    assert list(registry._heads) == HEAD_NAMES
