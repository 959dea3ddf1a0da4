"""Reads each rank's part of the files into its parameters, and checks that nothing was left out."""

import time
from collections import defaultdict, deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import groupby

import torch
from torch import Tensor
from torchtitan.tools.logging import logger

from flame_ext.distributed import is_main_rank
from flame_ext.errors import SeedError
from flame_ext.seeding.copying import Copies
from flame_ext.seeding.sources.boxes import Box, full_box, inside, intersection, local_part, tiles_exactly, volume
from flame_ext.seeding.sources.source import Chunk, ReadBox, Source, TensorEntry, read_piece

_THREADS_AHEAD = 8  # of a rank, where slices are read ahead


@dataclass(frozen=True)
class _Piece:
    """Elements that one chunk of the source and one local tensor have in common."""

    key: str
    again: bool
    """Whether a tied parameter's values are there under another name already; then they are compared, last of all."""
    entry: TensorEntry
    chunk: Chunk  # Of the entry
    box: Box  # Place in the full tensor
    local: Tensor  # Part of the parameter to write

    @property
    def nbytes(self) -> int:
        return volume(self.box) * self.stored.dtype.itemsize

    @property
    def stored(self) -> TensorEntry:
        """The tensor in the file."""
        return self.chunk.stored_tensor(self.entry)

    def __str__(self) -> str:
        return f"{self.chunk.file}: {self.stored.key!r}"


@torch.no_grad()
def read_weights(
    source: Source,
    state: Mapping[str, Tensor],
    tied: Mapping[str, str],
    check_finite: bool,
    progress: Callable[[int, int], None] = lambda done, total: None,
    growing: Collection[str] = (),
) -> int:
    """Fill, in place, the tensors of ``state`` that the source holds; returns the bytes that this rank has read.

    Files are read in the order of their bytes; at most two slices are in memory beside the parameters, and those that are read ahead
    (:attr:`Source.bytes_ahead`).

    Args:
        source: under the model's names.
        state: key to parameter or buffer, DTensor or plain.
        tied: other name to key in ``state``.
        check_finite: refuse NaN and infinities; an overflow in the cast is always refused.
        progress: called with the bytes that this rank has read so far and will read in all.
        growing: keys whose first rows alone the source has.

    Raises:
        SeedError: a file has changed, a value is not finite, tied values differ, or an element was not written exactly once.
    """
    pieces: list[_Piece] = []
    boxes: dict[str, Box] = {}
    for key, tensor in state.items():
        local, box = local_part(tensor)
        names = [key, *sorted(name for name, owner in tied.items() if owner == key)]
        for i, entry in enumerate(source.entries[name] for name in names if name in source.entries):
            held = intersection(box, full_box(entry.shape)) if key in growing else box
            if held is not None:
                boxes[key] = held
            for chunk in entry.chunks:
                if (common := intersection(chunk.box, box)) is not None:
                    pieces.append(_Piece(key, i > 0, entry, chunk, common, local[inside(common, box)]))
    total, done = sum(piece.nbytes for piece in pieces), 0
    written: dict[str, list[Box]] = defaultdict(list)
    pieces.sort(key=lambda piece: (piece.again, piece.chunk.file, piece.chunk.position))
    with Copies() as copies:
        for (again, file), group in groupby(pieces, key=lambda piece: (piece.again, piece.chunk.file)):
            with source.open(file) as read_box:
                summed: list[tuple[_Piece, list[Future[list[Tensor]]]]] = []
                read = partial(_read, read_box)
                for piece, values in read_ahead(group, read, source.bytes_ahead):
                    if again:
                        _compare(piece, values)
                    else:
                        # A sum is finite only if every element is: one cheap look at good weights. It is in the parameter's own
                        # dtype, because torch on CPU sums in another one by way of a copy.
                        looked_at = _may_be_refused(piece, check_finite)
                        summed.append((piece, copies.start(values, piece.local, looked_at)))
                        written[piece.key].append(piece.box)
                    done += piece.nbytes
                    progress(done, total)
                copies.finish()
                # Asked once a file, since every answer waits for the device.
                if not _all_finite(s for _, futures in summed for future in futures for s in future.result()):
                    for piece, _ in summed:
                        if _may_be_refused(piece, check_finite) and not torch.isfinite(piece.local).all():
                            _refuse(piece, read_piece(read_box, piece.entry, piece.chunk, piece.box), check_finite)
    for key, box in sorted(boxes.items()):
        if volume(box) > 0 and not tiles_exactly(box, written[key]):
            raise SeedError(
                f"{source.path}: {key!r}: elements {box} were to be written exactly once, written were {written[key]}"
            )
    return done


