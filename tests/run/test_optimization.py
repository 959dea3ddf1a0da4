"""Parameter groups of heads: their options, their schedules, and both again from a checkpoint."""

from __future__ import annotations

import copy
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torchtitan.components.lr_scheduler import LRSchedulersContainer
from torchtitan.components.lr_scheduler import build_lr_schedulers as build_torchtitan_lr_schedulers
from torchtitan.components.optimizer import OptimizersContainer
from torchtitan.components.optimizer import build_optimizers as build_torchtitan_optimizers
from torchtitan.config import LRScheduler, Optimizer

from flame_ext.config.head_options import HeadOptimization
from flame_ext.errors import ConfigError
from flame_ext.model.hf_causal_lm import AttachedHead
from flame_ext.run.optimization import build_lr_schedulers, build_optimizers, own_groups

OPTIMIZER = Optimizer(lr=0.01, weight_decay=0.1, implementation="for-loop")
SCHEDULE = LRScheduler(warmup_steps=4, decay_ratio=0.3, decay_type="cosine", min_lr_factor=0.1)
STEPS = 20
PREDICTOR = HeadOptimization(lr_scale=5.0, weight_decay=0.0, warmup_steps=8)
ACTION = HeadOptimization(lr_scale=0.5)


class Model(nn.Module):
    """A backbone and two heads."""

    def __init__(self, **head_optimization: HeadOptimization) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.backbone = nn.Linear(3, 3)
        self.predictor = nn.Linear(3, 2)
        self.action = nn.Linear(3, 1, bias=False)
        self.heads = {name: AttachedHead(options) for name, options in head_optimization.items()}

    @property
    def whole(self) -> Model:
        return self

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.backbone(x)
        return self.predictor(x).sum() + self.action(x).sum()


def build(model: Model) -> tuple[OptimizersContainer, LRSchedulersContainer]:
    optimizers = build_optimizers([model], OPTIMIZER, None)
    return optimizers, build_lr_schedulers(optimizers, SCHEDULE, STEPS)


def rates(optimizers: OptimizersContainer) -> list[float]:
    (optimizer,) = optimizers
    return [group["lr"] for group in optimizer.param_groups]


def train(
    model: Model, optimizers: OptimizersContainer, schedulers: LRSchedulersContainer, steps: int
) -> list[list[float]]:
    """Learning rates of the groups in each step."""
    history = []
    for _ in range(steps):
        history.append(rates(optimizers))
        optimizers.zero_grad()
        model(torch.ones(2, 3)).backward()
        optimizers.step()
        schedulers.step()
    return history


def host_factors(warmup_steps: int) -> list[float]:
    """What torchtitan multiplies a learning rate by, step by step."""
    model = nn.Linear(1, 1)
    optimizers = build_torchtitan_optimizers([model], Optimizer(lr=1.0, implementation="for-loop"), None)
    config = LRScheduler(warmup_steps, SCHEDULE.total_steps, 0.3, "cosine", 0.1)
    schedulers = build_torchtitan_lr_schedulers(optimizers, config, STEPS)
    factors = []
    for _ in range(STEPS):
        factors += rates(optimizers)
        optimizers.step()
        schedulers.step()
    return factors


def test_each_head_has_a_group_with_its_options() -> None:
    model = Model(predictor=PREDICTOR, action=ACTION)
    optimizers = build_optimizers([model], OPTIMIZER, None)
    (optimizer,) = optimizers
    backbone, predictor, action = optimizer.param_groups
    for group, module, lr, decay in (
        (backbone, model.backbone, 0.01, 0.1),
        (predictor, model.predictor, 0.05, 0.0),
        (action, model.action, 0.005, 0.1),
    ):
        assert [id(p) for p in group["params"]] == [id(p) for p in module.parameters()]
        assert group["lr"] == pytest.approx(lr) and group["weight_decay"] == decay
        assert group["betas"] == (0.9, 0.95) and group["eps"] == backbone["eps"]


def test_heads_without_options_are_optimised_as_the_host_does() -> None:
    model = Model(predictor=HeadOptimization(), action=HeadOptimization())
    optimizers, schedulers = build(model)
    assert own_groups(model) == [] and len(rates(optimizers)) == 1
    host = build_torchtitan_optimizers([model], OPTIMIZER, None)
    assert [id(p) for p in optimizers.optimizers[0].param_groups[0]["params"]] == [
        id(p) for p in host.optimizers[0].param_groups[0]["params"]
    ]
    history = train(model, optimizers, schedulers, STEPS)
    assert [lr for (lr,) in history] == pytest.approx([0.01 * factor for factor in host_factors(4)])


def test_each_group_has_the_hosts_schedule_with_its_own_warmup() -> None:
    model = Model(predictor=PREDICTOR, action=ACTION)
    backbone, predictor, action = zip(*train(model, *build(model), STEPS), strict=True)
    assert list(backbone) == pytest.approx([0.01 * factor for factor in host_factors(4)])
    assert list(predictor) == pytest.approx([0.05 * factor for factor in host_factors(8)])
    assert list(action) == pytest.approx([0.005 * factor for factor in host_factors(4)])
    assert host_factors(4) != host_factors(8)


