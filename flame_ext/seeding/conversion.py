"""Describes the tensors that transformers makes of stored ones while it loads, and of the model's while it saves.

Its own operations do it, on tensors without values (sources/traced.py).
"""

import re
from collections.abc import Mapping
from copy import deepcopy
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import torch
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.core_model_loading import MergeModulelist, WeightConverter, revert_weight_conversion

from flame_ext.errors import SeedError
from flame_ext.model.hf_causal_lm import HFCausalLM
from flame_ext.seeding.sources.safe_files import some
from flame_ext.seeding.sources.source import TensorEntry, rearranged, traced
from flame_ext.seeding.sources.traced import TracedTensor


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

    Raises SeedError if one is missing, has another shape than its like, or the converter does more than to rearrange elements.
    """
    _require_complete(path, name, stored, converter, shapes.get(name))
    converter = deepcopy(converter)
    for pattern, entries in stored.items():
        for key, entry in entries.items():
            converter.add_tensor(name, key, pattern, cast(Any, traced(entry)))
    # Some operations look up how large the parts of the result are.
    model: Any = SimpleNamespace(get_parameter=lambda key: torch.empty(shapes[key], device="meta"))
    try:
        made: dict[str, Any] = converter.convert(name, model=model, config=config)
    except Exception as e:
        first = next(entry for entries in stored.values() for entry in entries.values())
        operations = ", ".join(type(operation).__name__ for operation in converter.operations)
        raise SeedError(
            f"{path}: {name!r} is made of {first.key!r} in {first.place} and its like by an operation of transformers ({operations}) "
            f"that cannot be followed without their values: {e}; load the model with from_pretrained, and save its state_dict() as "
            "a source"
        ) from e
    tensors = {key: value[0] if isinstance(value, list) else value for key, value in made.items()}
    return {key: rearranged(tensor) for key, tensor in tensors.items()}


def _require_complete(
    path: Path,
    name: str,
    stored: Mapping[str, Mapping[str, TensorEntry]],
    converter: WeightConverter,
    shape: tuple[int, ...] | None,
) -> None:
    """Raise SeedError unless every pattern has its tensors, of one shape, and as many as the model stacks."""
    stacked = next((shape[op.dim] for op in converter.operations if shape and isinstance(op, MergeModulelist)), None)
    missing = []
    for pattern in converter.source_patterns:
        entries = {_number(pattern, key): entry for key, entry in stored.get(pattern, {}).items()}
        if len(entries) < len(stored.get(pattern, {})):
            keys = some(repr(entry.key) for entry in stored[pattern].values())
            raise SeedError(f"{path}: several of {keys} are the same part of {name!r} of the model; keep one of each")
        numbers = range(stacked) if stacked is not None and "*" in pattern else [None]
        missing += [_key(pattern, number, stored) for number in numbers if number not in entries]
        shapes = [entry.shape for entry in entries.values()]
        usual = max(shapes, key=shapes.count, default=())
        for entry in entries.values():
            if entry.shape != usual:
                raise SeedError(
                    f"{path}: {entry.key!r}: shape {list(entry.shape)} in {entry.place}, its like have {list(usual)}, and "
                    f"{name!r} of the model is made of all of them"
                )
    if missing:
        raise SeedError(
            f"{path}: {name!r} of the model is made of tensors that are missing ({len(missing)}): {some(map(repr, missing))}; copy "
            "the source again"
        )


def _matched(pattern: str, key: str) -> re.Match[str] | None:
    return re.search(pattern.replace("*", r"(\d+)"), key)


def _number(pattern: str, key: str) -> int | None:
    """Return the number that a pattern's ``*`` stands for in a key; None if it has none."""
    found = _matched(pattern, key) if "*" in pattern else None
    return int(found[1]) if found else None


def _key(pattern: str, number: int | None, stored: Mapping[str, Mapping[str, TensorEntry]]) -> str:
    """Return the key of a pattern's tensor, with the rest as in the keys of its like."""
    new = pattern if number is None else pattern.replace("*", str(number))
    like, key = next((other, key) for other, entries in stored.items() for key in entries)
    found = _matched(like, key)
    return new if found is None else key[: found.start()] + new + key[found.end() :]


def in_files(model: HFCausalLM, tensors: Mapping[str, TracedTensor]) -> dict[str, TracedTensor]:
    """Return the tensors, by the model's keys, as the architecture's ``save_pretrained`` would write them, by the files' keys."""
    return cast(
        dict[str, TracedTensor],
        revert_weight_conversion(cast(PreTrainedModel, model), cast(dict[str, torch.Tensor], {**tensors})),
    )
