"""The figures of a step: parts of the losses, gradient norms, epochs and times, summed over micro-batches and ranks."""

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torchtitan.distributed import ParallelDims

from flame_ext.config.sections import FlameJobConfig
from flame_ext.data.sources import sources_of
from flame_ext.heads.registry import teacher_of, trained_heads
from flame_ext.model.runner import ModelRunner
from flame_ext.step.backward import Gradients
from flame_ext.step.balance import Balance
from flame_ext.step.plan import StepPlan


class Stopwatch:
    """Measures named parts of a step; a part that runs several times (accumulation) adds up.

    On an accelerator it records events on the stream and reads them in :meth:`seconds` only, so that nothing waits.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._laps: dict[str, list[tuple[Any, ...]]] = defaultdict(list)

    def restart(self) -> None:
        """Forget what was measured: a new step begins."""
        self._laps.clear()

    @contextmanager
    def measure(self, name: str) -> Iterator[None]:
        begin = self._now()
        yield
        self._laps[name].append((begin, self._now()))

    def seconds(self) -> dict[str, float]:
        """Seconds of each part since :meth:`restart`. Waits for the end of the last one."""
        if self._device.type == "cpu":
            return {name: sum(end - begin for begin, end in laps) for name, laps in self._laps.items()}
        for laps in self._laps.values():
            laps[-1][1].synchronize()
        return {name: sum(b.elapsed_time(e) for b, e in laps) / 1e3 for name, laps in self._laps.items()}

    def _now(self) -> float | torch.Event:
        if self._device.type == "cpu":
            return time.perf_counter()
        event = torch.Event(device=self._device, enable_timing=True)
        event.record()
        return event


class Figures(NamedTuple):
    """What is reported of a step."""

    loss: float  # the mean over the tokens of all ranks
    largest_loss: float  # of the ranks' own means
    tokens_seen: float  # in the run so far, by all ranks
    metrics: dict[str, float | None]  # everything else; None if this step has no such value


class Reported:
    """Collects what is reported of a step; the stopwatch's times where there is a teacher."""

    def __init__(
        self,
        runner: ModelRunner,
        config: FlameJobConfig,
        parallel_dims: ParallelDims,
        dataloader: Any,
        gradients: Gradients,
        balance: Balance,
        stopwatch: Stopwatch,
        device: torch.device,
    ) -> None:
        self._runner, self._dataloader, self._gradients, self._device = runner, dataloader, gradients, device
        self._balance, self._stopwatch, self._max_norm = balance, stopwatch, config.training.max_norm
        self._loss_mesh = parallel_dims.get_optional_mesh("loss")
        self._has_losses, self._has_teacher = bool(trained_heads(config)), teacher_of(config) is not None
        self._sources = [source.reported_as for _, source in sources_of(config)]
        self._names: list[str] = []
        self.parts: dict[str, Tensor] = {}
        """Name to the sum of a part of the losses over this rank's micro-batches of the latest step."""

    def begin(self) -> None:
        """Forget the step before."""
        self.parts = {}
        self._stopwatch.restart()

    def add(self, parts: dict[str, Tensor]) -> None:
        """Add the parts of a micro-batch's losses."""
        for name, value in parts.items():
            self.parts[name] = self.parts[name] + value if name in self.parts else value

    def figures(self, losses: list[Tensor], plan: StepPlan, tokens: int, grad_norm: float) -> Figures:
        """The figures of the step. Collective; waits for the device once.

        Args:
            losses: the losses of this rank's micro-batches.
            tokens: that this rank has seen in the run so far.
            grad_norm: by which all gradients have been clipped.
        """
        loss = torch.stack([*losses, *self._balance.weighted()]).sum()
        ranks = 1 if self._loss_mesh is None else self._loss_mesh.size()  # that are summed over
        epochs = dict(zip(self._sources, self._dataloader.epochs(), strict=True))
        shares = {f"epochs/{name}": self._filled(value / ranks) for name, value in epochs.items()}
        parts = self.parts | self._balance.parts() | shares
        if not self._runner.has_last:
            parts = {}
        summed = torch.stack([value.double() for value in (self._filled(tokens), loss, *parts.values())])
        largest, norms = loss, self._norms_of_gradients()
        if self._loss_mesh is not None:
            largest = loss * plan.tokens / max(1, plan.local_tokens)  # with masked rows, a rank may have none
            dist.all_reduce(summed, group=self._loss_mesh.get_group())
            dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=self._loss_mesh.get_group())
        of_this_rank = torch.stack([largest, *norms.values()])
        tokens_seen, mean, *values = torch.cat([summed, of_this_rank.double()]).tolist()
        found = self._runner.from_last(dict(zip(parts, values, strict=False)))
        self._names = list(dict.fromkeys([*self._names, *found]))
        metrics = {**dict.fromkeys(self._names), **found, "skipped_steps": self._gradients.skipped_steps}
        largest_loss, *clipped = values[len(parts) :]
        # All gradients have been clipped by one factor.
        unclipped = max(1.0, (grad_norm + 1e-6) / self._max_norm)
        metrics |= {name: norm * unclipped for name, norm in zip(norms, clipped, strict=True)}
        if self._has_teacher or self._balance.counts_first:
            metrics |= {f"time_{name}": value for name, value in self._stopwatch.seconds().items()}
        return Figures(mean, largest_loss, tokens_seen, metrics)

    def _filled(self, value: float) -> Tensor:
        """A () float64 on the device, made there."""
        return torch.full((), value, dtype=torch.float64, device=self._device)

    def reduced(self, parts: dict[str, Tensor]) -> dict[str, float]:
        """Sums over data-parallel ranks, on all ranks of a pipeline. Collective: one all-reduce."""
        summed: dict[str, float] | None = None
        if self._runner.has_last:
            values = torch.stack([value.float() for value in parts.values()])
            if self._loss_mesh is not None:
                dist.all_reduce(values, group=self._loss_mesh.get_group())
            summed = dict(zip(parts, values.tolist(), strict=True))
        return self._runner.from_last(summed)

    def _norms_of_gradients(self) -> dict[str, Tensor]:
        """() norms of the gradients of the backbone and of the heads, if heads are trained. Collective."""
        if not self._has_losses:
            return {}
        return {f"grad_norm_{name}": self._norm(parameters) for name, parameters in self._backbone_and_heads().items()}

    def _backbone_and_heads(self) -> dict[str, list[nn.Parameter]]:
        model = self._runner.model
        heads = [p for name in model.heads for p in model.get_submodule(name).parameters()]
        owned = {id(p) for p in [*heads, *self._runner.copies()]}
        parameters = [p for part in self._runner.parts for p in part.parameters()]
        return {"backbone": [p for p in parameters if id(p) not in owned], "heads": heads}

    def _norm(self, parameters: list[nn.Parameter]) -> Tensor:
        """L2 norm of the gradients that there are. Collective."""
        by_mesh: dict[Any, list[Tensor]] = defaultdict(list)  # under expert parallelism experts have one of their own
        for p in parameters:
            if p.grad is not None:
                by_mesh[getattr(p.grad, "device_mesh", None)].append(p.grad)
        norms = [torch.nn.utils.get_total_norm(grads, foreach=True) for grads in by_mesh.values()]
        whole = [(norm.full_tensor() if isinstance(norm, DTensor) else norm).to(self._device) for norm in norms]
        norm = whole[0] if len(whole) == 1 else torch.nn.utils.get_total_norm(whole).to(self._device)
        return self._runner.norm_over_stages(norm)
