"""Any layout to any layout: streamed, checked, and complete or absent."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from huggingface_hub.serialization._base import parse_size_to_int
from torch import Tensor

from flame_ext.checkpoint.card import card_of_step
from flame_ext.checkpoint.export import ExportSpec, write_small_files, write_tensors
from flame_ext.checkpoint.steps import MANIFEST_NAME, put_in_place, start, temporary_path
from flame_ext.errors import CheckpointError, SeedError, UserError
from flame_ext.heads.converter import build_head
from flame_ext.heads.names import is_heads
from flame_ext.hf_config import load_hf_config
from flame_ext.seeding.key_map import parse_key_map, renamed
from flame_ext.seeding.key_names import in_model_names
from flame_ext.seeding.sources.open import open_source
from flame_ext.seeding.sources.safe_files import parse_json
from flame_ext.seeding.sources.source import HEADS_FOLDER, Source, TensorEntry
from flame_ext.seeding.sources.tensors import cast, read_tensor, same_bits
from flame_ext.tools.architecture import Architecture, load_architecture
from flame_ext.tools.compare import compare_headers
from flame_ext.tools.dcp_folder import write_dcp
from flame_ext.tools.names import folder_of, plain

Layout = Literal["hf", "dcp", "dcp-nested"]


@dataclass(frozen=True)
class Conversion:
    """What is asked for beside source, destination and layout."""

    dtype: torch.dtype | None = None
    """Of floating-point tensors; None = as they are."""
    max_shard_size: str = "5GB"
    """Of a Hugging Face folder's files."""
    assets: Path | None = None
    """Folder of ``config.json`` and tokenizer, and of ``future_heads/config.json``; None = the source's own."""
    head_arguments: dict[str, dict[str, Any]] | None = None
    """Name of each head to what it is built from, for a source that does not say."""
    key_map: tuple[str, ...] = ()
    """As ``seed.key_map``."""
    allow_pickle: bool = False
    trust_remote_code: bool = False


@dataclass(frozen=True)
class Converted:
    """What a conversion did."""

    layout: str
    """Of the source."""
    tensors: int
    nbytes: int
    """Written."""
    seconds: float
    passed_over: tuple[str, ...]


