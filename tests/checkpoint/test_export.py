"""Exports while a run goes on, what is written beside the weights, and reading it back for analysis."""

from __future__ import annotations

import json
import queue
import re
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from flame_ext.analysis import load_future_heads, load_with_heads, predict_future
from flame_ext.checkpoint.card import card_of_step, model_card
from flame_ext.checkpoint.lineage import ROOT
from flame_ext.checkpoint.manager import SeedingCheckpointManager
from flame_ext.errors import SeedError
from flame_ext.run.background_export import BackgroundExports
from flame_ext.seeding.sources.source import same_bits
from tests.ranks import TINY_OLMO, TrainRun, train
from tests.sources import load_dcp

FAST = (
    "--training.seq_len=32", "--training.local_batch_size=2", "--seed.verify=none", "--training.steps=4",
    "--checkpoint.interval=1", "--checkpoint.keep_latest_k=2", "--export.interval=2", "--export.max_shard_size=1MB",
)  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> TrainRun:
    """Four steps on two ranks, the second of which is exported while the run goes on."""
    return train(tmp_path_factory.mktemp("exporting") / "run", *FAST, "--checkpoint.keep_latest_k=0", world_size=2)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    files = [*folder.glob("*.safetensors"), *folder.glob("future_heads/*.safetensors")]
    return {key: tensor for file in files for key, tensor in load_file(file).items()}


def test_a_step_on_the_way_is_exported_like_the_last(run: TrainRun) -> None:
    assert sorted(p.name for p in (run.dump_folder / "hf").iterdir()) == ["step-2", "step-4"]
    assert "Exported step-2 in the background" in run.ranks[0].output
    for step in (2, 4):
        folder = run.dump_folder / "hf" / f"step-{step}"
        found = weights(folder)
        saved = load_dcp(run.dump_folder / "checkpoint" / f"step-{step}", {k: t.float() for k, t in found.items()})
        assert all(same_bits(found[key], saved[key].to(found[key].dtype)) for key in saved)
        assert len(list(folder.glob("model-*.safetensors"))) > 1
        _, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
        assert not info["missing_keys"] and not info["unexpected_keys"]
    beside = {p.name for p in (run.dump_folder / "hf" / "step-2").iterdir() if not p.name.startswith("model")}
    assert beside == {p.name for p in folder.iterdir() if not p.name.startswith("model")}, "the same files beside them"
    assert "router" not in (folder / "config.json").read_text(), "no option of a mixture of experts"


@pytest.mark.parametrize("step", [2, 4])
def test_the_card_says_where_the_weights_come_from(run: TrainRun, step: int) -> None:
    card = ModelCard.load(run.dump_folder / "hf" / f"step-{step}" / "README.md")
    assert card.data.library_name == "transformers" and "flame_ext" in card.data.tags
    (line,) = [line for line in run.metrics if line["step"] == step]
    assert (
        f"| tokens seen | {line['tokens_seen']} |" in card.text and f"| loss_ce | {line['loss_ce']:.6g} |" in card.text
    )
    assert "| continues from | `tests/assets/tiny_olmo`" in card.text and "load_with_heads" in card.text


@pytest.mark.parametrize("folder", ["steps", "elsewhere/of/steps"])
def test_the_card_is_there_whatever_the_folder_of_the_steps_is_called(dump_folder: Path, folder: str) -> None:
    steps = dump_folder.parent / folder if "/" in folder else folder
    run = train(dump_folder, *FAST, "--training.steps=1", "--export.interval=0", f"--checkpoint.folder={steps}")
    text = (dump_folder / "hf" / "step-1" / "README.md").read_text()
    assert f"| loss_ce | {run.metrics[0]['loss_ce']:.6g} |" in text


def test_the_card_of_a_mixture_from_the_hub() -> None:
    manifest = {
        "step": 7,
        "seed": {"source": "hf://org/model@v1", "revision": "abc123", "source_digest": "0123456789abcdef0123"},
        "config": {
            "training.dataset": "c4", "optimizer.lr": 1e-3, "data.sources.0.path": "a|b.jsonl", "data.sources.0.name": "",
            "data.sources.0.weight": 0.25, "data.sources.0.streaming": False, "data.sources.1.path": "other",
            "action_layer.enable": False, "action_layer.loss_weight": 0.1, "future_encoder.enable": True,
            "future_encoder.loss_weight": 0.5,
        },
    }  # fmt: skip
    card = ModelCard(model_card(manifest, {"loss": 1.25}))
    assert card.data.base_model == "org/model"
    rows = dict(re.findall(r"^\| (\S[^|]*) \| (.*) \|$", card.text, re.MULTILINE))
    assert rows == {
        "continues from": "`hf://org/model@v1`, revision abc123, digest of its headers 0123456789abcdef", "step": "7", "loss": "1.25",
        "data.sources.0.path": r"a\|b.jsonl", "data.sources.0.weight": "0.25", "data.sources.1.path": "other", "optimizer.lr": "0.001",
        "future_encoder.loss_weight": "0.5",
    }, "what is off, or is not read, is not said"  # fmt: skip


