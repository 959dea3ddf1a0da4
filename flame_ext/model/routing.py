"""The routers of a mixture of experts: what they do in a forward, and the gradient of the loss that balances them.

A hook passes each router's weights through one operator that does not change them. Its forward tells :class:`Routes` which
experts the tokens go to; its backward adds the balancing loss's gradient to the router's logits. So the gradient needs no other
layer and no other stage of a pipeline, and compiled or recomputed layers contain nothing but an operator.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flame_ext.errors import ConfigError
from flame_ext.model.experts import experts_of, find_routers, in_order

if TYPE_CHECKING:
    from flame_ext.model.hf_causal_lm import HFCausalLM

CORRECTION_BIAS = "e_score_correction_bias"  # transformers' name of the buffer that changes the choice of experts alone


class RouteListener:
    """What the routers report to in the forwards that are given it."""

    _next = 0  # the number of the router that reports next

    @contextmanager
    def heard(self, first: int) -> Iterator[None]:
        """While this is entered, routers report here, in the order of the model from number ``first`` on."""
        global _listening
        _listening, self._next = self, first
        try:
            yield
        finally:
            _listening = None

    def add(self, logits: Tensor, experts: Tensor) -> Tensor:
        """(N, E) logits of the next router, and (N, k) numbers of the experts that it has chosen; returns those to go to."""
        raise NotImplementedError


class Routes(RouteListener):
    """What the routers have done in the forwards that were given this object: sums over their tokens.

    Args:
        layers: the number of routers of the whole model.
        experts: the number of experts of each.
        probabilities: whether to add up the routers' softmax as well, as the balancing loss needs it.
    """

    def __init__(self, layers: int, experts: int, device: torch.device, probabilities: bool = False) -> None:
        self.counts = torch.zeros(layers, experts, dtype=torch.int64, device=device)
        """Tokens by router and expert; a token counts once for each of its experts."""
        self.probabilities = torch.zeros(experts, dtype=torch.float32, device=device) if probabilities else None
        """(E,) float32: the sum over tokens and routers."""
        self.chosen = 1
        """Experts that a token goes to."""

    def add(self, logits: Tensor, experts: Tensor) -> Tensor:
        chosen, self.chosen = experts.flatten(), experts.shape[-1]
        self.counts[self._next].scatter_add_(0, chosen, torch.ones_like(chosen))
        self._next += 1
        if self.probabilities is not None:
            self.probabilities += logits.float().softmax(dim=-1).sum(dim=0)
        return experts


class KeptRoutes(RouteListener):
    """Sends the tokens of each forward to the experts that the first one's went to.

    How an expert's kernel rounds depends on how many tokens it gets. With kept routes a token changes the others' results no
    more than in a dense model: two forwards can be compared to the last bit.
    """

    def __init__(self) -> None:
        self._kept: dict[int, Tensor] = {}

    def add(self, logits: Tensor, experts: Tensor) -> Tensor:
        number, self._next = self._next, self._next + 1
        return self._kept.setdefault(number, experts.clone())


# The operators see tensors only, and the backward runs on another thread. A process trains one model.
_listening: RouteListener | None = None
_pull: Tensor | None = None


def set_pull(pull: Tensor | None) -> None:
    """Sets the derivative (E,) of the step's loss by the routers' probabilities of each token, for backwards from now on."""
    global _pull
    _pull = pull


@torch.library.custom_op("flame_ext::routed", mutates_args=())
def routed(weights: Tensor, logits: Tensor, experts: Tensor) -> tuple[Tensor, Tensor]:
    """Returns copies of the (N, k) ``weights`` and ``experts`` that were chosen. Not heard when layers are computed again."""
    if _listening is not None:
        experts = _listening.add(logits, experts)
    return weights.clone(), experts.clone()


@torch.library.custom_op("flame_ext::routed_backward", mutates_args=())
def routed_backward(gradient: Tensor, logits: Tensor) -> Tensor:
    """Returns the balancing loss's gradient on (N, E) logits. ``gradient`` is not read; it keeps compiled code from running this
    in the forward, when the whole step's routes may not be known yet."""
    if _pull is None:
        return torch.zeros_like(logits)
    probabilities = logits.float().softmax(dim=-1)
    return (probabilities * (_pull - (probabilities @ _pull)[:, None])).to(logits.dtype)


