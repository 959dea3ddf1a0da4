"""How often a step waits for the device: for the gradient norm, and once for all figures that are logged."""

from __future__ import annotations

import traceback
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from tests.ranks import DEBUG_TOML, run_ranks

# What reads a tensor's values on the host.
METHODS = (
    "item",
    "tolist",
    "cpu",
    "numpy",
    "equal",
    "masked_select",
    "nonzero",
    "unique",
    "__bool__",
    "__int__",
    "__float__",
)
READS = {getattr(of, name) for of in (Tensor, torch) for name in METHODS if hasattr(of, name)}
HEADS = "--mtp.enable", "--token_order.enable", "--future_bag.enable", "--next_latent.enable", "--action_layer.enable"


class Waits(TorchFunctionMode):
    """Counts reads by the function of this package, or of transformers, that asks for them."""

    def __init__(self) -> None:
        super().__init__()
        self.by: Counter[str] = Counter()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        index = args[1] if func is Tensor.__getitem__ else ()
        masks = [
            i
            for i in (index if isinstance(index, tuple) else (index,))
            if isinstance(i, Tensor) and i.dtype == torch.bool
        ]
        if func in READS or masks:  # how many elements a mask selects is asked of the device
            frames = [f for f in traceback.extract_stack() if "/torch/" not in f.filename and f.filename != __file__]
            self.by[f"{Path(frames[-1].filename).stem}.{frames[-1].name}"] += 1
        return func(*args, **(kwargs or {}))


def waits_of_a_step(folder: str, jobs: dict[str, tuple[str, ...]]) -> dict[str, dict[str, int]]:
    """In a rank: the reads of each job's second step."""
    from flame_ext.preflight.parse import parse
    from flame_ext.trainer import FutureTrainer

    found = {}
    for job, options in jobs.items():
        arguments = [f"--job.config_file={DEBUG_TOML}", f"--job.dump_folder={folder}/{job}", "--seed.verify=none"]
        trainer = FutureTrainer(parse([*arguments, "--training.global_batch_size=16", *options]))
        trainer.checkpointer.load()
        batches = trainer.batch_generator(trainer.dataloader)
        trainer.step = 1
        trainer.train_step(batches)
        trainer.step = 2
        with Waits() as waits:
            trainer.train_step(batches)
        trainer.close()
        found[job] = dict(waits.by)
    return found


def test_a_step_of_two_micro_batches_waits_twice(tmp_path: Path) -> None:
    jobs = {"default": (), "heads": ("--data.document_attention", *HEADS)}
    (rank,) = run_ranks(waits_of_a_step, 1, str(tmp_path / "run"), jobs, folder=tmp_path / "ranks")
    assert rank.value.keys() == jobs.keys()
    for job, waits in rank.value.items():
        # On the CPU wherever the model is: the dataloader's tensors, a random number, the flags of all ranks, the optimizers' steps.
        on_the_cpu = ("plan._labelled", "plan.plan", "distributed.any_rank", "optimizer.step")
        assert all(waits.pop(name) > 0 for name in on_the_cpu), job
        assert waits == {"backward.clip": 1, "reported.figures": 1}, job
