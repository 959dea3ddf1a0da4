"""Says which rows a source's vocabulary lacks beside the model's, and from which old rows each new one is made."""

import json
import re
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from tokenizers import Tokenizer
from torch import Tensor, nn
from torchtitan.tools.logging import logger
from transformers import PreTrainedConfig, TokenizersBackend

from flame_ext.config.sections import Seed
from flame_ext.distributed import is_main_rank
from flame_ext.errors import ConfigError, SeedError
from flame_ext.hf_tokenizer import load_auto_tokenizer, number_of_ids
from flame_ext.seeding.sources.safe_files import TOKENIZER_FILES, some
from flame_ext.seeding.sources.source import Source
from flame_ext.seeding.target import SeedTarget

_BYTE = re.compile("<0x[0-9A-F]{2}>")  # a piece of SentencePiece's that stands for one byte


@dataclass(frozen=True)
class Growth:
    """Of a vocabulary whose first rows are the source's."""

    loaded: int  # rows of the source
    tokens: int  # rows that are loaded or have a token; those beyond are padding
    rows: int  # rows of the model
    shapes: Mapping[str, tuple[int, ...]]  # the model's key of each tensor that grows to its shape in the source
    new_rows: Literal["mean", "subwords", "random"]
    pieces: Mapping[int, tuple[int, ...]] = field(default_factory=dict)
    """Of "subwords": a new token to the old tokens that its row is the mean of; one that is absent has the mean of all rows."""
    absent: tuple[int, ...] = ()  # ids of new rows below ``tokens`` that no token has: padding as well

    @property
    def padding(self) -> list[int]:
        """New rows that no token has."""
        return [*self.absent, *range(self.tokens, self.rows)]

    @property
    def new_tokens(self) -> int:
        return self.rows - self.loaded - len(self.padding)

    @property
    def record(self) -> dict[str, Any]:
        """What ``seed_report.json`` says of it."""
        record = {
            "rows_loaded": self.loaded,
            "rows_initialised": self.rows - self.loaded,
            "of_which_padding": len(self.padding),
            "new_rows": self.new_rows,
            "keys": sorted(self.shapes),
        }
        pieces = {"of_which_without_pieces": self.new_tokens - len(self.pieces)}
        return record | (pieces if self.new_rows == "subwords" else {})

    def __str__(self) -> str:
        new, padding = self.rows - self.loaded, len(self.padding)
        words = f"{self.loaded:,} rows loaded, {new:,} initialised in each of {', '.join(sorted(self.shapes))}: "
        words += f"{self.new_tokens:,} of new tokens by seed.new_rows = {self.new_rows!r}"
        if self.new_rows == "subwords":
            words += (
                f" ({self.new_tokens - len(self.pieces):,} of them special or without pieces: the mean of all rows)"
            )
        return words + (f", {padding:,} of padding by the mean" if padding else "")


def growth_of(target: SeedTarget, source: Source, options: Seed) -> Growth | None:
    """Compare the rows of a source, under the model's names, with the model's; None if nothing grows.

    A vocabulary that is refused for its size is left to the account of shapes, which says what to do. Raises SeedError if the
    tokenizer is not longer than the source's rows and no padding is asked for, or has other ids for the source's tokens, or if
    "subwords" lack the source's tokenizer.
    """
    model = target.model
    names: dict[str, list[str]] = {key: [key] for key in target.whole}
    for alias, owner in model.tied_keys.items():
        names[owner].append(alias)
    shapes = {
        key: source.entries[name].shape for key, known in names.items() for name in known if name in source.entries
    }
    embedding = model.get_input_embeddings().weight
    key = next((name for name, parameter in model.named_parameters() if parameter is embedding), "")
    if not (options.resize_vocabulary and shapes.get(key)):
        return None
    old, rows = shapes[key][0], target.whole[key].shape[0]
    if old >= rows:
        if old == rows and is_main_rank():
            logger.info(f"seed.resize_vocabulary: nothing grows: the source has {old:,} rows, as the model")
        return None
    assets, trust = model.model_args.hf_assets_path, options.trust_remote_code
    try:
        tokenizer = load_auto_tokenizer(assets, trust)
        has_own = any((source.path / name).is_file() for name in TOKENIZER_FILES)
        own = load_auto_tokenizer(str(source.path), trust) if has_own else None
    except ConfigError as e:
        raise SeedError(str(e)) from e
    ids = number_of_ids(tokenizer)
    if ids <= old and rows - old >= options.pad_vocabulary_to_multiple_of:
        raise SeedError(
            f"{source.path}: a vocabulary of {old} in the source, of {rows} in the model, and seed.resize_vocabulary lets it grow to "
            f"a longer tokenizer only, where {assets} has one of {ids} ids: set vocab_size = {old} in config.json there, or ask for "
            "padding by seed.pad_vocabulary_to_multiple_of"
        )
    _require_no_other_table(model.text_backbone, embedding, rows, assets)
    if options.new_rows == "subwords" and own is not None and number_of_ids(own) > old:
        raise SeedError(
            f"{source.path}: seed.new_rows = 'subwords' needs the tokenizer from before the growth, and the one there has "
            f"{number_of_ids(own)} ids for {old} rows: put the model's own tokenizer there, and the longer one at "
            "model.hf_assets_path"
        )
    if own is not None:
        _require_same_ids(tokenizer, own, source.path, assets, old)
    elif options.new_rows == "subwords":
        raise SeedError(
            f"{source.path}: seed.new_rows = 'subwords' needs the source's own tokenizer, and there is none "
            f"({' or '.join(TOKENIZER_FILES)}): copy its files there, or take 'mean'"
        )
    elif is_main_rank():
        logger.warning(
            f"{source.path} has no tokenizer, so nothing tells whether that of {assets} has the same ids for old tokens"
        )
    growing = {
        key: shape
        for key, shape in shapes.items()
        if shape == (old, *shape[1:])
        and tuple(target.whole[key].shape) == (rows, *shape[1:])
        and (key in model.vocabulary_keys or key.partition(".")[0] in model.heads)
    }
    pieces = _pieces(tokenizer, own, range(old, ids), old) if options.new_rows == "subwords" else {}
    absent = tuple(sorted({*range(old, ids)} - {*tokenizer.get_vocab().values()}))
    return Growth(old, max(old, ids), rows, growing, options.new_rows, pieces, absent)


