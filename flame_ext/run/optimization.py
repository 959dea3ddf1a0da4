"""Optimizers and learning-rate schedules with a parameter group for each head that asks for one.

Built by the host's own builders first; only then are the heads' parameters taken out of the one group.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torchtitan.components.lr_scheduler import LRSchedulersContainer
from torchtitan.components.lr_scheduler import build_lr_schedulers as build_host_lr_schedulers
from torchtitan.components.optimizer import OptimizersContainer
from torchtitan.components.optimizer import build_optimizers as build_host_optimizers
from torchtitan.config import LRScheduler as LRSchedulerConfig
from torchtitan.config import Optimizer as OptimizerConfig
from torchtitan.distributed import ParallelDims

from flame_ext.config.sections import HeadOptimization
from flame_ext.model.hf_causal_lm import HFCausalLM


def build_optimizers(
    model_parts: list[HFCausalLM], optimizer_config: OptimizerConfig, parallel_dims: ParallelDims, *args: Any
) -> OptimizersContainer:
    """The host's optimizers; a head with options of its own (``model.head_optimization``) is a group of its own.

    DCP saves every group's options with each of its parameters, so they come back with the state, whatever the layout.
    """
    container = build_host_optimizers(model_parts, optimizer_config, parallel_dims, *args)
    if optimizer_config.early_step_in_backward:  # an optimizer for each parameter; preflight/checks.py refuses groups
        return container
    for model, optimizer in zip(model_parts, container, strict=True):
        (rest,) = optimizer.param_groups
        for head, options in own_groups(model):
            owned = {id(p) for p in head.parameters()}
            rest["params"] = [p for p in rest["params"] if id(p) not in owned]
            decay = optimizer_config.weight_decay if options.weight_decay is None else options.weight_decay
            optimizer.add_param_group(
                {
                    "params": [p for p in head.parameters() if p.requires_grad],
                    "lr": optimizer_config.lr * options.lr_scale,
                    "weight_decay": decay,
                }
            )
        if not rest["params"]:  # the backbone is frozen
            optimizer.param_groups.remove(rest)
    return container


def build_lr_schedulers(
    optimizers: OptimizersContainer, config: LRSchedulerConfig, training_steps: int
) -> LRSchedulersContainer:
    """The host's schedule for each group, with the group's own warm-up where it has one."""
    if not any(own_groups(model.whole) for model in optimizers.model_parts):
        return build_host_lr_schedulers(optimizers, config, training_steps)
    schedules = []
    for model, optimizer in zip(optimizers.model_parts, optimizers, strict=True):
        warmups = [options.warmup_steps for _, options in own_groups(model)]
        if len(optimizer.param_groups) > len(warmups):  # what is in no group of its own comes first
            warmups.insert(0, None)
        schedules.append([_schedule(config, training_steps, warmup) for warmup in warmups])
    return GroupedLRSchedulers(optimizers, schedules)


class GroupedLRSchedulers(LRSchedulersContainer):
    """The host's, where the stages of a pipeline have different groups: a step brings the time alone, the rates are at hand.

    Args:
        optimizers: of this rank's parts of the model.
        schedules: of each of their groups.
    """

    def __init__(self, optimizers: OptimizersContainer, schedules: list[list[Any]]) -> None:
        self.schedulers = [
            torch.optim.lr_scheduler.LambdaLR(optimizer, of_groups)
            for optimizer, of_groups in zip(optimizers, schedules, strict=True)
        ]

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        for scheduler in self.schedulers:
            scheduler.last_epoch, scheduler._step_count = state_dict["last_epoch"], state_dict["_step_count"]
            scheduler._last_lr = [
                rate * schedule(scheduler.last_epoch)
                for rate, schedule in zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)
            ]


def configured_again(optimizers: OptimizersContainer, lr_schedulers: LRSchedulersContainer) -> Callable[[], None]:
    """What is to be called after a step is loaded to have these options and rates instead of the saved ones.

    A step brings each group's options and base rates along, so a changed configuration would change nothing.
    """
    options = [[{k: v for k, v in group.items() if k != "params"} for group in o.param_groups] for o in optimizers]
    rates = [list(scheduler.base_lrs) for scheduler in lr_schedulers.schedulers]

    def configure() -> None:
        for optimizer, fresh in zip(optimizers, options, strict=True):
            for group, values in zip(optimizer.param_groups, fresh, strict=True):
                group.update(values)
        for scheduler, base_lrs in zip(lr_schedulers.schedulers, rates, strict=True):
            scheduler.base_lrs = base_lrs
            scheduler._last_lr = [
                rate * schedule(scheduler.last_epoch)
                for rate, schedule in zip(base_lrs, scheduler.lr_lambdas, strict=True)
            ]
            for group, rate in zip(scheduler.optimizer.param_groups, scheduler._last_lr, strict=True):
                group["lr"] = rate

    return configure


def own_groups(model: HFCausalLM) -> list[tuple[nn.Module, HeadOptimization]]:
    """The trained heads of ``model`` that are not optimised as the backbone is."""
    default = HeadOptimization()
    groups = []
    for name, section in model.head_optimization.items():
        options = HeadOptimization(section.lr_scale, section.weight_decay, section.warmup_steps)
        head = model.get_submodule(name)
        if options != default and any(p.requires_grad for p in head.parameters()):
            groups.append((head, options))
    return groups


def _schedule(config: LRSchedulerConfig, training_steps: int, warmup_steps: int | None) -> Any:
    """The host's function of the step; it has it only inside of a scheduler, and a scheduler only of an optimizer."""
    if warmup_steps is not None:
        config = replace(config, warmup_steps=warmup_steps)
    nothing = torch.optim.SGD([torch.zeros(())], lr=1.0)
    (scheduler,) = build_host_lr_schedulers([nothing], config, training_steps)
    return scheduler.lr_lambdas[0]
