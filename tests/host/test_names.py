"""The table of torchtitan's names: all of them are there, and nothing else in the package knows them."""

from __future__ import annotations

import re

import pytest

from flame_ext.host import names
from tests.ranks import REPOSITORY
from tests.test_imports import loaded_by


@pytest.mark.parametrize("name", names.NAMES)
def test_torchtitan_has_it(name: str) -> None:
    assert getattr(names, name) is not None


def test_a_name_outside_the_table_is_an_import_error() -> None:
    with pytest.raises(ImportError, match="cannot import name 'absent'"):
        from flame_ext.host.names import absent  # noqa: F401


@pytest.mark.slow
def test_a_name_loads_its_own_module_alone() -> None:
    assert not {"torch", "torchtitan"} & loaded_by("import flame_ext.host.names")
    code = "from flame_ext.host.names import get_metrics_rank"
    assert not {name for name in loaded_by(code) if name.startswith("torchtitan.models.llama3")}


def test_private_names_are_imported_by_the_table_alone() -> None:
    private = re.compile(
        r"^from torchtitan\S* import [^#\n]*?(?<![\w.])_\w+|^from torchtitan\.models|^import torchtitan\S*\._", re.M
    )
    found = [str(f) for f in (REPOSITORY / "flame_ext").rglob("*.py") if private.search(f.read_text())]
    assert found == []
