"""After the read, across ranks: every element of every tensor is on some rank, and the same on all that hold it.

A tensor's digest is a sum over its rows, each hashed with its place in the full tensor. So it does not depend on how the
rows are spread over ranks: two runs on different numbers of processes started from the same weights if it is the same.
Where ranks have columns (tensor parallelism), a rank gathers those of its rows, of one tensor at a time.
"""

from __future__ import annotations

import hashlib
import math
from collections import defaultdict
from collections.abc import Iterable, Mapping

import torch
import torch.distributed as dist
import xxhash
from torch import Tensor

from flame_ext.errors import SeedError
from flame_ext.seeding.sources.boxes import Box, full_box, local_part, tiles_exactly, volume, whole_rows

_MODULUS = 2**128


def compare_replicas(
    state: Mapping[str, Tensor], whole: Mapping[str, Tensor] | None = None, part: int = 0
) -> dict[str, int]:
    """The digest of every full tensor, from what all ranks hold. Collective.

    Args:
        state: key to parameter or buffer, DTensor or plain.
        whole: the same of all ranks together, for the shapes; None = ``state`` has every key.
        part: ranks of one part have the same keys; another part has others, or some of them as well.

    Raises:
        SeedError: on all ranks: two ranks hold different values for the same elements, or all ranks' parts together are
            not the tensor.
    """
    mine = {}
    for key, tensor in state.items():
        local, box = local_part(whole_rows(tensor))
        mine[key] = (box, local_digest(local, box, tuple(tensor.shape)))
    held = [(part, mine)]
    if dist.is_initialized() and dist.get_world_size() > 1:
        held = [(0, {}) for _ in range(dist.get_world_size())]
        dist.all_gather_object(held, (part, mine))
    return {
        key: _agreed(key, tuple(tensor.shape), _expected(key, held))
        for key, tensor in (state if whole is None else whole).items()
    }


def _expected(key: str, held: list[tuple[int, dict[str, tuple[Box, int]]]]) -> dict[int, tuple[Box, int] | None]:
    """What each rank holds of a tensor, of those whose part has it."""
    parts = {part for part, boxes in held if key in boxes}
    return {rank: boxes.get(key) for rank, (part, boxes) in enumerate(held) if part in parts}


def _agreed(key: str, shape: tuple[int, ...], parts: Mapping[int, tuple[Box, int] | None]) -> int:
    digests: dict[Box, dict[int, list[int]]] = defaultdict(lambda: defaultdict(list))
    for rank, part in parts.items():
        if part is None:
            raise SeedError(
                f"rank {rank} does not have {key!r}, which rank {_first_with(parts)} has: the ranks have built different models"
            )
        box, digest = part
        if volume(box) > 0:
            digests[box][digest].append(rank)
    for box, ranks_of in digests.items():
        if len(ranks_of) > 1:
            groups = " and ".join(f"rank {ranks[0]}" for ranks in ranks_of.values())
            raise SeedError(
                f"{key!r}: {groups} hold different values for the same elements {box}; the files differ between nodes, or a "
                "machine's memory is faulty"
            )
    if not tiles_exactly(full_box(shape), digests) and math.prod(shape) > 0:
        raise SeedError(f"{key!r}: the ranks together hold {sorted(digests)}, which is not its shape {list(shape)}")
    return sum(next(iter(ranks_of)) for ranks_of in digests.values()) % _MODULUS


def _first_with(parts: Mapping[int, tuple[Box, int] | None]) -> int:
    return next(rank for rank, part in parts.items() if part is not None)


@torch.no_grad()
def local_digest(local: Tensor, box: Box, shape: tuple[int, ...]) -> int:
    """Sum of the hashes of this rank's rows.

    Args:
        local: the rank's part.
        box: what part of the full tensor that is.
        shape: of the full tensor.
    """
    if volume(box) == 0:
        return 0
    rows = box[0][1] - box[0][0] if box else 1
    values = local.detach().to("cpu").reshape(-1).contiguous().view(torch.uint8).numpy()
    data, nbytes = memoryview(values.data), values.nbytes // rows
    # The flat index of the first element of the part, and what it grows by from row to row.
    strides = [math.prod(shape[i + 1 :]) for i in range(len(shape))]
    start = sum(begin * stride for (begin, _), stride in zip(box, strides, strict=True))
    stride = strides[0] if strides else 0
    digest = 0
    for row in range(rows):
        place = (start + row * stride) % 2**64
        digest += xxhash.xxh3_128_intdigest(data[row * nbytes : (row + 1) * nbytes], place)
    return digest % _MODULUS


def weights_digest(digests: Mapping[str, int], state: Mapping[str, Tensor], keys: Iterable[str]) -> str:
    """One SHA-256 over names, dtypes, shapes and digests of ``keys``."""
    total = hashlib.sha256()
    for key in sorted(keys):
        total.update(f"{key}\0{state[key].dtype}\0{tuple(state[key].shape)}\0{digests[key]:032x}\n".encode())
    return total.hexdigest()
