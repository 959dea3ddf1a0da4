"""Describes a checkpoint from headers (layout, groups of tensors, ties, configuration) and compares two. Imports no torchtitan."""

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flame_ext.checkpoint.lineage import read_steps
from flame_ext.checkpoint.steps import MANIFEST_NAME, read_manifest
from flame_ext.errors import CheckpointError, ConfigError, SeedError, UserError
from flame_ext.heads.names import is_head_key
from flame_ext.object_stores import is_url
from flame_ext.seeding.sources.hub import locate
from flame_ext.seeding.sources.open import open_source
from flame_ext.seeding.sources.safe_files import TOKENIZER_FILES, read_json
from flame_ext.seeding.sources.source import Source, TensorEntry, dtype_name, read_tensor, same_bits

_CHUNK = 2**22  # elements that are compared at a time


@dataclass(frozen=True)
class Description:
    """Everything that headers say about a path."""

    source: Source  # all tensors at the path, under the files' names
    problems: list[str]  # why it is not what it seems to be, a line each
    facts: list[str]  # other remarks, a line each
    groups: Mapping[str, list[str]]  # "backbone", "heads", "optimizer" or "rest" to keys, if there are any
    model_type: str | None  # as in config.json
    tokenizer: list[str]  # names of the tokenizer's files
    tied: bool | None  # whether config.json ties the embeddings; None without one
    step: int | None  # number of a complete training step


def folder_of(path: str, allow_pickle: bool = False) -> Path:
    """Returns the local folder of a path, ``hf://`` address or URL, as the trainer locates a source; a SeedError without one."""
    folder, _ = locate(path, allow_pickle, with_tokenizer=is_url(path))
    if not folder.is_dir():
        found = f"is a file; name its folder, {folder.parent}" if folder.exists() else "does not exist"
        raise SeedError(f"{path}: {found}")
    return folder


def describe(path: str, allow_pickle: bool = False, follow_links: bool = False) -> Description:
    """Describes what a job can be seeded from, or the newest step of a dump folder; raises a UserError if there is none."""
    folder, problems, facts = _newest_step(folder_of(path, allow_pickle))
    source = open_source(folder, allow_pickle, follow_links)
    facts += [f"passed over: {name}" for name in source.passed_over]
    if source.objects:
        facts.append(f"not tensors: {_by_first_part(source.objects)}")
    step: int | None = None
    if (folder / MANIFEST_NAME).exists():
        try:
            manifest = read_manifest(folder)
            step = manifest.get("step")
            facts.append(f"a complete step {step} of {manifest.get('world_size')} ranks, run {manifest.get('run')}")
        except CheckpointError as e:
            problems.append(f"not a complete step: {e}")
    elif folder.name.startswith("step-") and source.layout.startswith("dcp"):
        facts.append(f"no {MANIFEST_NAME}: not a step of this trainer, which would not resume it")
    config = folder / "config.json"
    fields = read_json(config, "file") if config.is_file() else {}
    names = source.model_part().entries
    tied = _ties(folder, fields) if fields else None
    if tied and "lm_head.weight" in names:
        facts.append("lm_head.weight is there though config.json ties it; it has to equal the input embedding")
    if fields and not tied and not any("lm_head" in name or "embed_out" in name for name in names):
        problems.append("config.json does not tie the embeddings, and there is no output embedding")
    tokenizer = [name for name in TOKENIZER_FILES if (folder / name).is_file()]
    groups = _groups(source, names)
    return Description(source, problems, facts, groups, fields.get("model_type"), tokenizer, tied, step)


@dataclass(frozen=True)
class Difference:
    """One tensor that differs between two sources."""

    name: str
    kind: str  # "missing" (only in the first), "unexpected" (only in the second), "shape", "dtype" or "values"
    first: str
    second: str
    max_abs: float | None = None
    mean_abs: float | None = None


def compare_headers(first: Mapping[str, TensorEntry], second: Mapping[str, TensorEntry]) -> list[Difference]:
    """Compares names, shapes and dtypes; returns at most one difference for each name, sorted by name."""
    found: list[Difference] = []
    for name in sorted({*first, *second}):
        a, b = first.get(name), second.get(name)
        if a is None or b is None:
            kind = "missing" if b is None else "unexpected"
        else:
            kind = "shape" if a.shape != b.shape else "dtype" if a.dtype != b.dtype else ""
        if kind:
            found.append(Difference(name, kind, _described(a), _described(b)))
    return found


def compare_values(first: Source, second: Source, names: Iterable[str]) -> Iterator[Difference]:
    """Compares values of tensors that both sources have in one shape, one tensor of each in memory at a time. In one dtype, bits
    are compared: NaN equals only NaN of the same bits, and 0.0 differs from -0.0. In two dtypes, values are.
    """
    for name in names:
        if difference := _compare_tensors(name, read_tensor(first, name), read_tensor(second, name)):
            yield difference


