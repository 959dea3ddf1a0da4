"""The names that this package takes from torchtitan 0.2.2 (table: :mod:`flame_ext.host`); each loads its own module alone."""

from importlib import import_module
from typing import Any

NAMES = {
    "BaseModelArgs": "torchtitan.protocols.BaseModelArgs",
    "CheckpointManager": "torchtitan.components.checkpoint.CheckpointManager",
    "Compile": "torchtitan.config.job_config.Compile",
    "ConfigManager": "torchtitan.config.ConfigManager",
    "DataLoader": "torchtitan.config.job_config.DataLoader",
    "HuggingFaceTokenizer": "torchtitan.components.tokenizer.HuggingFaceTokenizer",
    "JobConfig": "torchtitan.config.JobConfig",
    "LRScheduler": "torchtitan.config.LRScheduler",
    "LRSchedulersContainer": "torchtitan.components.lr_scheduler.LRSchedulersContainer",
    "ModelWrapper": "torchtitan.components.checkpoint.ModelWrapper",
    "OptimizersInBackwardContainer": "torchtitan.components.optimizer.OptimizersInBackwardContainer",
    "ParallelizeFunction": "torchtitan.protocols.train_spec.ParallelizeFunction",
    "Parallelism": "torchtitan.config.job_config.Parallelism",
    "TrainSpec": "torchtitan.protocols.train_spec.TrainSpec",
    "Trainer": "torchtitan.train.Trainer",
    "apply_ac": "torchtitan.distributed.activation_checkpoint.apply_ac",
    "apply_compile": "torchtitan.models.llama3.infra.parallelize.apply_compile",
    "apply_ddp": "torchtitan.models.llama3.infra.parallelize.apply_ddp",
    "build_lr_schedulers": "torchtitan.components.lr_scheduler.build_lr_schedulers",
    "build_optimizers": "torchtitan.components.optimizer.build_optimizers",
    "build_pipeline_schedule": "torchtitan.distributed.pipeline_parallel.build_pipeline_schedule",
    "disable_fsdp_gradient_division": "torchtitan.models.llama3.infra.parallelize.disable_fsdp_gradient_division",
    "generate_llm_fqn_per_model_part": "torchtitan.distributed.pipeline_parallel.generate_llm_fqn_per_model_part",
    "get_metrics_rank": "torchtitan.components.metrics._get_metrics_rank",
    "job_config": "torchtitan.config.job_config",
    "maybe_enable_async_tp": "torchtitan.distributed.tensor_parallel.maybe_enable_async_tp",
    "model_converters": "torchtitan.protocols.model_converter._registry_model_converter_cls",
    "op_sac_save_list": "torchtitan.models.llama3.infra.parallelize._op_sac_save_list",
    "register_model_converter": "torchtitan.protocols.model_converter.register_model_converter",
    "register_train_spec": "torchtitan.protocols.train_spec.register_train_spec",
}


def __getattr__(name: str) -> Any:
    if name not in NAMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, _, attribute = NAMES[name].rpartition(".")
    return getattr(import_module(module), attribute)
