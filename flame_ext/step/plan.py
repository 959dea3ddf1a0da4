"""The plan of a step, made before its first forward: everything that all ranks have to agree on and that needs the whole step."""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torchtitan.tools.logging import logger

from flame_ext.config.sections import FlameJobConfig
from flame_ext.data.packing import PADDING
from flame_ext.errors import UserError
from flame_ext.heads.registry import loss_weights, teacher_of, trained_heads
from flame_ext.heads.spec import KeyBank
from flame_ext.model.context_parallel import SequenceParts
from flame_ext.objective.cross_entropy import IGNORE_INDEX
from flame_ext.objective.masks import doc_ids_from_eos, has_future, pair_mask

Batch = tuple[dict[str, Tensor], Tensor]
"""Tensors of the dataloader, and (B, T) labels: (B, T) "input" and, if it knows documents, (B, T) "doc_ids" and "positions", and
the (B, 1) "next_doc_id" of the last label.
"""

MAX_WITHOUT_LABEL = 10
"""Steps in a row without a label that end a run."""


@dataclass
class FutureRows:
    """The b sequences of a micro-batch whose future is predicted."""

    selection: Tensor | None  # (b,) their indices in the micro-batch; None = all
    doc_ids: Tensor  # (b, T): the documents, as far as summaries respect them
    next_doc_id: Tensor  # (b, 1): that of the last label; -1 where this is masked
    pairs: Tensor  # (b, T) bool: positions t with a valid summary at t + shift, in their document
    bank: KeyBank | None = None
    """None until the teacher has run; it stays None for summaries that are pooled in the student's forward."""
    first_key: int = 0  # Row of the bank where this rank's b * n summaries of these sequences begin
    keys_of_rank: int = 0  # Number of rows of the bank from each rank
    numbers: list[int] | None = None  # The selection, on the host

    def select(self, values: Tensor) -> Tensor:
        """(B, …) to (b, …)."""
        return values if self.selection is None else values[self.selection]

    def next_doc_ids(self) -> Tensor:
        """Returns the (b, T) documents of the tokens that follow, those of :meth:`MicroBatch.next_tokens`."""
        return torch.cat([self.doc_ids[:, 1:], self.next_doc_id], dim=1)

    def rows(self, rows: slice, batch_size: int, length: int) -> FutureRows:
        """The part that lies in ``rows`` of the B = ``batch_size`` sequences; it is compared with the same keys. ``length``: n."""
        begin, end, _ = rows.indices(batch_size)
        selection, own, numbers = None, slice(begin, end), None
        if self.selection is not None:
            assert self.numbers is not None
            own = slice(*(bisect_left(self.numbers, row) for row in (begin, end)))
            selection, numbers = self.selection[own] - begin, [number - begin for number in self.numbers[own]]
        first_key = self.first_key + own.start * length
        doc_ids, next_doc_id, pairs = self.doc_ids[own], self.next_doc_id[own], self.pairs[own]
        return FutureRows(selection, doc_ids, next_doc_id, pairs, self.bank, first_key, self.keys_of_rank, numbers)

    def targets(self, shift: int, parts: SequenceParts) -> Tensor:
        """The (b * n,) rows of the bank with the summaries at t + shift of this rank's positions t; 0 where there is no pair."""
        (sequences, seq_len), device = self.pairs.shape, self.pairs.device
        ahead = (parts.positions(seq_len, device) + shift).clamp_max(seq_len - 1)
        place, length = parts.places(seq_len, device)[ahead], seq_len // parts.ranks
        owner = place.div(length, rounding_mode="floor")
        row = self.first_key + (owner - parts.rank) * self.keys_of_rank + place - owner * length
        rows = row + length * torch.arange(sequences, device=device)[:, None]
        return torch.where(parts.shard(self.pairs), rows, 0).flatten()


@dataclass
class MicroBatch:
    """One micro-batch of this rank, on its device."""

    inputs: dict[str, Tensor]  # as in Batch
    labels: Tensor  # (B, T)
    doc_ids: Tensor  # (B, T): the dataloader's documents, else those between EOS tokens
    future: FutureRows | None = None  # None on a step without summaries of the future

    def next_tokens(self) -> Tensor:
        """Returns the (B, T) tokens that follow; the last one is the last label, or 0 where this is masked."""
        return torch.cat([self.inputs["input"][:, 1:], self.labels[:, -1:].clamp_min(0)], dim=1)


