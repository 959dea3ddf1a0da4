"""The one way to the files of untrusted sources: they lie in their folder, are of a bounded size, and JSON has each key once."""

import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from flame_ext.errors import SeedError, UserError

# AutoTokenizer builds a tokenizer from one of these.
TOKENIZER_FILES = (
    *("tokenizer.json", "vocab.json", "vocab.txt", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model"),
    *("tiktoken.model", "tekken.json"),
)

# All far above what real models have, and low enough for a file of any content to be read in seconds and in less than 1 GiB.
MAX_JSON_BYTES = 2**25  # headers, indices and manifests
MAX_CONFIG_BYTES = 2**22
MAX_TOKENIZER_BYTES = 2**26
MAX_KEYS = 2**18  # of one JSON object
MAX_RANK = 8  # dimensions of a tensor
_MAX_CONFIG_VALUES = 2**17
_MAX_NAME_BYTES = 255  # of a file, in every file system

# Endings of a configuration's fields to the largest integer that they may be: transformers makes lists and buffers of these lengths.
_LARGEST = (
    (re.compile("(^|_)layers?$"), 2**10),
    (re.compile("labels$"), 2**16),
    (re.compile("(size|dim|heads?|experts|inner|embd)$"), 2**24),
    (re.compile("(positions?|embeddings|ctx|length)$"), 2**26),
    (re.compile(""), 2**64),
)
# Fields of which transformers makes nothing that is as long as their numbers; that of a tokenizer is 1e30 if it has no limit.
_ANY_NUMBER = (
    *("id2label", "label2id", "quantization_config", "compression_config", "task_specific_params", "model_max_length"),
)

# What transformers, tokenizers and torchtitan read of a model's folder, beside the weights.
_ASSETS = ("*.json", "*.jinja", "*.model", "merges.txt", "vocab.txt", "additional_chat_templates/*")
LARGEST = {  # bytes of such a file
    **dict.fromkeys((*TOKENIZER_FILES, "merges.txt", "tokenizer.model"), MAX_TOKENIZER_BYTES),
    **dict.fromkeys(("config.json", "generation_config.json", "chat_template.jinja"), MAX_CONFIG_BYTES),
    **dict.fromkeys(("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"), MAX_JSON_BYTES),
}


@contextmanager
def as_seed_error(problem: str, remedy: str = ": damaged file; copy it again") -> Iterator[None]:
    """Raise any exception of the body as a SeedError: damaged data can raise anything."""
    try:
        yield
    except UserError:
        raise
    except Exception as e:
        raise SeedError(f"{problem} ({type(e).__name__}: {' '.join(str(e).split())[:300]}){remedy}") from e


def contained_file(root: Path, name: str, named_by: str, follow_links: bool | None = None) -> Path:
    """Return the file ``name`` of the source ``root``, which ``named_by`` lists.

    Raises SeedError if it is absent, no regular file, or, without ``follow_links``, a link out of ``root`` other than the Hub
    cache's from ``snapshots`` into ``blobs``. The message names the option for links unless ``follow_links`` is None.
    """
    file = root / name
    with as_seed_error(f"{file}: cannot be looked at"):
        target, resolved_root = file.resolve(), root.resolve()
        if not target.exists():
            where = f"is a link to {target}, which does not exist" if file.is_symlink() else "absent"
            raise SeedError(f"{file}: listed in {named_by} but {where}; download or copy it again")
    above = (folder.parent for folder in (resolved_root, *resolved_root.parents) if folder.parent.name == "snapshots")
    cached = (snapshots.parent for snapshots in above if snapshots.parent.name.startswith("models--"))
    allowed = [resolved_root, *(model / "blobs" for model in cached)]
    if not follow_links and not any(target.is_relative_to(folder) for folder in allowed):
        option = "; or, if you trust who made the links, set seed.follow_links = true (of a command: --follow-links)"
        raise SeedError(
            f"{file}: is a link to {target}, outside the source; copy the file itself to its place"
            + ("" if follow_links is None else option)
        )
    if not target.is_file():
        raise SeedError(f"{file}: is not a file")
    return file


def require_contained(root: Path, follow_links: bool | None = None) -> None:
    """Raise SeedError if a file beside the weights that other libraries will read is a link out of ``root``, or too large, or if
    ``config.json`` asks for more layers, labels, … than a model has.
    """
    for file in sorted({file for pattern in _ASSETS for file in root.glob(pattern)}):
        if not file.exists() and file.name not in LARGEST:  # a link to nothing, which nothing reads
            continue
        if not file.is_dir():
            contained_file(root, str(file.relative_to(root)), "the folder", follow_links)
        _require_size(file, "model's file", LARGEST.get(file.name))
    # The others are of versions of transformers.
    for file in [root / "config.json", *sorted(root.glob("config.[0-9]*.json"))]:
        if file.exists():
            _require_modest(file)
    if (file := root / "tokenizer_config.json").exists():
        fields = read_json(file, "configuration")
        # In place of the vocabulary itself, some tokenizers take a path here, to any file.
        if named := [name for name in ("vocab", "merges") if isinstance(fields.get(name), str)]:
            place = f"{named[0]} names a file, {fields[named[0]]!r:.300}"
            raise SeedError(f"{file}: {place}; remove the field, and copy that file beside it")


def _require_modest(config: Path) -> None:
    pending: list[tuple[str, Any]] = [("", read_json(config, "configuration", MAX_CONFIG_BYTES))]
    for number, (name, value) in enumerate(pending, start=1):
        if isinstance(value, dict):
            pending += [(key, item) for key, item in value.items() if key not in _ANY_NUMBER]
        elif isinstance(value, list):
            pending += [(name, item) for item in value]
        elif type(value) is int:
            largest = next(most for field, most in _LARGEST if field.search(name))
            if abs(value) > largest:
                too_large = f"{name:.80} is {value:.3g}; expected at most {largest}: no model has as many"
                raise SeedError(f"{config}: {too_large}; correct or remove the field")
        if number > _MAX_CONFIG_VALUES:
            raise SeedError(f"{config}: more than {_MAX_CONFIG_VALUES} values; no model's configuration has as many")


def find_file(root: Path, name: str, follow_links: bool | None = None) -> Path | None:
    """Return the file ``name`` of ``root``, None if there is none; raise as :func:`contained_file` does."""
    if not (root / name).is_symlink() and not (root / name).exists():
        return None
    return contained_file(root, name, "the folder", follow_links)


def _require_size(file: Path, what: str, limit: int | None) -> None:
    size = file.stat().st_size
    if limit is not None and size > limit:
        raise SeedError(f"{file}: {size} bytes is no {what}; expected at most {limit}")


def read_bytes(file: Path, what: str, limit: int = MAX_JSON_BYTES) -> bytes:
    """Return a file's bytes; a file above ``limit`` is refused unread with a SeedError."""
    with as_seed_error(f"{file}: cannot be read"):
        _require_size(file, what, limit)
        with file.open("rb") as stream:
            return stream.read(limit)


def is_plain_name(name: str) -> bool:
    """Return whether a name is of a file in the same folder, and of a length and in characters that every file system takes."""
    plain = Path(name).name == name and name not in ("", ".", "..") and name.isprintable()
    return plain and len(name.encode()) <= _MAX_NAME_BYTES


def require_plain_name(name: object, key: str, named_by: Path) -> str:
    """Return ``name``; raise SeedError unless it names a file in the same folder as ``named_by``."""
    if not isinstance(name, str) or not is_plain_name(name):
        raise SeedError(
            f"{named_by}: {key!r} points to {name!r:.300}; only plain file names in the same folder are read"
        )
    return name


def read_json(file: Path, what: str, limit: int = MAX_JSON_BYTES) -> dict[str, Any]:
    """Read a JSON object as :func:`parse_json` does; a file above ``limit`` bytes is refused unread."""
    return parse_json(read_bytes(file, what, limit), file, what)


def parse_json(raw: bytes, file: Path, what: str) -> dict[str, Any]:
    """Parse a JSON object of at most :data:`MAX_KEYS` keys, none of them twice, else raise a SeedError about the ``what`` of ``file``."""

    def no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        value = dict(pairs)
        if len(value) < len(pairs):
            (twice, _), *_ = Counter(key for key, _ in pairs).most_common(1)
            raise SeedError(f"{file}: key {twice!r} stands twice in its {what}")
        if len(value) > MAX_KEYS:
            raise SeedError(f"{file}: {len(value)} keys in its {what}; expected at most {MAX_KEYS}")
        return value

    with as_seed_error(f"{file}: its {what} is not valid JSON"):
        value = json.loads(raw, object_pairs_hook=no_duplicates)
    if not isinstance(value, dict):
        raise SeedError(f"{file}: its {what} is not a JSON object: damaged file; copy it again")
    return value


def read_weight_map(index_file: Path, follow_links: bool | None = None) -> dict[str, str]:
    """Return a Hugging Face index's map from key to file name; raise SeedError unless every name is plain."""
    file = contained_file(index_file.parent, index_file.name, "the folder", follow_links)
    weight_map = read_json(file, "index").get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise SeedError(f"{index_file}: no 'weight_map' from keys to files; write it anew with save_pretrained()")
    for key, name in weight_map.items():
        require_plain_name(name, key, index_file)
    return weight_map


def some(names: Iterable[str]) -> str:
    """Return the first eight names, for a message."""
    names = sorted(names)
    return ", ".join(names[:8]) + (", …" if len(names) > 8 else "") or "nothing"
