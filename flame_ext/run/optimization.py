"""Builds optimizers and learning-rate schedules with a parameter group for each head that has options for them."""

from collections.abc import Callable
from dataclasses import replace
from itertools import repeat
from typing import Any

import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torchtitan.components.optimizer import OptimizersContainer
from torchtitan.distributed import ParallelDims
from torchtitan.tools.logging import logger

from flame_ext.config.head_options import HeadOptimization
from flame_ext.config.sections import Optimizer as OptimizerConfig
from flame_ext.errors import ConfigError
from flame_ext.host.names import LRScheduler as LRSchedulerConfig
from flame_ext.host.names import LRSchedulersContainer, OptimizersInBackwardContainer
from flame_ext.host.names import build_lr_schedulers as build_torchtitan_lr_schedulers
from flame_ext.host.names import build_optimizers as build_torchtitan_optimizers
from flame_ext.model.hf_causal_lm import HFCausalLM
from flame_ext.run.muon import Muon, take_matrices

_FLAT = StateDictOptions(flatten_optimizer_state_dict=True)


def build_optimizers(
    model_parts: list[HFCausalLM], optimizer_config: OptimizerConfig, parallel_dims: ParallelDims, *args: Any
) -> OptimizersContainer:
    """Builds torchtitan's optimizers, then takes each head with options, and Muon's matrices, out of their one parameter group.

    Raises ConfigError if parameters are frozen, of which an update in the backward would wait for gradients.
    """
    if optimizer_config.early_step_in_backward:  # an optimizer for each parameter; preflight refuses groups
        frozen = [name for model in model_parts for name, p in model.named_parameters() if not p.requires_grad]
        if frozen:
            first = f"{len(frozen)} parameters are, the first is {frozen[0]}"
            raise ConfigError(
                f"optimizer.early_step_in_backward does not go with frozen parameters ({first}); leave it out"
            )
        logger.warning(
            "optimizer.early_step_in_backward: gradients are neither clipped (training.max_norm) nor checked before the update, and "
            "grad_norm is 0"
        )
    muon = optimizer_config.name == "Muon"
    built = replace(optimizer_config, name="AdamW") if muon else optimizer_config
    container = build_torchtitan_optimizers(model_parts, built, parallel_dims, *args)
    if optimizer_config.early_step_in_backward:
        container.__class__ = OptimizersInBackward
        return container
    for model, optimizer in zip(model_parts, container, strict=True):
        (rest,) = optimizer.param_groups
        if muon:
            take_matrices(optimizer, model, optimizer_config.muon_momentum)
        for head, options in own_groups(model):
            owned = {id(p) for p in head.parameters()}
            rest["params"] = [p for p in rest["params"] if id(p) not in owned]
            decay = optimizer_config.weight_decay if options.weight_decay is None else options.weight_decay
            trained = [p for p in head.parameters() if p.requires_grad]
            lr = optimizer_config.lr * options.lr_scale
            optimizer.add_param_group({"params": trained, "lr": lr, "weight_decay": decay})
        if not rest["params"]:  # the backbone is frozen, or has matrices alone
            optimizer.param_groups.remove(rest)
    return container


class OptimizersInBackward(OptimizersInBackwardContainer):
    """Saves and loads the state of every parameter's optimizer; torchtitan's does so for the first one alone."""

    def state_dict(self) -> dict[str, Any]:
        (model,) = self.model_parts
        return get_optimizer_state_dict(model, tuple(self.optimizers), options=_FLAT)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        (model,) = self.model_parts
        set_optimizer_state_dict(model, tuple(self.optimizers), optim_state_dict=state_dict, options=_FLAT)


