"""``flame-ext information``: the figures of the formula, on the summaries of the trainer's own model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from flame_ext.analysis import future_information, load_with_heads
from flame_ext.heads.registry import build_head
from flame_ext.model.hf_causal_lm import HFModelArgs, build_hf_causal_lm
from flame_ext.tools.information import Curves, draw, report
from flame_ext.tools.main import main
from tests.ranks import TINY_OLMO
from tests.tiny_models import save_tiny

TEXT = "def main():\n    return sorted(range(10))\n\n" * 40


def export(folder: Path, backbone: Path, size: int, **encoder: Any) -> Path:
    """A backbone with random heads, as an export lies in a folder."""
    for file in backbone.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    torch.manual_seed(0)
    arguments = {
        "future_encoder": {"summary_method": "anticausal", "future_k": 0, "hidden_size": size, "num_heads": 4}
        | encoder,
        "future_predictor": {"hidden_size": size, "head_type": "linear", "dropout": 0.0},
    }
    tensors = {
        f"{name}.{key}": tensor if "norm" in key else torch.randn_like(tensor) / size**0.5
        for name, values in arguments.items()
        for key, tensor in build_head(name, values).state_dict().items()
    }
    (folder / "future_heads").mkdir()
    save_file(tensors, folder / "future_heads" / "model.safetensors")
    (folder / "future_heads" / "config.json").write_text(json.dumps(arguments))
    return folder


@pytest.mark.parametrize("name", ["tiny_olmo", "gemma2", "olmo3-sliding-window"])
@pytest.mark.parametrize("method", ["anticausal", "mean"])
def test_it_is_the_formula_on_the_trainers_summaries(tmp_path: Path, name: str, method: str) -> None:
    backbone = TINY_OLMO if name == "tiny_olmo" else save_tiny(name, tmp_path / "model")
    trained: Any = build_hf_causal_lm(HFModelArgs(hf_assets_path=str(backbone)))
    trained.to_empty(device="cpu").init_weights()
    weights = {key: tensor.float() for key, tensor in load_file(backbone / "model.safetensors").items()}
    trained.load_state_dict(weights, strict=False)
    (tmp_path / "export").mkdir()
    windows = {"windows": {"full_attention": 0, "sliding_attention": 8}} if name != "tiny_olmo" else {}
    folder = export(
        tmp_path / "export", backbone, trained.config.hidden_size, summary_method=method, future_k=8, **windows
    )
    model, heads = load_with_heads(folder, dtype=torch.float32)
    ids = torch.randint(3, 200, (2, 20), generator=torch.Generator().manual_seed(0))
    found = future_information(model, heads, ids, temperature=0.1)
    again = future_information(model, heads, ids, temperature=0.1)
    assert torch.equal(found.future.nan_to_num(), again.future.nan_to_num()), "the model is left as it was"

    encoder, predictor = heads["future_encoder"], heads["future_predictor"]
    with torch.no_grad():
        states = trained(ids, output="hidden_states")
        if method == "anticausal":
            mask = encoder.attention_mask(ids, None, "dense")
            summaries = trained(ids, attention_mask=mask, output="hidden_states")
        else:
            summaries = torch.stack([states[:, t + 1 : t + 9].mean(dim=1) for t in range(20)], dim=1)
        predictions = predictor(states).double()
        logits = trained(ids).double()
    keys = F.normalize(summaries[:, 1:19].double(), dim=-1).flatten(0, 1)
    assert found.future[:, 18:].isnan().all() and found.next_token[:, 19].isnan().all()
    for row in range(2):
        for t in range(18):
            scores = [(predictions[row, t] @ key / 0.1).item() for key in keys]
            mean = torch.tensor(scores, dtype=torch.float64).exp().mean().log().item()
            assert found.future[row, t].item() == pytest.approx(scores[row * 18 + t] - mean, abs=1e-4)
            expected = -logits[row, t].log_softmax(-1)[ids[row, t + 1]].item()
            assert found.next_token[row, t].item() == pytest.approx(expected, abs=1e-4)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export(tmp_path_factory.mktemp("information"), TINY_OLMO, 128)


def test_table_figures_and_picture_of_a_text(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "text.py").write_text(TEXT)
    command = ["information", str(folder), str(tmp_path / "text.py"), "--seq-len", "64"]
    assert main([*command, "--output", str(tmp_path / "curves.svg")]) == 0
    assert (tmp_path / "curves.svg").read_bytes().startswith(b"<?xml")
    assert "nats of information on the future on average" in capsys.readouterr().out
    assert main([*command, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (len(TEXT) + 1) // 64 == 26  # sequences, a token a byte: parts of at most 8 and of one size are 4 of 6
    assert len(found["tokens"]) == len(found["information"]) == len(found["loss"]) == 4 * 6 * 62
    assert max(found["information"]) <= found["bound"] == pytest.approx(torch.tensor(6.0 * 62).log().item(), rel=1e-6)


def test_peaks_are_outliers_and_counted_by_token() -> None:
    curves = Curves(
        ["a", "b", "|", "a", "b", "|"] * 4, [1.0, 1.1, 0.9, 1.2, 1.0, 1.1] * 3 + [1.0, 1.1, 9.0] * 2, [2.0] * 24, 10.0
    )
    assert curves.peaks == [20, 23]
    lines = report(curves, 5)
    assert lines[1] == f"2 peaks, above {curves.threshold:.3f} nats"
    assert lines[-1] == f'| `"\\|"` | 2 | 8 | {(0.9 * 3 + 1.1 * 3 + 18) / 8:.3f} |'
    above, below = draw(curves, 18, 24).axes
    assert [text.get_text() for text in above.texts] == ["|", "|"] and list(below.lines[0].get_ydata()) == [2.0] * 6


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--seq-len", "4000"], "less than one sequence"),
        (["--seq-len", "3"], "--seq-len must be >= 4"),
        (["--temperature", "0"], "--temperature > 0"),
        (["--output", "curves.txt"], "expected a name that ends in"),
        (["--output", "curves.png", "--draw", "9999", "10000"], "--draw: no tokens between 9999"),
    ],
)
def test_what_can_not_be_measured_is_said(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture, options: list[str], message: str
) -> None:
    (tmp_path / "text").write_text(TEXT)
    assert main(["information", str(folder), str(tmp_path / "text"), "--seq-len", "64", *options]) == 2
    assert message in capsys.readouterr().err


def test_an_export_without_a_predictor_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "text").write_text(TEXT)
    assert main(["information", str(TINY_OLMO), str(tmp_path / "text")]) == 2
    assert "name an export" in capsys.readouterr().err
