"""The dataloader of packed documents, whose saved position is plain integers and independent of ranks and workers."""

from collections.abc import Iterator
from itertools import chain, islice
from typing import Any

import torch
from torch import Tensor
from torchtitan.components.dataloader import ParallelAwareDataloader

from flame_ext.data.documents import READ_ONLY, without_marks
from flame_ext.data.packing import IGNORED, PackedDocuments
from flame_ext.errors import CheckpointError, UserError


class PackedDataloader(ParallelAwareDataloader):
    """Batches of :class:`PackedDocuments`, whose position is that of each lane after the batches that it has yielded.

    What workers have read ahead does not count, and any number of ranks and workers can resume the position. Its keys contain the
    number of lanes, so a position with another number of lanes has none of the keys that are asked for. The number of this rank's
    lanes must be a multiple of the number of workers. ``kwargs`` are those of StatefulDataLoader.
    """

    dataset: PackedDocuments

    def __init__(
        self, dataset: PackedDocuments, dp_rank: int, dp_world_size: int, *, batch_size: int, **kwargs: Any
    ) -> None:
        self.sequences = batch_size
        # Each iteration draws a seed for its workers. If that came from the default generator, the dropout masks of a resumed
        # run, which has one iteration more, would differ from those of an unbroken run.
        generator = torch.Generator()
        # Workers yield single sequences, so that asked in turn they yield the lanes in turn, whatever their number. Without
        # workers the dataset yields whole batches, which is faster.
        dataset.together = 1 if kwargs.get("num_workers") else batch_size
        # The default collation would make a tensor of each integer in a position.
        kwargs |= {"generator": generator, "batch_size": None, "collate_fn": list}
        super().__init__(dataset, dp_rank, dp_world_size, **kwargs)

    @property
    def layout(self) -> dict[str, int]:
        """The numbers that a saved position depends on: of lanes, and the size of each source. The step's manifest has them."""
        sizes = {f"in source {i}": source.size for i, source in enumerate(self.dataset.sources)}
        return {"lanes": self.dataset.num_lanes, **sizes}

    def require_layout(self, saved: dict[str, int] | None) -> None:
        """Raises CheckpointError if the ``layout`` in the manifest of the step to resume is absent or differs."""
        if saved is None:
            raise CheckpointError("the step has no layout of its data position: it was saved by something else")
        if (lanes := saved.get("lanes")) != self.dataset.num_lanes:
            raise CheckpointError(
                f"the step has a data position of {lanes} lanes, this run has {self.dataset.num_lanes}: set "
                f"training.global_batch_size = {lanes} (the number of ranks does not matter)"
            )
        if saved != self.layout:
            then, now = (", ".join(f"{n} {name}" for name, n in layout.items()) for layout in (saved, self.layout))
            raise CheckpointError(
                f"the step has a data position in {then}, this run has {now}: give it the same data, in the same order"
            )

    def __iter__(self) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
        """Yields ``{"input": (B, T), "doc_ids": (B, T), "positions": (B, T), "next_doc_id": (B, 1)}, labels (B, T)``.

        Labels are the next tokens, and -100 where these are only read and after the end of a lane's data. Positions count from the
        beginning of a document. ``next_doc_id`` is the document of the last label.
        """
        self._iterator = None  # workers of an earlier iteration have a copy of the dataset, at another position
        items = chain.from_iterable(super().__iter__())
        going_on = set(self.dataset.lanes)
        while going_on or self.dataset.pad:
            try:
                batch = list(islice(items, self.sequences))
            except UserError as e:  # raised in a worker, its message is a traceback that ends with the original message
                raise type(e)(str(e).strip().rpartition(f"{type(e).__name__}: ")[2]) from e
            for _, (lane, *numbers), ended in batch:
                self.dataset.move(lane, numbers)
                going_on -= {lane} if ended else set()
            tokens, doc_ids = torch.stack([sequence for sequence, *_ in batch], dim=1)
            inputs = {"input": without_marks(tokens[:, :-1]).clamp_min(0), "doc_ids": doc_ids[:, :-1]}
            labels = torch.where(tokens >= READ_ONLY, IGNORED, tokens)[:, 1:]
            more = {"positions": positions_in_documents(inputs["doc_ids"]), "next_doc_id": doc_ids[:, -1:]}
            yield {**inputs, **more}, labels

    def state_dict(self) -> dict[str, Tensor]:
        """Returns the position of each of this rank's lanes; CheckpointError in the middle of a global batch."""
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
        """The epochs of each source that this rank's lanes have read, on average."""
        lanes = self.dataset.lanes
        return [
            sum(source.epochs(lane.cursors[i], number) for number, lane in lanes.items()) / len(lanes)
            for i, source in enumerate(self.dataset.sources)
        ]

    def _name(self, lane: int) -> str:
        return f"lane_{lane}_of_{self.dataset.num_lanes}"


def positions_in_documents(doc_ids: Tensor) -> Tensor:
    """Maps (B, T) document numbers, equal ones adjacent, to (B, T) positions that count from the document's beginning."""
    index = torch.arange(doc_ids.shape[1], device=doc_ids.device).expand_as(doc_ids)
    begins = torch.ones_like(doc_ids, dtype=torch.bool)
    begins[:, 1:] = doc_ids[:, 1:] != doc_ids[:, :-1]
    return index - torch.where(begins, index, 0).cummax(dim=1).values
