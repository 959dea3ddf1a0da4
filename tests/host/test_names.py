"""The names that are taken from torchtitan: all of them are there, and each loads its own module alone."""

from __future__ import annotations

import pytest

from flame_ext.host import names
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
