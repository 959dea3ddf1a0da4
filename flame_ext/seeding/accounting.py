"""The exact account between what the model needs and what the source holds. Placement-free and file-free: pure data."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase

from flame_ext.errors import SeedError
from flame_ext.seeding.source import Source


@dataclass(frozen=True)
class Account:
    """Each key of the model and of the source, in exactly one list. Sorted, the same on every rank."""

    loaded: list[str]
    """In the model and in the source."""
    initialised: list[str]
    """In the model alone, and declared new."""
    tied: list[str]
    """Other names of a parameter of the model. Where the source holds one too, it has to be equal."""
    buffers: list[str]
    """Computed with the model, in no state dict."""
    ignored: list[str]
    """In the source alone, and declared to be ignored."""


def account(
    shapes: Mapping[str, tuple[int, ...]],
    tied: Mapping[str, str],
    computed_buffers: Collection[str],
    initialisable: Collection[str],
    source: Source,
    new_parameters: Iterable[str],
    ignore_source_keys: Iterable[str],
) -> Account:
    """Match the model's keys with the source's, before any weight is read.

    Args:
        shapes: key to shape of everything in the model's state dict, each tied parameter once.
        tied: name of a tied parameter to the key in ``shapes`` that it shares its values with.
        computed_buffers: names of the buffers outside the state dict.
        initialisable: keys that have an initialisation.
        source: from :func:`flame_ext.seeding.source.open_source`.
        new_parameters: patterns of the keys that may be missing from the source.
        ignore_source_keys: patterns of the source's keys that may be left unread.

    Raises:
        SeedError: one message with every missing, unexpected or misshapen key.
    """
    new_parameters, ignore_source_keys = list(new_parameters), list(ignore_source_keys)
    loaded, initialised, ignored, problems = [], [], [], []
    for key, shape in sorted(shapes.items()):
        # A tied weight may be saved under any of its names.
        names = [key, *sorted(alias for alias, owner in tied.items() if owner == key)]
        held = next((name for name in names if name in source.entries), None)
        if held is not None:
            loaded.append(key)
            for name in names:
                entry = source.entries.get(name)
                if entry is not None and entry.shape != shape:
                    problems.append(_misshapen(name, shape, entry.shape, entry.file.name))
        elif _matches(key, new_parameters) and key in initialisable:
            initialised.append(key)
        elif _matches(key, new_parameters):
            problems.append(
                f"{key!r} {list(shape)} is missing from the source; seed.new_parameters matches it, but it belongs to the "
                "backbone, which has no initialisation here: narrow the pattern"
            )
        else:
            problems.append(
                f"{key!r} {list(shape)} is missing from the source; if it is meant to start from its initialisation, "
                "declare it in seed.new_parameters"
            )
    for key, entry in sorted(source.entries.items()):
        if key in shapes or key in tied:
            continue
        if _matches(key, ignore_source_keys):
            ignored.append(key)
        else:
            problems.append(
                f"{key!r} {list(entry.shape)} in {entry.file.name} is not in the model; if it is to be left out, "
                f'add it to seed.ignore_source_keys = ["{key}"]'
            )
    if problems:
        shown = problems[:10] + ([f"… and {len(problems) - 10} more"] if len(problems) > 10 else [])
        raise SeedError(f"{source.path} does not fit the model:\n  - " + "\n  - ".join(shown))
    return Account(loaded, initialised, sorted(tied), sorted(computed_buffers), ignored)


def _matches(key: str, patterns: list[str]) -> bool:
    return any(fnmatchcase(key, pattern) for pattern in patterns)


def _misshapen(name: str, expected: tuple[int, ...], found: tuple[int, ...], file: str) -> str:
    message = f"{name!r}: shape {list(found)} in {file}, the model has {list(expected)}"
    if expected == found[::-1]:
        return message + " (transposed)"
    if len(expected) == len(found) and expected[1:] == found[1:]:
        return (
            message
            + f"; if this is the vocabulary, {found[0]} against {expected[0]}: set vocab_size in the model's config.json"
        )
    return message
