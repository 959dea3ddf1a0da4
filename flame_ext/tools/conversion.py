"""Converts any layout of weights to any other: streamed, read back and compared, complete or absent."""

import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import CheckpointException, DefaultSavePlanner
from torch.distributed.checkpoint.metadata import MetadataIndex

from flame_ext.checkpoint.assets import code_stays, read_assets
from flame_ext.checkpoint.card import card_of_step
from flame_ext.checkpoint.export import ExportSpec, on_meta, require_written, write_hf
from flame_ext.checkpoint.export_folder import ExportFolder, Origin, origin_of
from flame_ext.checkpoint.files import StepWriter
from flame_ext.checkpoint.steps import MANIFEST_NAME, parse_manifest
from flame_ext.errors import CheckpointError, SeedError, UserError
from flame_ext.files import parse_size, write_json
from flame_ext.heads.names import is_head_key
from flame_ext.heads.registry import build_head
from flame_ext.hf_config import mark_direction
from flame_ext.model.dtypes import dtypes_in
from flame_ext.model.hf_causal_lm import HFCausalLM
from flame_ext.seeding.accounting import SOURCE_DTYPES, adapters, matches, what_to_do
from flame_ext.seeding.conversion import in_files
from flame_ext.seeding.names import in_model_names, parse_key_map, renamed
from flame_ext.seeding.sources.dcp import NESTED_PREFIX
from flame_ext.seeding.sources.open import open_source
from flame_ext.seeding.sources.safe_files import find_file, read_json, require_contained, some
from flame_ext.seeding.sources.source import (
    HEADS_FOLDER,
    Source,
    TensorEntry,
    read_tensor,
    rearranged,
    same_bits,
    traced,
)
from flame_ext.seeding.sources.traced import TracedTensor
from flame_ext.tools.architecture import Architecture, load_architecture
from flame_ext.tools.describe import folder_of

Layout = Literal["hf", "dcp", "dcp-nested"]
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Conversion:
    """Options of a conversion."""

    dtype: torch.dtype | None = None  # as from_pretrained(dtype=…); None = unchanged
    max_shard_size: str = "5GB"  # maximum size of a Hugging Face folder's files
    assets: Path | None = None  # folder with config.json, tokenizer and future_heads/config.json; None = the source
    head_arguments: dict[str, dict[str, Any]] | None = None  # by head, for build_head; None = the source or assets say
    key_map: tuple[str, ...] = ()  # as seed.key_map
    ignore_source_keys: tuple[str, ...] = ()  # as seed.ignore_source_keys
    allow_pickle: bool = False
    follow_links: bool = False
    trust_remote_code: bool = False
    replace: bool = False  # whether an older destination is replaced, once the new one is complete


@dataclass(frozen=True)
class Converted:
    """Result of a conversion: the source's layout, and the number of tensors and bytes that were written."""

    layout: str
    tensors: int
    nbytes: int
    seconds: float
    passed_over: tuple[str, ...]


