"""Means over labels and over sources, of the same batches each time, with dataloaders that are lists."""

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
    """Batches of one sequence of labels each; it goes on from where it is, as a stateful dataloader does."""

    def __init__(self, *batches: list[float]) -> None:
        self.batches, self.position = batches, {"next": 0}
        self.dataset = SimpleNamespace(pad=False)

    def __iter__(self) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
        while self.position["next"] < len(self.batches):
            values = self.batches[self.position["next"]]
            self.position["next"] += 1
            yield {}, torch.tensor(values)

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


def validator(steps: int = -1, **loaders: Loader) -> FutureValidator:
    """A validator of one rank, whose loss is the mean of the labels, and whose second figure is that of the labels above 2."""
    config = FlameJobConfig()
    config.validation.steps = steps
    return _with_losses(FutureValidator(config, Metrics(), loaders))


def _with_losses(made: FutureValidator) -> FutureValidator:
    def evaluate(batch: tuple[dict[str, Tensor], Tensor], counts: Tensor) -> dict[str, Tensor]:
        _, labels = batch
        return {"loss_ce": labels.sum() / counts[0], "future_top1": labels[labels > 2].sum() / counts[1]}

    made.evaluate = evaluate
    made.reduce = lambda sums: {name: value.item() for name, value in sums.items()}
    made.count_all(lambda batch: torch.tensor([batch[1].numel(), (batch[1] > 2).sum()]), lambda counts: counts)
    return made


def test_a_figure_is_its_sum_over_what_it_counts_in_all_batches() -> None:
    made = validator(3, **{"": Loader([1.0, 2.0, 6.0], [3.0], [1.0, 1.0], [100.0])})
    made.validate([], step=5)
    (logged,) = made.metrics_processor.logged
    assert logged["loss"] == pytest.approx(14 / 6) and logged["step"] == 5
    assert logged["extra_metrics"] == {"validation_metrics/future_top1": 4.5}
    assert made.metrics_processor.ntokens_since_last_log == 6


def test_the_loss_of_several_sources_is_the_mean_of_theirs_however_many_labels_they_have() -> None:
    made = validator(news=Loader([1.0, 3.0], [5.0]), code=Loader([8.0]))
    made.validate([], step=1)
    (logged,) = made.metrics_processor.logged
    assert logged["loss"] == (3.0 + 8.0) / 2
    assert logged["extra_metrics"] == {
        "validation_metrics/news/loss_ce": 3.0,
        "validation_metrics/news/future_top1": 4.0,
        "validation_metrics/code/loss_ce": 8.0,
        "validation_metrics/code/future_top1": 8.0,
    }


def test_every_pass_has_the_same_batches() -> None:
    made = validator(2, news=Loader([1.0], [3.0], [5.0]), code=Loader([8.0]))
    for step in range(3):
        made.validate([], step)
    first, *others = [{**logged, "step": 0} for logged in made.metrics_processor.logged]
    assert others == [first, first]


def test_the_model_is_evaluated_without_gradients_and_trains_on() -> None:
    model = nn.Dropout()
    seen = []
    made = validator(**{"": Loader([1.0])})

    def evaluate(*_: Any) -> dict[str, Tensor]:
        seen.append((model.training, torch.is_grad_enabled()))
        return {"loss_ce": torch.ones(())}

    made.evaluate = evaluate
    made.validate([model], step=1)
    assert seen == [(False, False)] and model.training


@pytest.mark.parametrize(("label", "named"), [("", "validation.dataset 'text'"), ("news", "validation.sources 'news'")])
def test_a_source_without_a_label_is_refused_before_the_first_step(label: str, named: str) -> None:
    config = FlameJobConfig()
    config.validation.dataset = "text"
    with pytest.raises(ConfigError, match=f"{named} has no text to validate on; give it more"):
        _with_losses(FutureValidator(config, Metrics(), {label: Loader([])}))


def test_a_rank_whose_data_end_earlier_goes_on_as_long_as_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(validation, "gathered", lambda count: [count, 5])
    loader = Loader([1.0], [3.0])
    made = validator(**{"": loader})
    assert made._sources[""].batches == 5 and loader.dataset.pad


@pytest.mark.parametrize("sources", [[], [DataSource(label="news")]])
def test_every_rank_builds_its_own_loaders(monkeypatch: pytest.MonkeyPatch, sources: list[DataSource]) -> None:
    asked = []

    def build(*args: Any) -> dict[str, Loader]:
        asked.append(args)
        return {"news" if sources else "": Loader([4.0])}

    monkeypatch.setattr(validation, "build_validation_dataloaders", build)
    config = FlameJobConfig()
    config.validation.sources = sources
    made = _with_losses(build_validator(config, 4, 3, "tokenizer", metrics_processor=Metrics(), parallel_dims=None))
    made.validate([], step=1)
    assert asked == [(4, 3, "tokenizer", config)] and made.metrics_processor.logged[0]["loss"] == 4.0


def test_it_is_due_as_torchtitan_says() -> None:
    made = FutureValidator(SimpleNamespace(validation=SimpleNamespace(freq=4)), Metrics(), {})
    assert [step for step in range(1, 10) if made.should_validate(step)] == [1, 4, 8]
