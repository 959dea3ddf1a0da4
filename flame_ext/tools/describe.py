"""What lies at a path: layout, groups of tensors, ties, configuration."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flame_ext.checkpoint.steps import MANIFEST_NAME, find_steps, read_manifest
from flame_ext.errors import CheckpointError, ConfigError, SeedError, UserError
from flame_ext.heads.names import is_heads
from flame_ext.seeding.sources.dcp import DcpSource
from flame_ext.seeding.sources.open import open_source
from flame_ext.seeding.sources.safe_files import TOKENIZER_FILES, parse_json
from flame_ext.seeding.sources.source import Source, TensorEntry
from flame_ext.tools.compare import Difference, compare_headers
from flame_ext.tools.names import folder_of, plain

if TYPE_CHECKING:
    from flame_ext.tools.architecture import Architecture

GROUPS = ("backbone", "heads", "optimizer", "rest")


@dataclass(frozen=True)
class Description:
    """What lies at a path, from headers alone."""

    source: Source
    """With all that lies there, under the files' own names."""
    problems: list[str]
    """What keeps it from being what it seems to be, a line each."""
    facts: list[str]
    """What else there is to say, a line each."""
    groups: Mapping[str, list[str]]
    """Group to keys; see :data:`GROUPS`."""
    model_type: str | None = None
    """Of ``config.json``."""
    tokenizer: list[str] = field(default_factory=list)
    """Files of it."""
    tied: bool | None = None
    """What ``config.json`` says of the embeddings; None without one."""
    step: int | None = None
    """Of a complete training step."""


def describe(path: str, allow_pickle: bool = False) -> Description:
    """Describe a Hugging Face folder, an export, a DCP checkpoint, a training step, or the newest step of a dump folder.

    Raises:
        UserError: nothing that is known lies there, or it can not be read.
    """
    folder, problems, facts = _newest_step(folder_of(path, allow_pickle))
    source = open_source(folder, allow_pickle)
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
    elif folder.name.startswith("step-") and isinstance(source, DcpSource):
        facts.append(f"no {MANIFEST_NAME}: not a step of this trainer, which would not resume it")
    config = folder / "config.json"
    fields = parse_json(config.read_bytes(), config, "file") if config.is_file() else {}
    names = plain(source).entries
    tied = _ties(folder, fields) if fields else None
    if tied and "lm_head.weight" in names:
        facts.append("lm_head.weight is there though config.json ties it; it has to equal the input embedding")
    if fields and not tied and not any("lm_head" in name or "embed_out" in name for name in names):
        problems.append("config.json does not tie the embeddings, and there is no output embedding")
    return Description(
        source,
        problems,
        facts,
        _groups(source, names),
        fields.get("model_type"),
        [name for name in (*TOKENIZER_FILES, "tokenizer.model") if (folder / name).is_file()],
        tied,
        step,
    )


def _ties(folder: Path, fields: Mapping[str, Any]) -> bool:
    """What a ``config.json`` says of the embeddings; where it says nothing, its model type's default."""
    from flame_ext.hf_config import load_hf_config  # here, since it imports transformers

    try:
        config = load_hf_config(str(folder))
    except ConfigError:  # a model that is not known here
        return bool(fields.get("tie_word_embeddings", True))
    return bool(getattr(config.get_text_config(), "tie_word_embeddings", True))


def _by_first_part(keys: Iterable[str]) -> str:
    """``optimizer.* (391), step``: a training step has hundreds of them, one for each option of each parameter."""
    parts: dict[str, list[str]] = defaultdict(list)
    for key in sorted(keys):
        parts[key.split(".")[0]].append(key)
    return ", ".join(held[0] if len(held) == 1 else f"{part}.* ({len(held)})" for part, held in parts.items())


def _newest_step(folder: Path) -> tuple[Path, list[str], list[str]]:
    """The folder itself, or the newest complete step in it, if it is that of a run."""
    for place in (folder / "checkpoint", folder):
        steps, passed_over = find_steps(place)
        problems = [f"passed over: {place / line}" for line in passed_over]
        if steps:
            numbers = ", ".join(str(step.step) for step in steps)
            return steps[-1].path, problems, [f"steps in {place}: {numbers}; this is the newest"]
        if passed_over and place != folder:
            raise SeedError(f"{place}: no complete step: {'; '.join(passed_over)}")
    return folder, [], []


def _groups(source: Source, model: Mapping[str, TensorEntry]) -> dict[str, list[str]]:
    names = {entry.key: name for name, entry in model.items()}
    groups: dict[str, list[str]] = defaultdict(list)
    for key in sorted(source.entries):
        if key in names:
            groups["heads" if is_heads(names[key]) else "backbone"].append(key)
        else:
            groups["optimizer" if key.startswith("optimizer.") else "rest"].append(key)
    return {name: groups[name] for name in GROUPS if groups[name]}


def differences(first: Description, second: Description) -> tuple[list[Difference], Source, Source, list[str]]:
    """What differs between the models of two paths, from headers.

    If their names differ, and one of them has a ``config.json``, both are brought to its model's names, in which a tied
    parameter has one.

    Returns:
        The differences, both sources under the names that were compared, and the names that both have in one shape.
    """
    a, b = plain(first.source), plain(second.source)
    found = compare_headers(a.entries, b.entries)
    config = next((d.source.path for d in (first, second) if d.model_type is not None), None)
    if config is not None and any(d.kind in ("missing", "unexpected") for d in found):
        try:
            from flame_ext.tools.architecture import load_architecture  # here, since it imports the host

            architecture = load_architecture(config)
            a, b = (_under(source, architecture) for source in (first.source, second.source))
            found = compare_headers(a.entries, b.entries)
        except UserError:
            pass  # a model that is not known here: the files' own names have to do
    unlike = {d.name for d in found if d.kind != "dtype"}
    return found, a, b, sorted((a.entries.keys() & b.entries.keys()) - unlike)


def _under(source: Source, architecture: Architecture) -> Source:
    from flame_ext.seeding.key_names import in_model_names

    named = in_model_names(source, architecture.names)
    entries: dict[str, TensorEntry] = {}
    for name, entry in named.entries.items():
        entries.setdefault(architecture.model.tied_keys.get(name, name), entry)
    return replace(named, entries=entries)