def test_options_change_the_head_and_nothing_else() -> None:
    """The first step of AdamW is the learning rate in each element, and the decay."""
    changes = []
    for options in (HeadOptimization(), HeadOptimization(lr_scale=3.0, weight_decay=0.0)):
        model = Model(predictor=options)
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        train(model, *build(model), 1)
        changes.append({name: p.detach() - before[name] for name, p in model.named_parameters()})
    for name, change in changes[0].items():
        if name.startswith("predictor"):
            # Linear warm-up over 4 steps: a quarter of the rate; the gradient is the same everywhere, up to its sign.
            torch.testing.assert_close(changes[1][name].abs(), torch.full_like(change, 0.0075), rtol=1e-3, atol=0)
        else:
            assert torch.equal(changes[1][name], change)


def test_a_frozen_backbone_leaves_the_head_alone() -> None:
    model = Model(predictor=PREDICTOR)
    model.backbone.requires_grad_(False)
    model.action.requires_grad_(False)
    optimizers, schedulers = build(model)
    (optimizer,) = optimizers
    (group,) = optimizer.param_groups
    assert [id(p) for p in group["params"]] == [id(p) for p in model.predictor.parameters()]
    assert group["weight_decay"] == 0.0
    assert [lr for (lr,) in train(model, optimizers, schedulers, STEPS)] == pytest.approx(
        [0.05 * factor for factor in host_factors(8)]
    )


def test_a_frozen_head_has_no_group() -> None:
    model = Model(predictor=PREDICTOR, action=ACTION)
    model.predictor.requires_grad_(False)
    optimizers, _ = build(model)
    assert [head for head, _ in own_groups(model)] == [model.action]
    assert len(rates(optimizers)) == 2


def test_a_checkpoint_brings_rates_and_schedules_back() -> None:
    model = Model(predictor=PREDICTOR, action=ACTION)
    optimizers, schedulers = build(model)
    train(model, optimizers, schedulers, 6)
    saved = (model.state_dict(), optimizers.state_dict(), schedulers.state_dict())
    saved = torch.utils._pytree.tree_map(lambda x: x.clone() if isinstance(x, torch.Tensor) else x, saved)
    expected_rates = rates(optimizers)
    expected = train(model, optimizers, schedulers, STEPS - 6)

    resumed = Model(predictor=PREDICTOR, action=ACTION)
    again, schedulers_again = build(resumed)
    assert rates(again) != expected_rates
    resumed.load_state_dict(saved[0])
    again.load_state_dict(saved[1])
    assert rates(again) == expected_rates
    (optimizer,) = again
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0, 0.1]
    schedulers_again.load_state_dict(saved[2])
    assert train(resumed, again, schedulers_again, STEPS - 6) == expected
    for (name, actual), wanted in zip(resumed.named_parameters(), model.parameters(), strict=True):
        assert torch.equal(actual, wanted), name


def test_a_schedule_that_ends_before_the_run_is_refused() -> None:
    """Its steps may only be known once the data are counted (training.epochs)."""
    optimizers = build_optimizers([Model()], OPTIMIZER, None)
    with pytest.raises(ConfigError, match=r"total_steps \(19\) must be at least the steps of the run \(20\)"):
        build_lr_schedulers(optimizers, replace(SCHEDULE, total_steps=STEPS - 1), STEPS)


def test_every_optimizer_in_the_backward_is_saved_and_resumed() -> None:
    def steps(model: Model, count: int) -> None:
        for number in range(count):
            model(torch.full((1, 3), 1.0 + number)).backward()

    early, dims = replace(OPTIMIZER, early_step_in_backward=True), SimpleNamespace(ep_enabled=False, pp_enabled=False)
    unbroken, resumed = Model(), Model()
    first = build_optimizers([unbroken], early, dims)
    steps(unbroken, 2)
    state = copy.deepcopy(first.state_dict())
    assert {f"state.{name}.exp_avg" for name, _ in unbroken.named_parameters()} <= set(state)
    resumed.load_state_dict(unbroken.state_dict())
    build_optimizers([resumed], early, dims).load_state_dict(state)
    for model in (unbroken, resumed):
        steps(model, 2)
    assert all(torch.equal(p, q) for p, q in zip(unbroken.parameters(), resumed.parameters(), strict=True))


def test_an_update_in_the_backward_of_frozen_parameters_is_refused() -> None:
    model = Model()
    model.backbone.requires_grad_(False)
    with pytest.raises(ConfigError, match=r"frozen parameters \(2 parameters are, the first is backbone.weight\)"):
        build_optimizers([model], replace(OPTIMIZER, early_step_in_backward=True), None)
