"""The parts of :mod:`tests.benchmarks.accelerator`: ``python -m tests.benchmarks.on_device SCRATCH QUICK PART [ARGUMENT ...]``.

Each writes its results into SCRATCH as lines of JSON: a "row" of the steps, the time of a "loss", or a "check" that "holds" or not.
QUICK = 1 takes tiny sizes, for a CPU.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from flame_ext.host.device import prepare_host
from tests.benchmarks import device_checks as checks
from tests.benchmarks import device_times as times
from tests.benchmarks.machine import Machine

_FUNCTIONS = (
    checks.debug,
    checks.parity,
    checks.masks,
    checks.saving,
    times.losses,
    times.backbone,
    times.steps,
    times.seeding,
)
PARTS = {function.__name__: function for function in _FUNCTIONS}


def main() -> None:
    scratch, quick, part, *arguments = sys.argv[1:]
    prepare_host()
    machine = Machine(Path(scratch), quick == "1")
    with (machine.scratch / f"{' '.join([part, *arguments])}.jsonl").open("a") as results:
        for found in PARTS[part](machine, *arguments):
            print(json.dumps(found), file=results, flush=True)


if __name__ == "__main__":
    main()
