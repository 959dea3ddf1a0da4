"""Plans of steps: what is counted, which losses have which weight, and parts of a micro-batch."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from flame_ext.data.packing import PADDING
from flame_ext.errors import UserError
from flame_ext.heads.spec import HeadBatch, KeyBank, Sequences
from flame_ext.preflight.parse import parse
from flame_ext.step.plan import Batch, FutureRows, Planner, StepPlan, has_label
from tests.ranks import DEBUG_TOML

EOS = 0
IDS = torch.tensor([[5, 6, EOS, 7, 8, 9], [5, EOS, EOS, 6, 7, 8]])
LABELS = torch.tensor([[6, EOS, 7, 8, 9, -100], [EOS, EOS, 6, 7, 8, 9]])


def plan(step: int, *options: str, batches: list[Batch] | None = None) -> StepPlan:
    config = parse([f"--job.config_file={DEBUG_TOML}", "--training.local_batch_size=2", *options])
    planner = Planner(config, EOS, None, torch.device("cpu"))
    return planner.plan(step, batches or [({"input": IDS}, LABELS)])


def test_tokens_pairs_and_positions_are_counted_over_the_whole_step() -> None:
    once, twice = plan(1), plan(1, batches=[({"input": IDS}, LABELS)] * 2)
    assert once.tokens == once.local_tokens == 11 and twice.tokens == 22
    # Documents are 0 0 0 1 1 1 and 0 0 1 2 2 2: t, t + 1 and t + 2 have to be in one.
    assert once.microbatches[0].doc_ids.tolist() == [[0, 0, 0, 1, 1, 1], [0, 0, 1, 2, 2, 2]]
    future = once.microbatches[0].future
    assert future is not None and once.has_future and once.shift == 1
    # A masked label is of no known document; after EOS another one begins.
    assert future.next_doc_ids().tolist() == [[0, 0, 1, 1, 1, -1], [0, 1, 2, 2, 2, 2]]
    assert future.pairs.nonzero().tolist() == [[0, 0], [0, 3], [1, 3]]
    assert (once.pairs, once.positions) == (3, 7) and (twice.pairs, twice.positions) == (6, 14)
    whole = plan(1, "--future_encoder.no-respect_doc_boundaries")
    assert whole.pairs == 8 and whole.microbatches[0].doc_ids.tolist() == once.microbatches[0].doc_ids.tolist()


def test_a_step_without_any_label_or_pair_divides_by_one() -> None:
    nothing = plan(1, batches=[({"input": torch.full((2, 6), EOS)}, torch.full((2, 6), -100))])
    assert (nothing.tokens, nothing.pairs, nothing.positions, nothing.local_tokens) == (1, 1, 1, 0)


def test_documents_of_the_dataloader_count_before_eos() -> None:
    given = torch.tensor([[0, 0, 0, 0, 1, 1], [0, 0, 0, PADDING, PADDING + 1, PADDING + 2]])
    batches: list[Batch] = [({"input": IDS, "doc_ids": given}, LABELS)]
    respected, whole = plan(1, batches=batches), plan(1, "--future_encoder.no-respect_doc_boundaries", batches=batches)
    assert respected.microbatches[0].doc_ids is not None and respected.pairs == 3
    assert whole.pairs == 5, "what comes after the end of the data belongs to nothing"


def test_weights_follow_schedule_and_interval_and_the_teacher_rests_in_between() -> None:
    options = ["--future_encoder.teacher_interval=2", "--future_encoder.loss_weight_warmup_steps=4"]
    options += ["--action_layer.enable", "--action_layer.top_k=4", "--training.steps=60"]
    plans = [plan(step, *options) for step in (1, 2, 3)]
    assert [p.has_future for p in plans] == [True, False, True]
    assert [p.weights["loss_future"] for p in plans] == pytest.approx([2 * 0.1 / 4, 0, 2 * 0.1 * 3 / 4])
    assert [p.weights["loss_action"] for p in plans] == pytest.approx([0.2, 0, 0.2])
    assert plans[1].microbatches[0].future is None and plans[1].tokens == 11
    assert plan(1, "--future_encoder.loss_weight=0").weights == {}


def test_the_shift_is_drawn_from_step_and_seed() -> None:
    shifts = [plan(step, "--future_encoder.shift_k=3").shift for step in range(1, 13)]
    assert set(shifts) == {1, 2, 3} and shifts == [plan(s, "--future_encoder.shift_k=3").shift for s in range(1, 13)]
    assert shifts != [plan(s, "--future_encoder.shift_k=3", "--seed.rng_seed=1").shift for s in range(1, 13)]


def test_a_fraction_of_the_sequences_stands_for_all_of_them() -> None:
    options = ["--future_encoder.teacher_fraction=0.5"]
    chosen: list[Any] = [plan(step, *options) for step in range(1, 9)]
    rows = [p.microbatches[0].future.selection.tolist() for p in chosen]
    assert {row for (row,) in rows} == {0, 1}
    assert all(p.pairs == 1.5 and p.positions == 3.5 for p in chosen)
    first = chosen[0].microbatches[0].future
    assert first.pairs.shape == (1, 6) and torch.equal(first.select(IDS), IDS[first.selection])


@pytest.mark.parametrize("selection", [None, torch.tensor([0, 2, 3])])
def test_parts_of_a_micro_batch_keep_their_keys(selection: torch.Tensor | None) -> None:
    count = 5 if selection is None else 3
    doc_ids, pairs = torch.arange(count)[:, None].expand(count, 6), torch.rand(count, 6) > 0.5
    bank = KeyBank(torch.empty(0), torch.empty(0), torch.empty(0))
    future = FutureRows(
        selection,
        doc_ids,
        doc_ids,
        pairs,
        bank,
        first_key=100,
        numbers=None if selection is None else selection.tolist(),
    )
    parts = [future.rows(slice(begin, begin + 1), 5, 6) for begin in range(5)]
    values = torch.arange(5)
    assert (
        torch.cat([part.select(values[i : i + 1]) for i, part in enumerate(parts)]).tolist()
        == future.select(values).tolist()
    )
    assert torch.equal(torch.cat([part.pairs for part in parts]), pairs)
    assert all(part.bank is bank for part in parts)
    assert [part.first_key for part in parts] == [100 + 6 * sum(len(p.pairs) for p in parts[:i]) for i in range(5)]


def test_what_is_only_read_predicts_nothing_and_is_no_target() -> None:
    labels = torch.tensor([[-100, -100, -100, 8, 9, 5], [5, 6, -100, -100, 8, 9]])
    tokens = torch.tensor([[4, 5, 6, 7, 8, 9], [4, 5, 6, 7, 7, 8]])
    documents = torch.tensor([[0, 0, 0, 0, 0, 0], [0, 0, 0, 0, 0, 1]])
    found = plan(1, "--action_layer.enable", batches=[({"input": tokens, "doc_ids": documents}, labels)])
    future = found.microbatches[0].future
    assert future is not None
    pairs = [  # t has a label, and t + 1 a future in the document of t
        (row, t)
        for row in range(2)
        for t in range(4)
        if labels[row, t] != -100 and documents[row, t] == documents[row, t + 2]
    ]
    assert [*map(tuple, future.pairs.nonzero().tolist())] == pairs == [(0, 3), (1, 0), (1, 1)]
    assert (found.tokens, found.pairs) == (7, 3) and found.positions == 4


@pytest.mark.parametrize("whole", [False, True])
def test_the_upcoming_tokens_are_labels_of_positions_with_a_label(whole: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, 50, (4, 12), generator=generator)
    learned = torch.rand(4, 13, generator=generator) < 0.6
    labels = torch.where(learned[:, 1:], torch.nn.functional.pad(tokens[:, 1:], (0, 1), value=7), -100)
    documents = (torch.rand(4, 12, generator=generator) < 0.2).long().cumsum(1)
    sequences = Sequences(tokens, documents, labels=labels) if whole else None
    batch = HeadBatch(torch.zeros(4, 12, 1), torch.zeros(0), tokens, labels, documents, torch.ones(()), whole=sequences)
    expected = torch.full((4, 12, 3), -1)
    for row in range(4):
        for t in range(12):
            for distance in (1, 2, 3):
                inside = t + distance < 12 and documents[row, t] == documents[row, t + distance]
                if inside and learned[row, t + 1] and learned[row, t + distance]:
                    expected[row, t, distance - 1] = tokens[row, t + distance]
    assert batch.upcoming(3).equal(expected) and (expected >= 0).any()


def test_steps_without_a_label_are_warned_of_and_the_tenth_in_a_row_is_refused(
    caplog: pytest.LogCaptureFixture,
) -> None:
    masked = {"input": IDS}, torch.full((2, 6), -100)
    assert has_label([masked, ({"input": IDS}, LABELS)]) and not has_label([masked])
    planner = Planner(parse([f"--job.config_file={DEBUG_TOML}"]), EOS, None, torch.device("cpu"))
    planner.require_labels(1, True)
    assert not caplog.records
    for step in range(2, 11):
        planner.require_labels(step, False)
        assert f"step {step} has no token to predict on any rank: all are masked" in caplog.messages[-1]
    planner.require_labels(11, True)
    for step in range(12, 21):
        planner.require_labels(step, False)
    with pytest.raises(
        UserError, match="step 21 has no token to predict on any rank: all are masked, as in the 9 steps before"
    ):
        planner.require_labels(21, False)
