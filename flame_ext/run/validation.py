"""The host's validation pass (``[validation]``), with the future metrics beside the cross-entropy."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from itertools import islice
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torchtitan.components import validate
from torchtitan.components.validate import Validator
from torchtitan.config import JobConfig

from flame_ext.data.build import build_validation_dataloaders
from flame_ext.errors import ConfigError


class FutureValidator(Validator):
    """Evaluates ``validation.steps`` batches of held-out text, the same ones every time, of each source by itself."""

    evaluate: Callable[[dict[str, Tensor], Tensor], dict[str, Tensor]]
    """Set by the trainer; collective. A dataloader's batch to metrics that add up over ranks."""

    reduce: Callable[[dict[str, Tensor]], dict[str, float]]
    """Set by the trainer; collective. Sums over ranks."""

    def __init__(self, job_config: JobConfig, dp_world_size: int, dp_rank: int, tokenizer: Any, **kwargs: Any) -> None:
        self._loaders: Mapping[str, tuple[Any, int | None]] = {}
        """Label of a source, "" for ``validation.dataset``, to its dataloader and how many batches there are (None = to the end)."""
        sources = job_config.validation.sources
        with mock.patch.object(validate, "build_text_validation_dataloader", _none) if sources else nullcontext():
            super().__init__(job_config, dp_world_size, dp_rank, tokenizer, **kwargs)
        if sources:
            self._loaders = build_validation_dataloaders(dp_world_size, dp_rank, tokenizer, job_config)
        else:
            # Each pass draws a seed for workers: not from the default generator, which a resumed run continues.
            self.validation_dataloader.generator = torch.Generator()
            steps = job_config.validation.steps
            self._loaders = {"": (self.validation_dataloader, None if steps == -1 else steps)}
        self._starts = {label: copy.deepcopy(loader.state_dict()) for label, (loader, _) in self._loaders.items()}

    @torch.no_grad()
    def validate(self, model_parts: list[nn.Module], step: int) -> None:
        """As the host's: the mean over batches of each metric, logged as ``validation_metrics/…``; with several sources,
        ``validation_metrics/LABEL/…``, and the loss is the mean of theirs.
        """
        for model in model_parts:
            model.eval()
        found = {label: self._validated(label, *of_source) for label, of_source in self._loaders.items()}
        losses = [metrics["loss_ce"] for metrics in found.values()]
        parts = {f"{label}/{name}": value for label, metrics in found.items() for name, value in metrics.items()}
        if "" in found:
            parts = {name: value for name, value in found[""].items() if name != "loss_ce"}
        self.metrics_processor.log_validation(
            loss=sum(losses) / len(losses),
            step=step,
            extra_metrics={f"validation_metrics/{name}": value for name, value in parts.items()},
        )
        for model in model_parts:
            model.train()

    def _validated(self, label: str, loader: Any, steps: int | None) -> dict[str, float]:
        loader.load_state_dict(copy.deepcopy(self._starts[label]))
        sums: dict[str, Tensor] = {}
        count = 0
        for input_dict, labels in islice(loader, steps):
            self.metrics_processor.ntokens_since_last_log += labels.numel()
            parts = self.evaluate(input_dict, labels)
            sums = {name: sums.get(name, 0.0) + value for name, value in parts.items()}
            count += 1
        if count == 0:
            raise ConfigError(
                f"validation.dataset {label or self.job_config.validation.dataset!r} gives no batch of "
                "validation.local_batch_size x validation.seq_len tokens; give it more text, or set validation.enable = false"
            )
        return {name: value / count for name, value in self.reduce(sums).items()}


def _none(**_: Any) -> None:
    """In the place of the host's dataloader."""


def build_validator(**kwargs: Any) -> FutureValidator:
    """The TrainSpec's validator."""
    return FutureValidator(**kwargs)
