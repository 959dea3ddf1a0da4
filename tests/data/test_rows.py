"""Which tokens of a row are read, and which rows are refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from flame_ext.data.documents import READ_ONLY, without_marks
from flame_ext.data.rows import LEARNED, RowError, checked, is_mask, unpadded
from flame_ext.errors import ConfigError


def row(**columns: Any) -> dict[str, Any]:
    return {"input_ids": [5, 6, 7, 8, 9], "label": 1, "special_tokens_mask": [1, 0, 0, 0, 0], **columns}


@pytest.mark.parametrize("kind", [list, np.array])
@pytest.mark.parametrize(
    ("columns", "read"),
    [
        ({}, [5, 6, 7, 8, 9]),
        ({"attention_mask": None, "labels": 3}, [5, 6, 7, 8, 9]),
        ({"attention_mask": [1] * 5, "labels": [5, 6, 7, 8, 9]}, [5, 6, 7, 8, 9]),
        ({"attention_mask": [0, 1, 1, 1, 0]}, [6, 7, 8]),
        ({"attention_mask": [0, 1, 1, 1, 0], "labels": [-100, -100, 7, 8, -100]}, [6, 7, 8]),
        ({"labels": [5, 6, 7, -100, -100]}, [5, 6, 7]),
        ({"labels": [-100] * 5}, []),
        ({"attention_mask": [0] * 5}, []),
        ({"attention_mask": [1] * 5, "labels": [5, 6, 7, 8, -100]}, [5, 6, 7, 8, 9]),
        ({"attention_mask": [1, 1, 1, 0, 0], "labels": [5, 6, -100, -100, -100]}, [5, 6, 7]),
        ({"attention_mask": [0, 1, 1, 1, 0], "loss_mask": [7, 1, 1, 1, -1], "prompt_mask": [0, 1, 1, 1, 9]}, [6, 7, 8]),
        ({"loss_mask": None, "completion_mask": 0, "loss_weight": 0.5}, [5, 6, 7, 8, 9]),
    ],
)
def test_padding_is_left_out(kind: Any, columns: dict, read: list[int]) -> None:
    columns = {name: kind(mask) if isinstance(mask, list) else mask for name, mask in columns.items()}
    found = unpadded(row(**columns))
    assert list(found.tokens) == read and found.learned is None


@pytest.mark.parametrize("kind", [list, np.array])
@pytest.mark.parametrize(
    ("columns", "labels"),
    [
        ({"labels": [-100, -100, 7, 8, 9]}, [None, None, 7, 8, 9]),
        ({"labels": [5, 6, -100, 8, 9]}, [5, 6, None, 8, 9]),
        ({"labels": [-100, -100, 7, 8, -100]}, [None, None, 7, 8]),  # without attention, the end is padding
        ({"labels": [-100, -100, 7, 8, -100], "attention_mask": [1] * 5}, [None, None, 7, 8, None]),
        ({"labels": [5, 6, 7, -100, -100], "attention_mask": [1] * 5}, [5, 6, 7, None, None]),
        ({"labels": [-100] * 5, "attention_mask": [1] * 5}, [None] * 5),
        ({"labels": [-100, -100, 7, 8, -100], "attention_mask": [0, 1, 1, 1, 0]}, [6, 7, 8]),
        ({"labels": [-100, -100, -100, 8, -100], "attention_mask": [0, 1, 1, 1, 0]}, [None, None, 8]),
        ({"labels": [-100, 6, 7, 8, 9]}, [5, 6, 7, 8, 9]),  # nothing before it: the first one has no say
        ({"completion_mask": [0, 0, 1, 1, 1], "assistant_masks": [1, 1, 1, 0, 1]}, [None, None, 7, None, 9]),
        ({"labels": [-100, 6, 7, 8, 9], "loss_mask": [1, 1, 1, 1, 0]}, [5, 6, 7, 8, None]),
        ({"completion_mask": [0, 1, 1, 1, 1]}, [None, 6, 7, 8, 9]),  # it says something of the first one too
        ({"labels": [-100, 6, 7, 8, 9], "completion_mask": [0, 1, 1, 1, 1]}, [None, 6, 7, 8, 9]),
        ({"labels": [5, 6, 7, 8, -100], "assistant_masks": [0, 1, 1, 1, 0]}, [None, 6, 7, 8]),
        *(({name: [0, 0, 0, 1, 1]}, [None, None, None, 8, 9]) for name in LEARNED),
    ],
)
def test_masked_tokens_are_read_and_not_predicted(kind: Any, columns: dict, labels: list[int | None]) -> None:
    found = unpadded(row(**{name: kind(mask) for name, mask in columns.items()})).marked()
    begin = columns.get("attention_mask", [1]).index(1)
    assert [None if token >= READ_ONLY else token for token in found] == labels
    assert without_marks(np.asarray(found)).tolist() == row()["input_ids"][begin : begin + len(labels)]


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"attention_mask": [1, 0, 1, 1, 1]}, "column 'attention_mask' is not 1 between"),
        ({"attention_mask": [1, 1, 2, 2, 2]}, "column 'attention_mask' is not 1 between"),
        ({"labels": [6, 7, 8, 9, -100]}, "column 'labels' has 7 at token 2, which is 6"),
        ({"labels": [5, 6, 7, 0, 0]}, "column 'labels' has 0 at token 4, which is 8"),
        ({"labels": [-100, -100, 7, 9, 9], "attention_mask": [1] * 5}, "column 'labels' has 9 at token 4, which is 8"),
        ({"labels": [5, 6]}, r"column 'labels' has the shape \(2,\) beside 5 input_ids"),
        ({"loss_mask": [1, 0, 1, 1, 2]}, "column 'loss_mask' is not 0 or 1 everywhere"),
        ({"completion_mask": [0.0, 1.0, 1.0, 0.5, 1.0]}, "column 'completion_mask' is not 0 or 1 everywhere"),
        ({"prompt_mask": [1, 1, 1, 0, 0]}, "column 'prompt_mask' masks tokens, and nothing says what its 0 means"),
        ({"loss_weights": [1.0, 1.0, 0.5, 1.0, 1.0]}, "column 'loss_weights' masks tokens"),
        (
            {"completion_mask": "00111"},
            "column 'completion_mask' has '00111' of the type str beside input_ids, expected",
        ),
        (
            {"labels": torch.ones(5)},
            "column 'labels' has .* of the type Tensor beside input_ids, expected a list of numbers",
        ),
    ],
)
def test_other_masks_are_refused_by_name(columns: dict, message: str) -> None:
    assert all(map(is_mask, columns))
    with pytest.raises(ConfigError, match=message) as raised:
        unpadded(row(**columns))
    assert not isinstance(raised.value, RowError), "skip_unreadable is not meant for these"


@pytest.mark.parametrize(
    "value", [None, 7, 1.5, b"x", "a\ud83d", [1.5], [True], [[1], [2, 3]], [[1]], {"a": 1}, [None]]
)
def test_what_is_neither_text_nor_tokens(value: Any) -> None:
    with pytest.raises(RowError):
        checked(value)
    assert checked("é 😀") == "é 😀" and checked([1, 2]).tolist() == [1, 2] and len(checked([])) == 0
