"""Names of torchtitan 0.2.2 that are private or belong to one of its models; importing one imports its module alone."""

from importlib import import_module
from typing import Any

NAMES = {
    # components/metrics.py: (parallel_dims, job_config) -> the rank that logs, which is the first of the last pipeline stage.
    "get_metrics_rank": "torchtitan.components.metrics._get_metrics_rank",
    # protocols/model_converter.py: dict of registered name -> ModelConverter class, for `model.converters`.
    "model_converters": "torchtitan.protocols.model_converter._registry_model_converter_cls",
    # models/llama3/infra/parallelize.py: set of the operators whose outputs selective activation checkpointing keeps.
    "op_sac_save_list": "torchtitan.models.llama3.infra.parallelize._op_sac_save_list",
    # models/llama3/infra/parallelize.py: (model, compile_config) compiles each of `model.layers` in place.
    "apply_compile": "torchtitan.models.llama3.infra.parallelize.apply_compile",
    # models/llama3/infra/parallelize.py: (model, mesh, enable_compile) replicates a model with composable DDP, in place.
    "apply_ddp": "torchtitan.models.llama3.infra.parallelize.apply_ddp",
    # models/llama3/infra/parallelize.py (imported there): (model) makes FSDP sum gradients instead of averaging them.
    "disable_fsdp_gradient_division": "torchtitan.models.llama3.infra.parallelize.disable_fsdp_gradient_division",
}


def __getattr__(name: str) -> Any:
    if name not in NAMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, _, attribute = NAMES[name].rpartition(".")
    return getattr(import_module(module), attribute)
