"""One optimisation step of many jobs under a layout, to be compared with the same steps in a single process."""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from flame_ext.train import parse
from tests.ranks import DEBUG_TOML, run_ranks
from tests.tiny_models import save_tiny

TP2 = "--parallelism.tensor_parallel_degree=2"
EP2 = "--parallelism.expert_parallel_degree=2"
CP2 = "--parallelism.context_parallel_degree=2"
HEADS = ["--action_layer.enable", "--future_encoder.shift_k=2"]
NO_HEADS = ["--model.converters=", "--future_encoder.no-enable", "--future_predictor.no-enable"]
COMPILE = ["--compile.enable", "--compile.backend=aot_eager", "--compile.components=model,loss"]
PER_OP = ["--activation_checkpoint.mode=selective", "--activation_checkpoint.selective_ac_option=op"]
LENGTH, BATCH = 64, 4
# As preflight refuses it there.
spreads_experts = pytest.mark.skipif(torch.__version__ < "2.12", reason="expert parallelism needs torch 2.12")

# Name to number of processes and options.
LAYOUTS: dict[str, tuple[int, list[str]]] = {
    "single": (1, [f"--training.local_batch_size={BATCH}"]),
    "tp2": (2, [f"--training.local_batch_size={BATCH}", TP2]),
    "fsdp2-tp2": (4, [f"--training.local_batch_size={BATCH // 2}", TP2]),
    "hsdp4-tp2": (
        8,
        [f"--training.local_batch_size={BATCH // 4}", TP2, "--parallelism.data_parallel_replicate_degree=2"],
    ),
    "cp2": (2, [f"--training.local_batch_size={BATCH}", CP2]),
    "fsdp2-cp2": (4, [f"--training.local_batch_size={BATCH // 2}", CP2]),
    "cp2-tp2": (4, [f"--training.local_batch_size={BATCH}", CP2, TP2]),
    "cp4": (4, [f"--training.local_batch_size={BATCH}", "--parallelism.context_parallel_degree=4"]),
    "hsdp2-cp2": (
        4,
        [f"--training.local_batch_size={BATCH // 2}", CP2, "--parallelism.data_parallel_replicate_degree=2"],
    ),
    "fsdp2": (2, [f"--training.local_batch_size={BATCH // 2}"]),
    "ddp2": (2, [f"--training.local_batch_size={BATCH // 2}", "--parallelism.data_parallel_replicate_degree=2"]),
    "ep2": (2, [f"--training.local_batch_size={BATCH // 2}", EP2]),
    "ep4": (4, [f"--training.local_batch_size={BATCH // 4}", "--parallelism.expert_parallel_degree=4"]),
    "fsdp4-ep2": (4, [f"--training.local_batch_size={BATCH // 4}", EP2]),
    "hsdp4-ep2": (
        4,
        [f"--training.local_batch_size={BATCH // 4}", EP2, "--parallelism.data_parallel_replicate_degree=2"],
    ),
    "cp2-ep2": (2, [f"--training.local_batch_size={BATCH}", CP2, EP2]),
    "tp2-ep2": (2, [f"--training.local_batch_size={BATCH}", TP2, EP2]),
    "fsdp2-tp2-ep2": (4, [f"--training.local_batch_size={BATCH // 2}", TP2, EP2]),
    "fsdp2-tp2-ep4": (4, [f"--training.local_batch_size={BATCH // 2}", TP2, "--parallelism.expert_parallel_degree=4"]),
    "fsdp2-cp2-ep4": (4, [f"--training.local_batch_size={BATCH // 2}", CP2, "--parallelism.expert_parallel_degree=4"]),
}


