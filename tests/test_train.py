"""The command, end to end, on the really trained tiny OLMo."""

from __future__ import annotations

import json
import math
import re
import time
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from flame_ext.analysis import load_future_heads
from tests.conftest import TEN_STEPS
from tests.ranks import DEBUG_TOML, TINY_OLMO, TrainRun, train


def first_batch() -> tuple[torch.Tensor, torch.Tensor]:
    """(8, 256) inputs and labels of step 1 of the debug job."""
    from flame_ext.data.build import build_dataloader
    from flame_ext.data.tokenizer import build_tokenizer
    from flame_ext.train import parse

    config = parse([f"--job.config_file={DEBUG_TOML}"])
    inputs, labels = next(iter(build_dataloader(1, 0, build_tokenizer(config), config)))
    return inputs["input"], labels


def stock_model(path: Path = TINY_OLMO) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()


def test_step_one_has_the_loss_of_the_model_on_disk(ten_steps: TrainRun) -> None:
    inputs, labels = first_batch()
    with torch.no_grad():
        logits = stock_model()(inputs).logits
    expected = F.cross_entropy(logits.flatten(0, 1), labels.flatten()).item()
    loss_ce = ten_steps.metrics[0]["loss_ce"]
    assert loss_ce == pytest.approx(expected, rel=1e-5)
    assert loss_ce < 0.6 * math.log(264), "the model on disk is a trained one"


def test_metrics_have_the_contract_fields(ten_steps: TrainRun) -> None:
    fields = {
        "step",
        "loss",
        "loss_ce",
        "loss_future",
        "future_mi_bound",
        "future_top1",
        "future_keys",
        "future_cos_positive",
        "future_cos_negative",
        "grad_norm_backbone",
        "grad_norm_heads",
        "time_teacher",
        "time_student",
        "lr",
        "grad_norm",
        "tokens_seen",
        "tokens_per_second",
        "skipped_steps",
        "epochs/python_stdlib",
    }
    for step, line in enumerate(ten_steps.metrics, start=1):
        assert set(line) == fields
        assert line["step"] == step and line["tokens_seen"] == step * 8 * 256
        assert line["loss"] == pytest.approx(line["loss_ce"] + 0.1 * line["loss_future"], rel=1e-6)
        assert line["tokens_per_second"] > 0
        assert line["future_mi_bound"] == pytest.approx(math.log(line["future_keys"]) - line["loss_future"], abs=1e-5)
        norms = (line["grad_norm_backbone"], line["grad_norm_heads"])
        assert math.hypot(*norms) == pytest.approx(line["grad_norm"], rel=1e-5)


def test_seed_report_has_the_contract_fields(ten_steps: TrainRun) -> None:
    report = json.loads((ten_steps.dump_folder / "seed_report.json").read_text())
    assert set(report) == {
        "source", "layout", "keys", "bytes_read", "seconds", "world_size", "source_digest", "verification", "revision",
        "weights_digest",
    }  # fmt: skip
    stock = {name for name, _ in stock_model().named_parameters()}
    assert set(report["keys"]["loaded"]) == stock
    assert all(key.startswith("future_predictor.") for key in report["keys"]["initialised"])
    assert report["keys"]["tied"] == ["lm_head.weight"]
    assert all("inv_freq" in key for key in report["keys"]["buffers"]) and report["keys"]["buffers"]
    assert report["keys"]["ignored"] == []
    assert report["layout"] == "hf-safetensors" and report["world_size"] == 1
    assert report["bytes_read"] == 2 * sum(p.numel() for p in stock_model().parameters())
    assert set(report["verification"]) == {"mode", "passed", "loss", "reference_loss", "max_abs_diff"}


