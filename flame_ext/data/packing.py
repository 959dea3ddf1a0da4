"""Documents packed into sequences, in an order that does not depend on how many ranks read them.

The global batch is a fixed number of *lanes*: lane j packs documents j, j + L, j + 2L, … (L lanes) end to end and gives
one sequence to each step. A rank reads every ``dp_world_size``-th lane, so a step's global batch is the same set of
sequences on one rank and on sixty-four, each rank tokenises only its own documents, and the position in the data is
one document number and one offset for each lane.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import lru_cache, partial
from itertools import cycle
from typing import Any

import datasets
import torch
from torch import Tensor
from torch.utils.data import IterableDataset
from torchtitan.components.tokenizer import BaseTokenizer
from torchtitan.config import JobConfig
from torchtitan.hf_datasets.text_datasets import DATASETS, HuggingFaceTextDataset

from flame_ext.data.loader import PackedDataloader, ResumableDataloader, StreamDataloader
from flame_ext.data.sources import text_of
from flame_ext.errors import CheckpointError, ConfigError
from flame_ext.model.hf_causal_lm import load_hf_config


@dataclass
class Lane:
    """A position in the data, as it is saved."""

    document: int
    """Number of the document that the next token is in, counted on over epochs."""
    offset: int = 0
    """Position of the next token in that document."""


class PackedDocuments(IterableDataset[tuple[dict[str, Tensor], Tensor, Tensor]]):
    """Sequences of ``seq_len + 1`` tokens from this rank's lanes, in turn, without end.

    Args:
        count: number of documents of an epoch.
        tokens_of: document index in [0, count) to its tokens, EOS included.
        seq_len: T.
        lanes: this rank's lanes.
        num_lanes: of all ranks together: sequences in a global batch.
        rng_seed: determines each epoch's permutation of the documents; None = as they come.
    """

    def __init__(
        self,
        count: int,
        tokens_of: Callable[[int], list[int]],
        seq_len: int,
        lanes: range,
        num_lanes: int,
        rng_seed: int | None,
    ) -> None:
        self._count, self._tokens_of, self._seq_len = count, tokens_of, seq_len
        self.num_lanes = num_lanes
        self._order = lru_cache(maxsize=2)(partial(_permutation, count, rng_seed))  # lanes may stand in two epochs
        self.lanes = {number: Lane(number) for number in lanes}
        """Where the next iteration begins, in the order of the lanes' turns. Iterating does not move it: a dataloader's
        workers read ahead, and only what reaches the training counts (:meth:`move`)."""

    def move(self, lane: int, document: int, offset: int) -> None:
        """Put a lane to a position and make its turn the last."""
        self.lanes.pop(lane)
        self.lanes[lane] = Lane(document, offset)

    def __iter__(self) -> Iterator[tuple[dict[str, Tensor], Tensor, Tensor]]:
        """Yields ``{"input": (T,)}, labels (T,), position (3,)``; labels are the inputs moved by one, as the host's
        dataset has them; the position is the lane's after this sequence: its number, document and offset.

        Raises:
            CheckpointError: a lane was put (:meth:`move`) beyond the end of a document.
        """
        lanes = {number: replace(lane) for number, lane in self.lanes.items()}
        current: dict[int, list[int]] = {}  # tokens of each lane's document
        for number, lane in cycle(lanes.items()):
            tokens = torch.tensor(self._take(number, lane, current, self._seq_len + 1))
            yield {"input": tokens[:-1]}, tokens[1:], torch.tensor([number, lane.document, lane.offset])

    def _take(self, number: int, lane: Lane, current: dict[int, list[int]], length: int) -> list[int]:
        taken: list[int] = []
        while len(taken) < length:
            if number not in current:
                epoch, index = divmod(lane.document, self._count)
                current[number] = self._tokens_of(self._order(epoch)[index])
            tokens = current[number]
            if lane.offset > len(tokens):
                raise CheckpointError(
                    f"the data position is token {lane.offset} of a document that has {len(tokens)}: the step was saved with "
                    "other data, data.rng_seed or tokenizer"
                )
            part = tokens[lane.offset : lane.offset + length - len(taken)]
            taken += part
            lane.offset += len(part)
            if lane.offset == len(tokens):
                lane.document, lane.offset = lane.document + self.num_lanes, 0
                del current[number]
        return taken


def _permutation(count: int, rng_seed: int | None, epoch: int) -> list[int]:
    if rng_seed is None:
        return list(range(count))
    generator = torch.Generator().manual_seed(rng_seed * 1_000_003 + epoch)
    return torch.randperm(count, generator=generator).tolist()


def build_dataloader(
    dp_world_size: int, dp_rank: int, tokenizer: BaseTokenizer, job_config: JobConfig
) -> ResumableDataloader:
    """The TrainSpec's dataloader: ``training.dataset`` by its name in the host's registry.

    Map-style data are packed by lanes; streamed data (c4) go the host's own way.

    Raises:
        ConfigError: unknown name, no data, no such field, or a tokenizer with ids beyond the model's vocabulary.
    """
    training = job_config.training
    source = DATASETS.get(training.dataset.lower())
    if source is None:
        raise ConfigError(f"training.dataset {training.dataset!r} is unknown; known: {', '.join(sorted(DATASETS))}")
    _require_ids_in_vocabulary(tokenizer, job_config)
    try:
        data = source.loader(training.dataset_path or source.path)
    except (OSError, ValueError) as e:  # absent, unreachable or malformed; the libraries' own words say which
        raise ConfigError(
            f"training.dataset {training.dataset!r} (training.dataset_path {training.dataset_path!r}): {e}"
        ) from e
    if isinstance(data, datasets.Dataset):
        if len(data) == 0:
            raise ConfigError(f"training.dataset {training.dataset!r} ({training.dataset_path}): no documents in it")
        text_of(data[0], job_config.data.text_field)
        global_batch = training.global_batch_size
        if global_batch < 0:
            global_batch = training.local_batch_size * dp_world_size

        def tokens_of(index: int) -> list[int]:
            return tokenizer.encode(text_of(data[index], job_config.data.text_field), add_bos=True, add_eos=True)

        dataset: IterableDataset[Any] = PackedDocuments(
            count=len(data),
            tokens_of=tokens_of,
            seq_len=training.seq_len,
            lanes=range(dp_rank, global_batch, dp_world_size),
            num_lanes=global_batch,
            rng_seed=job_config.data.rng_seed if job_config.data.shuffle else None,
        )
    else:
        dataset = HuggingFaceTextDataset(
            training.dataset, training.dataset_path, tokenizer, training.seq_len, dp_rank, dp_world_size, infinite=True
        )
    dataloader = PackedDataloader if isinstance(dataset, PackedDocuments) else StreamDataloader
    return dataloader(
        dataset, dp_rank, dp_world_size, batch_size=training.local_batch_size, **asdict(training.dataloader)
    )


def _require_ids_in_vocabulary(tokenizer: BaseTokenizer, job_config: JobConfig) -> None:
    config = load_hf_config(job_config.model.hf_assets_path, job_config.seed.trust_remote_code)
    vocab_size = config.get_text_config().vocab_size
    token, largest = max(tokenizer.get_vocab().items(), key=lambda item: item[1])
    if largest >= vocab_size:
        raise ConfigError(
            f"{job_config.model.hf_assets_path}: the tokenizer's id {largest} ({token!r}) is beyond the model's vocab_size "
            f"{vocab_size}: it belongs to another model"
        )