def one_step(models: str, folder: str, jobs: dict[str, list[str]], options: list[str]) -> dict[str, Any]:
    """In a rank: seed each job (architecture and ``+heads``), take one step, and keep what it did."""
    import torch.distributed as dist
    from torch.distributed.tensor import DTensor
    from torchtitan.tools.logging import init_logger

    from flame_ext.model import tensor_parallel
    from flame_ext.trainer import FutureTrainer

    def full(tensor: Tensor) -> Tensor:
        tensor = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        return tensor.detach().clone()

    def named(model: torch.nn.Module) -> dict[str, Any]:
        """Its parameters, under the names that they have without compilation and checkpointing."""
        wrappers = "_orig_mod.", "_checkpoint_wrapped_module."
        return {key.replace(wrappers[0], "").replace(wrappers[1], ""): p for key, p in model.named_parameters()}

    init_logger()
    inputs = torch.zeros((1, LENGTH), dtype=torch.int64)
    results: dict[str, Any] = {}
    for job, more in jobs.items():
        path = f"{models}/{job.partition('+')[0]}"
        arguments = [f"--job.config_file={DEBUG_TOML}", f"--model.hf_assets_path={path}", "--seed.verify=parity"]
        arguments += [f"--checkpoint.initial_load_path={path}", f"--job.dump_folder={folder}/{job}", *options, *more]
        arguments += ["--metrics.no-enable-tensorboard", f"--training.seq_len={LENGTH}", "--training.max_norm=1e9"]
        arguments += [f"--training.global_batch_size={BATCH}", *(HEADS if "+heads" in job else NO_HEADS)]
        whole = mock.patch.object(tensor_parallel, "_no_sequence_parallel", return_value="the test says so")
        with whole if "+whole" in job else nullcontext():
            trainer = FutureTrainer(parse(arguments))
        backends = [group._get_backend(torch.device("cpu")) for group in dist.distributed_c10d._world.pg_map]
        of_gloo = [backend for backend in backends if isinstance(backend, dist.ProcessGroupGloo)]
        assert of_gloo and all(backend.options._threads == 1 for backend in of_gloo)
        trainer.checkpointer.load()
        heads = {key: full(p) for key, p in named(trainer.model).items() if key in trainer.model.parameter_inits}
        shapes: list[int] = []
        layer = trainer.model.layers[1]
        layer.register_forward_pre_hook(lambda _layer, args, shapes=shapes: shapes.append(args[0].shape[1]))
        trainer.step = 1
        trainer.train_step(trainer.batch_generator(trainer.dataloader))
        results[job] = {
            "parts": trainer.reported.reduced(trainer.reported.parts),
            "grad_norm": trainer.gradients.norm,
            "gradients": {key: full(p.grad) for key, p in named(trainer.model).items() if p.grad is not None},
            "heads": heads,
            "report": json.loads(Path(folder, job, "seed_report.json").read_text()),
            "parameters": {type(p).__name__ for p in trainer.model.parameters()},
            "sequence_parallel": shapes[-1] != LENGTH,
            "logits": type(trainer.model(inputs)).__name__,
        }
        trainer.close()
    dist.destroy_process_group()
    return results


def assert_same_step(result: dict[str, Any], expected: dict[str, Any]) -> None:
    for name, value in expected["parts"].items():
        assert result["parts"][name] == pytest.approx(value, rel=1e-5, abs=1e-6), name
    assert result["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-5)
    assert set(result["heads"]) == set(expected["heads"])
    for key, value in expected["heads"].items():
        assert torch.equal(result["heads"][key], value), key
    assert set(result["gradients"]) == set(expected["gradients"])
    for key, gradient in expected["gradients"].items():
        scale = gradient.abs().max().item()
        torch.testing.assert_close(result["gradients"][key], gradient, rtol=1e-4, atol=1e-5 * scale, msg=key)
    assert result["report"]["weights_digest"] == expected["report"]["weights_digest"]
    assert result["report"]["keys"] == expected["report"]["keys"]


def steps(
    models: Path, folder: Path, layout: str, jobs: dict[str, list[str]], *options: str
) -> list[dict[str, dict[str, Any]]]:
    """What :func:`one_step` did in each rank of a layout."""
    world_size, more = LAYOUTS[layout]
    for name in {job.partition("+")[0] for job in jobs}:
        if not (models / name).exists():
            save_tiny(name, models / name)
    arguments = (str(models), str(folder / layout), jobs, [*more, *options])
    ranks = run_ranks(one_step, world_size, *arguments, folder=folder / f"{layout}.ranks", timeout=800)
    assert all(rank.exit_code == 0 for rank in ranks), ranks[0].output[-3000:]
    return [rank.value for rank in ranks]
