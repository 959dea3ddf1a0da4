"""Describes the tensors that transformers makes of stored ones while it loads, and of the model's while it saves.

Its own operations do it, on tensors without values (sources/traced.py).
"""

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from copy import deepcopy
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import torch
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.core_model_loading import MergeModulelist, WeightConverter, revert_weight_conversion

from flame_ext.errors import CheckpointError, SeedError
from flame_ext.model.hf_causal_lm import HFCausalLM
from flame_ext.seeding.accounting import SOURCE_DTYPES
from flame_ext.seeding.sources.boxes import Box, full_box, tiles_exactly
from flame_ext.seeding.sources.safe_files import some
from flame_ext.seeding.sources.source import TensorEntry, dtype_name, rearranged, traced
from flame_ext.seeding.sources.traced import TracedTensor, UnknownRearrangement


def converted(
    path: Path,
    name: str,
    stored: Mapping[str, Mapping[str, TensorEntry]],
    converter: WeightConverter,
    shapes: Mapping[str, tuple[int, ...]],
    config: PreTrainedConfig | None,
) -> dict[str, TensorEntry]:
    """Return the tensors of the model that a converter makes of stored ones.

    Args:
        name: of the first of them.
        stored: the converter's source patterns to the tensors whose keys match, by key, in natural order.
        shapes: of the model's tensors.

    Raises SeedError if one is missing, is of another kind than the others, or the converter does more than to rearrange elements.
    """
    _require_complete(path, name, stored, converter, shapes.get(name))
    converter = deepcopy(converter)
    for pattern, entries in stored.items():
        for key, entry in entries.items():
            converter.add_tensor(name, key, pattern, cast(Any, traced(entry)))
    # Some operations look up how large the parts of the result are.
    model: Any = SimpleNamespace(get_parameter=lambda key: torch.empty(shapes[key], device="meta"))
    first = next(entry for entries in stored.values() for entry in entries.values())
    operations = ", ".join(type(operation).__name__ for operation in converter.operations)
    made_of = f"{path}: {name!r} is made of {first.key!r} in {first.place} and others by transformers ({operations})"
    try:
        made: dict[str, Any] = converter.convert(name, model=model, config=config)
        tensors = {key: value[0] if isinstance(value, list) else value for key, value in made.items()}
        _require_all_used(tensors.values(), [entry for entries in stored.values() for entry in entries.values()])
    except UnknownRearrangement as e:
        raise SeedError(
            f"{made_of}, which cannot be followed without their values: {e}; load the model with from_pretrained, and save its "
            "state_dict() with torch.distributed.checkpoint as a source"
        ) from e
    except Exception as e:  # what an operation makes of tensors that do not fit together may be anything
        raise SeedError(f"{made_of}, and they do not fit together: {e}; copy the source again") from e
    return {key: rearranged(tensor) for key, tensor in tensors.items()}


def _require_all_used(made: Iterable[TracedTensor], stored: list[TensorEntry]) -> None:
    """Raise UnknownRearrangement unless the tensors consist of every element of the stored ones, exactly once."""
    boxes: dict[str, list[Box]] = {entry.key: [] for entry in stored}
    for tensor in made:
        for part in tensor.parts:
            boxes[part.of.key].append(part.box_of)
    for entry in stored:
        if not tiles_exactly(full_box(entry.shape), boxes[entry.key]):
            raise UnknownRearrangement(f"elements of {entry.key!r} are left out or repeated")


def _require_complete(
    path: Path,
    name: str,
    stored: Mapping[str, Mapping[str, TensorEntry]],
    converter: WeightConverter,
    shape: tuple[int, ...] | None,
) -> None:
    """Raise SeedError unless the tensors of each pattern are as many as the model stacks, in their order, and of one kind."""
    stacks = next((operation for operation in converter.operations if isinstance(operation, MergeModulelist)), None)
    count = shape[stacks.dim] if stacks is not None and shape else None
    missing: list[str] = []  # The first ones of each pattern: a model may claim any number
    lacking = 0
    for pattern in converter.source_patterns:
        entries = stored.get(pattern, {})
        numbers = {_number(pattern, key): key for key in entries}
        _require_order(path, name, pattern, [*entries])
        if count is not None and "*" in pattern:
            _require_below(path, name, numbers, count)
            absent = (number for number in range(count) if number not in numbers)
            missing += [_key(pattern, number, stored) for number in islice(absent, 8)]
            lacking += count - len(numbers)
        elif stacks is not None and not entries:
            missing, lacking = [*missing, _key(pattern, None, stored)], lacking + 1
        _require_one_kind(path, name, [*entries.values()])
    if missing:
        raise SeedError(
            f"{path}: {name!r} of the model is made of tensors that are missing ({lacking}): {some(map(repr, missing))}; copy "
            "the source again"
        )