def test_the_card_of_a_step_takes_its_line_alone(tmp_path: Path) -> None:
    step = tmp_path / "checkpoint" / "step-2"
    step.mkdir(parents=True)
    assert card_of_step(step) is None
    (step / "manifest.json").write_text('{"step": 2}')
    (tmp_path / "metrics.jsonl").write_text('{"step": 2, "loss": 2.5}\n{"step": 3, "loss": 9.5}\n{"step": 4, "lo')
    assert "| loss | 2.5 |" in card_of_step(step), "of step 2; the last line was cut off by a kill"


def test_exports_that_were_cut_off_are_made_up_for(run: TrainRun, dump_folder: Path) -> None:
    for step in (2, 3):
        shutil.copytree(run.dump_folder / "checkpoint" / f"step-{step}", dump_folder / "checkpoint" / f"step-{step}")
    (dump_folder / "hf" / ".incomplete-step-2").mkdir(parents=True)
    again = train(dump_folder, *FAST, "--checkpoint.keep_latest_k=0", "--training.local_batch_size=4")  # on one rank
    assert "step-3" in again.ranks[0].output
    found, expected = (weights(folder / "hf" / "step-2") for folder in (dump_folder, run.dump_folder))
    assert found.keys() == expected.keys() and all(same_bits(found[key], expected[key]) for key in found)
    assert not list((dump_folder / "hf").glob(".*"))


@pytest.mark.matrix
def test_an_export_of_a_step_that_is_saved_again_is_replaced(run: TrainRun, dump_folder: Path) -> None:
    shutil.copytree(run.dump_folder / "checkpoint" / "step-1", dump_folder / "checkpoint" / "step-1")
    (dump_folder / "hf" / "step-2").mkdir(parents=True)
    (dump_folder / "hf" / "step-2" / "config.json").write_text("{}")
    train(dump_folder, *FAST, "--checkpoint.keep_latest_k=0", world_size=2)
    found, expected = (weights(folder / "hf" / "step-2") for folder in (dump_folder, run.dump_folder))
    assert found.keys() == expected.keys() and all(same_bits(found[key], expected[key]) for key in found)


def test_an_export_that_fails_ends_the_run_on_all_ranks(dump_folder: Path) -> None:
    dump_folder.mkdir()
    (dump_folder / "hf").write_text("in the way")
    options = [*FAST, "--training.steps=2000", "--checkpoint.interval=2"]
    failed = train(dump_folder, *options, world_size=2, check=False)
    assert failed.exit_codes == [1, 1]
    assert "the export of" in failed.ranks[0].output.splitlines()[-1]
    assert failed.metrics[-1]["step"] < 2000


def test_steps_in_use_are_known_and_one_export_follows_the_other(tmp_path: Path, monkeypatch) -> None:
    begun: list[str] = []
    exports = BackgroundExports(tmp_path / "hf", [], due=lambda step: step % 2 == 0)

    def slow(self: BackgroundExports, step: Path) -> str | None:
        begun.append(step.name)
        while not (tmp_path / "go").exists():
            time.sleep(0.01)
        return f"the export of {step.name} failed" if step.name == "step-4" else None

    monkeypatch.setattr(BackgroundExports, "_convert", slow)
    (tmp_path / "hf" / "step-6").mkdir(parents=True)
    for number in range(1, 7):
        exports.start(tmp_path / f"step-{number}", just_saved=False)
    assert exports.in_use() == {tmp_path / "step-2", tmp_path / "step-4"} and exports.error() is None
    while not begun:
        time.sleep(0.01)
    assert begun == ["step-2"]
    (tmp_path / "go").touch()
    while exports.running():
        time.sleep(0.01)
    assert exports.error() == "the export of step-4 failed"
    assert exports.in_use(), "what is not made needs its step"
    exports.cancel()


def test_a_step_that_an_export_still_reads_is_not_deleted(run: TrainRun) -> None:
    folder = run.dump_folder / "checkpoint"
    manifest = json.loads((folder / "step-1" / "manifest.json").read_text())
    queued: queue.Queue[str] = queue.Queue()
    manager = SimpleNamespace(
        keep_latest_k=2, folder=str(folder), purge_queue=queued, lineage=ROOT,
        hooks=SimpleNamespace(
            facts=lambda: {"run": manifest["run"]}, exports=SimpleNamespace(in_use=lambda: {folder / "step-1"})
        ),
    )  # fmt: skip
    SeedingCheckpointManager._purge_stale_checkpoints(manager)
    assert list(queued.queue) == [str(folder / ".deleted-step-2")], "of the four, two are kept and one is in use"
    (folder / ".deleted-step-2").rename(folder / "step-2")