def _compare_tensors(name: str, a: Tensor, b: Tensor) -> Difference | None:
    """Compares two tensors in a function of its own, so that they are freed before the next two are read."""
    if a.dtype == b.dtype and same_bits(a, b):
        return None
    wide = torch.complex128 if a.is_complex() or b.is_complex() else torch.float64
    largest, total = 0.0, 0.0
    for x, y in zip(
        a.reshape(-1).split(_CHUNK), b.reshape(-1).split(_CHUNK), strict=True
    ):  # keeps the wide copies small
        difference = (x.to(wide) - y.to(wide)).abs()
        maximum = difference.max().item() if len(x) else 0.0
        largest = maximum if math.isnan(maximum) else max(largest, maximum)  # max returns a NaN that comes first
        total += difference.sum().item()
    if a.dtype != b.dtype and largest == 0.0:
        return None
    return Difference(name, "values", dtype_name(a.dtype), dtype_name(b.dtype), largest, total / max(1, a.numel()))


def _described(entry: TensorEntry | None) -> str:
    return "absent" if entry is None else f"{dtype_name(entry.dtype)} {list(entry.shape)}"


def differences(first: Description, second: Description) -> tuple[list[Difference], Source, Source, list[str]]:
    """Compares the models of two paths from headers; if names differ, under those of the model of a ``config.json`` if one has it.
    Returns the differences, both sources under the names that were compared, and the names that both have in one shape.
    """
    a, b = first.source.model_part(), second.source.model_part()
    found = compare_headers(a.entries, b.entries)
    config = next((d.source.path for d in (first, second) if d.model_type is not None), None)
    if config is not None and any(d.kind in ("missing", "unexpected") for d in found):
        try:
            from flame_ext.seeding.names import in_model_names  # here, since it imports transformers
            from flame_ext.tools.architecture import load_architecture  # here, since it imports torchtitan

            model = load_architecture(config, tensors=max(len(a.entries), len(b.entries)))
            a, b = (model.tied_once(in_model_names(source, model.names)) for source in (first.source, second.source))
            found = compare_headers(a.entries, b.entries)
        except UserError:
            pass  # an unknown model: the files' names are compared
    unlike = {d.name for d in found if d.kind != "dtype"}
    return found, a, b, sorted((a.entries.keys() & b.entries.keys()) - unlike)


def _newest_step(folder: Path) -> tuple[Path, list[str], list[str]]:
    """Returns the newest complete step of a dump or checkpoint folder, else the folder; with problems and facts."""
    # Any other subfolder may be the run's checkpoint.folder.
    others = sorted(path for path in folder.iterdir() if path.is_dir() and path.name != "checkpoint")
    for place in (folder / "checkpoint", folder, *others):
        found = read_steps(place)
        if found.steps:
            numbers = ", ".join(str(step.step) for step in found.steps)
            problems = [f"passed over: {place / line}" for line in found.passed_over]
            return found.current[-1].path, problems, [f"steps in {place}: {numbers}; this is the newest"]
        if found.passed_over and place == folder / "checkpoint":
            raise SeedError(f"{place}: no complete step: {'; '.join(found.passed_over)}")
    return folder, [], []


def _ties(folder: Path, fields: Mapping[str, Any]) -> bool:
    """Whether a ``config.json`` ties the embeddings; if it does not say, its model type's default."""
    from flame_ext.hf_config import load_hf_config  # here, since it imports transformers

    try:
        config = load_hf_config(str(folder))
    except ConfigError:  # an unknown model
        return bool(fields.get("tie_word_embeddings", True))
    return bool(getattr(config.get_text_config(), "tie_word_embeddings", True))


def _by_first_part(keys: Iterable[str]) -> str:
    """``optimizer.* (391), step``: a training step has one such key for each option of each parameter."""
    parts: dict[str, list[str]] = defaultdict(list)
    for key in sorted(keys):
        parts[key.split(".")[0]].append(key)
    return ", ".join(held[0] if len(held) == 1 else f"{part}.* ({len(held)})" for part, held in parts.items())


def _groups(source: Source, model: Mapping[str, TensorEntry]) -> dict[str, list[str]]:
    names = {entry.key: name for name, entry in model.items()}
    groups: dict[str, list[str]] = {name: [] for name in ("backbone", "heads", "optimizer", "rest")}
    for key in sorted(source.entries):
        if key in names:
            groups["heads" if is_head_key(names[key]) else "backbone"].append(key)
        else:
            groups["optimizer" if key.startswith("optimizer.") else "rest"].append(key)
    return {name: keys for name, keys in groups.items() if keys}
