"""``flame-ext``: thin commands over the library, one module each. Starts without torch and torchtitan."""

import argparse
import signal
import sys
from collections.abc import Sequence

from flame_ext.errors import UserError
from flame_ext.files import expanded
from flame_ext.run.process import end_with
from flame_ext.tools import convert, evaluate, information, init, inspect, plan, plot, upload

_PATHS = {"against", "assets", "config_file", "destination", "output", "path", "plan", "source"}
_STARTED_BY_RUNS = ("convert", "upload", "evaluate")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; returns its exit code, 2 after a UserError, which is printed in one line."""
    from flame_ext.lab import command as lab  # above this layer, and the only way into it

    about = (
        "Plan jobs; look at, compare, convert and upload checkpoints; draw the curves of runs; evaluate exports; measure what a model "
        "knows of the future; "
        "compare objectives."
    )
    parser = argparse.ArgumentParser(prog="flame-ext", description=about)
    commands = parser.add_subparsers(dest="command", required=True)
    for command in (plan, init, inspect, convert, upload, plot, evaluate, information, lab):
        command.add_parser(commands)
    for name in _STARTED_BY_RUNS:
        ends = "end with the process of this number, which started this one (Linux)"
        commands.choices[name].add_argument("--end-with", type=int, metavar="PID", help=ends)
    options, others = parser.parse_known_args(arguments)
    if others and not hasattr(options, "trainer_options"):
        parser.error(f"unrecognized arguments: {' '.join(others)}")
    options.trainer_options = others
    if getattr(options, "end_with", None):
        end_with(options.end_with)
    if arguments is None:  # `| head` ends the command by the signal, not with exit code 1, which means "differs"
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)
        sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]  # names in files may be any text
    try:
        for name in _PATHS.intersection(vars(options)):  # a shell leaves the ~ of --assets=~/model as it is
            if (value := getattr(options, name)) is not None:
                setattr(options, name, type(value)(expanded(str(value), f"--{name}")))
        return options.run(options)
    except UserError as e:
        print(f"error: {e}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
