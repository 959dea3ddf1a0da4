"""One optimisation step under tensor parallelism against the same step in a single process."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel
from transformers import (
    CodeGenConfig,
    DeepseekV2Config,
    GPT2Config,
    LlamaConfig,
    OlmoeConfig,
    PreTrainedConfig,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from flame_ext.checkpoint.manager import SeedingCheckpointManager
from flame_ext.checkpoint.steps import CompleteStep
from flame_ext.errors import ConfigError
from flame_ext.model.hf_causal_lm import AttachedHead, HFModelArgs, build_hf_causal_lm
from flame_ext.model.initialisation import linear_inits
from flame_ext.model.tensor_parallel import apply_tensor_parallel
from flame_ext.train import parse
from tests.faults.test_resume import assert_resumed_exactly, resumed_from, saved, train
from tests.layouts import COMPILE, NO_HEADS, PER_OP, TP2, assert_same_step, steps
from tests.ranks import DEBUG_TOML, TINY_OLMO, run_ranks
from tests.tiny_models import CONFIGS

# -- one step ----------------------------------------------------------------------------------------------------

# Architecture, "+heads", "+whole" (no sequence parallelism), anything: job to options of its own.
JOBS: dict[str, list[str]] = {
    "olmo-tied+heads": [],
    "olmo-tied+heads+dropout": ["--future_predictor.dropout=0.2"],
    "olmo2": [],
    "olmo2+heads+whole": ["--parallelism.disable_loss_parallel"],
    "llama-scaled-rope": [],
    "llama-scaled-rope+heads": ["--activation_checkpoint.mode=full"],
}
# Ranks with other data draw other masks than one process does: no dropout for the second.
COVERED = {
    "tp2": ["olmo-tied+heads+dropout", "olmo2", "olmo2+heads+whole", "llama-scaled-rope+heads"],
    "fsdp2-tp2": ["olmo-tied+heads", "llama-scaled-rope"],
}


@pytest.mark.parametrize("layout", COVERED)
def test_one_step_is_that_of_a_single_process(
    models: Path, single: dict[str, dict[str, Any]], tmp_path: Path, layout: str
) -> None:
    for rank in steps(models, tmp_path, layout, {name: JOBS[name] for name in COVERED[layout]}):
        for name, result in rank.items():
            assert_same_step(result, single[name])
            assert result["parameters"] == {"DTensor"}, "counted alike by norms, optimizers and checkpoints"
            assert result["sequence_parallel"] is ("+whole" not in name)
            assert result["logits"] == ("Tensor" if "+whole" in name else "DTensor"), "loss parallelism"


ATTENTION = ["--future_encoder.summary_method=attention", "--future_encoder.no-detach_targets"]
PER_LAYER = ["--activation_checkpoint.mode=selective", "--activation_checkpoint.selective_ac_option=2"]
PLANNED = [name for name in CONFIGS if not name.startswith(("gpt2", "falcon", "opt"))]
VARIANTS: dict[str, list[str]] = {
    "olmo-tied+heads+attention": ATTENTION,
    "llama-scaled-rope+heads+tower": ["--future_encoder.summary_method=max", "--action_layer.head_type=tower"],
    "olmo2+heads+compiled": COMPILE,
    "qwen3-qk-norm+heads+compiled": COMPILE,
    "olmo2+heads+op": PER_OP,
    "gemma2+heads+layer": PER_LAYER,
    "olmo-tied+heads+frozen": ["--future_predictor.freeze_backbone"],
    "qwen3-qk-norm+heads+documents": ["--data.document_attention"],
}


@pytest.mark.matrix
@pytest.mark.parametrize("layout", ["tp2", "fsdp2-tp2", "hsdp4-tp2"])
@pytest.mark.parametrize("kind", ["", "+heads", "+heads+whole", "variants", "offload"])
def test_every_architecture_under_every_layout(models: Path, tmp_path: Path, layout: str, kind: str) -> None:
    if kind == "offload" and layout == "tp2":
        pytest.skip("FSDP's")
    jobs = VARIANTS if kind == "variants" else {name + kind: [] for name in PLANNED}
    options = []
    if kind == "offload":
        jobs, options = {"olmo-tied+heads": [], "olmo2": []}, ["--training.enable_cpu_offload"]
    (expected,) = steps(models, tmp_path, "single", jobs)
    for rank in steps(models, tmp_path, layout, jobs, *options):
        for name in jobs:
            assert_same_step(rank[name], expected[name])


class SplitHead(nn.Module):
    """An MLP to be split between its two maps, behind a norm that is on every rank."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(hidden_size)
        self.up = nn.Linear(hidden_size, 4 * hidden_size)
        self.down = nn.Linear(4 * hidden_size, hidden_size)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.down(torch.nn.functional.silu(self.up(self.norm(hidden_states))))


