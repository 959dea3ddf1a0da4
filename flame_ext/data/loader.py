"""Dataloaders whose saved position holds no pickle; that of packed documents holds no number of ranks either."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torchdata.stateful_dataloader import StatefulDataLoader
from torchtitan.components.dataloader import ParallelAwareDataloader

from flame_ext.errors import CheckpointError

if TYPE_CHECKING:
    from flame_ext.data.packing import PackedDocuments


class ResumableDataloader(ParallelAwareDataloader):
    """What both kinds share.

    The names under which a position is saved hold :attr:`layout`, so that a position of another one is never taken for
    this one's: its names are absent.

    Args:
        dataset: see the subclass.
        dp_rank: of this rank's batches.
        dp_world_size: number of ranks that read different batches.
        **kwargs: StatefulDataLoader's.
    """

    def __init__(self, dataset: Any, dp_rank: int, dp_world_size: int, **kwargs: Any) -> None:
        # Every iteration draws a seed for its workers. Not from the default generator: a resumed run, which has one
        # iteration more, would go on with other dropout masks than the unbroken one.
        super().__init__(dataset, dp_rank, dp_world_size, generator=torch.Generator(), **kwargs)

    @property
    def layout(self) -> dict[str, int]:
        """What a saved position fits; for the step's manifest."""
        raise NotImplementedError

    def require_layout(self, saved: dict[str, int] | None) -> None:
        """Check the ``layout`` of the step that is to be resumed.

        Raises:
            CheckpointError: it is another one, or None: the step does not say.
        """
        if saved == self.layout:
            return
        found = "no layout of its data position" if saved is None else f"a data position of {_in_words(saved)}"
        raise CheckpointError(
            f"the step has {found}, this run has {_in_words(self.layout)}: {self._remedy(saved or {})}"
        )

    def _remedy(self, saved: dict[str, int]) -> str:
        raise NotImplementedError


class PackedDataloader(ResumableDataloader):
    """Batches of :class:`PackedDocuments`. Its position is that of each lane after the batches handed out: what workers
    have read ahead does not count, and any number of ranks can go on from it.
    """

    dataset: PackedDocuments

    @property
    def layout(self) -> dict[str, int]:
        return {"lanes": self.dataset.num_lanes}

    def __iter__(self) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
        """Yields ``{"input": (B, T)}, labels (B, T)``."""
        self._iterator = None  # a worker of an earlier iteration has a dataset of its own, which stands elsewhere
        for inputs, labels, positions in super().__iter__():
            for lane, document, offset in positions.tolist():
                self.dataset.move(lane, document, offset)
            yield inputs, labels

    def state_dict(self) -> dict[str, Tensor]:
        """This rank's lanes: each one's ``[document, offset]``.

        Raises:
            CheckpointError: in the middle of a global batch, where lanes have had different numbers of turns.
        """
        lanes = self.dataset.lanes
        if list(lanes) != sorted(lanes):
            raise CheckpointError(
                f"the data position can only be saved after whole steps; the next lane is {next(iter(lanes))}"
            )
        return {self._name(number): torch.tensor([lane.document, lane.offset]) for number, lane in lanes.items()}

    def load_state_dict(self, state_dict: dict[str, Tensor]) -> None:
        for number in sorted(self.dataset.lanes):
            self.dataset.move(number, *state_dict[self._name(number)].tolist())

    def _name(self, lane: int) -> str:
        return f"lane_{lane}_of_{self.dataset.num_lanes}"

    def _remedy(self, saved: dict[str, int]) -> str:
        size = f" = {saved['lanes']}" if "lanes" in saved else " and training.dataset of that run"
        return f"set training.global_batch_size{size} (the number of ranks does not matter)"


class StreamDataloader(ResumableDataloader):
    """Batches of the host's streamed datasets, which are split by rank: only as many ranks can go on."""

    @property
    def layout(self) -> dict[str, int]:
        return {"streams": self.dp_world_size}

    @property
    def _name(self) -> str:
        return f"stream_{self.dp_rank}_of_{self.dp_world_size}"

    def state_dict(self) -> dict[str, str]:
        """This rank's stream, as JSON: text, so that DCP keeps it whole whatever has been added to it since the start."""
        return {self._name: json.dumps(StatefulDataLoader.state_dict(self))}

    def load_state_dict(self, state_dict: dict[str, str]) -> None:
        StatefulDataLoader.load_state_dict(self, json.loads(state_dict[self._name]))

    def _remedy(self, saved: dict[str, int]) -> str:
        return "streamed data go on only with the same training.dataset and the same number of data-parallel ranks"


def _in_words(layout: dict[str, int]) -> str:
    return ", ".join(f"{number} {name}" for name, number in layout.items())
