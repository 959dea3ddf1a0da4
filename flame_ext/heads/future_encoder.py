"""``[future_encoder]``: the summary F_t of what follows position t, which is the target of the prediction."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import BlockMask
from transformers import PreTrainedConfig

from flame_ext.config.head_options import at_least
from flame_ext.config.sections import FlameJobConfig
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
from flame_ext.objective.windows import reduce_following

# All but cuDNN, see choose_kernels; of these, flash takes masks on CPUs only.
_KERNELS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH, SDPBackend.OVERRIDEABLE]


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
    The model of summary_method = 'reverse_lm': a Hugging Face folder, such as an export of a run with `data.reverse`, or
    'hf://org/name'. It has the model's tokenizer and hidden size, is read under the options of `[seed]` for files, and is in no
    checkpoint or export: a resumed run needs it again, with the same weights.
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


class PooledEncoder(Head):
    """Future summaries by pooling the causal hidden states of the positions that follow.

    Cheap, since there is no second forward. But the state at t + 1 has read everything up to t + 1: these summaries
    carry the past, and part of the prediction is a copy. The window is ``future_k`` positions, 0 = to the end of the document.
    The query of "attention" is that of the window's first position, so that F_t depends on positions after t alone; that of
    "query" is of position t: what the prefix asks of its future.
    """

    def __init__(
        self, method: Literal["mean", "max", "attention", "query"], future_k: int, hidden_size: int, num_heads: int
    ) -> None:
        super().__init__()
        if method not in ("mean", "max", "attention", "query"):
            raise ValueError(f"method must be one of 'mean', 'max', 'attention', 'query', got {method!r}")
        self.method, self.future_k, self.num_heads = method, future_k, num_heads
        if method in ("attention", "query"):
            self.q_proj = nn.Linear(hidden_size, hidden_size, bias=False)
            self.k_proj = nn.Linear(hidden_size, hidden_size, bias=False)
            self.v_proj = nn.Linear(hidden_size, hidden_size, bias=False)

    def forward(self, hidden_states: Tensor, doc_ids: Tensor, parts: SequenceParts = WHOLE) -> FutureSummaries:
        """(B, n, D) causal hidden states of this rank's positions, and (B, T) document numbers, to summaries in float32 (by attention:
        as they came).
        """
        valid_mask = parts.shard(has_future(doc_ids))
        if self.method in ("attention", "query"):
            states = self._attend(hidden_states, doc_ids, valid_mask, parts)
        elif self.method == "max":
            states = self._reduce(hidden_states.float(), doc_ids, parts, torch.maximum, float("-inf"))
        else:
            states = self._reduce(hidden_states.float(), doc_ids, parts, torch.add, 0.0)
            ones = torch.ones_like(doc_ids, dtype=states.dtype)[..., None]
            count = parts.shard(reduce_following(ones, doc_ids, self.future_k, torch.add, 0.0))
            states = states / count.clamp_min(1.0)
        return FutureSummaries(torch.where(valid_mask[..., None], states, 0.0), valid_mask)

    def _reduce(
        self, states: Tensor, doc_ids: Tensor, parts: SequenceParts, combine: Callable[..., Tensor], empty: float
    ) -> Tensor:
        if not parts.is_split:
            return reduce_following(states, doc_ids, self.future_k, combine, empty)
        batch_size, seq_len = doc_ids.shape
        length = states.shape[1] // parts.chunks
        if 0 < self.future_k < seq_len - 1:  # what a window reads behind a chunk comes from other ranks
            values = parts.following(states, self.future_k).flatten(0, 1)
            documents = parts.shard_ahead(doc_ids, self.future_k, -1).flatten(0, 1)
            found = reduce_following(values, documents, self.future_k, combine, empty)[:, :length]
            return found.unflatten(0, (batch_size, -1)).flatten(1, 2)
        # To the end of the document: of each later chunk, one vector is enough, of the document that it begins with.
        values, documents = states.unflatten(1, (parts.chunks, -1)), parts.shard_ahead(doc_ids, 0, -1)
        inside = reduce_following(values.flatten(0, 1), documents.flatten(0, 1), 0, combine, empty).view_as(values)
        beginnings = parts.joined(combine(values[:, :, 0], inside[:, :, 0]))
        firsts = parts.order(seq_len, doc_ids.device).view(-1, length)[:, 0]
        own, last = parts.positions(seq_len, doc_ids.device).view(-1, length)[:, 0], documents[:, :, -1]
        reached = (firsts > own[:, None]) & (doc_ids[:, None, firsts] == last[..., None])  # (B, chunks, chunks of all)
        later = torch.full_like(values[:, :, 0], empty)
        for number in range(len(firsts)):
            later = combine(later, torch.where(reached[..., number, None], beginnings[:, None, number], empty))
        continued = torch.where((documents == last[..., None])[..., None], later[:, :, None], empty)
        return combine(inside, continued).flatten(1, 2)

    def _attend(self, hidden_states: Tensor, doc_ids: Tensor, valid_mask: Tensor, parts: SequenceParts) -> Tensor:
        # Row t attends to t + 1 .. t + future_k; where nothing follows, to itself, since no row may be empty.
        seq_len, device = doc_ids.shape[1], doc_ids.device
        rows, columns = parts.positions(seq_len, device), parts.order(seq_len, device)
        ahead = columns[None, :] - rows[:, None]
        allowed = (ahead > 0) if self.future_k == 0 else (ahead > 0) & (ahead <= self.future_k)
        mask = allowed & (doc_ids[:, rows, None] == doc_ids[:, None, columns]) | ((ahead == 0) & ~valid_mask[..., None])

        def split(states: Tensor) -> Tensor:
            return states.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)

        asking = hidden_states
        if self.method == "attention":
            asking = parts.following(hidden_states, 1)[:, :, 1:].flatten(1, 2)
        keys_and_values = torch.cat([self.k_proj(hidden_states), self.v_proj(hidden_states)], dim=-1)
        key, value = map(split, parts.joined(keys_and_values).chunk(2, dim=-1))
        with sdpa_kernel(_KERNELS):
            states = F.scaled_dot_product_attention(split(self.q_proj(asking)), key, value, attn_mask=mask[:, None])
        return states.transpose(1, 2).flatten(2)


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
