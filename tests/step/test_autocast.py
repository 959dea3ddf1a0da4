"""Mixed precision by autocast, where there is no FSDP: on where the model runs, and off again after it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from tests.ranks import DEBUG_TOML, run_ranks

OPTIONS = (
    "--training.mixed_precision_param=bfloat16", "--training.steps=1", "--lr_scheduler.total_steps=60", "--seed.verify=parity",
    "--training.local_batch_size=2", "--validation.enable", "--validation.dataset=python_stdlib", "--validation.steps=1",
    "--validation.freq=1", "--validation.seq_len=256", "--validation.local_batch_size=2", "--checkpoint.no-last_save_in_hf",
)  # fmt: skip


def run_watched(folder: str) -> list[tuple[str, bool]]:
    """Runs proofs, a step and a validation; returns whether autocast was on in some of the forwards, and after each of these."""
    from flame_ext.checkpoint.run_hooks import RunHooks
    from flame_ext.step.teacher import Teacher
    from flame_ext.train import main
    from flame_ext.trainer import FutureTrainer

    states = []

    def watch(cls: type, name: str) -> None:
        method = getattr(cls, name)

        def watched(self: Any, *arguments: Any, **options: Any) -> Any:
            result = method(self, *arguments, **options)
            states.append((name, torch.is_autocast_enabled("cpu")))
            if name == "_evaluate":
                with self.autocast(), self.autocast():
                    states.append(("inside", torch.is_autocast_enabled("cpu")))
                states.append(("after two", torch.is_autocast_enabled("cpu")))
            return result

        setattr(cls, name, watched)

    for cls, name in (
        (FutureTrainer, "train_step"),
        (FutureTrainer, "_evaluate"),
        (RunHooks, "seed"),
        (Teacher, "summaries"),
    ):
        watch(cls, name)
    main([f"--job.config_file={DEBUG_TOML}", f"--job.dump_folder={folder}", *OPTIONS])
    return states


def test_autocast_is_off_after_proofs_steps_and_validation(tmp_path: Path) -> None:
    (rank,) = run_ranks(run_watched, 1, str(tmp_path / "run"), folder=tmp_path / "ranks")
    assert rank.exit_code == 0, rank.output[-3000:]
    assert {name for name, _ in rank.value} == {"summaries", "seed", "train_step", "_evaluate", "inside", "after two"}
    assert [name for name, on in rank.value if on] == ["inside"]
