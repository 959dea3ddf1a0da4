"""How far a run is: one line a minute at most, from what is on the host anyway."""

import time
from collections.abc import Callable

from flame_ext.config.sections import FlameJobConfig

INTERVAL = 60.0  # seconds


class Progress:
    """Says how much of a run is left at the rate since the last time it said so.

    Args:
        config: of the run. ``training.steps`` may still be counted (``training.epochs``).
        clock: returns seconds.
    """

    def __init__(self, config: FlameJobConfig, clock: Callable[[], float] = time.perf_counter) -> None:
        self._config, self._clock = config, clock
        self._last: tuple[float, int, int] | None = None

    def line(self, step: int, tokens_seen: int) -> str | None:
        """Returns the line after a step in which ``tokens_seen`` were reached; None if it is not time, or nothing is left."""
        now, steps = self._clock(), self._config.training.steps
        if self._last is None:  # the first step has compiled, and waited for its data
            self._last = now, step, tokens_seen
        then, before, tokens = self._last
        done, left = step - before, steps - step
        if now - then < INTERVAL or done <= 0 or left <= 0:
            return None
        self._last = now, step, tokens_seen
        seconds = (now - then) / done
        tokens_left = round((tokens_seen - tokens) * left / done)
        line = f"{left:,} of {steps:,} steps left, {tokens_left:,} tokens, {_duration(left * seconds)}"
        if (save := self._next_save(step)) is not None:
            line += f"; next save after step {save:,}, in {_duration((save - step) * seconds)}"
        return line

    def _next_save(self, step: int) -> int | None:
        checkpoint = self._config.checkpoint
        if checkpoint.load_only:
            return None
        return min(self._config.training.steps, (step // checkpoint.interval + 1) * checkpoint.interval)


def _duration(seconds: float) -> str:
    """The two largest units of a time: 45 s, 3 min 20 s, 2 h 5 min, 3 d 4 h."""
    whole = round(seconds)
    for size, unit, part, of in ((86400, "d", 3600, "h"), (3600, "h", 60, "min"), (60, "min", 1, "s")):
        if whole >= size:
            return f"{whole // size} {unit} {whole % size // part} {of}"
    return f"{whole} s"
