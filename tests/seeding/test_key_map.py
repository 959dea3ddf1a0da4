"""New names for keys by their beginnings."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from flame_ext.errors import SeedError
from flame_ext.seeding.key_map import parse_key_map, rename, renamed
from flame_ext.seeding.sources.open import open_source
from tests.sources import save_dcp


def test_the_first_rule_that_fits_renames() -> None:
    rules = parse_key_map(["a.b.=x.", "a.=y.", "x.=z."])
    assert [rename(key, rules) for key in ("a.b.c", "a.c", "b.a.c")] == ["x.c", "y.c", "b.a.c"], (
        "once, at the beginning"
    )
    assert rename("model.a.c", rules) == "model.a.c"
    assert rename("model.a.c", rules, nested=True) == "model.y.c"


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        (["a."], "is not 'old=new'"),
        (["a.="], "is not 'old=new'"),
        (["a.=a."], "two different beginnings"),
        (["a.=b.", "a.=c."], "two rules rename 'a.'"),
        (["first.=second."], "makes 'second.weight' of both"),
        (["third.=fourth."], "no key begins with 'third.'"),
    ],
)
def test_what_can_not_be_meant_is_refused(tmp_path: Path, rules: list[str], message: str) -> None:
    source = open_source(save_dcp({"first.weight": torch.ones(2), "second.weight": torch.ones(2)}, tmp_path / "flat"))
    with pytest.raises(SeedError, match=message):
        renamed(source, parse_key_map(rules))