@dataclass
class StepPlan:
    """One step: its micro-batches, and what all ranks have agreed on for it."""

    microbatches: list[MicroBatch]
    tokens: Tensor  # () labelled tokens of the step, over all ranks, which the cross-entropy is divided by; at least 1
    local_tokens: int  # Those of this rank
    weights: dict[str, float]  # Name of each loss beside the cross-entropy to its weight
    shift: int = 1  # Predictions at t are compared with summaries at t + shift
    pairs: Tensor | float = 1.0  # () pairs of the step, over all ranks; at least 1
    positions: Tensor | float = (
        1.0  # () positions of the step with a future and a next token, over all ranks; at least 1
    )
    has_future: bool = False  # Whether the losses that need summaries of the future are computed


class Planner:
    """Makes the plans of a run's steps, with micro-batches on ``device``.

    Documents end with ``eos_id`` where the dataloader knows none; None = a sequence is one document. ``mesh`` is that of the
    ranks that have different data; None = one rank.
    """

    def __init__(
        self, config: FlameJobConfig, eos_id: int | None, mesh: DeviceMesh | None, device: torch.device
    ) -> None:
        self._config, self._eos_id, self._mesh, self._device = config, eos_id, mesh, device
        self._trained, teacher = trained_heads(config), teacher_of(config)
        waiting = [name for name, spec in self._trained.items() if spec.needs_future]
        self._future_losses = [loss for name in waiting for loss in loss_weights(name, config)]
        self._teacher: Any = None if teacher is None else getattr(config, teacher)
        self._without_label = 0  # the last steps

    def require_labels(self, step: int, has_label: bool) -> None:
        """Warns of a step without a label on any rank; raises a UserError at the :data:`MAX_WITHOUT_LABEL`-th in a row."""
        self._without_label = 0 if has_label else self._without_label + 1
        if has_label:
            return
        said = f"step {step} has no token to predict on any rank: all are masked"
        if self._without_label < MAX_WITHOUT_LABEL:
            logger.warning(said)
            return
        raise UserError(
            f"{said}, as in the {MAX_WITHOUT_LABEL - 1} steps before; look at the columns of labels and masks in the data, or make "
            "training.global_batch_size larger"
        )

    def plan(self, step: int, batches: list[Batch]) -> StepPlan:
        """Plan a step, counted from 1, of this rank's micro-batches. Collective: every rank calls it for every step."""
        weights = self._weights(step)
        if not any(weights[loss] for loss in self._future_losses):
            return self._plan(batches, weights, 1, None)
        generator = torch.Generator().manual_seed((self._config.seed.rng_seed * 1_000_003 + step) % 2**63)
        shift = int(torch.randint(1, self._teacher.shift_k + 1, (), generator=generator))  # the same on all ranks
        rank = 0 if self._mesh is None else self._mesh.get_local_rank()
        generator.manual_seed(((self._config.seed.rng_seed * 1_000_003 + step) * 65_537 + rank) % 2**63)
        fraction = self._teacher.teacher_fraction
        selections = [_draw(len(labels), fraction, generator) for _, labels in batches]
        return self._plan(batches, weights, shift, selections)

    def count(self, batch: Batch) -> Tensor:
        """(3,) float64 numbers of this rank's tokens with a label, pairs and positions in a batch that is only evaluated."""
        return self._microbatch(batch, 1, self._teacher is not None)[1]

    def over_ranks(self, counts: Tensor) -> Tensor:
        """The sum of all ranks' :meth:`count`. Collective."""
        if self._mesh is not None:
            dist.all_reduce(counts, group=self._mesh.get_group())
        return counts

    def plan_evaluation(self, batch: Batch, counts: Tensor) -> StepPlan:
        """Plan losses that are only to be known: the weights without schedules, shift 1, every sequence.

        Sums are divided by ``counts``, those of all ranks and of all batches that are to be added up.
        """
        return self._plan([batch], self._weights(None), 1, None if self._teacher is None else [None], counts)

    def _weights(self, step: int | None) -> dict[str, float]:
        return {loss: w for name in self._trained for loss, w in loss_weights(name, self._config, step).items()}

    def _plan(
        self,
        batches: list[Batch],
        weights: dict[str, float],
        shift: int,
        selections: list[Tensor | None] | None,
        counts: Tensor | None = None,
    ) -> StepPlan:
        chosen = selections or [None] * len(batches)
        has_future = selections is not None
        counted = [
            self._microbatch(batch, shift, has_future, selection)
            for batch, selection in zip(batches, chosen, strict=True)
        ]
        microbatches, own = [m for m, _ in counted], [c for _, c in counted]
        local_tokens = sum(_labelled(labels) for _, labels in batches)
        if counts is None:
            counts = self.over_ranks(torch.stack(own).sum(0))
        # They stay on the device, so that no step has to wait for them.
        tokens, pairs, positions = counts.clamp_min(1.0).float().unbind()
        return StepPlan(microbatches, tokens, local_tokens, weights, shift, pairs, positions, has_future)

    def _microbatch(
        self, batch: Batch, shift: int, has_future: bool, selection: Tensor | None = None
    ) -> tuple[MicroBatch, Tensor]:
        """A batch on the device, and its (3,) numbers of tokens with a label, pairs and positions."""
        inputs, labels = batch
        counts = torch.zeros(3, dtype=torch.float64, device=self._device)
        counts[0].fill_(_labelled(labels))
        inputs = {name: self._moved(values) for name, values in inputs.items()}
        microbatch = MicroBatch(inputs, self._moved(labels), self._documents(inputs))
        if has_future:
            microbatch.future, counts[1], counts[2] = self._future(microbatch, shift, selection)
        return microbatch, counts

    def _future(
        self, microbatch: MicroBatch, shift: int, selection: Tensor | None
    ) -> tuple[FutureRows, Tensor | float, Tensor | float]:
        """The selected sequences, and this micro-batch's numbers of pairs and of positions."""
        labels, (doc_ids, next_doc_id) = microbatch.labels, self._documents_for_summaries(microbatch)
        valid = has_future(doc_ids)
        labelled = labels != IGNORE_INDEX
        pairs = pair_mask(valid, doc_ids, shift) & labelled  # as padding, a position without a label predicts nothing
        # Numbers are those of all sequences times the share that is used: a sum over the selected ones is then unbiased.
        share = 1.0 if selection is None else len(selection) / len(labels)
        numbers = pairs.sum() * share, (valid & labelled).sum() * share
        chosen = None if selection is None else selection.tolist()
        if selection is not None:
            selection = self._moved(selection)
            doc_ids, next_doc_id, pairs = doc_ids[selection], next_doc_id[selection], pairs[selection]
        return FutureRows(selection, doc_ids, next_doc_id, pairs, numbers=chosen), *numbers

    def _moved(self, values: Tensor) -> Tensor:
        """A tensor of the dataloader on the device. From pinned memory, so that no step waits for the copy."""
        pinned = values.pin_memory() if self._device.type != "cpu" and values.device.type == "cpu" else values
        return pinned.to(self._device, non_blocking=True)

    def _documents(self, inputs: dict[str, Tensor]) -> Tensor:
        if "doc_ids" in inputs:
            return inputs["doc_ids"]
        ids = inputs["input"]
        return torch.zeros_like(ids) if self._eos_id is None else doc_ids_from_eos(ids, self._eos_id)

    def _documents_for_summaries(self, microbatch: MicroBatch) -> tuple[Tensor, Tensor]:
        """The (B, T) documents of the tokens, and the (B, 1) one of the last label."""
        doc_ids, last = microbatch.doc_ids, microbatch.inputs["input"][:, -1:]
        next_doc_id = microbatch.inputs.get("next_doc_id")
        if next_doc_id is None:
            next_doc_id = doc_ids[:, -1:] if self._eos_id is None else doc_ids[:, -1:] + (last == self._eos_id)
        if not self._teacher.respect_doc_boundaries:
            # What comes after the end of the data belongs to nothing.
            doc_ids, next_doc_id = (torch.where(ids < PADDING, 0, ids) for ids in (doc_ids, next_doc_id))
        return doc_ids, next_doc_id.masked_fill(microbatch.labels[:, -1:] == IGNORE_INDEX, -1)


def has_label(batches: list[Batch]) -> bool:
    """Whether any position of a step's batches has a label."""
    return any(_labelled(labels) for _, labels in batches)


def _labelled(labels: Tensor) -> int:
    return int((labels != IGNORE_INDEX).sum())  # on the CPU, where the dataloader has it


def _draw(count: int, fraction: float, generator: torch.Generator) -> Tensor | None:
    if fraction == 1.0:
        return None
    return torch.randperm(count, generator=generator)[: round(fraction * count)].sort().values
