"""torchtitan's converters to float8, for models of transformers: the names of layers."""

import copy
from typing import Any

from torch import nn

from flame_ext.config.head_options import HEAD_NAMES
from flame_ext.config.sections import FlameJobConfig
from flame_ext.errors import ConfigError
from flame_ext.model.hf_causal_lm import HFCausalLM

FILTERED = ("quantize.linear.float8", "quantize.linear.mx")  # the converters whose sections have ``filter_fqns``


def with_names_of_transformers(name: str, converter: type[Any]) -> type[Any]:
    """Returns a converter of ``filter_fqns`` whose filter "output", torchtitan's name, also spares the output embedding."""

    class Converter(converter):
        def __init__(self, job_config: FlameJobConfig, parallel_dims: Any) -> None:
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
