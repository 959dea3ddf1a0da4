"""Means over batches and over sources, of the same batches each time, with dataloaders that are lists."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from flame_ext.config.sections import DataSource, FlameJobConfig
from flame_ext.errors import ConfigError
from flame_ext.run import validation
from flame_ext.run.validation import FutureValidator, build_validator


class Loader:
    """Batches that are numbers; it goes on from where it is, as a stateful dataloader does."""

    def __init__(self, *values: float) -> None:
        self.values, self.position = values, {"next": 0}

    def __iter__(self) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
        while self.position["next"] < len(self.values):
            value = self.values[self.position["next"]]
            self.position["next"] += 1
            yield {"input": torch.tensor(value)}, torch.zeros(2, 4, dtype=torch.long)

    def state_dict(self) -> dict[str, int]:
        return self.position

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        self.position = state_dict


class Metrics:
    def __init__(self) -> None:
        self.ntokens_since_last_log = 0
        self.logged: list[dict[str, Any]] = []

    def log_validation(self, **values: Any) -> None:
        self.logged.append(values)


def validator(**loaders: tuple[Loader, int | None]) -> FutureValidator:
    """A validator of one rank whose loss is a batch's number, and a second metric its square."""
    return _with_losses(FutureValidator(FlameJobConfig(), Metrics(), loaders))


def _with_losses(made: FutureValidator) -> FutureValidator:
    made.evaluate = lambda inputs, labels: {"loss_ce": inputs["input"], "loss_future": inputs["input"] ** 2}
    made.reduce = lambda sums: {name: value.item() for name, value in sums.items()}
    return made


def test_a_metric_is_its_mean_over_the_batches_of_one_source() -> None:
    made = validator(**{"": (Loader(1.0, 2.0, 6.0, 100.0), 3)})
    made.validate([], step=5)
    (logged,) = made.metrics_processor.logged
    assert logged["loss"] == 3.0 and logged["step"] == 5
    assert logged["extra_metrics"] == {"validation_metrics/loss_future": pytest.approx(41 / 3)}
    assert made.metrics_processor.ntokens_since_last_log == 3 * 8


def test_the_loss_of_several_sources_is_the_mean_of_theirs_however_many_batches_they_have() -> None:
    made = validator(news=(Loader(1.0, 3.0), None), code=(Loader(8.0, 99.0), 1))
    made.validate([], step=1)
    (logged,) = made.metrics_processor.logged
    assert logged["loss"] == (2.0 + 8.0) / 2
    assert logged["extra_metrics"] == {
        "validation_metrics/news/loss_ce": 2.0,
        "validation_metrics/news/loss_future": 5.0,
        "validation_metrics/code/loss_ce": 8.0,
        "validation_metrics/code/loss_future": 64.0,
    }


def test_every_pass_has_the_same_batches() -> None:
    made = validator(news=(Loader(1.0, 3.0, 5.0), 2), code=(Loader(8.0), None))
    for step in range(3):
        made.validate([], step)
    first, *others = [{**logged, "step": 0} for logged in made.metrics_processor.logged]
    assert others == [first, first]


def test_the_model_is_evaluated_without_gradients_and_trains_on() -> None:
    model = nn.Dropout()
    seen = []
    made = validator(**{"": (Loader(1.0), 1)})

    def evaluate(*_: Any) -> dict[str, Tensor]:
        seen.append((model.training, torch.is_grad_enabled()))
        return {"loss_ce": torch.ones(())}

    made.evaluate = evaluate
    made.validate([model], step=1)
    assert seen == [(False, False)] and model.training


@pytest.mark.parametrize(("label", "named"), [("", "'text'"), ("news", "'news'")])
def test_a_source_without_a_batch_is_refused(label: str, named: str) -> None:
    made = validator(**{label: (Loader(), 3)})
    made.job_config.validation.dataset = "text"
    with pytest.raises(ConfigError, match=f"validation.dataset {named} gives no batch of .*give it more text"):
        made.validate([], step=1)
    assert made.metrics_processor.logged == []


@pytest.mark.parametrize(("steps", "expected"), [(2, 2.0), (-1, 3.0)])
def test_without_sources_the_dataset_is_evaluated(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, steps: int, expected: float
) -> None:
    asked = {}

    def build(*args: Any, infinite: bool) -> Loader:
        asked.update(args=args, infinite=infinite)
        return Loader(1.0, 3.0, 5.0)

    monkeypatch.setattr(validation, "build_text_validation_dataloader", build)
    config = FlameJobConfig()
    config.validation.steps = steps
    made = _with_losses(
        build_validator(config, 4, 3, "tokenizer", metrics_processor=Metrics(), loss_fn=None, pp_schedule=None)
    )
    assert asked == {"args": (4, 3, "tokenizer", config), "infinite": steps != -1}
    (loader, _) = made._loaders[""]
    assert loader.generator is not torch.default_generator, "passes must not draw what training draws"
    made.validate([], step=1)
    assert made.metrics_processor.logged[0]["loss"] == expected
    assert ("hangs" in caplog.text) == (steps == -1)


def test_with_sources_the_dataset_is_not_opened(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def build(*args: Any) -> dict[str, tuple[Loader, int]]:
        asked.append(args)
        return {"news": (Loader(4.0), 1)}

    monkeypatch.setattr(validation, "build_validation_dataloaders", build)
    monkeypatch.setattr(validation, "build_text_validation_dataloader", None)
    config = FlameJobConfig()
    config.validation.sources = [DataSource()]
    made = _with_losses(build_validator(config, 4, 3, "tokenizer", metrics_processor=Metrics(), parallel_dims=None))
    made.validate([], step=1)
    assert asked == [(4, 3, "tokenizer", config)] and made.metrics_processor.logged[0]["loss"] == 4.0


def test_it_is_due_as_torchtitan_says() -> None:
    made = FutureValidator(SimpleNamespace(validation=SimpleNamespace(freq=4)), Metrics(), {})
    assert [step for step in range(1, 10) if made.should_validate(step)] == [1, 4, 8]
