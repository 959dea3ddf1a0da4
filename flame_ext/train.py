"""The entry point: parse, check, run.

torchrun --nproc_per_node 8 -m flame_ext.train --job.config_file configs/olmo1b_fp.toml [--section.key value ...]

Exit code: 0 done, 1 the run failed, 2 the configuration or the way of launching is wrong, 75 a signal stopped the run,
which has saved: start the same command again.
"""

from __future__ import annotations

import atexit
import gc
import logging
import os
import sys

from flame_ext.imports import without_collection

with without_collection():
    import torch.distributed as dist
    import transformers
    from torch.distributed.elastic.multiprocessing.errors import record
    from torchtitan.tools.logging import init_logger

    from flame_ext.config.sections import FlameJobConfig
    from flame_ext.errors import UserError
    from flame_ext.preflight.parse import parse
    from flame_ext.run.signals import EXIT_PREEMPTED, StopSignals, note_exit_code
    from flame_ext.trainer import FutureTrainer

HOW_TO_LAUNCH = (
    "launch with torchrun: torchrun --nproc_per_node 1 -m flame_ext.train --job.config_file configs/debug.toml"
)


def run(config: FlameJobConfig) -> int:
    """Train. Must run in every rank, under torchrun's environment.

    Returns:
        0, or :data:`flame_ext.run.signals.EXIT_PREEMPTED`.
    """
    trainer: FutureTrainer | None = None
    signals = StopSignals()
    signals.install()
    try:
        trainer = FutureTrainer(config, signals)
        trainer.train()
    finally:
        try:
            if trainer is not None:
                trainer.close()
        finally:
            signals.restore()
    if dist.is_initialized():
        dist.destroy_process_group()
    return EXIT_PREEMPTED if trainer.preempted else 0


@record
def main(args: list[str] | None = None) -> None:
    """Run the command; ends the process with the exit codes above."""
    args = sys.argv[1:] if args is None else args
    gc.freeze()  # what was imported stays: no collection has to look at it again
    atexit.register(gc.unfreeze)  # but the last one, or extensions print what they take for leaks
    init_logger()
    # The host's logger is the root logger at INFO, and transformers would print every configuration that it reads.
    transformers.logging.set_verbosity(logging.WARNING)
    try:
        wants_help = "--help" in args or "-h" in args
        if not wants_help and any(name not in os.environ for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE")):
            print(f"error: {HOW_TO_LAUNCH}", file=sys.stderr)
            raise SystemExit(2)
        config = parse(args)
    except UserError as e:
        _fail(e, 2)
    try:
        code = run(config)
    except UserError as e:
        _fail(e, 1)
    if code:
        note_exit_code(code)
        raise SystemExit(code)


def _fail(error: UserError, code: int) -> None:
    print(f"error: {error}", file=sys.stderr, flush=True)
    raise SystemExit(code)


if __name__ == "__main__":
    main()
