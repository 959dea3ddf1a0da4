"""Lets a module's own code run on the local tensors of its DTensor parameters."""

import functools
from typing import Any

from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Partial


@functools.cache  # one class for all layers: compiled code is guarded by it
def with_local_parameters(cls: Any, names: tuple[str, ...], gradient_is_partial: bool) -> type[nn.Module]:
    """Makes a subclass whose attributes ``names`` are the local tensors of the DTensors in ``_parameters``.

    ``gradient_is_partial`` says that each rank sees only a part of the activations of these replicated parameters.
    """
    get = functools.partial(_local_parameter, gradient_is_partial=gradient_is_partial)
    return type(cls.__name__, (cls,), {name: property(functools.partial(get, name=name)) for name in names})


def _local_parameter(module: nn.Module, *, name: str, gradient_is_partial: bool) -> Tensor | None:
    parameter = module._parameters[name]
    # A DTensor on more mesh dimensions is FSDP's shard, which only FSDP asks for.
    if not isinstance(parameter, DTensor) or len(parameter.placements) != 1:
        return parameter
    if not gradient_is_partial:
        return parameter.to_local()
    # The backward of the redistribution sums the gradient over ranks.
    return parameter.redistribute(placements=parameter.placements).to_local(grad_placements=[Partial()])