def convert(
    path: str, destination: Path, to: Layout, options: Conversion, progress: Progress = lambda done, total: None
) -> Converted:
    """Writes the weights at ``path`` to ``destination``, and reads them back. The tensors of one Hugging Face file and two more
    are in memory at a time; for DCP, one tensor.

    Args:
        path: anything that a job can be seeded from; only the model is taken from a training step.
        to: "hf", "dcp" (flat, as in a training step) or "dcp-nested" (``{"model": …}``). DCP gets the keys of the model's
            state dict if its ``config.json`` is known, else the source's.
        progress: called with the bytes written so far and in all.

    Raises:
        UserError: ``destination`` exists, or something cannot be read or written; nothing new is at ``destination`` then.
    """
    begin = time.perf_counter()
    folder = folder_of(path, options.allow_pickle)
    if not options.replace and (destination.exists() or destination.is_symlink()):
        raise CheckpointError(
            f"{destination}: is there already and is not overwritten; name another folder or remove it"
        )
    if destination.resolve().is_relative_to(folder.resolve()):
        raise CheckpointError(f"{destination}: lies inside the source {folder}; name a folder beside it")
    rules = parse_key_map(options.key_map, "--key-map")
    source = renamed(open_source(folder, options.allow_pickle, options.follow_links), rules, "--key-map")
    source = _without(source, options.ignore_source_keys)
    assets = options.assets or source.path
    require_contained(assets, options.follow_links)
    origin = origin_of(folder) if to == "hf" else None
    vocab_size = _vocab_size(folder)
    if not (assets / "config.json").is_file() and (lines := adapters(source.entries.values())):
        raise SeedError(f"{source.path} does not hold a whole model: {lines[0]}")
    with _appearing(ExportFolder(destination, options.replace), origin) as temporary:
        if (assets / "config.json").is_file():
            architecture = load_architecture(assets, options.trust_remote_code, len(source.entries), vocab_size)
            source = _as_model(source, architecture, assets)
            if to == "hf":
                source, dtypes = _convert_to_hf(source, architecture, assets, temporary, options, progress)
            else:  # a strict load of a state dict expects a tied weight under each of its names
                tied = {name: source.entries[owner] for name, owner in architecture.model.tied_keys.items()}
                source = replace(source, entries={**source.entries, **tied})
                dtypes = _dtypes_to_write(source, options.dtype, architecture.model)
        elif to == "hf":
            raise SeedError(
                f"{assets}: no config.json, which a Hugging Face folder needs and DCP does not keep; name the folder of the "
                "model's config.json and tokenizer with --assets"
            )
        else:
            source = source.model_part()
            _require_tensors(source)
            dtypes = _dtypes_to_write(source, options.dtype)
        if to != "hf":
            _convert_to_dcp(source, temporary, to == "dcp-nested", dtypes, progress)
            _carry_assets(source.path, assets, temporary, options, vocab_size)
    nbytes = sum(tensor.nbytes for tensor in on_meta(source.entries, dtypes).values())
    return Converted(source.layout, len(source.entries), nbytes, time.perf_counter() - begin, source.passed_over)


def _without(source: Source, patterns: tuple[str, ...]) -> Source:
    """Leaves out the keys that match ``patterns``."""
    left_out = {key for key in source.entries if matches(key, patterns)}
    if not left_out:
        return source
    entries = {key: entry for key, entry in source.entries.items() if key not in left_out}
    said = f"{some(left_out)}: {len(left_out)} keys that --ignore-source-keys names"
    return replace(source, entries=entries, passed_over=(*source.passed_over, said))


def _vocab_size(folder: Path) -> int | None:
    """Returns the rows of a training step's embeddings, if its run let the vocabulary grow beyond ``config.json``'s."""
    rows = parse_manifest(folder).get("vocab_size") if (folder / MANIFEST_NAME).is_file() else None
    return rows if type(rows) is int and rows > 0 else None


def _carry_assets(source: Path, assets: Path, folder: Path, options: Conversion, vocab_size: int | None) -> None:
    """Copies configuration, tokenizer and the heads' arguments beside ``.metadata``, for the way back; no code is carried."""
    if (file := find_file(assets, "config.json", options.follow_links)) is not None:
        fields = code_stays(read_json(file, "file"), assets, options.trust_remote_code)
        text = fields.get("text_config")
        (text if isinstance(text, dict) else fields).update({} if vocab_size is None else {"vocab_size": vocab_size})
        if (reverse := _direction_of(source)) is not None:
            mark_direction(fields, reverse)
        write_json(folder / "config.json", fields)
    for name, content in read_assets(assets, options.trust_remote_code, options.follow_links).items():
        (folder / name).write_bytes(content)
    if (file := find_file(assets, f"{HEADS_FOLDER}/config.json", options.follow_links)) is not None:
        write_json(folder / HEADS_FOLDER / "config.json", read_json(file, "file"))


def _direction_of(folder: Path) -> bool | None:
    """Whether a step was trained with ``data.reverse``; None of a folder that is no step, of which its ``config.json`` says it."""
    if not (folder / MANIFEST_NAME).is_file():
        return None
    return bool((parse_manifest(folder).get("config") or {}).get("data.reverse"))


@contextmanager
def _appearing(place: ExportFolder, origin: Origin | None) -> Iterator[Path]:
    """Yields a temporary folder that gets its name at the end, or is removed after an error."""
    try:
        yield place.open()
        place.publish(origin)
    except OSError as e:
        raise CheckpointError(f"{place.final} cannot be written: {e}") from e
    finally:
        place.close()