def of_source(config: PreTrainedConfig, growth: Growth) -> PreTrainedConfig:
    """Return a model's configuration with the vocabulary of its source."""
    config = deepcopy(config)
    text = config.get_text_config()
    text.vocab_size = growth.loaded
    if (pad := getattr(text, "pad_token_id", None)) is not None and pad >= growth.loaded:
        text.pad_token_id = None  # no row of the embedding, which transformers refuses
    return config


def _require_no_other_table(backbone: nn.Module, embedding: Tensor, rows: int, assets: str) -> None:
    """Raise SeedError if the backbone looks up tokens in another table as well, which does not grow (Gemma-3n's and 4's layers)."""
    for name, module in backbone.named_modules():
        if isinstance(module, nn.Embedding) and module.weight is not embedding and "per_layer" in name:
            raise SeedError(
                f"{assets}: {name!r} has {module.num_embeddings} rows, one for each token, and does not grow to {rows}: the "
                "vocabulary of this architecture cannot grow; switch seed.resize_vocabulary off, and take a tokenizer that fits"
            )


def _require_same_ids(new: Any, old: Any, path: Path, assets: str, rows: int) -> None:
    """Raise SeedError if a token of the source has another id now: its row would be another token's.

    A token that is gone has given its row to another one on purpose, as reserved ones do; that is logged, as are new tokens whose
    rows the source holds beyond its own tokenizer.
    """
    then, now = old.get_vocab(), new.get_vocab()
    if moved := [token for token, number in then.items() if now.get(token, number) != number]:
        first = min(moved, key=then.__getitem__)
        raise SeedError(
            f"{assets}: the tokenizer has other ids for {len(moved):,} of the source's {len(then):,} tokens ({first!r} is {now[first]}, "
            f"and {then[first]} at {path}), so old rows would be other tokens': add tokens to the source's own tokenizer "
            "(add_tokens), or give each new one an id beyond it"
        )
    if not is_main_rank():
        return
    held = [token for token, number in now.items() if number < rows and token not in then]
    if held:
        logger.warning(
            f"{len(held):,} tokens of {assets} that the source's tokenizer lacks ({some(map(repr, held))}) have rows that the source "
            "holds, reserved or padding; these are loaded as they are"
        )


def _pieces(new: Any, old: Any, ids: range, rows: int) -> dict[int, tuple[int, ...]]:
    """Map each of ``ids`` of the tokenizer ``new`` to the ids below ``rows`` that the tokenizer ``old`` makes of it inside of a text.

    Special tokens are left out: the pieces of "<|user|>" say nothing of what it is for. So are single bytes ("<0xC3>") that the old
    tokenizer has no token for, since they are no text.
    """
    names = {number: token for token, number in new.get_vocab().items()}
    added = new.added_tokens_decoder
    special = {*new.all_special_ids, *(number for number, token in added.items() if token.special)}
    backends: list[Any] = [getattr(tokenizer, "backend_tokenizer", None) for tokenizer in (new, old)]
    models: list[Any] = [getattr(backend, "model", None) for backend in backends]
    alike = isinstance(new, TokenizersBackend) and type(models[0]) is type(models[1])
    as_text = not alike or any(number in added for number in ids)  # else the copy, which takes a second, is not needed
    inside = _without_prefix(backends[1]) if as_text and backends[1] is not None else None
    found = {}
    for number in ids:
        if number not in names or number in special:
            continue
        if alike and number not in added:
            # Models of other kinds than BPE do not say whether they have bytes.
            if _BYTE.fullmatch(names[number]) and getattr(models[0], "byte_fallback", True):
                continue
            # The token's own spelling ("Ġword", "▁word", parts of characters), which a decoded text may lose.
            made = [token.id for token in models[1].tokenize(names[number])]
        else:
            text = names[number] if number in added else new.decode([number])
            if inside is not None:
                made = inside.encode(text, add_special_tokens=False).ids
            else:
                made = old(text, add_special_tokens=False, verbose=False)["input_ids"]
        if pieces := tuple(piece for piece in made if piece < rows and piece != old.unk_token_id):
            found[number] = pieces
    return found


def _without_prefix(backend: Tokenizer) -> Tokenizer:
    """Return a tokenizer that puts no space, by whichever of its parts, before a text, since an added token stands anywhere in one.

    It neither cuts nor pads, as files may ask for.
    """

    def changed(part: Any) -> Any:
        if isinstance(part, list):
            return [
                changed(inner) for inner in part if not (isinstance(inner, dict) and inner.get("type") == "Prepend")
            ]
        if not isinstance(part, dict):
            return part
        if part.get("type") == "Prepend":
            return None
        never = {"prepend_scheme": "never", "add_prefix_space": False}
        return {key: never.get(key, changed(value)) for key, value in part.items()}

    state = json.loads(backend.to_str())
    parts = {key: changed(state[key]) for key in ("normalizer", "pre_tokenizer")}
    return Tokenizer.from_str(json.dumps(state | parts | {"padding": None, "truncation": None}))
