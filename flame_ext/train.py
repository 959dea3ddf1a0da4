"""The command: ``torchrun -m flame_ext.train --job.config_file TOML [--section.key value ...]``. It ends with exit code 0 (done), 1
(the run failed), 2 (the configuration or the launch is wrong) or 75 (a signal stopped the run, which has saved: start it again).
The same from Python, with a configuration that may be built in code: :func:`run`.
"""

import atexit
import gc
import logging
import os
import signal
import sys
import threading
from contextlib import closing, suppress
from copy import deepcopy
from typing import NoReturn

if __name__ == "__main__":  # a signal that comes while modules are imported is looked at when the handlers are there
    signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT))

from flame_ext.imports import without_collection

with without_collection():
    import torch.distributed as dist
    from torch.distributed.elastic.multiprocessing.errors import record

    from flame_ext.config.sections import FlameJobConfig
    from flame_ext.distributed import lost_rank
    from flame_ext.errors import LostRankError, UserError
    from flame_ext.preflight.parse import check, parse
    from flame_ext.run.process import LAUNCHED, left_as_found, set_up_logging
    from flame_ext.run.signals import EXIT_PREEMPTED, StopSignals, note_exit_code
    from flame_ext.trainer import FutureTrainer


def run(config: FlameJobConfig) -> int:
    """Trains as the command does, in this process, and leaves it usable: the process group is destroyed, the folder's lock released,
    and signal handlers, environment, logging and garbage collection are as they were.

    Args:
        config: of :func:`flame_ext.preflight.parse.new_config` or :func:`flame_ext.preflight.parse.parse`. It is not changed.

    Returns:
        0, or :data:`EXIT_PREEMPTED` if a stop signal, such as a notebook's interrupt, has ended the run, which has saved.

    Raises:
        UserError: what the command would say in one line; on all ranks. After a LostRankError the process can only end.
    """
    if dist.is_initialized():
        raise UserError(
            "run: torch.distributed has a process group already; destroy_process_group() first, a run makes its own"
        )
    if threading.current_thread() is not threading.main_thread():
        raise UserError("run: it takes stop signals, which Python allows in the main thread only; call it there")
    with left_as_found():
        try:
            return _train(check(deepcopy(config)))
        except BaseException as e:
            together = isinstance(e, UserError) and not isinstance(
                e, LostRankError
            )  # else others may be in a collective
            if dist.is_initialized() and (together or dist.get_world_size() == 1):
                dist.destroy_process_group()
            raise


def _train(config: FlameJobConfig) -> int:
    signals = StopSignals()
    signals.install()
    try:
        with closing(FutureTrainer(config, signals)) as trainer:
            trainer.train()
    except RuntimeError as e:
        if (reason := lost_rank(e)) is None:
            raise
        where = f"[rank {os.environ['RANK']}] another rank has ended or does not answer ({reason})"
        steps = f"{config.job.dump_folder}/{config.checkpoint.folder}"
        raise LostRankError(f"{where}: see its output; the last complete step in {steps} is as it was") from e
    finally:
        if __name__ == "__main__":  # nothing is left that a signal could stop
            signals.ignore()
        else:
            signals.restore()
    if dist.is_initialized():
        dist.destroy_process_group()
    return EXIT_PREEMPTED if trainer.preempted else 0


@record
def main(args: list[str] | None = None) -> None:
    """Runs the command; ends the process with one of the exit codes above."""
    args = sys.argv[1:] if args is None else args
    gc.freeze()  # no collection has to look at what was imported
    atexit.register(gc.unfreeze)  # but the last one has to, or extensions report leaks
    set_up_logging()
    code = 2
    try:
        wants_help = "--help" in args or "-h" in args
        if not wants_help and any(name not in os.environ for name in LAUNCHED):
            raise UserError(
                "launch with torchrun: torchrun --nproc_per_node 1 -m flame_ext.train --job.config_file configs/debug.toml"
            )
        config = parse(args)
        code = 1
        code = _train(config)
    except UserError as e:
        print(f"error: {e}", file=sys.stderr, flush=True)
        note_exit_code(code)
        raise SystemExit(code) from e
    except SystemExit as e:  # a command line that cannot be parsed
        if isinstance(e.code, int) and e.code:
            note_exit_code(e.code)
        raise
    if code:
        note_exit_code(code)
        raise SystemExit(code)


def command() -> NoReturn:
    """Runs :func:`main` and ends the process without ending the interpreter, in which a thread of gloo or NCCL that drops its last
    reference to a tensor aborts. What ends with an interpreter is done before: handlers of ``atexit``, and all output.
    """
    code = 0
    try:
        main()
    except SystemExit as e:
        code = e.code if isinstance(e.code, int) else int(e.code is not None)
    except BaseException:
        sys.excepthook(*sys.exc_info())
        code = 1
    for end in (atexit._run_exitfuncs, logging.shutdown, sys.stdout.flush, sys.stderr.flush):
        with suppress(Exception):  # such as a pipe that nobody reads any more
            end()
    os._exit(code)


if __name__ == "__main__":
    command()
