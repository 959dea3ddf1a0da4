"""Lets a run that is started again go on with its run at Weights & Biases, which torchtitan would begin anew."""

import os
import uuid
from pathlib import Path

WANDB_NAME = "wandb_run_id"


def continue_wandb_run(folder: Path, rank: int) -> None:
    """Sets ``WANDB_RUN_ID`` to the one in the folder, which the first start writes, unless the user has set it; and ``WANDB_RESUME``.
    Each rank that logs has its own.
    """
    if any(name in os.environ for name in ("WANDB_RESUME_FROM", "WANDB_FORK_FROM")):  # W&B takes one of the three
        return
    if "WANDB_RUN_ID" not in os.environ:
        file = folder / (f"{WANDB_NAME}.{rank}" if rank else WANDB_NAME)
        run = file.read_text().strip() if file.is_file() else ""
        if not run:
            run = uuid.uuid4().hex[:8]
            folder.mkdir(parents=True, exist_ok=True)
            file.write_text(f"{run}\n")
        os.environ["WANDB_RUN_ID"] = run
    os.environ.setdefault("WANDB_RESUME", "allow")
