"""What a row of a source gives: a text or tokens, without padding, or the reason why it cannot be used."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from numbers import Number
from typing import Any, NamedTuple

import numpy as np
import pyarrow.parquet
from numpy.typing import NDArray
from torchtitan.tools.logging import logger

from flame_ext.data.documents import READ_ONLY, Tokens
from flame_ext.errors import ConfigError
from flame_ext.object_stores import opened

TOKENS_FIELD = "input_ids"
LEARNED = (  # columns whose 1 says that a token is predicted, and whose 0 that it is only read
    *("completion_mask", "assistant_masks", "assistant_mask", "loss_mask", "loss_masks", "response_mask", "label_mask"),
)


class RowError(ConfigError):
    """One row is neither text nor tokens; ``skip_unreadable`` passes over it."""


class Masked(NamedTuple):
    """The ids of a row as they are in its file, and which of them are predicted."""

    tokens: Any
    learned: NDArray[np.bool_] | None = None  # None = all

    def marked(self) -> Tokens:
        """The tokens with ``READ_ONLY`` added to those that are read, but not predicted; ids have to be in a vocabulary."""
        tokens = np.asarray(self.tokens).astype(np.int64, copy=False)
        return tokens if self.learned is None else np.where(self.learned, tokens, tokens + READ_ONLY)


def checked(value: Any) -> str | NDArray[Any]:
    """Returns a text as it is and a list of integers as an array; raises RowError for anything else, such as null."""
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError as e:  # half of a surrogate pair, which JSON can write and nothing can tokenise
            raise RowError(f"a text that is not Unicode (character {e.start}: {value[e.start]!a})") from e
        return value
    try:
        tokens = np.asarray(value)
    except ValueError:  # lists of different lengths
        tokens = np.empty((0, 0))
    if tokens.ndim != 1 or not (tokens.dtype.kind in "iu" or len(tokens) == 0):
        raise RowError(f"a sample is neither text nor a list of token ids: {value!r:.80}")
    return tokens if len(tokens) else tokens.astype(np.int64)


def is_mask(name: str) -> bool:
    """Whether a column beside ``input_ids`` says which of them are read or learned, such as ``labels`` and ``attention_mask``."""
    return name == "labels" or ("mask" in name and name != "special_tokens_mask") or name.startswith("loss_")


@cache  # a line once, however often a file is opened
def used_columns(where: str, names: tuple[str, ...], text_field: str) -> list[str]:
    """The columns that are read of those that are there: ``text_field`` or, without it, ``input_ids``, with the masks beside these.

    Empty if there is neither. Warns of masks beside anything but ``input_ids``, which nobody follows.
    """
    field = next((name for name in (text_field, TOKENS_FIELD) if name in names), None)
    masks = [name for name in names if is_mask(name)]
    if field is None:
        return []
    if field == TOKENS_FIELD or not masks:
        return [field, *masks]
    instead = (
        "set text_field"
        if TOKENS_FIELD in names
        else f"name the column of tokens {TOKENS_FIELD!r}, and set text_field,"
    )
    logger.warning(
        f"{where}: column {field!r} (text_field) is read, all of it is learned, and {', '.join(map(repr, masks))} beside it "
        f"is not followed; {instead} to {TOKENS_FIELD!r} to learn the tokens that are not masked"
    )
    return [field]


def unpadded(row: Mapping[str, Any]) -> Masked:
    """Returns the ``input_ids`` of a row without padding, and which of them are predicted.

    Padding are tokens at either end whose ``attention_mask`` is 0 or, without that, those at the end whose label is -100. Not predicted
    are tokens whose label is -100 or that have a 0 in a column of ``LEARNED``. Null masks nothing. Raises ConfigError, with the column's
    name, for holes in the attention, labels that are other tokens, and columns that say anything else.
    """
    tokens, columns = row[TOKENS_FIELD], _masks(row)
    if not columns or isinstance(tokens, str):
        return Masked(tokens)
    tokens = np.asarray(checked(tokens))
    for name, mask in columns.items():
        if mask.shape != tokens.shape:
            raise ConfigError(
                f"column {name!r} has the shape {mask.shape} beside {len(tokens)} {TOKENS_FIELD}; mend it, or leave it out of the data"
            )
    begin, end = 0, len(tokens)
    if (attended := columns.pop("attention_mask", None)) is not None:
        used = np.flatnonzero(attended)
        begin, end = (int(used[0]), int(used[-1]) + 1) if len(used) else (0, 0)
        if not (attended[begin:end] == 1).all():
            raise ConfigError(
                "column 'attention_mask' is not 1 between the padding at both ends, and every token is read: mask what is not to be "
                "predicted by labels of -100, or leave the column out of the data"
            )
    learned = np.ones(len(tokens), dtype=bool)
    if (labels := columns.pop("labels", None)) is not None:
        learned = labels != -100
        last = begin + int(np.flatnonzero(learned[begin:end])[-1]) + 1 if learned[begin:end].any() else begin
        if attended is None:
            end = last
        # transformers' collator takes the label of an EOS that is the padding token, too, though it is attended.
        elif last == end - 1 and learned[begin + 1 : last].all():
            learned[last] = True
            labels = np.append(labels[:last], tokens[last:])
        # The first label is no token's successor.
        wrong = np.flatnonzero((labels != tokens) & learned)
        if len(wrong := wrong[(wrong > begin) & (wrong < end)]):
            i = int(wrong[0])
            raise ConfigError(
                f"column 'labels' has {labels[i]} at token {i + 1}, which is {tokens[i]}: labels are the tokens themselves (they are "
                "shifted here), or -100 for those that are not to be predicted"
            )
        # Nobody uses the first label: it says something only where others are masked too.
        learned[begin : begin + 1] |= learned[begin + 1 : end].all()
    for name, mask in columns.items():
        if name in LEARNED:
            if not np.isin(mask[begin:end], (0, 1)).all():
                raise ConfigError(f"column {name!r} is not 0 or 1 everywhere; 1 = the token is predicted")
            learned = learned & (mask == 1)
        elif not (mask[begin + 1 : end] == 1).all():
            raise ConfigError(
                f"column {name!r} masks tokens, and nothing says what its 0 means: name it {LEARNED[0]!r} if that is 'not to be "
                "predicted', or leave it out of the data"
            )
    tokens, learned = tokens[begin:end], learned[begin:end]
    return Masked(tokens, None if learned.all() else learned)


def _masks(row: Mapping[str, Any]) -> dict[str, NDArray[Any]]:
    """The masks of a row. A single number, such as the label of a classification, is none; ConfigError for what is no numbers at all."""
    masks = {name: row[name] for name in row if is_mask(name) and not isinstance(row[name], (Number, type(None)))}
    for name, mask in masks.items():
        if not isinstance(mask, (list, tuple, np.ndarray)):
            raise ConfigError(
                f"column {name!r} has {mask!r:.40} of the type {type(mask).__name__} beside {TOKENS_FIELD}, expected a list of numbers; "
                "mend it, or leave it out of the data"
            )
    return {name: np.asarray(mask) for name, mask in masks.items()}


@dataclass(frozen=True)
class Places:
    """Names the file and row of a document for messages; rows count from 1."""

    path: str
    files: Sequence[str] = ()  # in the order of their rows; empty if they are unknown

    def of_index(self, index: int) -> str:
        """The place of a row that is numbered over all files; the file is known for Parquet only."""
        row = index
        for file in self.files if all(file.endswith(".parquet") for file in self.files) else ():
            with opened(file, ConfigError) as stream:
                count = pyarrow.parquet.read_metadata(stream).num_rows
            if row < count:
                return f"{file}, row {row + 1}"
            row -= count
        return f"{self.path}, row {index + 1}"

    def in_file(self, number: int, row: int) -> str:
        """The place of a row of a file."""
        if number < len(self.files):
            return f"{self.files[number]}, row {row + 1}"
        return f"{self.path}, file {number + 1}, row {row + 1}"
