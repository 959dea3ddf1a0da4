"""torchtitan's converters to float8, for models of transformers: the names of layers, and the model without float8 for proofs."""

import copy
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
from torch import nn
from torchtitan.config import JobConfig

from flame_ext.config.head_options import HEAD_NAMES
from flame_ext.errors import ConfigError
from flame_ext.model.hf_causal_lm import HFCausalLM

FILTERED = ("quantize.linear.float8", "quantize.linear.mx")  # the converters whose sections have ``filter_fqns``


def with_names_of_transformers(name: str, converter: type[Any]) -> type[Any]:
    """Returns a converter of ``filter_fqns`` whose filter "output", torchtitan's name, also spares the output embedding."""

    class Converter(converter):
        def __init__(self, job_config: JobConfig, parallel_dims: Any) -> None:
            super().__init__(copy.deepcopy(job_config), parallel_dims)  # the list of filters is this converter's own

        def convert(self, model: HFCausalLM) -> None:
            """Raises ConfigError for a filter that is in the name of no linear layer, and so would spare none."""
            linear = {path for path, module in model.named_modules() if isinstance(module, nn.Linear)}
            output = [path for path, module in model.named_modules() if module is model.get_output_embeddings()]
            filters = getattr(self, "filter_fqns", [])
            for text in filters:
                known = (
                    text in ("output", "auto_filter_small_kn") or text.split(".")[0] in HEAD_NAMES
                )  # heads may be attached later
                if not known and not any(text in path for path in linear):
                    names = ", ".join(sorted({path.rpartition(".")[2] for path in linear}))
                    raise ConfigError(
                        f"{name}.filter_fqns: {text!r} is in the name of no linear layer of {model.config.model_type!r}, which "
                        f"are called {names}; take one of these, or 'output' for the output embedding"
                    )
            if "output" in filters:
                filters += output
            super().convert(model)

    return Converter


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