def convert(
    path: str,
    destination: Path,
    to: Layout,
    options: Conversion,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Converted:
    """Write the weights at ``path`` to ``destination``, and read them back.

    Memory: the tensors of one Hugging Face file (views of the source's files, unless they are cast) and two more; one tensor
    for DCP.

    Args:
        path: anything that a job can be seeded from; of a training step, the model is taken.
        destination: must not be there.
        to: "hf", "dcp" (flat, as this trainer, torchtitan and flame's seeds have it) or "dcp-nested" (``{"model": …}``). Where
            the model's ``config.json`` is known, DCP gets the keys of its state dict; else those of the source.
        options: see the class.
        progress: called with the bytes written so far and in all.

    Raises:
        UserError: nothing is at ``destination`` then.
    """
    begin = time.perf_counter()
    if to == "hf":
        _require_size(options.max_shard_size)
    folder = folder_of(path, options.allow_pickle)
    _require_free(destination, folder)
    opened = open_source(folder, options.allow_pickle)
    source = renamed(opened, parse_key_map(options.key_map, "--key-map"), "--key-map")
    with _appearing(destination) as temporary:
        writer = _HFFolder(options) if to == "hf" else _DCPFolder(options, nested=to == "dcp-nested")
        source, nbytes = writer.write(source, temporary, _counted(progress))
    return Converted(source.layout, len(source.entries), nbytes, time.perf_counter() - begin, source.passed_over)


def _counted(progress: Callable[[int, int], None]) -> Callable[[int, int], None]:
    written = 0

    def count(nbytes: int, total: int) -> None:
        nonlocal written
        written += nbytes
        progress(written, total)

    return count


def _require_size(size: str) -> None:
    try:
        parse_size_to_int(size)
    except ValueError as e:
        raise CheckpointError(f"--max-shard-size {size!r}: {e}") from e


def _require_free(destination: Path, source: Path) -> None:
    if destination.exists() or destination.is_symlink():
        raise CheckpointError(
            f"{destination}: is there already and is not overwritten; name another folder or remove it"
        )
    if destination.resolve().is_relative_to(source.resolve()):
        raise CheckpointError(f"{destination}: lies inside the source {source}; name a folder beside it")


@contextmanager
def _appearing(destination: Path) -> Iterator[Path]:
    """A temporary folder that gets the name ``destination`` at the end, or goes."""
    temporary = temporary_path(destination)
    try:
        start(destination)
        yield temporary
        put_in_place(destination)
    except UserError:
        raise
    except OSError as e:
        raise CheckpointError(f"{destination} can not be written: {e}") from e
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


class _DCPFolder:
    def __init__(self, options: Conversion, nested: bool) -> None:
        self.options, self.nested = options, nested

    def write(self, source: Source, folder: Path, progress: Callable[[int, int], None]) -> tuple[Source, int]:
        assets = _assets(source, self.options)
        source = plain(source) if assets is None else _as_state_dict(source, assets, self.options.trust_remote_code)
        _require_tensors(source)
        described = _described(source.entries, self.options.dtype)
        total = sum(tensor.nbytes for tensor in described.values())

        def read(name: str) -> Tensor:
            tensor = cast(read_tensor(source, name), self.options.dtype)
            progress(tensor.nbytes, total)
            return tensor

        write_dcp(described, read, folder, self.nested)
        written = plain(open_source(folder))
        if written.entries.keys() != described.keys():
            raise CheckpointError(f"{folder}: was written with other keys than it was to have")
        for name in described:
            if not same_bits(read_tensor(written, name), cast(read_tensor(source, name), self.options.dtype)):
                raise CheckpointError(f"{folder}: {name!r} is not what was written; is the disk full or failing?")
        return source, total


def _assets(source: Source, options: Conversion) -> Path | None:
    """The folder that has the ``config.json`` of a source's model, if any is known."""
    path = options.assets or source.path
    return path if (path / "config.json").is_file() else None


def _as_state_dict(source: Source, assets: Path, trust_remote_code: bool) -> Source:
    """A source with the keys of ``model.state_dict()``: a strict load wants a tied weight under each of its names.

    Raises:
        SeedError: the source is not that model.
    """
    architecture = load_architecture(assets, trust_remote_code)
    source = in_model_names(source, architecture.names)
    _require_tensors(source)
    held = _backbone(source, architecture, assets)
    tied = {name: held[owner] for name, owner in architecture.model.tied_keys.items() if owner in held}
    heads = {name: entry for name, entry in source.entries.items() if is_heads(name)}
    return replace(source, entries=held | tied | heads)


def _backbone(source: Source, architecture: Architecture, assets: Path) -> dict[str, TensorEntry]:
    """Each tensor of the model once, under the model's name.

    Raises:
        SeedError: the source and the model of ``config.json`` do not have the same, or tied tensors differ.
    """
    shapes, tied = architecture.shapes, architecture.model.tied_keys
    held = {name: entry for name, entry in source.entries.items() if not is_heads(name)}
    backbone: dict[str, TensorEntry] = {}
    for name, entry in held.items():
        owner = tied.get(name, name)
        first = backbone.setdefault(owner, entry)
        if first is not entry and not same_bits(
            read_tensor(source, name), read_tensor(replace(source, entries=backbone), owner)
        ):
            raise SeedError(
                f"{source.path}: {first.key!r} differs from {entry.key!r}, but config.json ties them (tie_word_embeddings); set "
                "it to false, or remove the one that is not meant"
            )
    needed = {
        name: TensorEntry(name, shape, backbone[name].dtype if name in backbone else torch.float32, ())
        for name, shape in shapes.items()
    }
    found = compare_headers(needed, backbone)
    if found:
        lines = [_misfit(difference.name, difference.kind, needed, backbone) for difference in found[:10]]
        more = [f"… and {len(found) - 10} more"] if len(found) > 10 else []
        raise SeedError(
            f"{source.path} is not the model of {assets}/config.json:\n  - " + "\n  - ".join([*lines, *more])
        )
    return backbone


class _HFFolder:
    def __init__(self, options: Conversion) -> None:
        self.options = options

    def write(self, source: Source, folder: Path, progress: Callable[[int, int], None]) -> tuple[Source, int]:
        options = self.options
        assets = _assets(source, options)
        if assets is None:
            raise SeedError(
                f"{options.assets or source.path}: no config.json, which a Hugging Face folder needs and DCP does not keep; name "
                "the folder of the model's config.json and tokenizer with --assets"
            )
        architecture = load_architecture(assets, options.trust_remote_code)
        source = in_model_names(source, architecture.names)
        _require_tensors(source)
        heads = {name: entry for name, entry in source.entries.items() if is_heads(name)}
        backbone = _backbone(source, architecture, assets)
        arguments = self._head_arguments(source, heads) if heads else None
        dtypes = {entry.dtype for entry in backbone.values() if entry.dtype.is_floating_point}
        config = load_hf_config(str(assets), options.trust_remote_code)
        dtype = options.dtype or (dtypes.pop() if len(dtypes) == 1 else torch.float32)
        write_small_files(folder, ExportSpec(config, assets, dtype, arguments, card=card_of_step(source.path)))
        file_keys = architecture.model.file_keys(backbone)
        names = {file_keys[name]: name for name in backbone} | {name: name for name in heads}
        parts = [
            (folder, {file_keys[name]: entry for name, entry in backbone.items()}, options.max_shard_size),
            (folder / HEADS_FOLDER, heads, "1TB"),
        ]
        described = [_described(entries, options.dtype) for _, entries, _ in parts]
        total = sum(tensor.nbytes for part in described for tensor in part.values())

        def read(key: str) -> Tensor:
            tensor = cast(read_tensor(source, names[key]), options.dtype).contiguous()
            progress(tensor.nbytes, total)
            return tensor

        for (place, entries, size), tensors in zip(parts, described, strict=True):
            if entries:
                write_tensors(tensors, read, place, size)
        return replace(source, entries=backbone | heads), total

    def _head_arguments(self, source: Source, heads: Mapping[str, TensorEntry]) -> dict[str, dict[str, Any]]:
        """What the heads of a source are built from, for ``future_heads/config.json``.

        Raises:
            SeedError: nothing says it, or what says it does not fit the tensors.
        """
        arguments, where = self._noted_arguments(source)
        if arguments is None:
            raise SeedError(
                f"{source.path}: has heads ({', '.join(sorted({name.split('.')[0] for name in heads}))}), and nothing says what "
                "they are built from; name the run's TOML with --job.config_file, or an export of it with --assets"
            )
        try:
            with torch.device("meta"):
                built = {name: build_head(name, values) for name, values in arguments.items()}
        except (KeyError, TypeError, ValueError, AttributeError) as e:
            raise SeedError(f"{where}: heads can not be built from it ({type(e).__name__}: {e})") from e
        needed = {
            f"{head}.{name}": TensorEntry(name, tuple(tensor.shape), torch.float32, ())
            for head, module in built.items()
            for name, tensor in module.state_dict().items()
        }
        found = [d for d in compare_headers(needed, heads) if d.kind != "dtype"]
        if found:
            raise SeedError(
                f"{source.path}: its heads are not those of {where}:\n  - "
                + "\n  - ".join(_misfit(d.name, d.kind, needed, heads) for d in found[:10])
            )
        return arguments

    def _noted_arguments(self, source: Source) -> tuple[dict[str, dict[str, Any]] | None, str]:
        if self.options.head_arguments is not None:
            return self.options.head_arguments, "--job.config_file"
        for folder in filter(None, (source.path, self.options.assets)):
            file = folder / HEADS_FOLDER / "config.json"
            if file.is_file():
                return parse_json(file.read_bytes(), file, "file"), str(file)
        manifest = source.path / MANIFEST_NAME
        if manifest.is_file():
            heads = parse_json(manifest.read_bytes(), manifest, "file").get("heads")
            if isinstance(heads, dict):
                return heads, str(manifest)
        return None, ""


def _misfit(name: str, kind: str, needed: Mapping[str, TensorEntry], found: Mapping[str, TensorEntry]) -> str:
    if kind == "missing":
        return f"{name!r} {list(needed[name].shape)} is missing"
    if kind == "unexpected":
        return f"{found[name].key!r} {list(found[name].shape)} in {found[name].place} is not in the model"
    return f"{found[name].key!r}: shape {list(found[name].shape)} in {found[name].place}, the model has {list(needed[name].shape)}"


def _described(entries: Mapping[str, TensorEntry], dtype: torch.dtype | None) -> dict[str, Tensor]:
    return {
        name: cast(torch.empty(entry.shape, dtype=entry.dtype, device="meta"), dtype) for name, entry in entries.items()
    }


def _require_tensors(source: Source) -> None:
    if source.objects:
        keys = ", ".join(repr(key) for key in sorted(source.objects)[:8])
        raise SeedError(f"{source.path}: holds what is not a tensor ({keys}), which no layout of weights can take")
    if not source.entries:
        raise SeedError(f"{source.path}: holds no tensor of a model")
