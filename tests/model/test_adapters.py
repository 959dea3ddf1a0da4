"""``model.converters = ["lora", …]``: adapters beside frozen weights, saved small, resumed, and exported for peft and merged."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint import FileSystemReader
from transformers import AutoModelForCausalLM

from flame_ext.checkpoint.gathering import BoxGatherer
from flame_ext.checkpoint.merging import adapter_summands
from flame_ext.config.sections import Lora
from flame_ext.model.adapters import KEY_A, KEY_B, add_adapters
from flame_ext.model.dropout import has_dropout, separate_generators
from flame_ext.model.hf_causal_lm import HFModelArgs, build_hf_causal_lm
from flame_ext.seeding.sources.traced import TracedTensor
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
    shutil.rmtree(tmp_path / "run" / "hf")
    run = train(tmp_path / "run", *options(), *more, *LAYOUTS["single"][1])
    assert run.values("loss") == pytest.approx(alone.values("loss"), rel=1e-2)
    adapters, merged, source = weights(run, ADAPTER), weights(run), load_file(TINY_OLMO / "model.safetensors")
    for key, value in adapters.items():
        assert value.dtype is torch.float32 and not torch.equal(value, value.bfloat16().float()), key
        layer, _, which = key.removeprefix("base_model.model.").partition(".lora_")
        if which == "A.weight":  # what the trainer computes with, also where the sum is no number of bfloat16
            update = adapters[key.replace("_A.", "_B.")] @ value * 32 / 4
            expected = source[f"{layer}.weight"].bfloat16().float() + update
            torch.testing.assert_close(merged[f"{layer}.weight"], expected, rtol=0, atol=1e-6)


def test_small_updates_are_not_lost_in_the_dtype_of_the_weights() -> None:
    a, b, weight = torch.ones(1, 3), torch.tensor([[1e-4], [2e-4]]), torch.ones(2, 3, dtype=torch.bfloat16)
    state = {f"layer.{KEY_A}": a, f"layer.{KEY_B}": b, "layer.weight": weight}
    model: Any = SimpleNamespace(whole=SimpleNamespace(adapters=SimpleNamespace(scaling=2.0)))
    shapes = {key: tensor.shape for key, tensor in state.items()}
    gather = BoxGatherer(state, shapes, torch.device("cpu"), adapter_summands(model, state))
    found = gather(TracedTensor.whole((2, 3), torch.float32, "layer.weight"))
    assert torch.equal(found, (1 + 2 * b).expand(2, 3)) and torch.equal(weight, torch.ones_like(weight))


@pytest.mark.matrix
def test_a_step_is_resumed_with_its_own_adapters_and_weights_alone(tmp_path: Path) -> None:
    source = shutil.copytree(TINY_OLMO, tmp_path / "source")
    dumped = tmp_path / "run"
    train(dumped, *options(source, steps=1), "--training.dtype=float32")
    changed = "--checkpoint.allow_config_change=training.steps,lora.target_modules,training.dtype"
    for more, message in (
        (["--lora.target_modules=q_proj"], "step-1 holds adapters that the model lacks, model.layers.0.mlp.down_proj.lora_A"),
        (["--training.dtype=bfloat16"], "step-1 was saved with training.dtype float32, now bfloat16"),
    ):  # fmt: skip
        run = train(dumped, *options(source), changed, *more, check=False)
        assert run.exit_codes == [1] and message in run.ranks[0].output, run.ranks[0].output[-3000:]
    other = shutil.copytree(source, tmp_path / "other")
    changed_name = load_file(other / "model.safetensors")
    save_file(changed_name, other / "model.safetensors", metadata={"format": "pt", "note": "another digest"})
    again = train(dumped, *options(other))
    assert "they are those of step 0" in again.ranks[0].output
    assert "The run goes on with the weights of its step" not in again.ranks[0].output


@pytest.mark.matrix
def test_more_adapters_than_a_step_has_are_refused(tmp_path: Path) -> None:
    train(tmp_path / "run", *options(steps=1), "--lora.target_modules=q_proj")
    changed = "--checkpoint.allow_config_change=training.steps,lora.target_modules"
    run = train(tmp_path / "run", *options(), "--lora.target_modules=q_proj,v_proj", changed, check=False)
    assert run.exit_codes == [1]
    assert "step-1 has no adapters model.layers.0.self_attn.v_proj.lora_A.default.weight" in run.ranks[0].output


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
        (["--lora.lora_dropout=1"], "lora.lora_dropout must be >= 0 and < 1 (the share of inputs that are dropped), got 1"),
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


def test_a_torchao_that_peft_cannot_use_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def is_torchao_available() -> bool:
        raise ImportError("Found an incompatible version of torchao. Found version 0.9.0.")

    monkeypatch.setattr(peft.tuners.lora.torchao, "is_torchao_available", is_torchao_available)
    assert "incompatible version of torchao. Found version 0.9.0; update or uninstall it" in refusal(*options())


def test_layers_that_draw_other_masks_when_they_run_again_are_refused(tmp_path: Path) -> None:
    noisy = shutil.copytree(TINY_OLMO, tmp_path / "noisy")
    fields = json.loads((noisy / "config.json").read_text())
    (noisy / "config.json").write_text(json.dumps(fields | {"attention_dropout": 0.2}))
    again, still = "--activation_checkpoint.no-preserve_rng_state", "--lora.lora_dropout=0.0"
    assert parse_debug(*options(), again, "--activation_checkpoint.mode=none")
    assert parse_debug(*options(), again, "--activation_checkpoint.mode=full", still)
    for arguments, where in (
        (options(), "lora.lora_dropout = 0.1"),
        ([*options(noisy), still], "attention_dropout = 0.2 in config.json"),
    ):
        said = refusal(*arguments, again, "--activation_checkpoint.mode=selective")
        assert f"activation_checkpoint.preserve_rng_state = false does not go with {where}: layers that" in said


def parse_debug(*arguments: str) -> Any:
    return parse([f"--job.config_file={DEBUG_TOML}", *arguments])


@pytest.mark.parametrize("name", ["deepseek-v3", "glm4-moe"])
def test_beside_stacked_experts_the_layers_of_their_names_get_no_adapter(
    tmp_path: Path, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    source = save_tiny(name, tmp_path)
    parse_debug(*options(source))
    args = HFModelArgs(hf_assets_path=str(source))
    model = build_hf_causal_lm(args)
    inside = {key for key, module in model.model.layers.named_modules() if isinstance(module, torch.nn.Linear)}
    caplog.set_level("INFO")
    add_adapters(model, Lora())
    assert model.adapters is not None
    adapted = {
        key.removeprefix("model.layers.").removesuffix(f".{KEY_A}") for key in model.adapters.keys if KEY_A in key
    }
    assert adapted == {key for key in inside if ".self_attn." in key} and len(adapted) >= 12
    assert f"{len(inside) - len(adapted)} linear layers of" in caplog.text
    assert "peft takes down_proj, gate_proj, up_proj for the stacked experts" in caplog.text
    said = refusal(*options(source), "--lora.target_modules=o_proj,mlp.down_proj")
    assert "peft takes mlp.down_proj of" in said
    choice = json.loads(said[said.index("[") : said.index("]") + 1])
    assert {key.rpartition(".")[2] for key in adapted} == set(choice)
    assert parse_debug(*options(source), f"--lora.target_modules={','.join(choice)}")


@pytest.mark.matrix
@pytest.mark.parametrize("name", ["deepseek-v3", "glm4-moe"])
def test_attention_alone_beside_stacked_experts(tmp_path: Path, name: str) -> None:
    source = save_tiny(name, tmp_path / "model")
    run = train(tmp_path / "run", *options(source), "--seed.verify=parity")
    base = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    before, export = logits(base), exported(run)
    adapted = logits(peft.PeftModel.from_pretrained(base, export / "adapter"))
    torch.testing.assert_close(logits(AutoModelForCausalLM.from_pretrained(export)), adapted, rtol=1e-4, atol=1e-4)
    assert (adapted - before).abs().max() > 0.01


def test_ranks_with_other_tokens_draw_other_masks_and_those_of_a_tensor_the_same() -> None:
    model = build_hf_causal_lm(HFModelArgs(hf_assets_path=str(TINY_OLMO)))

    def drawn(tokens: int | None) -> list[float]:
        torch.manual_seed(7)
        mesh = None if tokens is None else SimpleNamespace(size=lambda: 2, get_local_rank=lambda: tokens)
        dims: Any = SimpleNamespace(get_optional_mesh={"loss": mesh}.__getitem__)
        separate_generators(model, dims)
        return torch.rand(3).tolist()

    plain = drawn(None)
    assert drawn(0) == drawn(1) == plain
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model.config, "attention_dropout", 0.1)
        assert has_dropout(model) and drawn(None) == drawn(0) == plain != drawn(1) == drawn(1)
    assert not has_dropout(model)
    add_adapters(model, Lora(lora_dropout=0.1))
    assert has_dropout(model) and drawn(1) != plain
