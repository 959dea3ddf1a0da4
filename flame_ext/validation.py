"""The host's validation pass (``[validation]``), with the future metrics beside the cross-entropy."""

from __future__ import annotations

import copy
from collections.abc import Callable
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torchtitan.components.validate import Validator
from torchtitan.tools.utils import device_type

from flame_ext.errors import ConfigError


class FutureValidator(Validator):
    """Evaluates ``validation.steps`` batches of held-out text, the same ones every time."""

    evaluate: Callable[[Tensor, Tensor], dict[str, Tensor]]
    """Set by the trainer; collective. (B, T) inputs and labels to metrics that add up over ranks."""

    reduce: Callable[[dict[str, Tensor]], dict[str, float]]
    """Set by the trainer; collective. Sums over ranks."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        # Each pass draws a seed for workers: not from the default generator, which a resumed run continues.
        self.validation_dataloader.generator = torch.Generator()
        self._start = copy.deepcopy(self.validation_dataloader.state_dict())

    @torch.no_grad()
    def validate(self, model_parts: list[nn.Module], step: int) -> None:
        """As the host's: the mean over batches of each metric, logged as ``validation_metrics/…``."""
        for model in model_parts:
            model.eval()
        self.validation_dataloader.load_state_dict(copy.deepcopy(self._start))
        steps = self.job_config.validation.steps
        sums: dict[str, Tensor] = {}
        count = 0
        for input_dict, labels in islice(self.validation_dataloader, None if steps == -1 else steps):
            self.metrics_processor.ntokens_since_last_log += labels.numel()
            parts = self.evaluate(input_dict["input"].to(device_type), labels.to(device_type))
            sums = {name: sums.get(name, 0.0) + value for name, value in parts.items()}
            count += 1
        if count == 0:
            raise ConfigError(
                f"validation.dataset {self.job_config.validation.dataset!r} gives no batch of validation.local_batch_size x "
                "validation.seq_len tokens; give it more text, or set validation.enable = false"
            )
        metrics = {name: value / count for name, value in self.reduce(sums).items()}
        loss = metrics.pop("loss_ce")
        self.metrics_processor.log_validation(
            loss=loss, step=step, extra_metrics={f"validation_metrics/{name}": value for name, value in metrics.items()}
        )
        for model in model_parts:
            model.train()


def build_validator(**kwargs: Any) -> FutureValidator:
    """The TrainSpec's validator."""
    return FutureValidator(**kwargs)
