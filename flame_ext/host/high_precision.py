"""Runs torchao's float8 layers as the linear layers that they were converted from, for proofs."""

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from unittest import mock

import torch
from torch import nn

from flame_ext.host.names import JobConfig


@contextmanager
def in_high_precision(parts: Iterable[nn.Module], config: JobConfig) -> Iterator[None]:
    """Lets layers in float8 compute as those that they were converted from; nothing runs compiled meanwhile.

    A scale in float8 may be that of a whole tensor: each token then changes the results of all others by rounding. Where FSDP gathers
    weights in float8 (``enable_fsdp_float8_all_gather``) there is no high precision to return to, and nothing changes.
    """
    classes = {cls for part in parts for module in part.modules() for cls in type(module).__mro__ if _is_converted(cls)}
    if not classes or config.quantize.linear.float8.enable_fsdp_float8_all_gather:
        yield
        return
    with ExitStack() as stack:
        for cls in classes:
            stack.enter_context(mock.patch.object(cls, "forward", nn.Linear.forward))
        stack.enter_context(torch.compiler.set_stance("force_eager"))  # graphs would keep the other forward
        yield


def _is_converted(cls: type) -> bool:
    return issubclass(cls, nn.Linear) and cls.__module__.startswith("torchao.") and "forward" in vars(cls)
