"""What a GPU alone can show, ``pytest -m gpu``: the command beside a CPU, the kernels of attention by masks, saves from pinned memory."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import warnings
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from copy import deepcopy
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import flex_attention
from torch.profiler import ProfilerActivity, profile
from transformers import AutoModelForCausalLM, OlmoConfig

from flame_ext.model.attention import attention_options, choose_kernels
from flame_ext.model.initialisation import Uniform
from flame_ext.objective.masks import anticausal_block_mask, anticausal_mask, doc_ids_from_eos
from flame_ext.seeding.new_parameters import initialise
from flame_ext.seeding.read import read_weights
from flame_ext.seeding.sources.open import open_source
from tests.benchmarks.common import rank_environment
from tests.benchmarks.device_checks import enlarge_heads
from tests.ranks import DEBUG_TOML, REPOSITORY
from tests.step.test_waits import HEADS
from tests.tiny_models import CONFIGS

pytestmark = pytest.mark.gpu

STEPS = ("--lr_scheduler.total_steps=60", "--checkpoint.interval=2", "--checkpoint.export_dtype=float32")


def run(dump_folder: Path, *options: str, on_cpu: bool = False) -> list[dict[str, Any]]:
    """Run the command in a process of its own, since CUDA does not survive a fork; returns its metrics."""
    env = os.environ | rank_environment()
    arguments = [
        f"--job.config_file={DEBUG_TOML}",
        f"--job.dump_folder={dump_folder}",
        "--metrics.no-enable-tensorboard",
    ]
    done = subprocess.run(
        [sys.executable, "-m", "flame_ext.train", *arguments, *STEPS, *options],
        env=env | ({"CUDA_VISIBLE_DEVICES": ""} if on_cpu else {}),
        cwd=REPOSITORY, capture_output=True, text=True, timeout=280,
    )  # fmt: skip
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    return [json.loads(line) for line in (dump_folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("attention", ["flex", "sdpa"])
def test_steps_have_the_losses_of_a_cpu_and_the_model_those_of_from_pretrained(tmp_path: Path, attention: str) -> None:
    options = ("--training.steps=2", "--action_layer.enable", "--data.document_attention")
    found = run(tmp_path / "gpu", *options, f"--future_encoder.teacher_attention={attention}")
    report = json.loads((tmp_path / "gpu" / "seed_report.json").read_text())["verification"]
    assert report["mode"] == "parity" and report["max_abs_diff"] < 1e-4
    for line, expected in zip(found, run(tmp_path / "cpu", *options, on_cpu=True), strict=True):
        for name in ("loss_ce", "loss_future", "loss_action", "loss_action_model", "grad_norm"):
            assert line[name] == pytest.approx(expected[name], rel=1e-5), (line["step"], name)


def test_a_save_from_pinned_memory_goes_on_with_the_same_bits(tmp_path: Path) -> None:
    options = ("--training.steps=4", "--checkpoint.async_mode=async_with_pinned_mem", "--seed.verify=finite")
    options += ("--checkpoint.keep_latest_k=0", "--future_encoder.teacher_attention=sdpa")
    unbroken = run(tmp_path / "run", *options)
    export = tmp_path / "run" / "hf" / "step-4"
    before = load_file(export / "model.safetensors")
    for gone in (export, tmp_path / "run" / "checkpoint" / "step-4"):
        shutil.rmtree(gone)
    again = run(tmp_path / "run", *options)
    assert [line["loss"] for line in again[-2:]] == [line["loss"] for line in unbroken[-2:]]
    after = load_file(export / "model.safetensors")
    assert all(torch.equal(tensor, after[key]) for key, tensor in before.items())


def waits_of_a_step(folder: str, *options: str) -> dict[str, int]:
    """In a process of its own: how often the third step waits for the device, by file; "sys" is a kernel of torch's backward."""
    from flame_ext.preflight.parse import parse
    from flame_ext.trainer import FutureTrainer

    os.environ.update(rank_environment())
    arguments = [f"--job.config_file={DEBUG_TOML}", f"--job.dump_folder={folder}", "--seed.verify=none"]
    trainer = FutureTrainer(parse([*arguments, "--training.global_batch_size=16", *options]))
    trainer.checkpointer.load()
    batches = trainer.batch_generator(trainer.dataloader)
    for trainer.step in (1, 2):
        trainer.train_step(batches)
    trainer.step = 3
    torch.cuda.set_sync_debug_mode("warn")
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        trainer.train_step(batches)
    torch.cuda.set_sync_debug_mode("default")
    trainer.close()
    return dict(Counter(Path(w.filename).stem for w in found if "synchronizing" in str(w.message)))


@pytest.mark.parametrize("options", [(), ("--data.document_attention", *HEADS)], ids=["default", "heads"])
def test_a_step_of_two_micro_batches_waits_twice(tmp_path: Path, options: tuple[str, ...]) -> None:
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        waits = pool.submit(waits_of_a_step, str(tmp_path), *options).result(250)
    waits.pop("sys", None)
    assert waits == {"backward": 1, "reported": 1}


