"""``model.converters = ["lora", …]``: adapters beside frozen weights, saved small, resumed, and exported for peft and merged."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint import FileSystemReader
from transformers import AutoModelForCausalLM

from flame_ext.train import parse
from tests.layouts import LAYOUTS, NO_HEADS
from tests.preflight.refusals import refusal
from tests.ranks import DEBUG_TOML, TINY_OLMO, TrainRun, run_ranks, train
from tests.tiny_models import save_tiny

peft = pytest.importorskip("peft")

LORA = ("--model.converters=lora,future_prediction", "--lora.r=4", "--lora.lora_dropout=0.1")
ADAPTER = "adapter/adapter_model.safetensors"
TOKENS = torch.arange(3, 63).unsqueeze(0)


def options(source: Path = TINY_OLMO, steps: int = 2) -> list[str]:
    return [
        *LORA,
        f"--model.hf_assets_path={source}",
        f"--checkpoint.initial_load_path={source}",
        f"--training.steps={steps}",
        "--training.seq_len=64",
        "--checkpoint.interval=1",
        "--checkpoint.export_dtype=float32",
        "--checkpoint.allow_config_change=training.steps",
        "--lr_scheduler.total_steps=60",
        "--lr_scheduler.warmup_steps=1",
        "--optimizer.lr=1e-2",  # adapters that matter after two steps
    ]


def trainer_logits(arguments: list[str]) -> torch.Tensor:
    """In a rank: the logits of the trainer that has loaded the last step."""
    from flame_ext.trainer import FutureTrainer

    trainer = FutureTrainer(parse([f"--job.config_file={DEBUG_TOML}", "--metrics.no-enable-tensorboard", *arguments]))
    trainer.checkpointer.load()
    trainer.model.eval()
    with torch.no_grad():
        logits = trainer.model(TOKENS)
    trainer.close()
    return logits


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(TOKENS).logits


def weights(run: TrainRun, name: str = "model.safetensors") -> dict[str, torch.Tensor]:
    return load_file(exported(run) / name)


def exported(run: TrainRun) -> Path:
    (folder,) = (run.dump_folder / "hf").glob("step-*")
    return folder


def saved(run: TrainRun, step: int) -> set[str]:
    return set(FileSystemReader(run.dump_folder / "checkpoint" / f"step-{step}").read_metadata().state_dict_metadata)


def assert_exports(run: TrainRun, source: Path, expected: torch.Tensor | None = None) -> None:
    """Both exports are one model, which is not the source; every weight without an adapter is the source's, bit for bit."""
    export, base = exported(run), AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    before, names = logits(base), {key for key, _ in base.named_parameters()}
    merged = logits(AutoModelForCausalLM.from_pretrained(export))
    adapted = logits(peft.PeftModel.from_pretrained(base, export / "adapter"))
    torch.testing.assert_close(merged, adapted, rtol=1e-4, atol=1e-4)
    assert (adapted - before).abs().max() > 0.05
    if expected is not None:
        assert torch.equal(adapted, expected)
    old, new = load_file(source / "model.safetensors"), weights(run)
    changed = {key for key in names & new.keys() if not torch.equal(new[key], old[key].float())}
    assert changed == {key for key in names if key.endswith("proj.weight")}


def test_adapters_train_alone_are_saved_small_and_exported_for_peft_and_merged(tmp_path: Path) -> None:
    run = train(tmp_path / "run", *options(), "--seed.verify=parity")
    report = json.loads((tmp_path / "run" / "seed_report.json").read_text())
    assert report["verification"]["max_abs_diff"] < 1e-5 and report["frozen"] == report["keys"]["loaded"]
    keys = {key for key in saved(run, 1) if not key.startswith("optimizer.")}
    model = {key for key in keys if key.startswith(("model.", "lm_head.", "future_"))}
    heads = {key for key in model if key.startswith("future_predictor.")}
    assert heads and model - heads == {key for key in model if ".lora_A.default.weight" in key or ".lora_B." in key}
    moments = {key[len("optimizer.state.") : -len(".exp_avg")] for key in saved(run, 1) if key.endswith(".exp_avg")}
    assert moments == model
    arguments = [f"--job.dump_folder={tmp_path / 'run'}", *options(steps=3)]
    (rank,) = run_ranks(trainer_logits, 1, arguments, folder=tmp_path / "ranks")
    assert rank.exit_code == 0, rank.output[-3000:]
    assert_exports(run, TINY_OLMO, rank.value)


PIPELINE = (2, ["--training.local_batch_size=4", "--parallelism.pipeline_parallel_degree=2"])


@pytest.mark.matrix
@pytest.mark.parametrize("layout", ["single", "fsdp2", "ddp2", "pp2"])
def test_a_resumed_run_is_the_unbroken_one_bit_for_bit(tmp_path: Path, layout: str) -> None:
    ranks, more = {**LAYOUTS, "pp2": PIPELINE}[layout]
    unbroken = train(tmp_path / "unbroken", *options(), *more, world_size=ranks)
    train(tmp_path / "broken", *options(steps=1), *more, world_size=ranks)
    shutil.rmtree(tmp_path / "broken" / "hf")
    again = train(tmp_path / "broken", *options(), *more, world_size=ranks)
    assert "they are those of step 0" in again.ranks[0].output
    for name in ("model.safetensors", ADAPTER, "future_heads/model.safetensors"):
        now, then = weights(again, name), weights(unbroken, name)
        assert now.keys() == then.keys() and all(torch.equal(now[key], value) for key, value in then.items())
    assert again.values("loss") == unbroken.values("loss")