def _convert_to_hf(
    source: Source, architecture: Architecture, assets: Path, folder: Path, options: Conversion, progress: Progress
) -> tuple[Source, dict[str, torch.dtype]]:
    """Returns the source under the keys that were written, and their dtypes."""
    parse_size(options.max_shard_size, "--max-shard-size")
    heads = {name: entry for name, entry in source.entries.items() if is_head_key(name)}
    backbone = {name: entry for name, entry in source.entries.items() if name not in heads}
    dtypes = _dtypes_to_write(source, options.dtype, architecture.model)
    spec = ExportSpec(
        config=architecture.model.model_args.load(),
        architecture=architecture.model.architecture,
        assets=read_assets(assets, options.trust_remote_code, options.follow_links),
        folder=assets,
        dtype=options.dtype or _dtype_of_model(backbone, architecture.model),
        heads=_head_arguments(source, heads, options) if heads else None,
        max_shard_size=options.max_shard_size,
        card=card_of_step(source.path),
        reverse=_direction_of(source.path),
    )
    stored = in_files(architecture.model, {name: traced(entry) for name, entry in backbone.items()})
    source = replace(source, entries={key: rearranged(tensor) for key, tensor in stored.items()} | heads)
    # Again, of tensors in the dtypes to write.
    cast = {name: TracedTensor.whole(entry.shape, dtypes[name], name) for name, entry in backbone.items()}
    written = {key: tensor.dtype for key, tensor in in_files(architecture.model, cast).items()}
    written |= {name: dtypes[name] for name in heads}
    described, read = _reader(source, written, progress)
    head_tensors = {name: described.pop(name) for name in heads}
    write_hf(described, head_tensors, read, folder, spec)
    return source, written


def _dtypes_to_write(
    source: Source, dtype: torch.dtype | None, model: HFCausalLM | None = None
) -> dict[str, torch.dtype]:
    """Maps each name to its dtype in ``--dtype``: that of ``from_pretrained(dtype=…)`` where the model is known."""
    held = {name: entry.dtype for name, entry in source.entries.items()}
    if dtype is None:
        return held
    if model is not None:
        return dtypes_in(model, dtype, held)
    return {name: dtype if own.is_floating_point else own for name, own in held.items()}


def _dtype_of_model(backbone: Mapping[str, TensorEntry], model: HFCausalLM) -> torch.dtype:
    """Returns the dtype of a model for its ``config.json``: that of all tensors but those which the architecture keeps in
    another one; float32 if there is no such dtype.
    """
    held = {name: entry.dtype for name, entry in backbone.items()}
    floating = sorted({dtype for dtype in held.values() if dtype.is_floating_point}, key=str)
    if len(floating) == 1:
        return floating[0]
    for dtype in floating:
        kept = dtypes_in(model, dtype, held) if dtype in SOURCE_DTYPES else {}
        if all(own in (dtype, kept.get(name)) for name, own in held.items()):
            return dtype
    return torch.float32


def _convert_to_dcp(
    source: Source, folder: Path, nested: bool, dtypes: Mapping[str, torch.dtype], progress: Progress
) -> None:
    described, read = _reader(source, dtypes, progress)
    write_dcp(described, read, folder, nested)
    written = open_source(folder).model_part()

    def same(name: str) -> bool:
        return same_bits(read_tensor(written, name), read_tensor(source, name).to(dtypes[name]))

    require_written(folder, written.entries, described, same)


def _reader(
    source: Source, dtypes: Mapping[str, torch.dtype], progress: Progress
) -> tuple[dict[str, Tensor], Callable[[str], Tensor]]:
    """Returns a source's tensors on meta in the dtypes to write, and a function that reads one of them."""
    described, done = on_meta(source.entries, dtypes), 0
    total = sum(tensor.nbytes for tensor in described.values())

    def read(name: str) -> Tensor:
        nonlocal done
        tensor = read_tensor(source, name).to(dtypes[name]).contiguous()
        done += tensor.nbytes
        progress(done, total)
        return tensor

    return described, read


def _as_model(source: Source, architecture: Architecture, assets: Path) -> Source:
    """Returns the source under the model's names, each tied tensor once; raises if it is another model, or tied tensors differ."""
    source = in_model_names(source, architecture.names)
    _require_tensors(source)
    once = architecture.tied_once(source)
    for name, entry in source.entries.items():
        owner = architecture.model.tied_keys.get(name, name)
        kept = once.entries[owner]
        if kept is not entry and not same_bits(read_tensor(source, name), read_tensor(once, owner)):
            raise SeedError(
                f"{source.path}: {kept.key!r} differs from {entry.key!r}, but config.json ties them (tie_word_embeddings); set "
                "it to false, or remove the one that is not meant"
            )
    backbone = {name: entry for name, entry in once.entries.items() if not is_head_key(name)}
    _require_shapes(backbone, architecture.shapes, source.path, f"is not the model of {assets}/config.json")
    return once


