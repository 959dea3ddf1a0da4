"""``[future_encoder]``: the summary F_t of what follows position t, which is the target of the prediction."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask
from transformers import PreTrainedConfig

from flame_ext.config.head_options import at_least
from flame_ext.config.sections import FlameJobConfig
from flame_ext.heads.pooled_encoder import PooledEncoder
from flame_ext.heads.reverse_lm import ReverseEncoder
from flame_ext.heads.spec import LOSS_WEIGHT, BackboneTeacher, FutureSummaries, Head, HeadSection, HeadSpec
from flame_ext.model.attention import MaskForm, attention_windows, flex_problem, mask_problem
from flame_ext.model.context_parallel import WHOLE, SequenceParts
from flame_ext.objective.masks import (
    anticausal_block_mask,
    anticausal_mask,
    anticausal_window_mask,
    has_future,
    window_is_short,
)

SummaryMethod = Literal["anticausal", "reverse_lm", "mean", "max", "attention", "query"]
WITH_A_FORWARD = ("anticausal", "reverse_lm")  # the methods whose summaries are made by a forward without gradients


@dataclass
class FutureEncoderSection(HeadSection):
    """What summarises the future: the target F_t (batch, sequence, hidden size) of the prediction."""

    enable: bool = False
    """Whether there is a future objective. Needs the model converter 'future_prediction'."""

    summary_method: SummaryMethod = "anticausal"
    """
    'anticausal': the last hidden states of a second, gradient-free forward of the backbone in which position t attends
    to positions after t only. 'reverse_lm': the states of another, frozen model that has read the text after t from right to left.
    'mean', 'max', 'attention', 'query': the causal hidden states of the positions after t, pooled; no second forward, but these
    states have read the past. The query of 'query' is that of t itself.
    """

    reverse_model: str = ""
    """
    The model of summary_method = 'reverse_lm': a Hugging Face folder, such as an export of a run with `data.reverse`,
    'hf://org/name', or the URL of one in an object store. It has the model's tokenizer and hidden size, is read under the options of
    `[seed]` for files, and is in no checkpoint or export: a resumed run needs it again, with the same weights.
    """

    assume_reverse: bool = False
    """Take `reverse_model` for one that reads from right to left though its `config.json` does not say so."""

    future_k: int = 0
    """How many following positions a summary may attend to; 0 = all the future."""

    shift_k: int = 1
    """
    The prediction at t is compared with F_{t+shift}; above 1, the shift is sampled from 1..shift_k for each step, the
    same on all ranks.
    """

    respect_doc_boundaries: bool = True
    """Whether summaries stop at the end of their document (the tokenizer's EOS)."""

    temperature: float = 0.1
    """Temperature of the contrastive loss: cosines are divided by it."""

    loss_weight: float = 0.1
    """Weight of the contrastive loss beside the cross-entropy. At 0 it is not computed."""

    loss_weight_warmup_steps: int = 0
    """Steps over which `loss_weight` rises linearly from 0."""

    loss_weight_decay_steps: int = 0
    """Steps at the end of the run over which `loss_weight` falls linearly to 0."""

    negatives: Literal["global", "local"] = "global"
    """
    'global': the summaries of all data-parallel ranks and, with the anticausal encoder, of all micro-batches of the step
    are the negatives: the loss depends on the global batch alone, however it is spread over ranks and accumulation.
    'local': only those of this rank's micro-batch; they travel between the ranks that share its sequences alone (context
    parallelism).
    """

    detach_targets: bool = True
    """
    Whether pooled summaries are constants to the loss. If not, the gradient also goes through them into the backbone, and
    into the projections of 'attention', which otherwise stay as they were initialised. Anticausal ones always are.
    """

    teacher_fraction: float = 1.0
    """
    Share of each micro-batch's sequences, drawn anew each time, that the anticausal teacher runs on and the future is
    predicted in. Unbiased; `training.local_batch_size` times this has to be an integer.
    """

    teacher_interval: int = 1
    """Run the anticausal teacher on every n-th step only, with n times the weights. Unbiased."""

    teacher_attention: Literal["auto", "sdpa", "flex"] = "auto"
    """
    Attention of the anticausal forward: 'flex' (FlexAttention with a BlockMask), 'sdpa' (a boolean mask of all pairs of
    positions), 'auto': flex on CUDA where the backbone supports it and its heads have 16 elements or more, else sdpa, block by
    block where the window is short.
    """


class AnticausalEncoder(BackboneTeacher):
    """Future summaries by an anti-causal, gradient-free forward of the backbone itself.

    The backbone runs a second time with a mask that lets position t attend to later positions only; its last hidden
    states are the summaries. Token t itself enters F_t through its own residual stream, which is why predictions are
    compared with F_{t+shift}, shift >= 1. A layer attends to ``future_k`` following positions, 0 = all, and at most to as many
    as its own causal window has behind it (``windows``, of :func:`flame_ext.model.attention.attention_windows`).
    """

    remedy = "future_encoder.summary_method = 'anticausal' cannot be right for this backbone; take 'mean', 'max' or 'attention'"

    def __init__(self, future_k: int = 0, windows: Mapping[str, int] | None = None) -> None:
        super().__init__()
        self.future_k = future_k
        self.windows = dict(windows or {"full_attention": 0})

    def attention_mask(
        self, input_ids: Tensor, doc_ids: Tensor | None, form: MaskForm, parts: SequenceParts = WHOLE
    ) -> Any:
        """The mask (:mod:`flame_ext.objective.masks`), or one for each layer type if the backbone has several."""
        masks = {kind: self._mask(input_ids, doc_ids, window, form, parts) for kind, window in self.windows.items()}
        return masks if len(masks) > 1 else next(iter(masks.values()))

    def summaries(
        self, states: Tensor, input_ids: Tensor, doc_ids: Tensor | None, parts: SequenceParts = WHOLE
    ) -> FutureSummaries:
        valid_mask = has_future(torch.zeros_like(input_ids) if doc_ids is None else doc_ids)
        return FutureSummaries(states, parts.shard(valid_mask))

    def _mask(
        self, input_ids: Tensor, doc_ids: Tensor | None, window: int, form: MaskForm, parts: SequenceParts
    ) -> Tensor | BlockMask:
        # A causal window of w is w - 1 positions beside the own one, which an anti-causal layer does not attend to.
        reach = min((k for k in (self.future_k, max(1, window - 1) if window else 0) if k), default=0)
        seq_len, device = input_ids.shape[1], input_ids.device
        if form == "windows" and window_is_short(seq_len, reach) and not parts.is_split:
            return anticausal_window_mask(seq_len, reach, doc_ids, device)
        rows = parts.positions(seq_len, device), parts.order(seq_len, device)
        make = anticausal_block_mask if form == "flex" else anticausal_mask
        return make(seq_len, reach, doc_ids, device, *(rows if parts.is_split else ()))


def build_future_encoder(
    summary_method: SummaryMethod,
    future_k: int,
    hidden_size: int,
    num_heads: int,
    windows: Mapping[str, int] | None = None,
) -> Head:
    """Builds the encoder of ``[future_encoder]``; the sizes are the backbone's.

    "attention" and "query" have the backbone's number of heads, or one if that does not divide D.
    """
    if summary_method == "anticausal":
        return AnticausalEncoder(future_k, windows)
    if summary_method == "reverse_lm":
        return ReverseEncoder(future_k)
    return PooledEncoder(summary_method, future_k, hidden_size, 1 if hidden_size % num_heads else num_heads)


# -- the head ----------------------------------------------------------------------------------------------------


def _arguments(section: FutureEncoderSection, backbone: Any) -> dict[str, Any]:
    text = backbone.config.get_text_config()
    return {
        "summary_method": section.summary_method,
        "future_k": section.future_k,
        "hidden_size": text.hidden_size,
        "num_heads": text.num_attention_heads,
        "windows": attention_windows(text) if section.summary_method == "anticausal" else None,
    }


def scheduled_weight(weight: float, step: int, total_steps: int, warmup_steps: int, decay_steps: int) -> float:
    """Rises linearly to ``weight`` over the first ``warmup_steps`` and falls linearly to 0 over the last ``decay_steps``.

    ``step`` counts from 1: the weight is full at ``warmup_steps`` and zero at ``total_steps``. 0 steps = no rise or fall.
    """
    rise = step / warmup_steps if warmup_steps else 1.0
    fall = (total_steps - step) / decay_steps if decay_steps else 1.0
    return weight * max(0.0, min(1.0, rise, fall))


def weight_in_step(config: FlameJobConfig, section: Any, step: int | None) -> float:
    """The weight in a step, counted from 1, of a loss on summaries: ``section.loss_weight``, scheduled, times
    :func:`interval_factor`. For step None it is ``section.loss_weight`` itself.
    """
    if step is None:
        return section.loss_weight
    warmup, decay = section.loss_weight_warmup_steps, section.loss_weight_decay_steps
    weight = scheduled_weight(section.loss_weight, step, config.training.steps, warmup, decay)
    return weight * interval_factor(config, step)


def interval_factor(config: FlameJobConfig, step: int | None) -> int:
    """``teacher_interval`` n on the steps on which the teacher runs, every n-th, and 0 on the others; 1 for step None."""
    interval = config.future_encoder.teacher_interval
    if step is None:
        return 1
    return interval if (step - 1) % interval == 0 else 0


def _check(config: FlameJobConfig) -> Iterator[str]:
    encoder = config.future_encoder
    if encoder.enable != config.future_predictor.enable:
        yield "future_encoder.enable and future_predictor.enable go together: one is the target, the other predicts it"
    if not 1 <= encoder.shift_k < config.training.seq_len:
        yield f"future_encoder.shift_k must be in 1..training.seq_len - 1 ({config.training.seq_len - 1}), got {encoder.shift_k}"
    if encoder.temperature <= 0:
        yield f"future_encoder.temperature must be > 0 (cosines are divided by it; 0.05-0.1 is usual), got {encoder.temperature}"
    yield from at_least(
        "future_encoder",
        encoder,
        LOSS_WEIGHT | {"future_k": (0, "0 = all the future"), "teacher_interval": (1, "1 = every step")},
    )
    yield from _check_teacher(config, encoder)
    yield from _check_reverse(config, encoder)


def _check_teacher(config: FlameJobConfig, encoder: FutureEncoderSection) -> Iterator[str]:
    batch, method = config.training.local_batch_size, encoder.summary_method
    sequences = encoder.teacher_fraction * batch
    whole = max(1, round(sequences))
    if not 0 < encoder.teacher_fraction <= 1:
        yield f"future_encoder.teacher_fraction must be in (0, 1], got {encoder.teacher_fraction}"
    elif abs(sequences - whole) > 1e-6:
        yield (
            f"future_encoder.teacher_fraction ({encoder.teacher_fraction}) times training.local_batch_size ({batch}) must be "
            f"a whole number of sequences; for {whole} of them, set it to {whole / batch:g}"
        )
    size = config.parallelism.pipeline_parallel_microbatch_size
    if method in WITH_A_FORWARD:
        if not encoder.detach_targets:
            yield f"future_encoder.detach_targets = false is for pooled summaries: the {method} forward has no gradient"
        return
    if encoder.teacher_interval > 1 or encoder.teacher_fraction != 1:
        yield (
            "future_encoder.teacher_interval and teacher_fraction save the second forward of summary_method = 'anticausal' and "
            f"'reverse_lm'; {method!r} has none"
        )
    pipelined = encoder.enable and config.parallelism.pipeline_parallel_degree > 1
    if pipelined and not encoder.detach_targets and batch != size:
        yield (
            f"future_encoder.detach_targets = false: the gradient of {method!r} summaries goes through the whole "
            f"local batch, which a pipeline cuts: set parallelism.pipeline_parallel_microbatch_size ({size}) to "
            f"training.local_batch_size ({batch}), with pipeline_parallel_schedule = 'GPipe', or detach_targets = true"
        )


def _check_reverse(config: FlameJobConfig, encoder: FutureEncoderSection) -> Iterator[str]:
    name = "future_encoder.reverse_model"
    if encoder.summary_method != "reverse_lm":
        if encoder.reverse_model or encoder.assume_reverse:
            option = name if encoder.reverse_model else "future_encoder.assume_reverse"
            yield f"{option} is for summary_method = 'reverse_lm', and it is {encoder.summary_method!r}: leave it out"
    elif encoder.enable and not encoder.reverse_model:
        yield f"{name} is not set: summary_method = 'reverse_lm' needs the folder of a model trained with data.reverse = true"
    elif encoder.enable and config.data.reverse:
        yield (
            "data.reverse with future_encoder.summary_method = 'reverse_lm': the teacher would read backwards what is backwards "
            "already; leave data.reverse to the run that trains reverse_model"
        )


def _check_model(config: FlameJobConfig, hf_config: PreTrainedConfig) -> Iterator[str]:
    encoder, model_type = config.future_encoder, hf_config.model_type
    if encoder.summary_method == "anticausal" and (reason := mask_problem(hf_config)) is not None:
        yield (
            f"future_encoder.summary_method = 'anticausal' cannot be right for {model_type!r}: {reason}; take "
            "'mean', 'max' or 'attention'"
        )
    device_type = "cuda" if torch.cuda.is_available() else "cpu"
    # Of a reverse model it is looked at where its configuration is.
    own = encoder.summary_method != "reverse_lm"
    if own and encoder.teacher_attention == "flex" and (reason := flex_problem(hf_config, device_type)) is not None:
        yield f"future_encoder.teacher_attention = 'flex': {reason}; take 'auto' or 'sdpa'"


def _record(config: FlameJobConfig, step_batch: int) -> dict[str, Any]:
    encoder = config.future_encoder
    local, action = encoder.negatives == "local", config.action_layer
    compared = config.future_predictor.loss == "info_nce" or (action.enable and action.model_loss_weight > 0)
    if encoder.summary_method in WITH_A_FORWARD and not (local and compared):
        return {}
    # These losses compare within a micro-batch, of one rank or of all: here its size is no matter of layout.
    return {"sequences_compared": config.training.local_batch_size if local else step_batch}


HEAD = HeadSpec(
    section=FutureEncoderSection,
    build=build_future_encoder,
    arguments=_arguments,
    trains=lambda config: config.future_encoder.loss_weight > 0 and not config.future_encoder.detach_targets,
    is_teacher=True,
    takes_parts=True,
    uses_logits=False,
    check=_check,
    check_model=_check_model,
    record=_record,
    card_options=("summary_method", "loss_weight"),
)