def heads(length: int, dtype: torch.dtype, generator: torch.Generator) -> list[Tensor]:
    """Queries, keys and values, with scores far below those whose exponential is 0 in float32."""
    query, key, value = (torch.randn(2, 4, length, 64, generator=generator) for _ in range(3))
    query[..., 0], key[..., 0] = 1.0, -960.0
    return [tensor.to("cuda", dtype).requires_grad_() for tensor in (query, key, value)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("length", [192, 256])
@pytest.mark.parametrize("kernel", ["chosen", "math", "flex"])
def test_rows_that_attend_to_nothing_give_zeros_and_gradients_are_finite(
    kernel: str, length: int, dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(0)
    doc_ids = doc_ids_from_eos(torch.randint(0, 40, (2, length), generator=generator), 0).cuda()
    mask = anticausal_mask(length, 0, doc_ids, "cuda")
    tensors = heads(length, dtype, generator)
    if kernel == "flex":
        output = torch.compile(flex_attention)(*tensors, block_mask=anticausal_block_mask(length, 0, doc_ids, "cuda"))
    elif kernel == "math":
        with sdpa_kernel(SDPBackend.MATH):
            output = F.scaled_dot_product_attention(*tensors, attn_mask=mask)
    else:
        choose_kernels(OlmoConfig(), mask, length)
        assert SDPBackend(torch._fused_sdp_choice(*tensors, mask)) == SDPBackend.EFFICIENT_ATTENTION
        output = F.scaled_dot_product_attention(*tensors, attn_mask=mask)
    empty = ~mask.any(dim=-1, keepdim=True).expand(-1, 4, -1, -1)
    assert empty.sum() >= 2 and not output.masked_select(empty).any()
    scores = (tensors[0].double() @ tensors[1].double().mT / 8).masked_fill(~mask, float("-inf"))
    expected = scores.softmax(-1).masked_fill(empty, 0.0) @ tensors[2].double()
    tolerance = 1e-3 if dtype == torch.float32 else 5e-2  # scores of -120, and weights of eight bits
    torch.testing.assert_close(output.double(), expected, rtol=0, atol=tolerance)
    for gradient in torch.autograd.grad(output.float().square().sum(), tensors):
        assert torch.isfinite(gradient).all()


def test_attention_without_a_mask_may_take_the_fastest_kernel() -> None:
    tensors = heads(256, torch.bfloat16, torch.Generator().manual_seed(0))
    choose_kernels(OlmoConfig(), None, 256)
    choice = SDPBackend(torch._fused_sdp_choice(*tensors, is_causal=True))
    assert choice in (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION)
    assert torch.backends.cuda.cudnn_sdp_enabled()


def test_soft_capped_attention_is_that_of_transformers_eager_code() -> None:
    config = deepcopy(CONFIGS["gemma2"])
    enlarge_heads(config)
    assert attention_options(config) == {"attn_implementation": "flex_attention"}
    torch.manual_seed(0)
    eager, flex = (
        AutoModelForCausalLM.from_config(deepcopy(config), attn_implementation=name).cuda()
        for name in ("eager", "flex_attention")
    )
    flex.load_state_dict(eager.state_dict())
    tokens = torch.randint(3, 264, (2, 160), device="cuda")
    logits = [model(tokens, use_cache=False).logits for model in (eager, flex)]
    torch.testing.assert_close(logits[1], logits[0], rtol=1e-4, atol=1e-5)
    grads = [
        torch.autograd.grad(o.log_softmax(-1)[..., 7].sum(), [*model.parameters()])
        for o, model in zip(logits, (eager, flex), strict=True)
    ]
    for found, expected in zip(grads[1], grads[0], strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4 * expected.abs().max().item())


def test_files_are_read_through_pinned_memory_alone(tmp_path: Path) -> None:
    stored = {
        "rows": torch.randn(5000, 4096, dtype=torch.bfloat16),
        "small": torch.randn(7),
        "scalar": torch.tensor(2.0),
    }
    (tmp_path / "config.json").write_text("{}")
    save_file(stored, tmp_path / "model.safetensors")
    state = {key: torch.full(values.shape, float("nan"), device="cuda") for key, values in stored.items()}
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiled:
        read_weights(open_source(tmp_path), state, {}, check_finite=True)
        torch.cuda.synchronize()
    assert all(torch.equal(state[key].cpu(), values.float()) for key, values in stored.items())
    copies = {event.name for event in profiled.events() if "HtoD" in event.name}
    assert copies == {"Memcpy HtoD (Pinned -> Device)"}
    drawn = {device: {"new": torch.empty(3000, 4096, device=device)} for device in ("cpu", "cuda")}
    for parameters in drawn.values():
        initialise(parameters, {"new": Uniform(0.5)}, 0)
    assert torch.equal(drawn["cuda"]["new"].cpu(), drawn["cpu"]["new"])
