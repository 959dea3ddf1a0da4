"""The dataloader of packed documents: batches, and a saved position without pickle or number of ranks and workers."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain, islice
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torchtitan.components.dataloader import ParallelAwareDataloader

from flame_ext.errors import CheckpointError, UserError

if TYPE_CHECKING:
    from flame_ext.data.packing import PackedDocuments


class PackedDataloader(ParallelAwareDataloader):
    """Batches of :class:`PackedDocuments`. Its position is that of each lane after the batches handed out: what workers
    have read ahead does not count, and any number of ranks and workers can go on from it.

    The names under which it is saved hold the number of lanes, so that a position of another one is never taken for this
    one's: its names are absent.

    Args:
        dataset: this rank's lanes, as many for each worker.
        dp_rank: of this rank's batches.
        dp_world_size: number of ranks that read different batches.
        batch_size: sequences of a batch.
        **kwargs: StatefulDataLoader's.
    """

    dataset: PackedDocuments

    def __init__(
        self, dataset: PackedDocuments, dp_rank: int, dp_world_size: int, *, batch_size: int, **kwargs: Any
    ) -> None:
        self.sequences = batch_size
        # Every iteration draws a seed for its workers. Not from the default generator: a resumed run, which has one
        # iteration more, would go on with other dropout masks than the unbroken one.
        generator = torch.Generator()
        # Workers give sequences, not batches: asked in turn they yield the lanes in turn, however many they are. Without workers
        # a batch comes in one piece, which costs less.
        dataset.together = 1 if kwargs.get("num_workers") else batch_size
        super().__init__(
            dataset, dp_rank, dp_world_size, generator=generator, batch_size=None, collate_fn=_as_it_is, **kwargs
        )

    @property
    def layout(self) -> dict[str, int]:
        """What a saved position fits; for the step's manifest."""
        sizes = {f"in source {i}": source.size for i, source in enumerate(self.dataset.sources)}
        return {"lanes": self.dataset.num_lanes, **sizes}

    def require_layout(self, saved: dict[str, int] | None) -> None:
        """Check the ``layout`` of the step that is to be resumed.

        Raises:
            CheckpointError: it is another one, or None: the step does not say.
        """
        if saved == self.layout:
            return
        if saved is None:
            raise CheckpointError("the step has no layout of its data position: it was saved by something else")
        if saved.get("lanes") != self.dataset.num_lanes:
            raise CheckpointError(
                f"the step has a data position of {saved.get('lanes')} lanes, this run has {self.dataset.num_lanes}: set "
                f"training.global_batch_size = {saved.get('lanes')} (the number of ranks does not matter)"
            )
        raise CheckpointError(
            f"the step has a data position in {_in_words(saved)}, this run has {_in_words(self.layout)}: give it the same data, "
            "in the same order"
        )

    def __iter__(self) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
        """Yields ``{"input": (B, T), "doc_ids": (B, T), "positions": (B, T)}, labels (B, T)``. Labels are the inputs moved by
        one, as the host's dataset has them, -100 after the end of a lane's data; positions count from the beginning of a document.
        """
        self._iterator = None  # a worker of an earlier iteration has a dataset of its own, which stands elsewhere
        items = chain.from_iterable(super().__iter__())
        going_on = set(self.dataset.lanes)
        while going_on or self.dataset.pad:
            try:
                batch = list(islice(items, self.sequences))
            except UserError as e:  # of a worker: its message is a traceback, with the message at the end
                raise type(e)(str(e).strip().rpartition(f"{type(e).__name__}: ")[2]) from e
            for _, (lane, *numbers), ended in batch:
                self.dataset.move(lane, numbers)
                going_on -= {lane} if ended else set()
            tokens, doc_ids = torch.stack([sequence for sequence, *_ in batch], dim=1)
            inputs = {"input": tokens[:, :-1].clamp_min(0), "doc_ids": doc_ids[:, :-1]}
            yield {**inputs, "positions": positions_in_documents(inputs["doc_ids"])}, tokens[:, 1:]

    def state_dict(self) -> dict[str, Tensor]:
        """This rank's lanes: each one's :meth:`flame_ext.data.packing.Lane.numbers`.

        Raises:
            CheckpointError: in the middle of a global batch, where lanes have had different numbers of turns.
        """
        lanes = self.dataset.lanes
        if list(lanes) != sorted(lanes):
            raise CheckpointError(
                f"the data position can only be saved after whole steps; the next lane is {next(iter(lanes))}"
            )
        return {self._name(number): torch.tensor(lane.numbers()) for number, lane in lanes.items()}

    def load_state_dict(self, state_dict: dict[str, Tensor]) -> None:
        for number in sorted(self.dataset.lanes):
            self.dataset.move(number, state_dict[self._name(number)].tolist())

    def epochs(self) -> list[float]:
        """How often this rank's lanes have had all their documents of each source, on average."""
        lanes = self.dataset.lanes
        return [
            sum(source.epochs(lane.cursors[i], number) for number, lane in lanes.items()) / len(lanes)
            for i, source in enumerate(self.dataset.sources)
        ]

    def _name(self, lane: int) -> str:
        return f"lane_{lane}_of_{self.dataset.num_lanes}"


def _as_it_is(sequences: Any) -> Any:
    """Instead of a collation, which would make tensors of the numbers in a position, one by one."""
    return sequences


def positions_in_documents(doc_ids: Tensor) -> Tensor:
    """(B, T) document numbers, each document in one piece, to positions that count from its beginning."""
    index = torch.arange(doc_ids.shape[1]).expand_as(doc_ids)
    begins = torch.ones_like(doc_ids, dtype=torch.bool)
    begins[:, 1:] = doc_ids[:, 1:] != doc_ids[:, :-1]
    return index - torch.where(begins, index, 0).cummax(dim=1).values


def _in_words(layout: dict[str, int]) -> str:
    return ", ".join(f"{number} {name}" for name, number in layout.items())
