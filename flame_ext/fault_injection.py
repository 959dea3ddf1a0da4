"""Marks points at which a test can kill a process, by setting ``FLAME_EXT_FAULT``."""

import os
import signal

FAULT_VARIABLE = "FLAME_EXT_FAULT"


def fault_point(name: str) -> None:
    """Kill this process (SIGKILL) if ``FLAME_EXT_FAULT`` is ``name``, or ``name:rank`` with its rank."""
    wanted, _, rank = os.environ.get(FAULT_VARIABLE, "").partition(":")
    if wanted == name and rank in ("", os.environ.get("RANK", "0")):
        os.kill(os.getpid(), signal.SIGKILL)
