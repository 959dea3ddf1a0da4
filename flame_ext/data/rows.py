"""What a row of a source gives: a text or tokens, without padding, or the reason why it cannot be used."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow.parquet

from flame_ext.data.documents import READ_ONLY, Tokens
from flame_ext.errors import ConfigError

TOKENS_FIELD = "input_ids"
LEARNED = (  # columns whose 1 says that a token is predicted, and whose 0 that it is only read
    *("completion_mask", "assistant_masks", "assistant_mask", "loss_mask", "loss_masks", "response_mask", "label_mask"),
)


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
    """Returns the ``input_ids`` of a row without padding; those that are read, but not predicted, have ``READ_ONLY`` added.

    Padding are tokens at either end whose ``attention_mask`` is 0 or, without that, those at the end whose label is -100. Not predicted
    are tokens whose label is -100 or that have a 0 in a column of ``LEARNED``. Raises ConfigError, with the column's name, for holes
    in the attention, labels that are other tokens, and columns that say anything else.
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
    for name, mask in columns.items():
        if name in LEARNED and not np.isin(mask, (0, 1)).all():
            raise ConfigError(f"column {name!r} is not 0 or 1 everywhere; 1 = the token is predicted")
        if name not in LEARNED and not (mask[begin + 1 : end] == 1).all():
            raise ConfigError(
                f"column {name!r} masks tokens, and nothing says what its 0 means: name it {LEARNED[0]!r} if that is 'not to be "
                "predicted', or leave it out of the data"
            )
        learned = learned & (mask == 1)
    if learned[begin + 1 : end].all():  # whether the first one is predicted depends on what is packed before it
        return tokens[begin:end]
    return np.where(learned, tokens, tokens + READ_ONLY)[begin:end]


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