@routed.register_fake
def _(weights: Tensor, logits: Tensor, experts: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(weights), torch.empty_like(experts)


@routed_backward.register_fake
def _(gradient: Tensor, logits: Tensor) -> Tensor:
    return torch.empty_like(logits)


def _save(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(inputs[1])
    ctx.mark_non_differentiable(output[1])


def _backward(ctx: Any, gradient: Tensor, _of_experts: None) -> tuple[Tensor, Tensor | None, None]:
    (logits,) = ctx.saved_tensors
    return gradient, routed_backward(gradient, logits) if ctx.needs_input_grad[1] else None, None


routed.register_autograd(_backward, setup_context=_save)


@dataclass(frozen=True)
class Routing:
    """The routers of a whole model, in the order of its layers."""

    routers: tuple[str, ...] = ()  # their names; none in a dense model
    experts: int = 0  # that each chooses from
    coefficient: float = 0.0  # of the balancing loss
    problem: str = ""  # why they are not observed

    @property
    def of_mixture(self) -> bool:
        """Whether the model is a mixture, observed or not."""
        return bool(self.routers or self.problem)

    def parameters(self, model: nn.Module) -> list[str]:
        """Returns the names of the routers' parameters in the whole ``model``."""
        return [f"{name}.{key}" for name in self.routers for key, _ in model.get_submodule(name).named_parameters()]


def prepare_routers(model: HFCausalLM, coefficient: float | None, freeze: bool) -> Routing:
    """Hooks the routers of a whole model on meta, in place, and returns what is known of them.

    Args:
        coefficient: of the balancing loss; None = ``router_aux_loss_coef`` of the configuration.
        freeze: whether their parameters get no gradients.

    Raises a ConfigError if the loss is asked for and cannot be what the architecture defines, or if tokens go to more experts
    than there are.
    """
    routers, problem = find_routers(model)
    for config in (model.config, model.config.get_text_config()):
        if hasattr(config, "output_router_logits"):
            # Its forward would compute the loss as well, and of other masks than it knows.
            config.output_router_logits = False
    if not routers:
        if coefficient or freeze:
            option = "moe.freeze_router" if freeze else "moe.aux_loss_coef"
            reason = problem or "it is no mixture of experts"
            raise ConfigError(f"{option} with {model.architecture}: {reason}; leave it out")
        return Routing(problem=problem)
    for number, (name, router) in enumerate(routers.items()):
        if (chosen := chosen_by(router, model)) is not None and not 0 < chosen <= experts_of(router):
            raise ConfigError(
                f"model.hf_assets_path {model.model_args.hf_assets_path!r}: config.json lets {name} send a token to {chosen} of "
                f"{experts_of(router)} experts; correct num_experts_per_tok, or copy config.json again"
            )
        router.router_number = number  # type: ignore[assignment]
        if freeze:
            router.requires_grad_(False)
    function = balancing_function(model)
    defined = function is not None and not any(hasattr(router, CORRECTION_BIAS) for router in routers.values())
    if defined and coefficient is None:
        coefficient = float(getattr(model.config.get_text_config(), "router_aux_loss_coef", None) or 0.0)
    if coefficient:
        reason = problem
        if not defined:
            reason = "its architecture defines no auxiliary loss of its routers"
        elif function is not None and not problem and not _is_known(function):
            reason = (
                "its load_balancing_loss_func is not the product of shares and mean probabilities that is known here"
            )
        if reason:
            raise ConfigError(f"moe.aux_loss_coef = {coefficient} with {model.architecture}: {reason}; set it to 0")
    if not problem:
        for router in routers.values():
            router.register_forward_hook(partial(_pass_on, balanced=bool(coefficient)))
    (experts, *_) = {experts_of(router) for router in routers.values()}
    return Routing(tuple(routers), experts, coefficient or 0.0, problem)


def first_router(model: nn.Module) -> int:
    """The number of the first router of a model, or of a stage of one."""
    numbers: Any = (module.router_number for module in model.modules() if hasattr(module, "router_number"))
    return next(numbers, 0)


def chosen_by(router: nn.Module, model: HFCausalLM) -> int | None:
    """The number of experts that a router sends a token to; None if it does not say."""
    return getattr(router, "top_k", getattr(model.config.get_text_config(), "num_experts_per_tok", None))


def balancing_function(model: nn.Module) -> Callable[..., Any] | None:
    """Returns ``load_balancing_loss_func`` of the architecture's modelling file; None if it defines none."""
    for cls in type(model).__mro__:
        if (function := getattr(sys.modules.get(cls.__module__), "load_balancing_loss_func", None)) is not None:
            return function
    return None


def pull_of(counts: Tensor, chosen: int) -> Tensor:
    """The derivative (E,) of the balancing loss by the probabilities of each token.

    The loss is E times the sum over the E experts of the share of tokens that choose the expert and its mean probability; both
    are over the same tokens and routers. ``counts`` (…, E) has the tokens, each of which chooses ``chosen`` experts.
    """
    total = counts.double().flatten(0, -2).sum(0)
    rows = total.sum() / chosen
    return (len(total) * total / rows / rows).float()


def _pass_on(_router: nn.Module, _args: Any, output: tuple[Tensor, ...], *, balanced: bool) -> Any:
    logits, weights, experts = in_order(output)
    passed = (logits, *routed(weights, logits if balanced else logits.detach(), experts))
    return passed if output[0] is logits else passed[::-1]


def _is_known(function: Callable[..., Any]) -> bool:
    """Whether an architecture's balancing loss is the one of :func:`pull_of`."""
    with torch.device("cpu"):  # models are built on meta
        generator = torch.Generator().manual_seed(0)
        probabilities = torch.randn(2, 12, 4, dtype=torch.float32, generator=generator).softmax(dim=-1)
        counts = F.one_hot(probabilities.topk(2).indices, 4).sum((1, 2))
        try:
            expected = torch.as_tensor(function(tuple(probabilities.log()), 4, 2))
        except Exception:  # such as other arguments
            return False
        return torch.allclose(expected, pull_of(counts, 2) @ probabilities.sum((0, 1)), rtol=1e-4)


def resting_parameters(model: HFCausalLM) -> int:
    """The parameters of a mixture, on meta, that do not multiply a token: those of the experts that it does not go to."""
    resting = 0
    for name in model.routing.routers:
        router, block = model.get_submodule(name), model.get_submodule(name.rpartition(".")[0])
        sizes = [
            p.numel()
            for module in block.modules()
            if any(p.ndim == 3 and len(p) == model.routing.experts for p in module.parameters(recurse=False))
            for p in module.parameters(recurse=False)
        ]
        experts = model.routing.experts
        resting += sum(sizes) // experts * (experts - (chosen_by(router, model) or experts))
    return resting