def build_lr_schedulers(
    optimizers: OptimizersContainer, config: LRSchedulerConfig, training_steps: int
) -> LRSchedulersContainer:
    """Builds torchtitan's schedule for each group, with the group's warm-up where it has one.

    Raises ConfigError if the schedule ends before the run, whose steps may only be known now (``training.epochs``).
    """
    if problem := schedule_problem(config.total_steps, training_steps):
        raise ConfigError(problem)
    grouped = any(own_groups(model.whole) for model in optimizers.model_parts)
    if not grouped and not any(isinstance(optimizer, Muon) for optimizer in optimizers):
        return build_torchtitan_lr_schedulers(optimizers, config, training_steps)
    schedules = []
    for model, optimizer in zip(optimizers.model_parts, optimizers, strict=True):
        own = [options.warmup_steps for _, options in own_groups(model)]
        warmups = [*repeat(None, len(optimizer.param_groups) - len(own)), *own]  # heads' own groups come last
        schedules.append([_schedule(config, training_steps, warmup) for warmup in warmups])
    return GroupedLRSchedulers(optimizers, schedules)


def schedule_problem(total_steps: int | None, training_steps: int) -> str | None:
    """What is wrong with ``lr_scheduler.total_steps``, None if nothing is: after it torchtitan's rates fall below 0, or rise again."""
    if total_steps is None or total_steps >= training_steps:
        return None
    return (
        f"lr_scheduler.total_steps ({total_steps}) must be at least the steps of the run ({training_steps}): after it the learning "
        "rate would fall below 0; raise it, leave it out, or lower training.steps"
    )


class GroupedLRSchedulers(LRSchedulersContainer):
    """Loads only the step and computes the rates from it, since the stages of a pipeline have different groups."""

    def __init__(self, optimizers: OptimizersContainer, schedules: list[list[Any]]) -> None:
        pairs = zip(optimizers, schedules, strict=True)
        self.schedulers = [torch.optim.lr_scheduler.LambdaLR(optimizer, of_groups) for optimizer, of_groups in pairs]

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        for scheduler in self.schedulers:
            scheduler.last_epoch, scheduler._step_count = state_dict["last_epoch"], state_dict["_step_count"]
            scheduler._last_lr = _rates(scheduler)


def configured_again(optimizers: OptimizersContainer, lr_schedulers: LRSchedulersContainer) -> Callable[[], None]:
    """Returns a function to call after a step is loaded. It sets the present options and rates again, which the step replaces."""
    options = [[{k: v for k, v in group.items() if k != "params"} for group in o.param_groups] for o in optimizers]
    base_lrs = [list(scheduler.base_lrs) for scheduler in lr_schedulers.schedulers]

    def configure() -> None:
        for optimizer, fresh in zip(optimizers, options, strict=True):
            for group, values in zip(optimizer.param_groups, fresh, strict=True):
                group.update(values)
        for scheduler, rates in zip(lr_schedulers.schedulers, base_lrs, strict=True):
            scheduler.base_lrs = rates
            scheduler._last_lr = _rates(scheduler)
            for group, rate in zip(scheduler.optimizer.param_groups, scheduler._last_lr, strict=True):
                group["lr"] = rate

    return configure


def own_groups(model: HFCausalLM) -> list[tuple[nn.Module, HeadOptimization]]:
    """Returns the trained heads of ``model`` that are not optimised as the backbone is, with their options."""
    groups = []
    for name, attached in model.heads.items():
        section, head = attached.optimization, model.get_submodule(name)
        options = HeadOptimization(section.lr_scale, section.weight_decay, section.warmup_steps)
        if options != HeadOptimization() and any(p.requires_grad for p in head.parameters()):
            groups.append((head, options))
    return groups


def _rates(scheduler: torch.optim.lr_scheduler.LambdaLR) -> list[Any]:
    """Returns the learning rate of each group at the scheduler's step."""
    lrs = zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)
    return [base * schedule(scheduler.last_epoch) for base, schedule in lrs]


def _schedule(config: LRSchedulerConfig, training_steps: int, warmup_steps: int | None) -> Any:
    """Returns torchtitan's function from step to factor, which it keeps in the scheduler of an optimizer."""
    if warmup_steps is not None:
        config = replace(config, warmup_steps=warmup_steps)
    nothing = torch.optim.SGD([torch.zeros(())], lr=1.0)
    (scheduler,) = build_torchtitan_lr_schedulers([nothing], config, training_steps)
    return scheduler.lr_lambdas[0]
