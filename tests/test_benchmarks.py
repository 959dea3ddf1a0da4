"""The runner of the benchmarks: what it writes and where, not what it measures."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from tests.benchmarks import __main__ as runner
from tests.benchmarks import startup
from tests.benchmarks.common import Table, into_page, quartiles, ratios, spread, verdict
from tests.benchmarks.jobs import MixtureShape, Shape, give_host_the_shape
from tests.ranks import REPOSITORY

PAGE = "# Title\n\n<!-- table: startup -->\nold\n<!-- end of table -->\n\nkept\n<!-- table: other -->\nas it was\n<!-- end of table -->\n"


def test_a_run_writes_facts_figures_and_the_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = Table("startup", ["", "s"], [["a row", "1.50"]], ["A note."], {"a row": [1.5]})
    monkeypatch.setattr(startup, "measure", lambda quick: [table] if quick else [])
    page, figures = tmp_path / "page.md", tmp_path / "figures.json"
    page.write_text(PAGE)
    runner.main(["--only", "startup", "--quick", "--json", str(figures), "--markdown", str(page)])
    found = json.loads(figures.read_text())
    assert found["tables"]["startup"]["figures"] == {"a row": [1.5]}
    assert found["facts"]["cores"] >= 1 and found["facts"]["torch"] and found["quick"] is True
    written = page.read_text()
    assert "|  | s |\n| --- | --- |\n| a row | 1.50 |\n\nA note." in written and "old" not in written
    assert "--quick" in written and "kept" in written and "as it was" in written
    runner.main(["--only", "startup", "--quick", "--markdown", str(page)])
    assert page.read_text().count("| a row |") == 1  # again in its place, not once more


def test_an_unknown_topic_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        runner.main(["--only", "startup,weather"])
    assert "unknown topic weather" in capsys.readouterr().err


def test_a_table_without_a_place_is_an_error() -> None:
    with pytest.raises(ValueError, match="table: nowhere"):
        into_page(PAGE, Table("nowhere", [""], []))


def test_the_page_has_a_row_for_every_table() -> None:
    sources = "".join((REPOSITORY / "tests" / "benchmarks" / f"{topic}.py").read_text() for topic in runner.TOPICS)
    made = set(re.findall(r'\b(?:Table|compare|table_of)\(\s*"([a-z0-9-]+)"', sources))
    page = (REPOSITORY / "docs" / "performance.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| ([a-z]+): `([a-z0-9-]+)` \|", page, re.MULTILINE)
    assert {topic for topic, _ in rows} == set(runner.TOPICS)
    assert {name for _, name in rows} == made
    assert len(rows) == 21


def test_numbers() -> None:
    assert quartiles([3.0]) == (3.0, 3.0, 3.0)
    assert quartiles([1.0, 2.0, 3.0, 4.0, 5.0]) == (2.0, 3.0, 4.0)
    assert ratios([2.0, 9.0], [1.0, 3.0]) == [2.0, 3.0]
    assert spread([2.0, 1.0, 3.0]) == "2.00 (2.00, 1.00, 3.00)"
    assert spread([float(n) for n in range(9)]) == "4.00 (2.00-6.00)"
    assert "met" in verdict("x", 1.19, 1.2) and "missed" in verdict("x", 1.21, 1.2)
    assert "met" in verdict("x", 0.96, 0.95, at_most=False) and "missed" in verdict("x", 0.94, 0.95, at_most=False)


@pytest.mark.parametrize(("hidden", "intermediate"), [(64, 176), (128, 512), (256, 688), (2048, 8192)])
def test_the_host_gets_the_same_shape(hidden: int, intermediate: int) -> None:
    import torch
    from torchtitan.models.llama3 import llama3_args
    from torchtitan.models.llama3.model.model import Transformer

    give_host_the_shape(Shape(1, hidden, intermediate, 4, 264, 1, 32), "unused")
    with torch.device("meta"):
        model = Transformer(llama3_args.pop("bench"))
    assert model.layers["0"].feed_forward.w1.weight.shape == (intermediate, hidden)


def test_the_host_gets_the_same_mixture() -> None:
    import torch
    from torchtitan.models.qwen3 import Qwen3StateDictAdapter, qwen3_args
    from torchtitan.models.qwen3.model.model import Qwen3Model
    from transformers import AutoModelForCausalLM
    from transformers.core_model_loading import revert_weight_conversion

    shape = MixtureShape(2, 64, 48, 4, 264, 1, 32, kv_heads=2, head_dim=32, experts=8, chosen=3)
    torch.manual_seed(0)
    ours = AutoModelForCausalLM.from_config(shape.config())
    before = torch.histc
    try:
        give_host_the_shape(shape, "unused")
        args = qwen3_args.pop("bench")
        with torch.device("meta"):
            host = Qwen3Model(args)
        with torch.no_grad():
            host.to_empty(device="cpu").init_weights(torch.device("cpu"))
        stored = revert_weight_conversion(ours, ours.state_dict())
        host.load_state_dict(Qwen3StateDictAdapter(args, None).from_hf(stored))
        tokens = torch.randint(264, (2, 32))
        with torch.no_grad():
            assert torch.allclose(host(tokens), ours(tokens).logits, atol=1e-5)
    finally:
        torch.histc = before
