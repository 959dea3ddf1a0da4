"""The process of the command: how it ends, and what it leaves for the launching script."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from flame_ext.run.signals import EXIT_FILE_VARIABLE
from tests.ranks import REPOSITORY, train

ENDS = """
import atexit, ctypes, sys
import flame_ext.train as command

libc = ctypes.CDLL(None)
# As gloo's and NCCL's threads may do it while an interpreter ends.
libc.__cxa_atexit(ctypes.cast(libc.abort, ctypes.c_void_p), None, None)
atexit.register(lambda: print("an atexit handler"))

def main():
    print("output")
    {end}

command.main = main
command.command()
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("end", "code"), [("return", 0), ("raise SystemExit(75)", 75), ("raise RuntimeError('what failed')", 1)]
)
def test_nothing_can_abort_a_process_that_has_done_its_work(end: str, code: int) -> None:
    run = subprocess.run([sys.executable, "-c", ENDS.format(end=end)], cwd=REPOSITORY, capture_output=True, text=True)
    assert run.returncode == code, run.stderr[-2000:]
    assert run.stdout == "output\nan atexit handler\n"
    assert ("RuntimeError: what failed" in run.stderr) == (code == 1)


@pytest.mark.parametrize("options", [["--checkpoint.no-enable"], ["--training.nonsense=1"]])
def test_a_wrong_configuration_leaves_its_exit_code(dump_folder: Path, options: list[str]) -> None:
    file = dump_folder.parent / "code"
    run = train(dump_folder, *options, env={EXIT_FILE_VARIABLE: str(file)}, check=False)
    assert run.exit_codes == [2] and file.read_text() == "2\n"