def _all_finite(sums: Iterable[Tensor]) -> bool:
    """Whether all of the () sums are. With CPU offload buffers are on another device than parameters."""
    alike: dict[tuple[torch.device, torch.dtype], list[Tensor]] = defaultdict(list)
    for one in sums:
        alike[one.device, one.dtype].append(one)
    return all(bool(torch.stack(some).isfinite().all()) for some in alike.values())


def read_ahead(
    pieces: Iterable[_Piece], read: Callable[[_Piece], Tensor], nbytes: int
) -> Iterator[tuple[_Piece, Tensor]]:
    """Yield each piece with its values, in order; threads read the next ones meanwhile, as many as have ``nbytes`` in all."""
    if not nbytes:
        yield from ((piece, read(piece)) for piece in pieces)
        return
    with ThreadPoolExecutor(_THREADS_AHEAD, "reading ahead") as pool:
        under_way: deque[tuple[_Piece, Future[Tensor]]] = deque()
        try:
            for piece in pieces:
                while under_way and sum(other.nbytes for other, _ in under_way) + piece.nbytes > nbytes:
                    first, values = under_way.popleft()
                    yield first, values.result()
                under_way.append((piece, pool.submit(read, piece)))
            while under_way:
                first, values = under_way.popleft()
                yield first, values.result()
        finally:
            pool.shutdown(cancel_futures=True)


def _read(read_box: ReadBox, piece: _Piece) -> Tensor:
    """Return the values of a piece, if they are of the shape and dtype that the header says."""
    values = read_piece(read_box, piece.entry, piece.chunk, piece.box)
    if values.shape != piece.local.shape or values.dtype != piece.stored.dtype:
        raise SeedError(f"{piece} is {list(values.shape)} {values.dtype} now: the file has changed")
    return values


def _compare(piece: _Piece, values: Tensor) -> None:
    """Compare a piece with what is written already."""
    local = piece.local
    if not torch.equal(local, values.to(local.device).to(local.dtype)):
        raise SeedError(
            f"{piece} differs from {piece.key!r}, but the model ties them; set tie_word_embeddings = false in config.json, or remove one"
        )


def _may_be_refused(piece: _Piece, check_finite: bool) -> bool:
    """Whether values that are not finite are looked for: where they are refused, and where a cast may have made them."""
    stored, dtype = piece.stored.dtype, piece.local.dtype
    if not (stored.is_floating_point and dtype.is_floating_point):
        return False
    return check_finite or torch.finfo(stored).max > torch.finfo(dtype).max


def _refuse(piece: _Piece, values: Tensor, check_finite: bool) -> None:
    """Raises the SeedError of a piece that is not finite where it was written; ``values`` are the file's."""
    local = piece.local
    if bool(torch.isfinite(values).all()):
        raise SeedError(f"{piece} ({values.dtype}) overflows {local.dtype}; set training.dtype to a wider type")
    if check_finite:
        raise SeedError(f"{piece} holds NaN or infinity; the file is damaged or its training had diverged")


def logged_progress(interval: float = 5.0, clock: Callable[[], float] = time.monotonic) -> Callable[[int, int], None]:
    """Return a ``progress`` for :func:`read_weights` that logs on the main rank, at most every ``interval`` seconds."""
    begin = last = clock()

    def log(done: int, total: int) -> None:
        nonlocal last
        now = clock()
        if is_main_rank() and now - last >= interval and done < total:
            last = now
            mib, rate = done / 2**20, done / 2**20 / (now - begin)
            logger.info(f"Reading weights: {mib:,.0f} of {total / 2**20:,.0f} MiB on this rank, {rate:,.0f} MiB/s")

    return log
