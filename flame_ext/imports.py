"""Importing much at once."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def without_collection() -> Iterator[None]:
    """Import in its body. What is imported stays, and looking for garbage among it, again and again, takes a quarter of the time
    that the imports of torch, transformers and the host take.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            # Together: into the oldest generation, where it would come to lie, without being looked at on the way.
            gc.freeze()
            gc.unfreeze()
            gc.enable()