@pytest.mark.matrix
def test_adapters_without_heads(tmp_path: Path) -> None:
    names = ["q_proj", "layers.1.mlp.up_proj"]
    more = [*NO_HEADS, "--model.converters=lora", f"--lora.target_modules={','.join(names)}", "--lora.use_rslora"]
    run = train(tmp_path / "run", *options(), *more, "--seed.verify=parity")
    export = exported(run)
    changed = {
        key.removesuffix(".lora_A.weight")[len("base_model.model.") :] for key in weights(run, ADAPTER) if "_A" in key
    }
    assert changed == {"model.layers.1.mlp.up_proj", *(f"model.layers.{n}.self_attn.q_proj" for n in range(4))}
    base = AutoModelForCausalLM.from_pretrained(TINY_OLMO, dtype=torch.float32)
    adapted = logits(peft.PeftModel.from_pretrained(base, export / "adapter"))
    torch.testing.assert_close(logits(AutoModelForCausalLM.from_pretrained(export)), adapted, rtol=1e-4, atol=1e-4)


@pytest.mark.matrix
def test_a_run_is_resumed_on_another_number_of_ranks_in_bfloat16(tmp_path: Path) -> None:
    more = ["--training.dtype=bfloat16", "--training.mixed_precision_param=bfloat16", "--lora.lora_dropout=0.0"]
    alone = train(tmp_path / "alone", *options(), *more, *LAYOUTS["single"][1])
    train(tmp_path / "run", *options(steps=1), *more, *LAYOUTS["fsdp2"][1], world_size=2)
    run = train(tmp_path / "run", *options(), *more, *LAYOUTS["single"][1])
    assert run.values("loss") == pytest.approx(alone.values("loss"), rel=1e-2)
    with torch.no_grad():
        for key, value in weights(run, ADAPTER).items():
            assert value.dtype is torch.float32 and not torch.equal(value, value.bfloat16().float()), key


@pytest.mark.matrix
def test_a_source_of_other_weights_is_refused(tmp_path: Path) -> None:
    source = shutil.copytree(TINY_OLMO, tmp_path / "source")
    train(tmp_path / "run", *options(source, steps=1))
    changed = load_file(source / "model.safetensors")
    changed["model.layers.2.mlp.up_proj.weight"][0, 0] += 1
    save_file(changed, source / "model.safetensors", metadata={"format": "pt"})
    run = train(tmp_path / "run", *options(source), check=False)
    assert run.exit_codes == [1]
    assert "its weights are not those beside which this run's adapters were trained" in run.ranks[0].output


EVERY = ("fsdp2", "ddp2", "hsdp2-cp2", "tp2", "fsdp2-tp2", "pp2", "compiled", "selective")
PAIRS = [(layout, name) for name in ("olmo-tied", "qwen3-qk-norm") for layout in EVERY]


@pytest.mark.matrix
@pytest.mark.parametrize(("layout", "name"), [*PAIRS, ("fsdp2", "olmoe")])
def test_under_parallelisms_and_architectures(tmp_path: Path, layout: str, name: str) -> None:
    more = {
        "pp2": PIPELINE,
        "compiled": (1, ["--training.local_batch_size=4", "--compile.enable", "--compile.backend=aot_eager"]),
        "selective": (1, ["--training.local_batch_size=4", "--activation_checkpoint.mode=selective"]),
    }
    ranks, layout_options = {**LAYOUTS, **more}[layout]
    source = save_tiny(name, tmp_path / "model")
    arguments = [
        *options(source, steps=4),
        "--lora.lora_dropout=0.0",
        "--seed.verify=parity",
        "--training.global_batch_size=4",
    ]
    alone = train(tmp_path / "alone", *arguments, "--training.local_batch_size=4")
    run = train(tmp_path / "run", *arguments, *layout_options, world_size=ranks, timeout=400)
    for figure in ("loss", "grad_norm"):  # A has no gradient before B has changed
        assert run.values(figure) == pytest.approx(alone.values(figure), rel=1e-4)
    now, then = (weights(r, ADAPTER) for r in (run, alone))
    assert now.keys() == then.keys()
    assert_exports(run, source)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--model.converters=future_prediction,lora"], 'model.converters must have "lora" once and before'),
        (["--model.converters=future_prediction"], '[lora] has no effect without model.converters = ["lora", …]'),
        (["--lora.target_modules=q_prj"], "OlmoForCausalLM is called 'q_prj'; names are q_proj"),
        (["--lora.target_modules=q_proj,lm_head"], "no linear layer in the decoder layers of OlmoForCausalLM is called 'lm_head'"),
        (["--lora.target_modules=q_proj,all-linear"], "lora.target_modules must name linear layers, or be ['all-linear'] alone"),
        (["--lora.lora_dropout=1"], "lora.lora_dropout must be in [0, 1), got 1"),
        (["--parallelism.tensor_parallel_degree=2"], "lora.lora_dropout > 0 with parallelism.tensor_parallel_degree > 1 does not"),
        (["--training.freeze=*norm*"], "training.freeze does not go with model.converters 'lora'"),
        (["--future_predictor.freeze_backbone"], "future_predictor.freeze_backbone does not go with model.converters 'lora'"),
        (["--export.interval=1"], "export.interval > 0 does not go with model.converters 'lora'"),
        (["--seed.resize_vocabulary"], "seed.resize_vocabulary does not go with model.converters 'lora'"),
    ],
)  # fmt: skip
def test_what_does_not_go_with_adapters(more: list[str], message: str) -> None:
    assert message in refusal(*options(), *more)


def test_other_layers_than_linear_ones_are_refused(tmp_path: Path) -> None:
    source = save_tiny("gpt2-learned-positions", tmp_path)
    assert "GPT2LMHeadModel has no nn.Linear in its decoder layers" in refusal(*options(source))


def test_without_peft_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "peft", None)
    assert "pip install 'flame_ext[lora]'" in refusal(*options())