def _require_order(path: Path, name: str, pattern: str, keys: list[str]) -> None:
    """Raise SeedError unless the numbers in the keys rise; a key without one comes first."""
    numbers = [_number(pattern, key) for key in keys]
    if numbers != sorted({*numbers}, key=lambda number: -1 if number is None else number):
        raise SeedError(
            f"{path}: {some(map(repr, keys))}: some are the same part of {name!r} of the model, or two spellings put them out of "
            "order; keep one of each, in one spelling"
        )


def _require_below(path: Path, name: str, numbers: Mapping[int | None, str], count: int) -> None:
    """Raise SeedError if a key, here by its number, has none or one beyond the model's ``count``."""
    if beyond := [key for number, key in numbers.items() if number is None or number >= count]:
        raise SeedError(f"{path}: {some(map(repr, beyond))}: {name!r} of the model is made of {count} of these")


def _require_one_kind(path: Path, name: str, entries: list[TensorEntry]) -> None:
    """Raise SeedError unless the tensors have elements, and one shape and dtype, or dtypes that can be cast alike."""
    if not entries:
        return
    (usual, _), *_ = Counter((entry.shape, entry.dtype) for entry in entries).most_common(1)
    for entry in entries:
        castable = entry.dtype == usual[1] or {entry.dtype, usual[1]} <= {*SOURCE_DTYPES}
        if entry.shape != usual[0] or not castable or 0 in entry.shape:
            raise SeedError(
                f"{path}: {entry.key!r} in {entry.place} is {dtype_name(entry.dtype)} {list(entry.shape)}, the most of its kind are "
                f"{dtype_name(usual[1])} {list(usual[0])}, and {name!r} of the model is made of all of them; copy the source again"
            )


def _matched(pattern: str, key: str) -> re.Match[str] | None:
    return re.search(pattern.replace("*", r"(\d+)"), key)


def _number(pattern: str, key: str) -> int | None:
    """Return the number that a pattern's ``*`` stands for in a key; None if it has none."""
    found = _matched(pattern, key) if "*" in pattern else None
    return int(found[1]) if found else None


def _key(pattern: str, number: int | None, stored: Mapping[str, Mapping[str, TensorEntry]]) -> str:
    """Return the key of a pattern's tensor, with the rest as in the keys of the others."""
    new = (pattern if number is None else pattern.replace("*", str(number))).replace("\\", "")
    like, key = next((other, key) for other, entries in stored.items() for key in entries)
    found = _matched(like, key)
    return new if found is None else key[: found.start()] + new + key[found.end() :]


def in_files(model: HFCausalLM, tensors: Mapping[str, TracedTensor]) -> dict[str, TracedTensor]:
    """Return the tensors, by the model's keys, as the architecture's ``save_pretrained`` would write them, by the files' keys.

    Those of heads stay as they are. Raises CheckpointError if transformers does more than to rearrange elements.
    """
    heads = {key: tensor for key, tensor in tensors.items() if key.split(".")[0] in model.heads}
    backbone: Any = {key: tensor for key, tensor in tensors.items() if key not in heads}
    try:
        return {**revert_weight_conversion(cast(PreTrainedModel, model), backbone), **heads}
    except UnknownRearrangement as e:
        raise CheckpointError(
            f"{model.architecture} cannot be exported: what transformers does as it saves it cannot be followed: {e}; set "
            "checkpoint.last_save_in_hf = false and export.interval = 0"
        ) from e
