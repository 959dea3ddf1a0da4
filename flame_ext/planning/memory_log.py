"""Logs when each storage of fake tensors is made, resized and freed, so that the peak can be taken apart afterwards."""

from __future__ import annotations

import sys
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.distributed._functional_collectives import AsyncCollectiveTensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

_PROPAGATION = "torch/distributed/tensor/_sharding_prop"  # runs operations on whole tensors for their shapes alone


@dataclass
class _Record:
    """A storage that is or was there."""

    part: str
    size: int = 0


@dataclass(frozen=True)
class Peak:
    """The moment with most bytes."""

    size: int
    parts: dict[str, int]  # what the bytes belong to, largest first


class MemoryLog(TorchDispatchMode):
    """Runs operations by a ``fake_mode``, and logs the bytes of the storages that they make.

    Tensors that are not fake, such as random numbers on the host, are computed with; a value that is asked of a fake tensor is 1.
    ``part_of`` names what a new tensor belongs to, given the files of the functions that it is made in, innermost first.
    """

    def __init__(self, fake_mode: FakeTensorMode, part_of: Callable[[Tensor, list[str]], str]) -> None:
        super().__init__()
        self._fake_mode, self._part_of = fake_mode, part_of
        self._events: list[tuple[_Record, int]] = []  # bytes more or less, in order
        self._records: weakref.WeakKeyDictionary[torch.UntypedStorage, _Record] = weakref.WeakKeyDictionary()
        self._kernel = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if any(issubclass(t, (DTensor, AsyncCollectiveTensor)) for t in types):
            return NotImplemented  # they come again as the local tensors that they are made of
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        is_fake = any(isinstance(tensor, FakeTensor) for tensor in tensors)
        if kwargs.get("generator") is not None or (tensors and not is_fake):
            with _disable_current_modes():
                return func(*args, **kwargs)
        if func is torch.ops.aten._local_scalar_dense.default:
            return _one(args[0].dtype)
        if func is torch.ops._c10d_functional.wait_tensor.default:  # its meta function copies
            return args[0]
        result = func(*args, **kwargs)
        if not self._kernel:
            self.add(result)
        return result

    def add(self, tensors: Any, part: str | None = None) -> None:
        """Logs the storages of all fake tensors in ``tensors`` that are not known yet; ``part`` renames those that are."""
        for tensor in tree_leaves(tensors):
            if not isinstance(tensor, Tensor):
                continue
            local: Tensor = tensor.detach().to_local() if isinstance(tensor, DTensor) else tensor  # type: ignore[attr-defined]
            if not isinstance(local, FakeTensor) or local.fake_mode is not self._fake_mode or local.is_meta:
                continue
            storage = local.untyped_storage()
            record = self._records.get(storage)
            if record is None:
                files = _files()
                if any(_PROPAGATION in file for file in files):
                    continue
                record = self._records[storage] = _Record(part or self._part_of(local, files))
                self._resized(record, storage.nbytes())
                weakref.finalize(storage, self._resized, record, 0).atexit = False
            elif part is not None:
                record.part = part

    def hold(self, size: int, part: str) -> None:
        """Logs bytes that stay, beside those of fake tensors."""
        self._events.append((_Record(part, size), size))

    @contextmanager
    def logging(self) -> Iterator[None]:
        """While this is entered, operations are run and logged; a storage may also be resized in place, as FSDP does."""
        resize = torch.UntypedStorage.resize_

        def resized(storage: torch.UntypedStorage, size: int) -> Any:
            result = resize(storage, size)
            if (record := self._records.get(storage)) is not None:
                self._resized(record, size)
            return result

        with mock.patch.object(torch.UntypedStorage, "resize_", resized), self._fake_mode, self:
            yield

    def as_kernel(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Returns ``function`` as one kernel, as a compiler makes it: only its results are logged."""

        def run(*args: Any, **kwargs: Any) -> Any:
            before, self._kernel = self._kernel, True
            try:
                results = function(*args, **kwargs)
            finally:
                self._kernel = before
            if not self._kernel:
                self.add(results)
            return results

        return run

    def peak(self, counts: Callable[[str], bool] = lambda _part: True) -> Peak:
        """Returns the moment with most bytes so far, of the parts that count."""
        now, largest, moment = 0, 0, 0
        events = [(record, change) for record, change in self._events if counts(record.part)]
        for number, (_, change) in enumerate(events):
            now += change
            if now > largest:
                largest, moment = now, number + 1
        parts: Counter[str] = Counter()
        for record, change in events[:moment]:
            parts[record.part] += change
        return Peak(largest, {part: size for part, size in parts.most_common() if size})

    def _resized(self, record: _Record, size: int) -> None:
        self._events.append((record, size - record.size))
        record.size = size


def _one(dtype: torch.dtype) -> bool | int | float:
    return True if dtype is torch.bool else 1.0 if dtype.is_floating_point else 1


def _files() -> list[str]:
    """The files of the functions that are running, innermost first."""
    names, frame = [], sys._getframe(2)
    while frame is not None:
        names.append(frame.f_code.co_filename)
        frame = frame.f_back  # type: ignore[assignment]
    return names
