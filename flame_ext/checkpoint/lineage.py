"""Tells which steps of a folder follow from each other, and with which of them a run goes on.

A run's steps lie on numbered branches, and each manifest records its lineage: every branch that led to the step, with the step
after which it began. A branch begins where a run goes on from a step that ``checkpoint.load_step`` names, or from one behind the
newest (which is damaged); ``lineage.json`` records it before anything is trained, so that a kill at any moment finds it begun. The
lineage with the highest branch is the current one: "newest", "complete", deletion and exports go by its steps alone, and those of
a branch that was given up stay until a save takes their name, in one rename. A launcher repeats its command, so a ``load_step``
that began the current branch yields to the newer steps on it. Steps of older versions have no lineage and lie on branch 0.
"""

from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

from flame_ext.checkpoint.steps import MANIFEST_NAME, CompleteStep, find_steps
from flame_ext.errors import CheckpointError, UserError
from flame_ext.files import write_json
from flame_ext.seeding.sources.safe_files import read_json

LINEAGE_NAME = "lineage.json"


class Branch(NamedTuple):
    """A part of a lineage."""

    number: int  # higher than those of all branches before it in its folder
    after: int  # the step after which it begins; -1 = the seed
    load_step: int  # the checkpoint.load_step that is in force on it; -1 = none


Lineage = tuple[Branch, ...]
ROOT: Lineage = (Branch(0, -1, -1),)


def parse_lineage(value: Any) -> Lineage:
    """Returns the lineage in a manifest, or :data:`ROOT` for None; raises ValueError for anything else."""
    if value is None:
        return ROOT
    try:
        lineage = tuple(Branch(**branch) for branch in value)
    except TypeError as e:
        raise ValueError(f"lineage: {e}") from e
    if not lineage or any(type(number) is not int for branch in lineage for number in branch):
        raise ValueError("lineage: expected a list of branches, each with three integers")
    if any(a.number >= b.number or a.after >= b.after for a, b in pairwise(lineage)):
        raise ValueError("lineage: a branch does not come after the one before it")
    return lineage


def as_json(lineage: Lineage) -> list[dict[str, int]]:
    """Returns what :func:`parse_lineage` reads."""
    return [branch._asdict() for branch in lineage]


@dataclass(frozen=True)
class StepFolder:
    """The complete steps of a folder, oldest first, and which of them are of the current lineage."""

    path: Path
    steps: list[CompleteStep] = field(default_factory=list)
    passed_over: list[str] = field(default_factory=list)  # a line for each step-N that is not complete
    run: str | None = None
    lineage: Lineage = ROOT
    last_number: int = 0  # the highest number of a branch of this run

    @property
    def current(self) -> list[CompleteStep]:
        """The complete steps of the current lineage, oldest first."""
        return self.of(self.run, self.lineage)

    def of(self, run: str | None, lineage: Lineage) -> list[CompleteStep]:
        """Returns the complete steps of a run's lineage, oldest first."""
        return [s for s in self.steps if s.manifest.get("run") == run and _until(lineage, s.step) == lineage_of(s)]

    def given_up(self, run: str | None, lineage: Lineage) -> list[str]:
        """Returns the names of the complete steps that a run has gone back behind, and that are not of a lineage."""
        kept = {s.path for s in self.of(run, lineage)}
        return [s.path.name for s in self.of_any_branch(run) if s.path not in kept]

    def candidates(self, load_step: int) -> list[CompleteStep]:
        """Returns the steps with which a run may go on, the last one first in line; raises a CheckpointError if ``load_step`` is
        not there.
        """
        if load_step == -1 or self.yields(load_step):
            return [step for step in self.current if step.step >= load_step]
        if found := [step for step in self.steps if step.step == load_step]:
            return found
        there = ", ".join(str(step.step) for step in self.steps) or "none"
        missing = f"checkpoint.load_step = {load_step}: no complete step of that number in"
        raise CheckpointError(f"{missing} {self.path} (complete: {there})")

    def yields(self, load_step: int) -> bool:
        """Returns whether the current branch began with this ``checkpoint.load_step``, and goes on from it or a later step."""
        current = self.current
        return load_step != -1 and bool(current) and self.lineage[-1].load_step == load_step <= current[-1].step

    def lineage_from(self, step: CompleteStep, load_step: int) -> Lineage:
        """Returns the lineage of a run that goes on from ``step``, which is one of :meth:`candidates`."""
        asked = load_step != -1 and not self.yields(load_step)
        if not asked and step == self.current[-1]:
            return self.lineage
        of_run = step.manifest.get("run") == self.run
        others = [lineage_of(other) for other in self.of_any_branch(step.manifest.get("run"))]
        number = 1 + max([*(lineage[-1].number for lineage in others), self.last_number if of_run else 0])
        return (*lineage_of(step), Branch(number, step.step, load_step if asked else self.lineage[-1].load_step))

    def of_any_branch(self, run: str | None) -> list[CompleteStep]:
        """Returns the complete steps of a run."""
        return [step for step in self.steps if step.manifest.get("run") == run]


def read_steps(folder: Path) -> StepFolder:
    """Reads the manifests in a folder; raises a CheckpointError if its ``lineage.json`` cannot be read."""
    steps: list[CompleteStep] = []
    found, passed_over = find_steps(folder)
    for step in found:
        try:
            lineage_of(step)
            steps.append(step)
        except ValueError as e:
            passed_over.append(f"{step.path.name}: unreadable {MANIFEST_NAME} ({e})")
    run, recorded = _recorded(folder / LINEAGE_NAME)
    known = StepFolder(folder, steps, passed_over)
    if not steps:
        return known
    if not recorded or not known.of_any_branch(run):  # another run's, whose steps were moved away
        run, recorded = steps[-1].manifest.get("run"), ()
    lineages = {lineage_of(step) for step in known.of_any_branch(run)} | ({recorded} if recorded else set())
    newest_first = sorted(lineages, key=lambda lineage: lineage[-1].number, reverse=True)
    # The steps of the newest may have been moved away, and those of another branch be left.
    lineage = next(lineage for lineage in newest_first if known.of(run, lineage))
    return StepFolder(folder, steps, passed_over, run, lineage, newest_first[0][-1].number)


def record_lineage(folder: Path, run: str | None, lineage: Lineage) -> None:
    """Writes ``lineage.json``. For one rank."""
    write_json(folder / LINEAGE_NAME, {"run": run, "lineage": as_json(lineage)})


def lineage_of(step: CompleteStep) -> Lineage:
    """Returns the lineage in a step's manifest; raises ValueError if it is none, which :func:`read_steps` has ruled out."""
    lineage = parse_lineage(step.manifest.get("lineage"))
    if lineage[-1].after >= step.step:
        raise ValueError("lineage: its last branch begins after the step")
    return lineage


def _until(lineage: Lineage, step: int) -> Lineage:
    return tuple(branch for branch in lineage if branch.after < step)


def _recorded(file: Path) -> tuple[str | None, Lineage]:
    if not file.is_file():
        return None, ()
    try:
        values = read_json(file, "record")
        return values["run"], parse_lineage(values["lineage"])
    except (OSError, KeyError, ValueError, UserError) as e:
        remedy = "put a copy in its place, or remove it and name the step to go on from with checkpoint.load_step"
        raise CheckpointError(f"{file}: cannot be read ({e}): damaged file; {remedy}") from e