@pytest.mark.parametrize(
    ("command", "error"),
    [
        (
            "[ -e seen ] && echo made && exit 0; touch seen; kill -TERM $$",
            None,
        ),  # a signal to all of a job, or to it alone
        ("kill -TERM $$", "failed: exit code -15"),
        ("echo 'error: no' >&2; exit 2", "failed: no"),
        (None, "failed: FileNotFoundError: "),
    ],
    ids=["ended-once", "ended-each-time", "failed", "not-started"],
)
def test_a_step_is_in_use_until_its_export_is_made(tmp_path: Path, monkeypatch, command: str | None, error) -> None:
    python = tmp_path / "python"
    if command is not None:
        python.write_text(f"#!/bin/sh\n{command}\n")
        python.chmod(0o755)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "executable", str(python))
    exports = BackgroundExports(tmp_path / "hf", [], due=lambda step: True)
    exports.start(tmp_path / "step-2", just_saved=True)
    while exports.running():
        time.sleep(0.01)
    found = exports.error()
    assert (found is None) if error is None else error in found
    assert exports.in_use() == (set() if error is None else {tmp_path / "step-2"})
    exports.cancel()


def test_an_export_that_is_cancelled_ends_at_once_and_never_sees_an_accelerator(tmp_path: Path, monkeypatch) -> None:
    python, seen = tmp_path / "python", tmp_path / "seen"
    python.write_text(
        f'#!/bin/sh\necho "devices:$CUDA_VISIBLE_DEVICES" > {seen}.part\nmv {seen}.part {seen}\nexec sleep 60\n'
    )
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    exports = BackgroundExports(tmp_path / "hf", [], due=lambda step: True)
    for number in (2, 4):
        exports.start(tmp_path / f"step-{number}", just_saved=True)
    while not seen.exists():
        time.sleep(0.01)
    begin = time.monotonic()
    exports.cancel()
    assert time.monotonic() - begin < 30
    assert exports.error() is None and len(exports.in_use()) == 2
    assert seen.read_text() == "devices:\n"


def test_an_export_that_begins_while_it_is_cancelled_ends_at_once(tmp_path: Path, monkeypatch) -> None:
    python, begun, popen = tmp_path / "python", threading.Event(), subprocess.Popen
    python.write_text("#!/bin/sh\nexec sleep 60\n")
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))

    def slow(*args, **kwargs):
        process = popen(*args, **kwargs)
        begun.set()
        time.sleep(0.3)
        return process

    monkeypatch.setattr(subprocess, "Popen", slow)
    exports = BackgroundExports(tmp_path / "hf", [], due=lambda step: True)
    exports.start(tmp_path / "step-2", just_saved=True)
    assert begun.wait(30)
    begin = time.monotonic()
    exports.cancel()
    assert time.monotonic() - begin < 30


def test_backbone_and_heads_for_analysis(run: TrainRun) -> None:
    folder = run.dump_folder / "hf" / "step-4"
    model, heads = load_with_heads(folder, dtype=torch.float32)
    assert not any(module.training for part in (model, heads) for module in part.modules()), "no dropout"
    tokens = torch.randint(0, 264, (2, 24), generator=torch.Generator().manual_seed(0))
    prediction = predict_future(model, heads, tokens)
    assert not model.base_model._forward_hooks, "the model is left as it was"
    stock = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        expected = stock(tokens, output_hidden_states=True)
    assert torch.equal(prediction.logits, expected.logits)
    assert torch.equal(prediction.hidden_states, expected.hidden_states[-1])
    norms = prediction.future.norm(dim=-1)
    assert prediction.future.shape == (2, 24, 128) and torch.allclose(norms, torch.ones_like(norms), atol=1e-5)
    tensors = load_file(folder / "future_heads" / "model.safetensors")
    head = {key.removeprefix("future_predictor."): tensor.float() for key, tensor in tensors.items()}
    hidden = F.layer_norm(expected.hidden_states[-1], (128,), head["norm.weight"], head["norm.bias"])
    inner = F.gelu(hidden @ head["proj.0.weight"].T + head["proj.0.bias"])
    outer = inner @ head["proj.2.weight"].T + head["proj.2.bias"]
    naive = outer / outer.norm(dim=-1, keepdim=True)
    assert torch.allclose(prediction.future, naive, atol=1e-5)


def test_what_has_no_heads_or_damaged_ones_is_refused(run: TrainRun, tmp_path: Path) -> None:
    with pytest.raises(SeedError, match="name an export"):
        load_with_heads(TINY_OLMO)
    damaged = tmp_path / "damaged"
    shutil.copytree(run.dump_folder / "hf" / "step-4", damaged)
    tensors = load_file(damaged / "future_heads" / "model.safetensors")
    tensors.pop("future_predictor.proj.2.bias")
    save_file(tensors, damaged / "future_heads" / "model.safetensors")
    with pytest.raises(SeedError, match="proj.2.bias"):
        load_future_heads(damaged)
    config = damaged / "future_heads" / "config.json"
    content = json.loads(config.read_text())
    content["future_predictor"]["hidden_size"] = 64
    config.write_text(json.dumps(content))
    with pytest.raises(SeedError, match="export the step again"):
        load_future_heads(damaged)
