"""Experts spread over ranks, against all of them in a single process."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.torch_version import TorchVersion
from transformers import AutoModelForCausalLM, PhimoeConfig, PreTrainedConfig

from flame_ext.errors import ConfigError
from flame_ext.model.expert_parallel import apply_expert_parallel
from flame_ext.model.experts import stacked_experts
from flame_ext.model.hf_causal_lm import HFModelArgs, build_hf_causal_lm
from flame_ext.train import parse
from tests.faults.test_resume import assert_resumed_exactly, resumed_from, saved, train
from tests.layouts import BATCH, COMPILE, EP2, NO_HEADS, PER_OP, assert_same_step, spreads_experts, steps
from tests.ranks import DEBUG_TOML, TINY_OLMO, TrainRun, run_ranks
from tests.tiny_models import CONFIGS, MIXTURES, load_stock, save_tiny

# -- one layer's experts -----------------------------------------------------------------------------------------

TOKENS, CHOICES = 12, 2


def chosen(kind: str, experts: int) -> Tensor:
    """(2 * TOKENS, CHOICES) experts for the tokens of two ranks."""
    if kind == "one rank's":  # the other rank gets no token, and still takes part in forward and backward
        experts //= 2
    scores = torch.rand(2 * TOKENS, experts, generator=torch.Generator().manual_seed(3))
    return scores.topk(CHOICES).indices


def run_experts(folder: str, spread: bool) -> dict[str, Any]:
    """In a rank: what a layer's experts make of its tokens, and all gradients, for each choice of experts."""
    model = build_hf_causal_lm(HFModelArgs(hf_assets_path=folder))
    module = list(stacked_experts(model).values())[-1]
    count = module.num_experts
    rows = slice(0, 2 * TOKENS)
    if spread:
        dist.init_process_group("gloo")
        apply_expert_parallel(model, init_device_mesh("cpu", (2,)))
        rows = slice(dist.get_rank() * TOKENS, (dist.get_rank() + 1) * TOKENS)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in list(module._parameters.items()):
        value: Tensor = torch.randn(parameter.shape, generator=generator) * 0.3
        if spread:
            value = distribute_tensor(value, parameter.device_mesh, parameter.placements, src_data_rank=None)
        module.register_parameter(name, nn.Parameter(value))
    results = {}
    for kind in ("any", "one rank's", "some skipped"):
        hidden = torch.randn(2 * TOKENS, 32, generator=generator)[rows].clone().requires_grad_()
        weights = torch.rand(2 * TOKENS, CHOICES, generator=generator)[rows].clone().requires_grad_()
        experts, used = chosen(kind, count)[rows], weights
        if kind == "some skipped":
            skipped = experts % 3 == 0
            used = weights.masked_fill(skipped, 0)
            if spread:  # the number after the last expert's
                experts = experts.masked_fill(skipped, count)
        output = module(hidden, experts, used)
        (output * torch.randn(2 * TOKENS, 32, generator=generator)[rows]).sum().backward()
        of_tokens = {"output": output.detach(), "hidden": hidden.grad, "weights": weights.grad}
        gradients = {name: p.grad for name, p in module._parameters.items()}
        full = {name: grad.full_tensor() if isinstance(grad, DTensor) else grad for name, grad in gradients.items()}
        results[kind] = (of_tokens, {name: grad.clone() for name, grad in full.items()})
        module.zero_grad()
    if spread:
        dist.destroy_process_group()
    return results


@pytest.mark.parametrize("name", ["gpt-oss"])
def test_tokens_come_back_from_the_ranks_of_their_experts(tmp_path: Path, name: str) -> None:
    MIXTURES[name].save_pretrained(tmp_path)
    expected = run_experts(str(tmp_path), spread=False)
    ranks = run_ranks(run_experts, 2, str(tmp_path), True, folder=tmp_path / "ranks")
    assert all(rank.exit_code == 0 for rank in ranks), ranks[0].output[-3000:]
    for kind, (of_tokens, gradients) in expected.items():
        for key, value in of_tokens.items():
            found = torch.cat([rank.value[kind][0][key] for rank in ranks])
            torch.testing.assert_close(found, value, rtol=1e-5, atol=1e-6, msg=f"{kind}: {key}")
        for key, value in gradients.items():
            for rank in ranks:
                torch.testing.assert_close(rank.value[kind][1][key], value, rtol=1e-5, atol=1e-5, msg=f"{kind}: {key}")


def test_without_a_plan_they_are_known_by_their_shape() -> None:
    """Not the block around them, which has a router with a row for each expert."""
    config = PhimoeConfig(
        num_hidden_layers=2, hidden_size=64, intermediate_size=64, num_attention_heads=4, num_local_experts=4
    )
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(config)
    planned = {name: type(module).__name__ for name, module in stacked_experts(model).items()}
    model._ep_plan = {}
    assert {name: type(module).__name__ for name, module in stacked_experts(model).items()} == planned
    assert set(planned.values()) == {"PhimoeExperts"}


