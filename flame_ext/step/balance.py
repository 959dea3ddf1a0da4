"""The load of a mixture's experts in a step: the loss that balances it, the correction of routers without one, and its figures.

The loss is a product of two means over the tokens of the whole step, of which the first, each expert's share of them, has no
gradient. So the shares are counted over all ranks, micro-batches and layers before the first backward; the rest adds up.
"""

import math
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor
from torchtitan.distributed import ParallelDims
from torchtitan.tools.logging import logger

from flame_ext.config.sections import FlameJobConfig
from flame_ext.model.routing import CORRECTION_BIAS, Routes, pull_of, set_pull
from flame_ext.model.runner import ModelRunner
from flame_ext.seeding.sources.safe_files import some
from flame_ext.step.plan import MicroBatch, StepPlan


class Balance:
    """Follows the routers through the steps of a run. It does nothing in a dense model."""

    # Of the step: (layers, E) tokens by router and expert, of all ranks and of this one; the derivative (E,) of the loss by each
    # token's probabilities; and the loss, as far as it comes from this rank's forwards.
    _counts: Tensor | None = None
    _local: Tensor | None = None
    _pull: Tensor | None = None
    _share: Tensor

    def __init__(
        self, runner: ModelRunner, config: FlameJobConfig, parallel_dims: ParallelDims, device: torch.device
    ) -> None:
        model, self._runner, self._device = runner.model.whole, runner, device
        self._routing, self._over = model.routing, config.moe.balance_over
        self.observed = bool(self._routing.routers) and not self._routing.problem
        trained = any(p.requires_grad for p in model.base_model.parameters())
        self._coefficient = self._routing.coefficient if trained else 0.0
        self._rate = config.moe.bias_update_rate
        mesh = parallel_dims.get_optional_mesh("loss")
        self._ranks = 1 if mesh is None else mesh.size()
        self._groups = [group for group in (mesh and mesh.get_group(), runner.group) if group is not None]
        self._microbatches = 1
        if self._routing.of_mixture:
            logger.info(self._description(model.architecture))
        if config.moe.freeze_router:
            frozen = model.routing.parameters(model)
            logger.info(f"moe.freeze_router: {len(frozen)} parameters stay as they are: {some(frozen)}")

    def begin(self, plan: StepPlan, count: Callable[[MicroBatch, Routes], None]) -> None:
        """Begin a step; ``count`` runs a forward without gradients, where the routes of all micro-batches have to be known
        before the backward of the first. Collective.
        """
        self._microbatches = len(plan.microbatches)
        self._counts = self._local = self._pull = None
        if self._coefficient:
            self._share = torch.zeros((), dtype=torch.float32, device=self._device)
        if self.counts_first:
            routes = self._routes()
            for microbatch in plan.microbatches:
                count(microbatch, routes)
            self._counts = self._over_all(routes.counts)
            self._pull = self._pull_by(self._counts, routes.chosen)

    @property
    def counts_first(self) -> bool:
        """Whether the step has a forward that only counts: its backwards begin before its last forward."""
        return (
            self._coefficient > 0
            and self._over == "step"
            and (self._microbatches > 1 or self._runner.group is not None)
        )

    def routes(self) -> Routes | None:
        """What the student's forward of the next micro-batch is given."""
        return self._routes(self._coefficient > 0) if self.observed else None

    def add(self, routes: Routes | None) -> None:
        """Take in what a forward has left in ``routes``, before the backward, or after a pipeline's. Collective."""
        if routes is None:
            return
        if not self.counts_first:
            self._local = routes.counts if self._local is None else self._local + routes.counts
        if routes.probabilities is not None:
            if not self.counts_first:
                self._pull = self._pull_by(self._over_all(routes.counts), routes.chosen)
            assert self._pull is not None
            self._share = self._share + self._pull @ routes.probabilities

    def end(self, updated: bool) -> None:
        """After the optimizer's step: move the biases by which routers without a loss choose. Collective.

        Each goes up or down by ``moe.bias_update_rate``, as its expert has had fewer or more tokens than the mean of its layer.
        """
        set_pull(None)
        if not (self._rate and updated):
            return
        counts = self.counts().double()
        steps = self._rate * torch.sign(counts.mean(dim=1, keepdim=True) - counts)
        for part in self._runner.parts:
            for module in part.modules():
                if (bias := module._buffers.get(CORRECTION_BIAS)) is not None:
                    bias.add_(steps[module.router_number].to(bias))  # type: ignore[index]

    def counts(self) -> Tensor:
        """The (layers, E) tokens of the step by router and expert, over all ranks and micro-batches. Collective."""
        if self._counts is None:
            assert self._local is not None
            self._counts = self._over_all(self._local)
        return self._counts

    def weighted(self) -> list[Tensor]:
        """This rank's share of the balancing loss times its coefficient, a summand of the loss; empty without such a loss.

        Collective for a pipeline.
        """
        return [self._coefficient * self._share_of_pipeline()] if self._coefficient else []

    def parts(self) -> dict[str, Tensor]:
        """The figures of the step, as values that are summed over ranks. Collective."""
        if not self.observed:
            return {}
        found = {"loss_router": self._share_of_pipeline()} if self._coefficient else {}
        return found | {name: value / self._ranks for name, value in load_figures(self.counts()).items()}

    def _routes(self, probabilities: bool = False) -> Routes:
        return Routes(len(self._routing.routers), self._routing.experts, self._device, probabilities)

    def _pull_by(self, counts: Tensor, chosen: int) -> Tensor:
        """The derivative of the balancing loss by each token's probabilities, which the backwards that follow use."""
        pull = pull_of(counts, chosen)
        if self._over == "micro_batch":
            pull = pull / self._microbatches
        set_pull(self._coefficient * pull)
        return pull

    def _over_all(self, counts: Tensor) -> Tensor:
        counts = counts.clone()
        for group in self._groups:
            dist.all_reduce(counts, group=group)
        return counts

    def _share_of_pipeline(self) -> Tensor:
        share = self._share.clone()
        if self._runner.group is not None:
            dist.all_reduce(share, group=self._runner.group)
        return share

    def _description(self, architecture: str) -> str:
        how = self._runner.parts[0].config.get_text_config()._experts_implementation
        routers = f"{len(self._routing.routers)} routers, each to {self._routing.experts} experts, run by {how!r}"
        if not self._routing.routers:
            routers = f"{architecture} is a mixture of experts, run by {how!r}"
        if self._routing.problem:
            return f"{routers}: their load is not reported, {self._routing.problem}"
        loss = "no auxiliary loss"
        if self._coefficient:
            loss = (
                f"{self._coefficient:g} times the auxiliary loss of {architecture}, over the tokens of a {self._over}"
            )
        return f"{routers}; {loss}" + (f"; their biases move by {self._rate:g} a step" if self._rate else "")


def load_figures(counts: Tensor) -> dict[str, Tensor]:
    """Figures of (layers, E) tokens by router and expert, each () float32.

    ``router_entropy``: of the shares of a layer's experts, over its maximum log E; mean of the layers. ``router_largest_share``:
    of a layer's tokens at one expert, the largest of all. ``router_unused``: share of all experts without a token.
    """
    shares = counts.double() / counts.sum(dim=1, keepdim=True)
    entropy = (
        torch.special.entr(shares).sum(dim=1).mean() / math.log(counts.shape[1])
        if counts.shape[1] > 1
        else shares.sum() * 0
    )
    figures = {"router_entropy": entropy, "router_largest_share": shares.max()}
    figures["router_unused"] = (counts == 0).double().mean()
    return {name: value.float() for name, value in figures.items()}
