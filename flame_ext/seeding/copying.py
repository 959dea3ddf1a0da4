"""Copies slices of files into parameters by several threads, block by block: on a CPU in blocks that stay in its cache until they
are summed, to a device through pinned memory, so that reading overlaps with copying.
"""

import os
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from queue import SimpleQueue
from threading import Semaphore
from types import TracebackType

import torch
from torch import Tensor

from flame_ext.distributed import cores

_TASK_BYTES = 2**23  # Of one call of a thread, as stored, and of a pinned buffer
_CACHED_BYTES = 2**19  # Of what a CPU copies and then sums, as stored
_MAX_THREADS = 4


def threads_of_rank() -> int:
    """Return the number of cores for each rank on this host, at most 4: more do not read faster."""
    return max(1, min(_MAX_THREADS, cores() // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))


class Copies:
    """A pool of threads that copy and cast. Sources are on CPU, in memory or mapped; destinations are on any device.

    At most two blocks a thread are under way, so at most two slices are in memory where a slice is no view of its file. To a
    device go two pinned buffers of 8 MiB a thread. One CPU thread each: torch's own threads would take the others' cores.
    """

    def __init__(self, threads: int | None = None) -> None:
        self._threads = threads or threads_of_rank()
        self._free = Semaphore(2 * self._threads)
        self._started: list[Future[list[Tensor]]] = []
        self._lanes: dict[torch.device, list[_Lane]] = {}
        self._idle: dict[torch.device, SimpleQueue[_Lane]] = {}

    def __enter__(self) -> "Copies":
        self._torch_threads = torch.get_num_threads()
        self._pool = ThreadPoolExecutor(self._threads, "seeding", initializer=torch.set_num_threads, initargs=(1,))
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._pool.shutdown(cancel_futures=True)
        torch.set_num_threads(self._torch_threads)  # a thread that sets its own sets that of threads to come

    def start(self, values: Tensor, destination: Tensor, summed: bool) -> list[Future[list[Tensor]]]:
        """Begin to copy; waits for earlier ones only. The futures have the () sums of the blocks, if ``summed``."""
        return [self.fill(_given(part), place, summed) for part, place in _blocks(values, destination, _TASK_BYTES)]

    def fill(self, make: Callable[[], Tensor], destination: Tensor, summed: bool = False) -> Future[list[Tensor]]:
        """Begin to copy what ``make`` returns, which a thread calls; as :meth:`start` in all else."""
        device = destination.device
        if device.type != "cpu" and device not in self._lanes:
            self._lanes[device] = [_Lane(device) for _ in range(self._threads)]
            self._idle[device] = SimpleQueue()
            for lane in self._lanes[device]:
                self._idle[device].put(lane)
        self._free.acquire()
        self._started.append(self._pool.submit(self._copy, make, destination, summed))
        self._started[-1].add_done_callback(lambda _: self._free.release())
        return self._started[-1]

    def finish(self) -> None:
        """Wait until all is copied, on a device as its current stream sees it; raises what a thread has raised."""
        for future in self._started:
            future.result()
        self._started.clear()
        for lanes in self._lanes.values():
            for lane in lanes:
                lane.join()

    @torch.no_grad()
    def _copy(self, make: Callable[[], Tensor], destination: Tensor, summed: bool) -> list[Tensor]:
        if destination.device.type == "cpu":
            return _copied_to_cpu(make(), destination, summed)
        lane = self._idle[destination.device].get()
        try:
            return lane.copied(make(), destination, summed)
        finally:
            self._idle[destination.device].put(lane)


def _given(values: Tensor) -> Callable[[], Tensor]:
    return lambda: values


def _copied_to_cpu(values: Tensor, destination: Tensor, summed: bool) -> list[Tensor]:
    sums = []
    for part, place in _blocks(values, destination, _CACHED_BYTES):
        place.copy_(part)
        sums += [place.sum()] if summed else []
    return sums


class _Lane:
    """A way to a device: a stream, and two pinned buffers, of which one is filled while the other is copied from."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.module = device, torch.get_device_module(device)
        self.stream = self.module.Stream(device)
        self.stream.wait_stream(self.module.current_stream(device))  # which may be writing to the destinations still
        self.buffers: deque[tuple[Tensor, torch.Event]] = deque()

    def copied(self, values: Tensor, destination: Tensor, summed: bool) -> list[Tensor]:
        self.module.set_device(self.device)  # each thread has its own, and would else touch the first one
        sums = []
        with self.module.stream(self.stream):
            for part, place in _blocks(values, destination, _TASK_BYTES):
                if len(self.buffers) < 2:
                    buffer = torch.empty(_TASK_BYTES, dtype=torch.uint8, pin_memory=True)
                    self.buffers.append((buffer, self.module.Event()))
                else:
                    self.buffers.rotate(1)
                buffer, emptied = self.buffers[-1]
                emptied.synchronize()
                pinned = buffer[: part.nbytes].view(part.dtype).view(part.shape)
                pinned.copy_(part)
                on_device = pinned.to(self.device, non_blocking=True)  # cast later: the file's dtype is often smaller
                emptied.record()
                place.copy_(on_device)
                sums += [place.sum()] if summed else []
        return sums

    def join(self) -> None:
        """Have the current stream wait for this one."""
        self.module.current_stream(self.device).wait_stream(self.stream)


def _blocks(values: Tensor, destination: Tensor, nbytes: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Cut two tensors of one shape alike, across the first axis that can be, into views of at most so many bytes of ``values``."""
    if values.nbytes <= nbytes:
        yield values, destination
        return
    axis = next(axis for axis, length in enumerate(values.shape) if length > 1)
    rows = max(1, nbytes * values.shape[axis] // values.nbytes)
    for part, place in zip(values.split(rows, axis), destination.split(rows, axis), strict=True):
        yield from _blocks(part, place, nbytes)
