"""What a row of a source gives: a text or tokens, without padding, or the reason why it cannot be used."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow.parquet

from flame_ext.data.documents import Tokens
from flame_ext.errors import ConfigError

TOKENS_FIELD = "input_ids"


class RowError(ConfigError):
    """One row is neither text nor tokens; ``skip_unreadable`` passes over it."""


def checked(value: Any) -> str | Tokens:
    """Returns a text as it is and a list of token ids as an array; raises RowError for anything else, such as null."""
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
    return tokens.astype(np.int64, copy=False)


def is_mask(name: str) -> bool:
    """Whether a column beside ``input_ids`` says which of them are read or learned, such as ``labels`` and ``attention_mask``."""
    return name == "labels" or ("mask" in name and name != "special_tokens_mask") or name.startswith("loss_")


def unpadded(row: Mapping[str, Any]) -> Any:
    """Returns the ``input_ids`` of a row without the padding that its masks and labels leave out.

    These are tokens at either end whose ``attention_mask`` is 0 or, without one, tokens at the end without a label. Raises ConfigError, with the
    column's name, if a mask or labels leave out anything else: all tokens of a document are trained on.
    """
    tokens = row[TOKENS_FIELD]
    # A single number, such as the label of a classification, is none.
    masks = {name: row[name] for name in row if is_mask(name) and isinstance(row[name], (list, tuple, np.ndarray))}
    if not masks or isinstance(tokens, str):
        return tokens
    columns = {name: np.asarray(mask) for name, mask in masks.items()}
    tokens = np.asarray(checked(tokens))
    for name, mask in columns.items():
        if mask.shape != tokens.shape:
            raise ConfigError(
                f"column {name!r} has the shape {mask.shape} beside {len(tokens)} {TOKENS_FIELD}{_REMEDY}"
            )
    begin, end = 0, len(tokens)
    if (attended := columns.pop("attention_mask", None)) is not None:
        used = np.flatnonzero(attended)
        begin, end = (int(used[0]), int(used[-1]) + 1) if len(used) else (0, 0)
        if not (attended[begin:end] == 1).all():
            raise ConfigError(f"column 'attention_mask' is not 1 between the padding at both ends{_REMEDY}")
    if (labels := columns.pop("labels", None)) is not None:
        learned = np.flatnonzero(labels[begin:end] != -100)
        last = begin + int(learned[-1]) + 1 if len(learned) else begin
        # transformers' collator takes the label of an EOS that is the padding token, too, though it is attended.
        end, kept = (last, last) if attended is None else (end, end - 1 if end - last == 1 else end)
        # The first label is no token's successor.
        if not (labels[begin + 1 : kept] == tokens[begin + 1 : kept]).all():
            raise ConfigError(f"column 'labels' differs from {TOKENS_FIELD}, as where a prompt is masked{_REMEDY}")
    for name, mask in columns.items():
        if not (mask[begin + 1 : end] == 1).all():
            raise ConfigError(f"column {name!r} masks tokens{_REMEDY}")
    return tokens[begin:end]


_REMEDY = ": every token of a document is trained on; take the masked tokens or this column out of the data"


@dataclass(frozen=True)
class Places:
    """Names the file and row of a document for messages; rows count from 1."""

    path: str
    files: Sequence[str] = ()  # in the order of their rows; empty if they are unknown

    def of_index(self, index: int) -> str:
        """The place of a row that is numbered over all files; the file is known for Parquet only."""
        row = index
        for file in self.files if all(file.endswith(".parquet") for file in self.files) else ():
            count = pyarrow.parquet.read_metadata(file).num_rows
            if row < count:
                return f"{file}, row {row + 1}"
            row -= count
        return f"{self.path}, row {index + 1}"

    def in_file(self, number: int, row: int) -> str:
        """The place of a row of a file."""
        if number < len(self.files):
            return f"{self.files[number]}, row {row + 1}"
        return f"{self.path}, file {number + 1}, row {row + 1}"