# -- one step ----------------------------------------------------------------------------------------------------

# Architecture, "+heads", anything: job to options of its own.
JOBS: dict[str, list[str]] = {"deepseek-v3+heads": []}


@spreads_experts
def test_one_step_is_that_of_a_single_process(models: Path, single: dict[str, dict[str, Any]], tmp_path: Path) -> None:
    for rank in steps(models, tmp_path, "ep2", JOBS):
        for name, result in rank.items():
            assert_same_step(result, single[name])
            assert result["parameters"] == {"DTensor"}, "counted alike by norms, optimizers and checkpoints"


DOCUMENTS = ["--data.document_attention"]
VARIANTS: dict[str, list[str]] = {
    "olmoe+heads+full": ["--activation_checkpoint.mode=full"],
    "deepseek-v3+heads+op": PER_OP,
    "qwen3-moe+heads+layer": [
        "--activation_checkpoint.mode=selective",
        "--activation_checkpoint.selective_ac_option=2",
    ],
    "deepseek-v3+heads+compiled": COMPILE,
    "olmoe+compiled+full": [*COMPILE, "--activation_checkpoint.mode=full"],
    "olmoe+heads+accumulated": ["--training.local_batch_size=1"],
    "olmoe+heads+documents": DOCUMENTS,
    "mixtral+offload": ["--training.enable_cpu_offload"],
}


@spreads_experts
@pytest.mark.matrix
@pytest.mark.parametrize(
    ("layout", "kind"),
    [
        *((layout, "+heads") for layout in ("fsdp2", "ddp2", "ep2", "ep4", "fsdp4-ep2", "hsdp4-ep2")),
        *((layout, "+heads") for layout in ("tp2-ep2", "fsdp2-tp2-ep2", "fsdp2-tp2-ep4", "cp2-ep2", "fsdp2-cp2-ep4")),
        *((layout, "variants") for layout in ("ep2", "fsdp4-ep2")),
    ],
)
def test_every_mixture_under_every_layout(models: Path, tmp_path: Path, layout: str, kind: str) -> None:
    jobs = VARIANTS if kind == "variants" else {name + kind: [] for name in MIXTURES}
    if "cp" in layout:  # has no sinks
        jobs = {name: options for name, options in jobs.items() if not name.startswith("gpt-oss")}
    if "tp" in layout:  # transformers plans no attention of these, or nothing at all
        jobs = {name: options for name, options in jobs.items() if not name.startswith(("gpt-oss", "granite"))}
    if layout.endswith("ep4"):
        jobs.pop("mixtral-two" + kind, None)
    single = {name: DOCUMENTS if options == DOCUMENTS else [] for name, options in jobs.items()}
    (expected,) = steps(models, tmp_path, "single", single)
    for rank in steps(models, tmp_path, layout, jobs):
        for name in jobs:
            assert_same_step(rank[name], expected[name])


# -- saved, resumed, exported ------------------------------------------------------------------------------------

RESUMED = {
    "single": (1, []),
    "fsdp2": (2, []),
    "ep2": (2, [EP2]),
    "fsdp4-ep2": (4, [EP2]),
}


@spreads_experts
@pytest.mark.parametrize(
    ("name", "lr", "layouts"),
    [
        pytest.param("deepseek-v3", "0", ["ep2", "fsdp2"], marks=pytest.mark.matrix),
        pytest.param("olmoe", "1e-2", ["single", "fsdp4-ep2", "single", "ep2"], marks=pytest.mark.matrix),
        pytest.param("mixtral-two", "1e-2", ["fsdp4-ep2", "single", "fsdp4-ep2"], marks=pytest.mark.matrix),
        pytest.param("gpt-oss", "0", ["fsdp4-ep2", "ep2", "single"], marks=pytest.mark.matrix),
    ],
)
def test_a_run_goes_on_and_is_exported_under_another_layout(
    tmp_path: Path, name: str, lr: str, layouts: list[str]
) -> None:
    source = save_tiny(name, tmp_path / "source")
    common = [f"--model.hf_assets_path={source}", f"--checkpoint.initial_load_path={source}", f"--optimizer.lr={lr}"]
    run: TrainRun | None = None
    for step, layout in enumerate(layouts, start=1):
        ranks, options = RESUMED[layout]
        folder = tmp_path / f"{step}-{layout}"
        last = None if run is None else run.dump_folder / "checkpoint" / f"step-{step - 1}"
        if run is not None:
            resumed_from(run, step - 1, folder)
        run = train(folder, *options, *common, "--checkpoint.last_save_in_hf", ranks=ranks, steps=step)
        if last is not None:
            assert_resumed_exactly(run, last)
        exported, weights = folder / "hf" / f"step-{step}", saved(folder / "checkpoint" / f"step-{step}")
        for key, value in load_stock(exported).state_dict().items():
            assert torch.equal(value, weights[key]), key
        if lr == "0":  # only the moments have changed
            found, expected = load_file(exported / "model.safetensors"), load_file(source / "model.safetensors")
            assert set(found) == set(expected)
            assert all(torch.equal(found[key], value) for key, value in expected.items())


