"""Validates on held-out text (``[validation]``), with the metrics of the objective beside the cross-entropy."""

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torchtitan.components.validate import BaseValidator

from flame_ext.config.sections import FlameJobConfig
from flame_ext.data.build import build_validation_dataloaders
from flame_ext.data.loader import PackedDataloader
from flame_ext.distributed import failing_together, gathered
from flame_ext.errors import ConfigError
from flame_ext.run.metrics import FutureMetricsProcessor

Batch = tuple[dict[str, Tensor], Tensor]  # as a dataloader yields it: inputs, and (B, T) labels


@dataclass
class _Source:
    loader: PackedDataloader
    start: dict[str, Any] = field(init=False)  # the loader's position, of every pass
    batches: int = 0  # of a pass
    counts: Tensor = field(default_factory=lambda: torch.zeros(3))  # of all ranks' batches; figures are over them

    def __post_init__(self) -> None:
        self.start = copy.deepcopy(self.loader.state_dict())

    def rewind(self) -> None:
        self.loader.load_state_dict(copy.deepcopy(self.start))


class FutureValidator(BaseValidator):
    """Evaluates the same held-out batches every time, of each source separately."""

    evaluate: Callable[[Batch, Tensor], dict[str, Tensor]]
    """Maps a batch and the counts of its source to metrics that are summed over batches and ranks. The trainer sets it. Collective."""
    reduce: Callable[[dict[str, Tensor]], dict[str, float]]  # Sums metrics over ranks. The trainer sets it. Collective

    def __init__(
        self,
        job_config: FlameJobConfig,
        metrics_processor: FutureMetricsProcessor,
        loaders: Mapping[str, PackedDataloader],  # by label, "" for ``validation.dataset``
    ) -> None:
        super().__init__(job_config)
        self.metrics_processor = metrics_processor
        self._sources = {label: _Source(loader) for label, loader in loaders.items()}

    def count_all(self, count: Callable[[Batch], Tensor], over_ranks: Callable[[Tensor], Tensor]) -> None:
        """Reads every source once, for the numbers that figures are divided by. Collective.

        ``count`` maps a batch to its numbers, ``over_ranks`` sums those of all ranks. Raises ConfigError, on all ranks, if a source
        cannot be read or has no label.
        """
        limit = None if self.job_config.validation.steps == -1 else self.job_config.validation.steps
        for label, source in self._sources.items():
            with failing_together(ConfigError):
                counts = [count(batch) for batch in islice(source.loader, limit)]
            source.batches = max(gathered(len(counts)))
            source.counts = over_ranks(torch.stack(counts).sum(0))
            source.loader.dataset.pad = True  # ranks whose data end earlier go on with batches that have no label
            if source.counts[0] == 0:
                dataset = self.job_config.validation.dataset
                named = f"validation.sources {label!r}" if label else f"validation.dataset {dataset!r}"
                raise ConfigError(f"{named} has no text to validate on; give it more, or set validation.enable = false")

    @torch.no_grad()
    def validate(self, model_parts: list[nn.Module], step: int) -> None:
        """Logs the mean of each metric as ``validation_metrics/…``; with several sources as ``validation_metrics/LABEL/…``."""
        for model in model_parts:
            model.eval()
        found = {label: self._validated(source) for label, source in self._sources.items()}
        losses = [metrics["loss_ce"] for metrics in found.values()]
        parts = {f"{label}/{name}": value for label, metrics in found.items() for name, value in metrics.items()}
        if "" in found:
            parts = {name: value for name, value in found[""].items() if name != "loss_ce"}
        extra = {f"validation_metrics/{name}": value for name, value in parts.items()}
        self.metrics_processor.log_validation(loss=sum(losses) / len(losses), step=step, extra_metrics=extra)
        for model in model_parts:
            model.train()

    def _validated(self, source: _Source) -> dict[str, float]:
        source.rewind()
        sums: dict[str, Tensor] = {}
        for batch in islice(source.loader, source.batches):
            self.metrics_processor.ntokens_since_last_log += batch[1].numel()
            parts = self.evaluate(batch, source.counts)
            sums = {name: sums.get(name, 0.0) + value for name, value in parts.items()}
        return self.reduce(sums)


def build_validator(
    job_config: FlameJobConfig,
    dp_world_size: int,
    dp_rank: int,
    tokenizer: Any,
    metrics_processor: FutureMetricsProcessor,
    **_: Any,
) -> FutureValidator:
    """Builds the validator of the TrainSpec over ``validation.sources``, else over ``validation.dataset``."""
    loaders = build_validation_dataloaders(dp_world_size, dp_rank, tokenizer, job_config)
    return FutureValidator(job_config, metrics_processor, loaders)
