"""Opens files of untrusted sources: names stay inside their folder, JSON is bounded and has each key once."""

import json
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from flame_ext.errors import SeedError

# AutoTokenizer builds a tokenizer from one of these.
TOKENIZER_FILES = (
    *("tokenizer.json", "vocab.json", "vocab.txt", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model"),
    *("tiktoken.model", "tekken.json"),
)
MAX_JSON_BYTES = 100 * 2**20  # far above any real checkpoint's header or index


@contextmanager
def as_seed_error(problem: str, remedy: str = ": damaged file; copy it again") -> Iterator[None]:
    """Raise any exception of the body as a SeedError: damaged data can raise anything."""
    try:
        yield
    except SeedError:
        raise
    except Exception as e:
        raise SeedError(f"{problem} ({type(e).__name__}: {' '.join(str(e).split())[:300]}){remedy}") from e


def contained_file(root: Path, name: str, named_by: str) -> Path:
    """Return the file ``name`` of the source ``root``, which ``named_by`` lists.

    Raises SeedError if it is absent, or a link out of ``root`` other than the Hub cache's from ``snapshots`` into ``blobs``.
    """
    file = root / name
    if not file.exists():
        raise SeedError(f"{file}: listed in {named_by} but absent; download or copy it again")
    target, resolved_root = file.resolve(), root.resolve()
    snapshots = resolved_root.parent
    is_hub_cache = snapshots.name == "snapshots" and snapshots.parent.name.startswith("models--")
    allowed = [resolved_root, snapshots.parent / "blobs"] if is_hub_cache else [resolved_root]
    if not any(target.is_relative_to(folder) for folder in allowed):
        raise SeedError(f"{file}: is a link to {target}, outside the source; copy the file itself to its place")
    if not target.is_file():
        raise SeedError(f"{file}: is not a file")
    return file


def require_plain_name(name: object, key: str, named_by: Path) -> str:
    """Return ``name``; raise SeedError unless it names a file in the same folder as ``named_by``."""
    if not isinstance(name, str) or Path(name).name != name or name in ("", ".", "..") or "\0" in name:
        raise SeedError(f"{named_by}: {key!r} points to {name!r}; only plain file names in the same folder are read")
    return name


def read_json(file: Path, what: str) -> dict[str, Any]:
    """Read a JSON object as :func:`parse_json` does; a file above :data:`MAX_JSON_BYTES` is refused unread."""
    size = file.stat().st_size
    if size > MAX_JSON_BYTES:
        raise SeedError(f"{file}: {size} bytes is no {what}; expected at most {MAX_JSON_BYTES}")
    return parse_json(file.read_bytes(), file, what)


def parse_json(raw: bytes, file: Path, what: str) -> dict[str, Any]:
    """Parse a JSON object in which no key stands twice, else raise a SeedError about the ``what`` of ``file``."""

    def no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        key, count = Counter(key for key, _ in pairs).most_common(1)[0] if pairs else ("", 0)
        if count > 1:
            raise SeedError(f"{file}: key {key!r} stands twice in its {what}")
        return dict(pairs)

    with as_seed_error(f"{file}: its {what} is not valid JSON"):
        value = json.loads(raw, object_pairs_hook=no_duplicates)
    if not isinstance(value, dict):
        raise SeedError(f"{file}: its {what} is not a JSON object: damaged file; copy it again")
    return value


def read_weight_map(index_file: Path) -> dict[str, str]:
    """Return a Hugging Face index's map from key to file name; raise SeedError unless every name is plain."""
    file = contained_file(index_file.parent, index_file.name, "the folder")
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