@pytest.mark.parametrize(
    "options",
    [
        ["--activation_checkpoint.mode=full"],
        ["--activation_checkpoint.mode=selective", "--activation_checkpoint.selective_ac_option=op"],
        ["--compile.enable", "--compile.backend=aot_eager", "--activation_checkpoint.mode=selective"],
    ],
    ids=["full-ac", "op-ac", "compile-layer-ac"],
)
def test_checkpointing_and_compilation_do_not_change_the_step(
    ten_steps: TrainRun, dump_folder: Path, options: list[str]
) -> None:
    # The same operations; a compiled graph may order them otherwise.
    options = [*TEN_STEPS, "--training.steps=3", "--training.local_batch_size=4", *options]
    run = train(dump_folder, *options, world_size=2)
    for name in ("loss_ce", "loss_future", "grad_norm"):
        assert run.values(name) == pytest.approx(ten_steps.values(name)[:3], rel=1e-5), name
    assert "step-3" in {p.name for p in (dump_folder / "checkpoint").iterdir()}
    keys = set(load_file(dump_folder / "hf" / "step-3" / "model.safetensors"))
    assert keys == {name for name, _ in stock_model().named_parameters()}, "no wrapper's name in a key"


def test_tensorboard_has_the_parts_of_the_loss(dump_folder: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = train(dump_folder, *TEN_STEPS, "--training.steps=2", "--metrics.enable_tensorboard")
    (folder,) = (dump_folder / "tb").iterdir()
    events = EventAccumulator(str(folder)).Reload()
    for name in ("loss_ce", "loss_future", "future_top1"):
        assert [e.value for e in events.Scalars(name)] == pytest.approx(run.values(name), rel=1e-6), name
    assert {"loss_metrics/global_avg_loss", "grad_norm", "lr"} <= set(events.Tags()["scalars"])


def test_validation_runs_on_held_out_text(dump_folder: Path) -> None:
    options = ["--validation.enable", "--validation.dataset=python_stdlib_validation", "--validation.seq_len=256"]
    run = train(dump_folder, *TEN_STEPS, "--training.steps=1", *options, "--validation.steps=2", world_size=2)
    (line,) = (line for line in run.ranks[0].output.splitlines() if "validate step:" in line)
    loss = float(line.split("loss:")[1].split()[0])
    assert 0.5 < loss < 0.6 * math.log(264)


def test_validation_is_the_mean_over_all_labels(tmp_path: Path) -> None:
    """Of packed sequences, against from_pretrained, with more padding in some batches and on one rank than elsewhere."""
    texts = ["x = 1\n" * (1 + i % 3) for i in range(30)] + ["def f(a, b):\n    return {a: b}\n" * 60]
    (tmp_path / "held_out.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    toml = tmp_path / "job.toml"
    toml.write_text(DEBUG_TOML.read_text() + f'\n[[validation.sources]]\npath = "{tmp_path}/held_out.jsonl"\n')
    model, tokenizer = stock_model(TINY_OLMO), AutoTokenizer.from_pretrained(TINY_OLMO)
    lanes: list[list[int]] = [[], [], [], []]
    for number, text in enumerate(texts):
        lanes[number % 4] += [*tokenizer(text, add_special_tokens=False).input_ids, tokenizer.eos_token_id]
    total, count = 0.0, 0
    for lane in lanes:
        for part in (torch.tensor([lane[i : i + 65]]) for i in range(0, len(lane) - 1, 65)):
            with torch.no_grad():
                logits = model(part).logits[0, :-1].double()
            total += F.cross_entropy(logits, part[0, 1:], reduction="sum").item()
            count += part.shape[1] - 1
    options = ["--training.steps=1", "--optimizer.lr=0", "--validation.enable", "--validation.seq_len=64"]
    options += ["--validation.local_batch_size=2", "--checkpoint.no-last_save_in_hf"]
    train(tmp_path / "run", *options, config=toml, world_size=2)
    (line,) = (tmp_path / "run" / "validation.jsonl").read_text().splitlines()
    assert json.loads(line)["loss_ce"] == pytest.approx(total / count, rel=1e-5)


def test_heads_that_a_step_lacks_are_refused_at_a_resume(dump_folder: Path) -> None:
    options = ["--training.seq_len=64", "--training.local_batch_size=2", "--checkpoint.no-last_save_in_hf"]
    options += ["--checkpoint.interval=1", "--seed.verify=none", "--lr_scheduler.total_steps=60"]
    off = ["--model.converters=", "--future_encoder.no-enable", "--future_predictor.no-enable"]
    train(dump_folder, *options, *off, "--training.steps=1")
    changed = "training.steps,model.converters,future_encoder.enable,future_predictor.enable"
    options += ["--training.steps=2", f"--checkpoint.allow_config_change={changed}"]
    (rank,) = train(dump_folder, *options, check=False).ranks
    assert (
        "step-1 was saved without future_encoder, future_predictor, whose parameters and moments it lacks"
        in rank.output
    )
    assert rank.exit_code == 1 and "Traceback" not in rank.output
    train(dump_folder, *options, *off)


def mixture(folder: Path) -> Path:
    """The debug job on two sources, one of which is streamed, for one epoch, with two more for validation."""
    texts = [f"def function_{i}():\n    return {i}\n" * (1 + i % 5) for i in range(80)]
    for name, part in (("a", texts[:50]), ("b", texts[50:70]), ("held_out", texts[70:]), ("more", texts[75:])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in part))
    toml = folder / "job.toml"
    tables = "".join(
        f'\n[[{section}.sources]]\npath = "{folder}/{name}.jsonl"\n{more}\n'
        for section, name, more in (
            ("data", "a", "weight = 2.0"), ("data", "b", "streaming = true"),
            ("validation", "held_out", ""), ("validation", "more", 'label = "others"'),
        )
    )  # fmt: skip
    without = re.sub(r"^dataset = .*\n", "", DEBUG_TOML.read_text(), flags=re.MULTILINE)
    toml.write_text(without + tables)
    return toml


def test_an_epoch_of_a_mixture_is_the_same_on_any_ranks(tmp_path: Path) -> None:
    toml = mixture(tmp_path)
    options = [
        "--training.epochs=1",
        "--training.seq_len=64",
        "--training.global_batch_size=8",
        "--data.document_attention",
    ]
    options += [
        "--validation.enable",
        "--validation.seq_len=64",
        "--validation.freq=100",
        "--checkpoint.no-last_save_in_hf",
    ]
    options += ["--seed.verify=none"]
    lines = {}
    for ranks, batch in ((1, 8), (2, 2)):
        more = [f"--training.local_batch_size={batch}", f"--validation.local_batch_size={8 // ranks}"]
        folder = tmp_path / str(ranks)
        run = train(folder, *options, *more, config=toml, world_size=ranks)
        validated = [json.loads(line) for line in (folder / "validation.jsonl").read_text().splitlines()]
        assert [line["step"] for line in validated] == [1]
        assert f"training.epochs = 1: {len(run.metrics)} steps" in run.ranks[0].output and 5 < len(run.metrics) < 60
        lines[ranks] = [*run.metrics, *validated]
    names = ("loss_ce", "loss_future", "held_out.jsonl/loss_ce", "others/loss_ce", "others/loss_future")
    for one, two in zip(lines[1], lines[2], strict=True):
        for name in set(names) & set(one):
            assert two[name] == pytest.approx(one[name], rel=1e-5), (one["step"], name)
    assert all(lines[ranks][-2]["epochs/a.jsonl"] == pytest.approx(1) for ranks in lines), "each document once"
    assert lines[1][0]["epochs/a.jsonl"] < 0.5
    held_out = lines[1][-1]
    assert held_out["loss_ce"] == pytest.approx((held_out["held_out.jsonl/loss_ce"] + held_out["others/loss_ce"]) / 2)


def test_the_objective_is_learned(debug_run: TrainRun) -> None:
    future, top1 = debug_run.values("loss_future"), debug_run.values("future_top1")
    chance = 1 / (8 * 254)  # of 256 positions two have no pair, even without document ends
    assert sum(future[-5:]) / 5 < future[0] - 1.0
    assert sum(top1[-5:]) / 5 > 10 * chance
    ce = debug_run.values("loss_ce")
    assert sum(ce[-10:]) < sum(ce[:10])


def test_the_future_loss_is_below_that_of_shuffled_targets(debug_run: TrainRun) -> None:
    """On the exported model, with a naive formula and the mask written out, not with the trainer's code."""
    export = debug_run.dump_folder / "hf" / "step-60"
    model, heads = stock_model(export), load_future_heads(export)
    inputs, _ = first_batch()
    position = torch.arange(256)
    ahead = position[None, :] - position[:, None]
    doc = (inputs == 0).long().cumsum(1) - (inputs == 0).long()
    mask = (ahead > 0) & (ahead <= 32) & (doc[:, :, None] == doc[:, None, :])
    with torch.no_grad():
        hidden = model.model(inputs).last_hidden_state
        summaries = model.model(inputs, attention_mask=mask[:, None], use_cache=False).last_hidden_state
        predictions = heads["future_predictor"](hidden)
    valid = (doc[:, 2:] == doc[:, 1:-1]) & (doc[:, 1:-1] == doc[:, :-2])
    queries = predictions[:, :-2][valid].double()
    keys = F.normalize(summaries[:, 1:-1][valid].double(), dim=-1)
    logits = queries @ keys.T / 0.1
    targets = torch.arange(len(queries))
    shuffled = targets[torch.randperm(len(targets), generator=torch.Generator().manual_seed(0))]
    loss = F.cross_entropy(logits, targets)
    assert loss < F.cross_entropy(logits, shuffled) - 1.0
    assert loss.item() == pytest.approx(sum(debug_run.values("loss_future")[-5:]) / 5, abs=0.5)


def test_killed_after_a_saved_step_it_goes_on_bit_for_bit(ten_steps: TrainRun, dump_folder: Path) -> None:
    def kill_after_step_five(processes: list) -> None:
        deadline = time.monotonic() + 60
        while not (dump_folder / "checkpoint" / "step-5" / "manifest.json").exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        processes[0].kill()

    killed = train(dump_folder, *TEN_STEPS, check=False, watch=kill_after_step_five)
    assert killed.exit_codes == [-9]
    assert not (dump_folder / "checkpoint" / "step-10").exists()
    with (dump_folder / "metrics.jsonl").open("a") as lost:  # what it may have logged after its last save
        lost.write('{"step": 7, "loss": 1.0}\n{"step": 8, "lo')
    resumed = train(dump_folder, *TEN_STEPS)
    assert "Resumed from" in resumed.ranks[0].output and "Training starts at step 6" in resumed.ranks[0].output
    assert resumed.values("step") == list(range(1, 11)), "lines of the lost steps are dropped"
    for name in ("loss", "loss_ce", "loss_future", "grad_norm", "lr"):
        assert resumed.values(name) == ten_steps.values(name), name
    again = train(dump_folder, *TEN_STEPS)
    assert again.values("loss") == ten_steps.values("loss"), "a finished run has nothing left to do"


def test_an_empty_or_half_written_checkpoint_folder_seeds(ten_steps: TrainRun, dump_folder: Path) -> None:
    half_written = dump_folder / "checkpoint" / "step-7"
    half_written.mkdir(parents=True)
    (half_written / ".metadata").write_bytes(b"not all of it")
    run = train(dump_folder, *TEN_STEPS, "--training.steps=1")
    assert "Passed over" in run.ranks[0].output and "step-7: no manifest.json" in run.ranks[0].output
    assert run.values("loss_ce") == ten_steps.values("loss_ce")[:1]


def test_dry_run_stops_before_step_one(dump_folder: Path) -> None:
    run = train(dump_folder, "--seed.dry_run", "--seed.verify=parity", world_size=2)
    assert not (dump_folder / "metrics.jsonl").exists() and not (dump_folder / "checkpoint").exists()
    report = json.loads((dump_folder / "seed_report.json").read_text())
    assert report["world_size"] == 2
    # Two shards make one model: nobody has read more than its own part of the bfloat16 file.
    assert report["bytes_read"] == 2 * sum(p.numel() for p in stock_model().parameters())
    verification = report["verification"]
    assert verification["passed"] and verification["max_abs_diff"] == 0.0
    assert verification["loss"] == verification["reference_loss"] < 0.6 * math.log(264)
    assert "Dry run: stopped before step 1" in run.ranks[0].output


def test_the_export_is_the_trained_model(debug_run: TrainRun) -> None:
    export = debug_run.dump_folder / "hf" / "step-60"
    model, info = AutoModelForCausalLM.from_pretrained(export, dtype=torch.float32, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    assert model.lm_head.weight is model.model.embed_tokens.weight
    tokenizer = AutoTokenizer.from_pretrained(export)
    text = "def f(x):\n    return x\n"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert sorted(p.name for p in export.iterdir()) == [
        "README.md", "config.json", "export.json",
        "future_heads", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json",
    ]  # fmt: skip

    # The trained model as DCP has it, read without the trainer.
    from torch.distributed.checkpoint.state_dict_loader import load

    state = {key: torch.empty_like(value) for key, value in model.state_dict().items() if key != "lm_head.weight"}
    heads = load_future_heads(export)
    head_state = {key: torch.empty_like(value) for key, value in heads.state_dict().items()}
    assert head_state
    saved = {**state, **head_state}
    load(saved, checkpoint_id=debug_run.dump_folder / "checkpoint" / "step-60")
    for key, value in {**model.state_dict(), **heads.state_dict()}.items():
        if key != "lm_head.weight":
            assert torch.equal(value, saved[key]), key
    trained = stock_model()
    trained.load_state_dict({**state, "lm_head.weight": state["model.embed_tokens.weight"]})
    inputs, _ = first_batch()
    with torch.no_grad():
        assert torch.equal(trained(inputs).logits, model.eval()(inputs).logits)


def test_an_export_seeds_the_next_run_heads_included(debug_run: TrainRun, dump_folder: Path) -> None:
    export = debug_run.dump_folder / "hf" / "step-60"
    options = [f"--checkpoint.initial_load_path={export}", "--training.steps=1"]
    spread = "--training.local_batch_size=4"  # the same number of negatives
    run = train(dump_folder, *TEN_STEPS, *options, spread, world_size=2)
    report = json.loads((dump_folder / "seed_report.json").read_text())
    assert report["keys"]["initialised"] == []
    assert sum(key.startswith("future_predictor.") for key in report["keys"]["loaded"]) == 6
    assert run.values("loss_future")[0] < debug_run.values("loss_future")[0] - 1.0, "the head goes on where it was"

    plain = ["--model.converters=", "--future_encoder.no-enable", "--future_predictor.no-enable"]
    refused = train(dump_folder / "plain", *TEN_STEPS, *options, *plain, check=False)
    assert refused.exit_codes == [1]
    assert (
        "'future_predictor.norm.bias' [128] in future_heads/model.safetensors is not in the model"
        in refused.ranks[0].output
    )
    ignored = ["--seed.ignore_source_keys=future_predictor.*"]
    train(dump_folder / "ignored", *TEN_STEPS, *options, *plain, *ignored)


def test_steps_are_kept_and_complete(debug_run: TrainRun) -> None:
    folder = debug_run.dump_folder / "checkpoint"
    assert sorted(p.name for p in folder.iterdir()) == ["step-40", "step-60"], "keep_latest_k = 2"
    manifest = json.loads((folder / "step-60" / "manifest.json").read_text())
    assert manifest["step"] == 60 and manifest["model_only"] is False
    digest = json.loads((debug_run.dump_folder / "seed_report.json").read_text())["source_digest"]
    assert manifest["seed"]["source_digest"] == digest


def test_the_teacher_does_not_take_the_students_gradients_under_autocast(dump_folder: Path) -> None:
    """Autocast keeps its casts of the weights; those made without gradient must not be the ones that the student uses."""
    options = [*TEN_STEPS, "--training.steps=2", "--training.mixed_precision_param=bfloat16"]
    plain = train(dump_folder / "plain", *options, "--future_encoder.loss_weight=0")
    with_teacher = train(dump_folder / "teacher", *options, "--future_encoder.loss_weight=1e-9")
    assert with_teacher.values("loss_ce") == pytest.approx(plain.values("loss_ce"), rel=1e-3)
    assert with_teacher.values("grad_norm") == pytest.approx(plain.values("grad_norm"), rel=1e-3)
