"""torchtitan's converter to float8, for models of transformers: the names of layers, ties, and weights as steps hold them."""

import copy
from typing import Any

from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torchtitan.tools.logging import logger

from flame_ext.config.sections import FlameJobConfig
from flame_ext.errors import ConfigError
from flame_ext.model.hf_causal_lm import HFCausalLM

FLOAT8 = "quantize.linear.float8"
OUTPUT = "output"  # torchtitan's name, in filters, of the output embedding


def with_names_of_transformers(converter: type[Any]) -> type[Any]:
    """Returns a converter of ``filter_fqns`` whose filter "output" also spares the output embedding."""

    class Converter(converter):
        def __init__(self, job_config: FlameJobConfig, parallel_dims: Any) -> None:
            super().__init__(copy.deepcopy(job_config), parallel_dims)  # the list of filters is this converter's own

        def convert(self, model: HFCausalLM) -> None:
            """Raises ConfigError for a filter that is in the name of no linear layer, and for a tie that is lost."""
            linear = {path for path, module in model.named_modules() if isinstance(module, nn.Linear)}
            output = [path for path, module in model.named_modules() if module is model.get_output_embeddings()]
            filters = getattr(self, "filter_fqns", [])
            for text in filters:
                if text not in (OUTPUT, "auto_filter_small_kn") and not any(text in path for path in linear):
                    names = ", ".join(sorted({path.rpartition(".")[2] for path in linear}))
                    raise ConfigError(
                        f"{FLOAT8}.filter_fqns: {text!r} is in the name of no linear layer of {model.config.model_type!r}, which "
                        f"are called {names}; take one of these, or 'output' for the output embedding"
                    )
            if OUTPUT in filters:
                filters += output
            tied = model.tied_keys
            super().convert(model)
            model.remember_state()  # the converted layers are other modules
            if lost := [key for key in tied if key not in model.tied_keys]:
                raise ConfigError(
                    f"{FLOAT8}.enable_fsdp_float8_all_gather would untie {lost[0]!r} from {tied[lost[0]]!r}: add 'output' to "
                    f"{FLOAT8}.filter_fqns, or leave it out"
                )
            logger.info(f"{len(converted_layers(model))} of {len(linear)} linear layers compute in float8")

    return Converter


def converted_layers(model: nn.Module) -> list[str]:
    """Returns the names of the linear layers that compute in float8."""
    return [name for name, module in model.named_modules() if type(module).__name__ == "Float8Linear"]


def plain(tensor: Tensor) -> Tensor:
    """Returns a weight that FSDP gathers in float8 as a tensor of torch's own in the same memory, and other tensors as they are."""
    local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    if type(local).__name__ != "WeightWithDynamicFloat8CastTensor":
        return tensor
    weight: Tensor = local._tensor  # type: ignore[attr-defined]
    if not isinstance(tensor, DTensor):
        return weight
    return DTensor.from_local(
        weight, tensor.device_mesh, tensor.placements, run_check=False, shape=tensor.shape, stride=tensor.stride()
    )