def head_of_its_own_plan(split: bool) -> dict[str, torch.Tensor]:
    """In a rank: what the head gives for the hidden states of a whole forward, and all gradients."""
    model = build_hf_causal_lm(HFModelArgs(hf_assets_path=str(TINY_OLMO)))
    with torch.device("meta"):
        head = SplitHead(model.config.hidden_size)
    plan = {"up": ColwiseParallel(), "down": RowwiseParallel()}
    model.add_head("split_head", head, linear_inits(head), AttachedHead(tensor_parallel_plan=plan))
    model.remember_state()
    if split:
        dist.init_process_group("gloo")
        apply_tensor_parallel(model, init_device_mesh("cpu", (2,)), loss_parallel=True)
    model.to_empty(device="cpu")
    model.init_weights()
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        value = torch.randn(parameter.shape, generator=generator) * 0.1
        placed = isinstance(parameter, DTensor)
        parameter.data.copy_(distribute_tensor(value, parameter.device_mesh, parameter.placements) if placed else value)
    tokens = torch.randint(0, 264, (2, 16), generator=generator)
    output = model(tokens, compute=lambda _logits, states, _unembed: model.split_head(states))
    (output * torch.randn(output.shape, generator=generator)).sum().backward()
    results = {"output": output.detach()}
    for name, parameter in model.named_parameters():
        if (grad := parameter.grad) is not None:
            results[name] = grad.full_tensor() if isinstance(grad, DTensor) else grad
    if split:
        assert model.split_head.up.weight.to_local().shape[0] == 2 * model.config.hidden_size, "half of the rows"
        dist.destroy_process_group()
    return results


def test_a_head_is_split_by_its_own_plan(tmp_path: Path) -> None:
    expected = head_of_its_own_plan(split=False)
    for rank in run_ranks(head_of_its_own_plan, 2, True, folder=tmp_path):
        assert rank.exit_code == 0, rank.output[-3000:]
        assert set(rank.value) == set(expected)
        assert {"split_head.norm.weight", "split_head.down.bias", "model.embed_tokens.weight"} < set(rank.value)
        for name, value in rank.value.items():
            scale = expected[name].abs().max().item()
            torch.testing.assert_close(value, expected[name], rtol=1e-5, atol=1e-5 * scale, msg=name)


# -- saved steps and exports -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("layout", "tail"),
    [
        pytest.param("fsdp2-tp2", "single", marks=pytest.mark.matrix),
        pytest.param("tp2", "fsdp2", marks=pytest.mark.matrix),
        pytest.param("fsdp2", "tp2", marks=pytest.mark.matrix),
    ],
)
def test_a_run_goes_on_under_another_layout(tmp_path: Path, layout: str, tail: str) -> None:
    layouts = {"single": (1, []), "fsdp2": (2, []), "tp2": (2, [TP2, "--training.local_batch_size=4"])}
    layouts["fsdp2-tp2"] = (4, [TP2, "--training.local_batch_size=2"])
    unbroken = train(tmp_path / "unbroken", ranks=1, steps=3)
    run = unbroken
    for step, name in ((1, layout), (2, tail)):
        ranks, options = layouts[name]
        last = run.dump_folder / "checkpoint" / f"step-{step}"
        folder = resumed_from(run, step, tmp_path / f"{step}-{name}")
        run = train(folder, *options, "--checkpoint.last_save_in_hf", ranks=ranks, steps=step + 1)
        assert_resumed_exactly(run, last)
        exported = load_file(folder / "hf" / f"step-{step + 1}" / "model.safetensors")
        exported |= load_file(folder / "hf" / f"step-{step + 1}" / "future_heads" / "model.safetensors")
        weights = saved(folder / "checkpoint" / f"step-{step + 1}")
        assert len(exported) > 30 and all(torch.equal(value, weights[key]) for key, value in exported.items())
    for name in ("loss_ce", "loss_future", "grad_norm"):
        # Adam divides small gradients by themselves: a step on, roundings of 1e-7 are 1e-6.
        assert run.values(name) == pytest.approx(unbroken.values(name), rel=1e-5), name


def test_other_ranks_generators_are_not_taken_over(tmp_path: Path) -> None:
    """Two ranks that share a model must draw the same; two stages of a pipeline do not."""
    manager = SimpleNamespace(hooks=SimpleNamespace(facts=lambda: {"parallelism": {"tp": 2}}))
    for parallelism, shared in (({"tp": 2}, True), ({"tp": 1}, False), ({}, False), ({"tp": 2, "pp": 2}, False)):
        step = CompleteStep(1, tmp_path, {"parallelism": parallelism})
        assert SeedingCheckpointManager._shares_models_as(manager, step) is shared


# -- what is refused ---------------------------------------------------------------------------------------------

