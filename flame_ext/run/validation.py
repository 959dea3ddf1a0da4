"""Validates on held-out text (``[validation]``), with the metrics of the objective beside the cross-entropy."""

import copy
from collections.abc import Callable, Mapping
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torchtitan.components.validate import BaseValidator
from torchtitan.config import JobConfig
from torchtitan.hf_datasets.text_datasets import build_text_validation_dataloader
from torchtitan.tools.logging import logger

from flame_ext.data.build import build_validation_dataloaders
from flame_ext.errors import ConfigError
from flame_ext.run.metrics import FutureMetricsProcessor

Loaders = Mapping[str, tuple[Any, int | None]]
"""Label of each source, "" for ``validation.dataset``, to its dataloader and number of batches (None = all)."""


class FutureValidator(BaseValidator):
    """Evaluates the same held-out batches every time, of each source separately."""

    evaluate: Callable[[dict[str, Tensor], Tensor], dict[str, Tensor]]
    """Maps a dataloader's batch and its labels to metrics, to be summed over ranks. The trainer sets it. Collective."""
    reduce: Callable[[dict[str, Tensor]], dict[str, float]]  # Sums metrics over ranks. The trainer sets it. Collective

    def __init__(self, job_config: JobConfig, metrics_processor: FutureMetricsProcessor, loaders: Loaders) -> None:
        super().__init__(job_config)
        self.metrics_processor, self._loaders = metrics_processor, loaders
        self._starts = {label: copy.deepcopy(loader.state_dict()) for label, (loader, _) in loaders.items()}

    @torch.no_grad()
    def validate(self, model_parts: list[nn.Module], step: int) -> None:
        """Logs the mean of each metric as ``validation_metrics/…``; with several sources as ``validation_metrics/LABEL/…``."""
        for model in model_parts:
            model.eval()
        found = {label: self._validated(label, *of_source) for label, of_source in self._loaders.items()}
        losses = [metrics["loss_ce"] for metrics in found.values()]
        parts = {f"{label}/{name}": value for label, metrics in found.items() for name, value in metrics.items()}
        if "" in found:
            parts = {name: value for name, value in found[""].items() if name != "loss_ce"}
        extra = {f"validation_metrics/{name}": value for name, value in parts.items()}
        self.metrics_processor.log_validation(loss=sum(losses) / len(losses), step=step, extra_metrics=extra)
        for model in model_parts:
            model.train()

    def _validated(self, label: str, loader: Any, steps: int | None) -> dict[str, float]:
        loader.load_state_dict(copy.deepcopy(self._starts[label]))
        sums: dict[str, Tensor] = {}
        count = 0
        for count, (input_dict, labels) in enumerate(islice(loader, steps), start=1):  # noqa: B007
            self.metrics_processor.ntokens_since_last_log += labels.numel()
            parts = self.evaluate(input_dict, labels)
            sums = {name: sums.get(name, 0.0) + value for name, value in parts.items()}
        if count == 0:
            raise ConfigError(
                f"validation.dataset {label or self.job_config.validation.dataset!r} gives no batch of "
                "validation.local_batch_size x validation.seq_len tokens; give it more text, or set validation.enable = false"
            )
        return {name: value / count for name, value in self.reduce(sums).items()}


def build_validator(
    job_config: JobConfig,
    dp_world_size: int,
    dp_rank: int,
    tokenizer: Any,
    metrics_processor: FutureMetricsProcessor,
    **_: Any,
) -> FutureValidator:
    """Builds the validator of the TrainSpec over ``validation.sources``, else over ``validation.dataset``."""
    if job_config.validation.sources:
        loaders = build_validation_dataloaders(dp_world_size, dp_rank, tokenizer, job_config)
        return FutureValidator(job_config, metrics_processor, loaders)
    steps = None if job_config.validation.steps == -1 else job_config.validation.steps
    loader = build_text_validation_dataloader(dp_world_size, dp_rank, tokenizer, job_config, infinite=steps is not None)
    # Every pass draws a seed for workers, which must not advance the default generator.
    loader.generator = torch.Generator()
    if steps is None:
        logger.warning("validation.steps = -1 hangs if the ranks have unequal numbers of validation batches")
    return FutureValidator(job_config, metrics_processor, {"": (loader, steps)})