def _require_shapes(
    entries: Mapping[str, TensorEntry], shapes: Mapping[str, tuple[int, ...]], path: Path, message: str
) -> None:
    lines, unexpected = [], []
    for name in sorted({*entries, *shapes}):
        entry, shape = entries.get(name), shapes.get(name, ())
        if entry is None:
            lines.append(f"{name!r} {list(shape)} is missing")
        elif name not in shapes:
            unexpected.append(entry)
            lines.append(f"{entry.key!r} {list(entry.shape)} in {entry.place} is not in the model")
        elif entry.shape != shape:
            lines.append(f"{entry.key!r}: shape {list(entry.shape)} in {entry.place}, the model has {list(shape)}")
    if lines:
        more = [f"… and {len(lines) - 10} more"] if len(lines) > 10 else []
        raise SeedError("\n  - ".join([f"{path} {message}:", *lines[:10], *more, *what_to_do(unexpected)]))


def _require_tensors(source: Source) -> None:
    if source.objects:
        keys = ", ".join(repr(key) for key in sorted(source.objects)[:8])
        raise SeedError(f"{source.path}: holds what is not a tensor ({keys}), which no layout of weights can take")
    if not source.entries:
        raise SeedError(f"{source.path}: holds no tensor of a model")


def _head_arguments(source: Source, heads: Mapping[str, TensorEntry], options: Conversion) -> dict[str, dict[str, Any]]:
    """Returns the arguments of the source's heads; raises a SeedError if they are not known, or do not fit the tensors."""
    places = [place for place in (source.path, options.assets) if place is not None]
    files = [find_file(place, f"{HEADS_FOLDER}/config.json", options.follow_links) for place in places]
    manifest = source.path / MANIFEST_NAME
    where: str | Path = "--job.config_file"
    arguments = options.head_arguments
    if arguments is None and (file := next(filter(None, files), None)):
        arguments, where = read_json(file, "file"), file
    elif arguments is None and manifest.is_file():
        arguments, where = parse_manifest(source.path).get("heads"), manifest
    if not isinstance(arguments, dict):
        raise SeedError(
            f"{source.path}: has heads ({', '.join(sorted({name.split('.')[0] for name in heads}))}), and nothing says what "
            "they are built from; name the run's TOML with --job.config_file, or an export of it with --assets"
        )
    try:
        with torch.device("meta"):
            built = {name: build_head(name, values) for name, values in arguments.items()}
    except UserError:
        raise
    except Exception as e:
        raise SeedError(f"{where}: heads cannot be built from it ({type(e).__name__}: {e})") from e
    shapes = {f"{head}.{name}": tuple(t.shape) for head, m in built.items() for name, t in m.state_dict().items()}
    _require_shapes(heads, shapes, source.path, f"has other heads than {where}")
    return arguments


class _ReadingPlanner(DefaultSavePlanner):
    """Plans with tensors on meta, and reads each tensor when it is written."""

    def __init__(self, read: Callable[[str], Tensor]) -> None:
        super().__init__()
        self._read = read

    def lookup_object(self, index: MetadataIndex) -> Any:
        return self._read(index.fqn)


def write_dcp(described: Mapping[str, Tensor], read: Callable[[str], Tensor], folder: Path, nested: bool) -> None:
    """Writes tensors as ``dcp.save`` would into an empty ``folder``, but in one file, and with one tensor in memory at a time.

    Args:
        described: name to a tensor on meta; ``read`` maps the name to its values, on CPU.
        nested: saves ``{"model": tensors}``, which makes ``model.name`` of every name.
    """
    state: dict[str, Any] = {"model": dict(described)} if nested else dict(described)
    prefix = NESTED_PREFIX if nested else ""
    planner = _ReadingPlanner(lambda name: read(name.removeprefix(prefix)))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")  # no_dist is meant
        try:
            dcp.save(state, storage_writer=StepWriter(folder, thread_count=1), planner=planner, no_dist=True)
        except CheckpointException as e:  # a BaseException around the error of each rank
            raise e.failures[0][0] from None
