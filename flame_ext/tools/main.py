"""``flame-ext``: thin commands over the library, a module each."""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Sequence

from flame_ext.errors import UserError
from flame_ext.tools import convert, inspect, plot

COMMANDS = (inspect, convert, plot)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command. Returns its exit code: 0 done, 2 if something can not be read or written, said in one line."""
    parser = argparse.ArgumentParser(
        prog="flame-ext", description="Look at, compare and convert checkpoints; draw the curves of runs."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    for command in COMMANDS:
        command.add_parser(commands)
    options = parser.parse_args(arguments)
    if (
        arguments is None
    ):  # a reader that leaves, `| head`, ends the command as it ends others, not with a 1 that means "differs"
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    try:
        return options.run(options)
    except UserError as e:
        print(f"error: {e}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