_SHAPE = {"vocab_size": 264, "hidden_size": 48, "intermediate_size": 48, "num_hidden_layers": 2, "eos_token_id": 0}
_SHAPE |= {"num_attention_heads": 4, "bos_token_id": None, "pad_token_id": 1}


def refusal(folder: Path, config: PreTrainedConfig, *options: str, world_size: int = 2, **environment: str) -> str:
    """The message of the checks before any process group exists."""
    config.architectures = [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[config.model_type]]
    config.save_pretrained(folder)
    shutil.copy(TINY_OLMO / "tokenizer.json", folder)
    arguments = [
        f"--job.config_file={DEBUG_TOML}",
        f"--model.hf_assets_path={folder}",
        "--training.seq_len=64",
        *NO_HEADS,
    ]
    with mock.patch.dict("os.environ", {"WORLD_SIZE": str(world_size)}), pytest.raises(ConfigError) as refused:
        parse([*arguments, f"--parallelism.tensor_parallel_degree={world_size}", *options])
    return str(refused.value)


@pytest.mark.parametrize(
    ("config", "world_size", "expected"),
    [
        (LlamaConfig(**{**_SHAPE, "num_attention_heads": 3}), 2, "num_attention_heads (3) is not divisible"),
        (LlamaConfig(**_SHAPE, num_key_value_heads=2), 4, "num_key_value_heads (2) is not divisible"),
        (LlamaConfig(**{**_SHAPE, "intermediate_size": 50}), 4, "'model.layers.*.mlp.gate_proj' (50) is not divisible"),
        (
            LlamaConfig(**{**_SHAPE, "vocab_size": 265}),
            2,
            "the vocabulary (265) is not divisible; pad it: seed.resize_vocabulary",
        ),
        (GPT2Config(vocab_size=264, n_embd=32, n_layer=2, n_head=4), 2, "no tensor-parallel plan for its layers"),
        (
            OlmoeConfig(**_SHAPE, num_experts=4, num_experts_per_tok=2),
            2,
            "'model.layers.*.mlp.experts.gate_up_proj' is 'packed_colwise'",
        ),
        pytest.param(
            CodeGenConfig(vocab_size=264, n_embd=32, n_layer=2, n_head=4, rotary_dim=4),
            2,
            "uses self.embed_dim, which is of all heads, where a rank has some",
            marks=pytest.mark.skipif(
                not CodeGenConfig.base_model_tp_plan, reason="this transformers has no plan for it"
            ),
        ),
        (
            DeepseekV2Config(**_SHAPE, first_k_dense_replace=2),
            2,
            "is 'mla_kv_a_proj', which is not supported (known: colwise",
        ),
    ],
    ids=["heads", "key-value-heads", "width", "vocabulary", "no-plan", "experts", "heads-in-code", "latent-attention"],
)
def test_a_model_that_can_not_be_split_is_refused(
    tmp_path: Path, config: PreTrainedConfig, world_size: int, expected: str
) -> None:
    message = refusal(tmp_path, config, world_size=world_size)
    assert expected in message and f"tensor_parallel_degree = {world_size} with" in message


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--parallelism.tensor_parallel_degree=0"], "tensor_parallel_degree must be >= 1, got 0"),
        (
            ["--parallelism.tensor_parallel_degree=3"],
            "tensor_parallel_degree (3) must divide the number of processes (4)",
        ),
        (
            ["--training.seq_len=63"],
            "training.seq_len (63) must be a multiple of parallelism.tensor_parallel_degree (2)",
        ),
        (["--validation.enable", "--validation.seq_len=63"], "validation.seq_len (63) must be a multiple of"),
        (["--parallelism.data_parallel_replicate_degree=2"], "torchtitan's DDP goes with no other parallelism; set"),
        (
            ["--parallelism.enable_async_tensor_parallel"],
            "enable_async_tensor_parallel needs compile.enable with 'model'",
        ),
        (["--parallelism.enable_async_tensor_parallel", "--compile.enable"], "an accelerator, and there is none"),
        (["--training.global_batch_size=6"], "training.local_batch_size (2) times the data-parallel ranks (2)"),
    ],
)
def test_options_that_do_not_go_together_are_refused(tmp_path: Path, options: list[str], expected: str) -> None:
    degree, batch = ["--parallelism.tensor_parallel_degree=2"], ["--training.local_batch_size=2"]
    assert expected in refusal(tmp_path, LlamaConfig(**_SHAPE), *degree, *batch, *options, world_size=4)


def test_asynchronous_collectives_need_tensor_parallelism(tmp_path: Path) -> None:
    message = refusal(tmp_path, LlamaConfig(**_SHAPE), "--parallelism.enable_async_tensor_parallel", world_size=1)
    assert "needs parallelism.tensor_parallel_degree > 1" in message
