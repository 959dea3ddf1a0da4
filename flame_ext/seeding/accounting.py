"""The exact account between what the model needs and what the source holds. Placement-free and file-free: pure data."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch

from flame_ext.errors import SeedError
from flame_ext.seeding.sources.source import Source, TensorEntry

# What a weight can be seeded from: numbers that mean themselves. Quantised ones mean something only with their scales.
SOURCE_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)

_SHOWN_PROBLEMS = 10


@dataclass(frozen=True)
class ModelKey:
    """What the model needs under one key."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    is_vocabulary: bool = False
    """Whether its first dimension is the vocabulary: an input or output embedding."""


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
    model: Mapping[str, ModelKey],
    tied: Mapping[str, str],
    computed_buffers: Collection[str],
    initialisable: Collection[str],
    source: Source,
    new_parameters: Iterable[str],
    ignore_source_keys: Iterable[str],
) -> Account:
    """Match the model's keys with the source's, before any weight is read.

    Args:
        model: everything in the model's state dict, each tied parameter once.
        tied: name of a tied parameter to the key in ``model`` that it shares its values with.
        computed_buffers: names of the buffers outside the state dict.
        initialisable: keys that have an initialisation.
        source: what lies there, under the model's names.
        new_parameters: patterns of the keys that may be missing from the source.
        ignore_source_keys: patterns of the source's keys that may be left unread.

    Raises:
        SeedError: one message with every missing, unexpected, misshapen or unreadable key.
    """
    new_parameters, ignore_source_keys = list(new_parameters), list(ignore_source_keys)
    loaded, initialised, ignored, problems = [], [], [], []
    for key, needed in sorted(model.items()):
        # A tied weight may be saved under any of its names.
        names = [key, *sorted(alias for alias, owner in tied.items() if owner == key)]
        held = [source.entries[name] for name in names if name in source.entries]
        if held:
            loaded.append(key)
            problems += [problem for entry in held for problem in _misfits(entry, needed)]
        elif _matches(key, new_parameters) and key in initialisable:
            initialised.append(key)
        elif _matches(key, new_parameters):
            problems.append(
                f"{key!r} {list(needed.shape)} is missing from the source; seed.new_parameters matches it, but it belongs to "
                "the backbone, which has no initialisation here: narrow the pattern"
            )
        else:
            problems.append(
                f"{key!r} {list(needed.shape)} is missing from the source; if it is meant to start from its initialisation, "
                "declare it in seed.new_parameters"
            )
    unexpected = []
    for name, entry in sorted(source.entries.items()):
        if name in model or name in tied:
            continue
        if _matches(entry.key, ignore_source_keys) or _matches(name, ignore_source_keys):
            ignored.append(entry.key)
        else:
            unexpected.append(entry.key)
            problems.append(f"{entry.key!r} {list(entry.shape)} in {entry.place} is not in the model")
    for key, file in sorted(source.objects.items()):
        if _matches(key, ignore_source_keys):
            ignored.append(key)
        else:
            unexpected.append(key)
            problems.append(f"{key!r} in {file.name} is not a tensor")
    if problems:
        shown = problems[:_SHOWN_PROBLEMS]
        if len(problems) > _SHOWN_PROBLEMS:
            shown.append(f"… and {len(problems) - _SHOWN_PROBLEMS} more")
        if unexpected:
            patterns = ", ".join(f'"{pattern}"' for pattern in _patterns(unexpected))
            shown.append(f"to leave out what is not in the model: seed.ignore_source_keys = [{patterns}]")
        raise SeedError(f"{source.path} does not fit the model:\n  - " + "\n  - ".join(shown))
    return Account(loaded, initialised, sorted(tied), sorted(computed_buffers), sorted(ignored))


def _matches(key: str, patterns: list[str]) -> bool:
    return any(fnmatchcase(key, pattern) for pattern in patterns)


def _patterns(keys: Iterable[str]) -> list[str]:
    """One pattern for keys that differ in numbers alone."""
    groups: dict[str, list[str]] = {}
    for key in keys:
        groups.setdefault(re.sub(r"(?<=\.)\d+(?=\.|$)", "*", key), []).append(key)
    return [pattern if len(group) > 1 else group[0] for pattern, group in groups.items()]


def _misfits(entry: TensorEntry, needed: ModelKey) -> Iterable[str]:
    """What keeps one tensor of the source out of the model."""
    # An integer buffer is the same integers in the model, or nothing.
    if entry.dtype not in SOURCE_DTYPES and (entry.dtype != needed.dtype or needed.dtype.is_floating_point):
        yield (
            f"{entry.key!r} in {entry.place} has dtype {_name(entry.dtype)}; only unquantised weights can be seeded from "
            f"({', '.join(map(_name, SOURCE_DTYPES))}): dequantise the model first"
        )
    if entry.shape != needed.shape:
        yield _misshapen(entry, needed)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _misshapen(entry: TensorEntry, needed: ModelKey) -> str:
    found, expected = entry.shape, needed.shape
    message = f"{entry.key!r}: shape {list(found)} in {entry.place}, the model has {list(expected)}"
    if needed.is_vocabulary and len(found) == len(expected) and found[1:] == expected[1:]:
        return (
            f"{message}: a vocabulary of {found[0]} in the source, of {expected[0]} in the model. Set vocab_size = {found[0]} "
            "in config.json at model.hf_assets_path (rows beyond the tokenizer's are padding and do no harm), or save the "
            f"source anew after resize_token_embeddings({expected[0]})"
        )
    if expected == found[::-1]:
        return message + " (transposed)"
    return message
