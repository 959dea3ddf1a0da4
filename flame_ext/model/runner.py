"""One interface to running the student, whether a rank holds the whole model or stages of a pipeline."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torchtitan.distributed import ParallelDims

from flame_ext.model.hf_causal_lm import HFCausalLM, LossOutput

StageInputs = Callable[[slice], dict[str, Any]]
"""Maps a slice of a batch's sequences to the arguments of the model's forward beside the tokens."""


class ModelRunner:
    """Runs the student. This class runs a model in one piece, or a shard of each of its parameters; ``Pipeline`` runs stages.

    ``parts`` are the model, or this rank's stages in order. The heads are on the last of all stages. All methods are
    collective where the model is.
    """

    has_last = True  # whether this rank has the end of the model, and so logits, heads and losses
    group: dist.ProcessGroup | None = None  # the ranks of this rank's pipeline

    def __init__(self, parts: list[HFCausalLM], parallel_dims: ParallelDims) -> None:
        self.parts, self.model, self.dims = parts, parts[-1], parallel_dims
        # DDP's backward waits for the gradient of every parameter.
        replicated = parallel_dims.dp_replicate_enabled and not parallel_dims.fsdp_enabled
        self.needs_all_gradients = replicated and not parallel_dims.pp_enabled

    def losses(self, inputs: Tensor, inputs_of: StageInputs) -> LossOutput:
        """Runs the student's forward on (B, T) tokens, in which ``compute`` returns a :class:`LossOutput`, and adds these up.

        All ranks of a pipeline get the loss, and those with the last stage its parts; its schedule has run the backward as well.
        """
        return self.model(inputs, **inputs_of(slice(None)))

    def backward(self, loss: Tensor) -> None:
        """Runs the backward of :meth:`losses`, unless a schedule has."""
        loss.backward()

    @torch.no_grad()  # not inference_mode: FSDP's unsharded parameters are used again by the student's forward
    def forward(self, inputs: Tensor, inputs_of: StageInputs) -> list[Any] | None:
        """Runs a forward without gradients, and returns its results for each part of the batch; None without the last stage."""
        return [self.model(inputs, **inputs_of(slice(None)))]

    def cuts(self, batch: int) -> bool:
        """Whether a batch of so many sequences goes through in several parts."""
        return False

    def from_last(self, value: Any) -> Any:
        """Returns the last stage's object or tensor on every rank; for a tensor, the other ranks give None."""
        return value

    def copies(self) -> list[nn.Parameter]:
        """Returns this rank's parameters that are counted on another rank."""
        return []

    def finish_gradients(self) -> None:
        """Sums what the backward has left apart; before gradients are clipped."""

    def norm_over_stages(self, norm: Tensor) -> Tensor:
        """Returns the norm of all stages' parameters from that of this rank's."""
        return norm

    def begin_microbatch(self, is_last: bool) -> None:
        """Says whether the next backward is the last one of the step."""
        # DDP: gradients add up over micro-batches; summed over ranks after each, the earlier ones would be summed again.
        if self.needs_all_gradients:
            self.model.set_requires_gradient_sync(is_last)


def sum_of_parts(outputs: Iterable[LossOutput]) -> dict[str, Tensor]:
    """Adds up the parts of the losses of several forwards."""
    parts = [output.parts for output in outputs]
    return {name: torch.stack([part[name] for part in parts]).sum(0) for name in (parts[0] if parts else ())}