# -- beside a pipeline -------------------------------------------------------------------------------------------


@spreads_experts
@pytest.mark.matrix
@pytest.mark.parametrize("schedule", ["1F1B", "Interleaved1F1B"])
@pytest.mark.parametrize("name", ["qwen3-moe", "deepseek-v3"])
def test_stages_of_a_pipeline_spread_their_experts(tmp_path: Path, name: str, schedule: str) -> None:
    source = save_tiny(name, tmp_path / "source")
    sources = [f"--model.hf_assets_path={source}", f"--checkpoint.initial_load_path={source}"]
    single = train(tmp_path / "single", *sources, ranks=1, steps=2)
    options = ["--parallelism.pipeline_parallel_degree=2", f"--parallelism.pipeline_parallel_schedule={schedule}", EP2]
    spread = train(
        tmp_path / "spread", *sources, *options, f"--training.local_batch_size={BATCH // 2}", ranks=4, steps=2
    )
    for key in ("loss_ce", "loss_future", "grad_norm", "grad_norm_backbone"):
        # Adam divides small gradients by themselves: a step on, roundings of 1e-7 are 1e-6.
        assert spread.values(key) == pytest.approx(single.values(key), rel=1e-5), key
    last = tmp_path / "spread" / "checkpoint" / "step-2"
    back = train(resumed_from(spread, 2, tmp_path / "back"), *sources, ranks=1, steps=3)
    assert_resumed_exactly(back, last)


# -- what is refused ---------------------------------------------------------------------------------------------


def refusal(folder: Path, config: PreTrainedConfig, *options: str, world_size: int = 2) -> str:
    """The message of the checks before any process group exists."""
    config.save_pretrained(folder)
    shutil.copy(TINY_OLMO / "tokenizer.json", folder)
    arguments = [f"--job.config_file={DEBUG_TOML}", f"--model.hf_assets_path={folder}", "--training.seq_len=64"]
    with mock.patch.dict("os.environ", {"WORLD_SIZE": str(world_size)}), pytest.raises(ConfigError) as refused:
        parse([*arguments, *NO_HEADS, f"--parallelism.expert_parallel_degree={world_size}", *options])
    return str(refused.value)


@pytest.mark.parametrize(
    ("name", "world_size", "options", "message"),
    [
        ("olmo2", 2, [], "with Olmo2ForCausalLM: no layer holds experts as stacked parameters"),
        ("olmoe", 3, [], "'model.layers.*.mlp.experts' has 8 experts, which it does not divide"),
        ("olmoe", 6, [EP2], "the 4 experts of a rank in 'model.layers.*.mlp.experts.down_proj' [8, 32, 24] are to be sharded over 3"),
        ("olmoe", 2, ["--parallelism.data_parallel_replicate_degree=2"], "must divide the ranks that share one copy of the model or of"),
        ("olmoe", 2, ["--parallelism.pipeline_parallel_degree=2"], "a pipeline's stage (1: data_parallel_shard_degree times"),
        ("olmoe", 4, [EP2, "--parallelism.tensor_parallel_degree=4"], "must be a multiple of parallelism.tensor_parallel_degree (4)"),
        ("olmoe", 1, ["--parallelism.expert_tensor_parallel_degree=2"], "expert_tensor_parallel_degree must be 1, got 2"),
        ("olmoe", 1, ["--parallelism.expert_parallel_comm_backend=deepep"], "comm_backend must be 'standard', got 'deepep'"),
        ("olmoe", 2, ["--optimizer.early_step_in_backward"], "optimizer.early_step_in_backward does not go with"),
    ],
)  # fmt: skip
def test_what_cannot_be_right_is_refused(
    tmp_path: Path, name: str, world_size: int, options: list[str], message: str
) -> None:
    config = {**CONFIGS, **MIXTURES}[name]
    with mock.patch("torch.__version__", TorchVersion("2.12.0")):  # what comes first in older ones is below
        assert message in refusal(tmp_path, config, *options, world_size=world_size)


def test_an_older_torch_is_refused_in_one_line(tmp_path: Path) -> None:
    with mock.patch("torch.__version__", TorchVersion("2.11.0+cu130")):
        message = refusal(tmp_path, MIXTURES["olmoe"])
    assert message.startswith("parallelism.expert_parallel_degree > 1 needs torch 2.12 or newer, ")
    assert message.endswith("and this is 2.11.0+cu130; set it to 1, or update torch") and "\n" not in message
