"""Proves that every element of every tensor is on some rank, and the same on all ranks that hold it.

A tensor's digest sums its rows, each hashed with its place in the full tensor, so it is the same on any number of ranks.
"""

import hashlib
import math
from collections import defaultdict
from collections.abc import Iterable, Mapping

import torch
import xxhash
from torch import Tensor

from flame_ext.distributed import gathered
from flame_ext.errors import SeedError
from flame_ext.seeding.sources.boxes import Box, full_box, local_part, tiles_exactly, volume, whole_rows

_MODULUS = 2**128


def compare_replicas(
    state: Mapping[str, Tensor], whole: Mapping[str, Tensor] | None = None, part: int = 0
) -> dict[str, int]:
    """Return the digest of every full tensor, from the parts that all ranks hold. Collective.

    ``whole`` has the keys of all pipeline stages, ``state`` those of stage number ``part``; None = all. Raises SeedError on all
    ranks if they hold different values for the same elements, or together not all elements.
    """
    mine = {}
    for key, tensor in state.items():
        local, box = local_part(whole_rows(tensor))
        mine[key] = (box, local_digest(local, box, tuple(tensor.shape)))
    held = gathered((part, mine))
    digests = {}
    for key, tensor in (state if whole is None else whole).items():
        parts = {part for part, boxes in held if key in boxes}
        ranks = {rank: boxes.get(key) for rank, (part, boxes) in enumerate(held) if part in parts}
        digests[key] = _agreed(key, tuple(tensor.shape), ranks)
    return digests


def _agreed(key: str, shape: tuple[int, ...], held: Mapping[int, tuple[Box, int] | None]) -> int:
    digests: dict[Box, dict[int, int]] = defaultdict(dict)  # box to digest to the first rank that has it
    for rank, part in held.items():
        if part is None:
            other = next(rank for rank, part in held.items() if part is not None)
            raise SeedError(f"rank {rank} does not have {key!r}, which rank {other} has: their models differ")
        box, digest = part
        if volume(box) > 0:
            digests[box].setdefault(digest, rank)
    for box, ranks in digests.items():
        if len(ranks) > 1:
            raise SeedError(
                f"{key!r}: {' and '.join(f'rank {rank}' for rank in ranks.values())} hold different values for the same elements "
                f"{box}; the files differ between nodes, or a machine's memory is faulty"
            )
    if not tiles_exactly(full_box(shape), digests) and math.prod(shape) > 0:
        raise SeedError(f"{key!r}: the ranks together hold {sorted(digests)}, which is not its shape {list(shape)}")
    return sum(digest for ranks in digests.values() for digest in ranks) % _MODULUS


@torch.no_grad()
def local_digest(local: Tensor, box: Box, shape: tuple[int, ...]) -> int:
    """Return the sum of the hashes of this rank's rows; ``box`` is the place of ``local`` in the full tensor of ``shape``."""
    if volume(box) == 0:
        return 0
    rows = box[0][1] - box[0][0] if box else 1
    values = local.detach().to("cpu").reshape(-1).contiguous().view(torch.uint8).numpy()
    data, nbytes = memoryview(values.data), values.nbytes // rows
    # The seed of a row's hash is the flat index of its first element in the full tensor.
    strides = [math.prod(shape[i + 1 :]) for i in range(len(shape))]
    start = sum(begin * stride for (begin, _), stride in zip(box, strides, strict=True))
    places = [(start + row * math.prod(shape[1:])) % 2**64 for row in range(rows)]
    hashed = xxhash.xxh3_128_intdigest
    return sum(hashed(data[i * nbytes : (i + 1) * nbytes], place) for i, place in enumerate(places)) % _MODULUS


def weights_digest(digests: Mapping[str, int], state: Mapping[str, Tensor], keys: Iterable[str]) -> str:
    """Return one SHA-256 over names, dtypes, shapes and digests of ``keys``."""
    total = hashlib.sha256()
    for key in sorted(keys):
        total.update(f"{key}\0{state[key].dtype}\0{tuple(state[key].shape)}\0{digests[key]:032x}\n".encode())
    return total.hexdigest()
