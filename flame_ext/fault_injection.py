"""Moments at which a test can kill a process. Without the environment variable, nothing."""

from __future__ import annotations

import os
import signal

FAULT_VARIABLE = "FLAME_EXT_FAULT"


def fault_point(name: str) -> None:
    """SIGKILL this process if ``FLAME_EXT_FAULT`` is ``name``, or ``name:rank`` with its rank. For tests alone."""
    wanted, _, rank = os.environ.get(FAULT_VARIABLE, "").partition(":")
    if wanted == name and rank in ("", os.environ.get("RANK", "0")):
        os.kill(os.getpid(), signal.SIGKILL)
