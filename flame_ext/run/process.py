"""What a run needs of its process, and what it changes there."""

import ctypes
import gc
import logging
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from flame_ext.errors import UserError

LAUNCHED = ("RANK", "LOCAL_RANK", "WORLD_SIZE")
"""The variables that torchrun sets and that a run cannot do without."""


def environment_of_only_rank() -> dict[str, str]:
    """Returns the variables that torchrun sets for its only rank. Of its port nobody has to know: it is any that is free."""
    ranks = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}
    return ranks | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}


def end_with(parent: int, number: signal.Signals = signal.SIGKILL) -> None:
    """Lets the kernel signal this process when its ``parent`` ends, whichever way. Linux alone can; elsewhere it goes on."""
    if sys.platform != "linux":
        return
    ctypes.CDLL(None, use_errno=True).prctl(1, int(number))  # PR_SET_PDEATHSIG
    if os.getppid() != parent:  # it has ended before
        os.kill(os.getpid(), number)


def set_up_logging() -> None:
    """Prints what torchtitan logs, without the configurations that transformers reads: the logger of torchtitan is the root logger."""
    import transformers
    from torchtitan.tools.logging import init_logger

    init_logger()
    transformers.logging.set_verbosity(logging.WARNING)


@contextmanager
def left_as_found() -> Iterator[None]:
    """Lends the process to a run, which may be one of others: environment, logging, garbage collection and torch's choice of
    algorithms are as before afterwards. The only rank is launched as torchrun would launch it, and a process without handlers of
    logs gets torchtitan's for the time. Raises UserError if torchrun's variables are set in part.
    """
    import torch
    import transformers

    environment, collecting, root = dict(os.environ), gc.isenabled(), logging.getLogger()
    handlers, level, verbosity = [*root.handlers], root.level, transformers.logging.get_verbosity()
    deterministic, warn_only = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    cudnn = torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark
    if missing := [name for name in LAUNCHED if name not in environment]:
        if len(missing) < len(LAUNCHED):
            others = f"{', '.join(LAUNCHED)}: set all of torchrun's variables, or none for the only rank"
            raise UserError(f"{' and '.join(missing)} not set, of {others}")
        os.environ.update(environment_of_only_rank())
    if not handlers:
        set_up_logging()
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(environment)
        root.handlers[:] = handlers
        root.setLevel(level)
        transformers.logging.set_verbosity(verbosity)
        torch.use_deterministic_algorithms(deterministic, warn_only=warn_only)
        torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = cudnn
        if collecting:
            gc.enable()
        gc.collect()  # the model's memory is free at once
