"""What a head is: one :class:`HeadSpec` says how it is configured, built, trained, split over ranks and saved."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor.parallel import ParallelStyle
from transformers import PreTrainedConfig

from flame_ext.config.head_options import HeadOptimization
from flame_ext.config.sections import FlameJobConfig
from flame_ext.model.attention import MaskForm
from flame_ext.model.context_parallel import WHOLE, SequenceParts
from flame_ext.model.hf_causal_lm import Unembed
from flame_ext.model.initialisation import ParameterInit, linear_inits
from flame_ext.objective.cross_entropy import IGNORE_INDEX, TokenLogProbs
from flame_ext.objective.windows import upcoming_tokens


@dataclass
class HeadSection(HeadOptimization):
    """Base of a head's section in the TOML, ``[name]``."""

    enable: bool = False
    """Whether the head is attached. Needs the model converter 'future_prediction'."""


@dataclass
class WeightedHeadSection(HeadSection):
    """The section of a head whose one loss has a constant weight."""

    loss_weight: float = 0.1
    """Weight of the head's loss beside the cross-entropy. At 0 it is not computed."""


LOSS_WEIGHT = {
    "loss_weight": (0, "0 = not computed"),
    "loss_weight_warmup_steps": (0, "0 = none"),
    "loss_weight_decay_steps": (0, "0 = none"),
}
"""For :func:`flame_ext.config.head_options.at_least`: the weight of a loss, and its schedule."""


class Head(nn.Module):
    """Base of a head's module; one of another base has ``parameter_inits`` as well."""

    @property
    def layer_lists(self) -> Sequence[nn.ModuleList]:
        """Lists of decoder layers: each layer is checkpointed, compiled and sharded as one of the backbone's is."""
        return ()

    def parameter_inits(self) -> dict[str, ParameterInit]:
        """Name of each parameter to its initialisation: norms at identity, biases at zero, linear maps LeCun-uniform (gain 1)."""
        return linear_inits(self)


class FutureSummaries(NamedTuple):
    """The summaries of the future that a teacher computes from a batch."""

    states: Tensor  # (B, n, D) of this rank's n positions; finite everywhere
    valid_mask: Tensor
    """(B, n) bool: positions that have a future in their document. What ``states`` holds elsewhere means nothing."""


class BackboneTeacher(Head):
    """Base of a teacher that summarises by a second, gradient-free forward of the backbone under another mask; any other teacher
    is called with the student's (b, n, D) hidden states and (b, T) document numbers. n is T, unless context parallelism gives this rank a
    part of the positions: then there is one more argument ``parts``, which says what part.
    """

    remedy = ""  # What to do if a backbone does not obey the mask, for the message of the proof at step 0

    def attention_mask(
        self, input_ids: Tensor, doc_ids: Tensor | None, form: MaskForm, parts: SequenceParts = WHOLE
    ) -> Any:
        """The ``attention_mask`` of the second forward of (B, T) tokens, in a form that the backbone's attention understands;
        ``doc_ids`` is (B, T) if summaries stop at the end of their document, else None. Rows are the positions of this rank, and
        columns those of all ranks, in the order that ``parts`` gives.
        """
        raise NotImplementedError

    def summaries(
        self, states: Tensor, input_ids: Tensor, doc_ids: Tensor | None, parts: SequenceParts = WHOLE
    ) -> FutureSummaries:
        """The summaries from the (B, n, D) last hidden states of that forward."""
        raise NotImplementedError


class KeyBank(NamedTuple):
    """The summaries of the future that predictions are compared with."""

    keys: Tensor  # (M, D), of unit length
    pair_mask: Tensor  # (M,) bool: summaries that are the target of a prediction
    valid_mask: Tensor  # (M,) bool: positions that have a future, and so a summary that means something


class FutureBatch(NamedTuple):
    """The b sequences of a micro-batch whose future is predicted, and the summaries that predictions are compared with."""

    hidden_states: Tensor  # (b, n, D), after the final norm
    labels: Tensor  # (b, n)
    log_probs: TokenLogProbs  # (b * n, 1 + K): log-probabilities of the labels and of the K likeliest tokens
    pairs: Tensor  # (b, n) bool: positions t with a valid summary at t + shift, in their document
    bank: KeyBank
    first_key: int  # Row of the bank where the b * n summaries of these positions begin
    shift: int  # The prediction at t is compared with the summary at t + shift
    pairs_in_step: Tensor | float  # () number of pairs in the whole step, over all ranks and micro-batches
    positions_in_step: Tensor | float  # () number of positions with a future and a next token in the whole step
    targets: Tensor  # (b * n,) rows of the bank with the summaries at t + shift; 0 where there is no pair


class Sequences(NamedTuple):
    """The tokens of whole sequences, and which of their positions this rank has."""

    input_ids: Tensor  # (B, T)
    doc_ids: Tensor  # (B, T)
    parts: SequenceParts = WHOLE
    labels: Tensor | None = None  # (B, T): the next tokens, or -100 for those that are only read; None = none is


class HeadBatch(NamedTuple):
    """One micro-batch of this rank, as a head's loss sees it: n positions of each sequence, all T without context parallelism."""

    hidden_states: Tensor  # (B, n, D), after the final norm
    logits: Tensor  # (B, n, V), of the language model
    input_ids: Tensor  # (B, n)
    labels: Tensor  # (B, n): the next token, or -100 where there is none
    doc_ids: (
        Tensor  # (B, n): equal where tokens are of one document; all 0 where neither dataloader nor EOS tokens tell
    )
    tokens_in_step: Tensor  # () number of labelled tokens in the whole step, over all ranks and micro-batches
    config: Any = None  # The job's configuration, with the section of every head
    embed: Callable[[Tensor], Tensor] | None = None
    """The backbone's input embedding, token ids (…) to vectors (…, D); None unless the spec ``uses_embedding``."""
    unembed: Unembed | None = None
    """
    States of the head's own, as after a final norm, (B, n, D), to logits (B, n, V), a DTensor under loss parallelism; None unless
    the spec ``uses_unembedding``.
    """
    future: FutureBatch | None = None  # None on a step without a teacher, on which heads that ``needs_future`` rest
    compile_backend: str | None = None  # The backend of ``torch.compile`` for a loss's arithmetic; None = not compiled
    whole: Sequences | None = None  # None: they are those above

    @property
    def sequences(self) -> Sequences:
        """The whole sequences of which these are the positions."""
        return self.whole or Sequences(self.input_ids, self.doc_ids, labels=self.labels)

    def upcoming(self, window: int) -> Tensor:
        """The (B, n, window) tokens at t + 1 .. t + window, wherever they are, that are to be predicted.

        -1 where the document of t has ended, for tokens that are only read, and everywhere where t itself has no label.
        """
        tokens, documents, parts, labels = self.sequences
        if labels is not None:  # the token at t is the label of t - 1
            learned = F.pad(labels[:, :-1] != IGNORE_INDEX, (1, 0), value=True)
            tokens = torch.where(learned, tokens, -1)
        found = upcoming_tokens(tokens, documents, window, parts.positions(tokens.shape[1], tokens.device))
        return found.masked_fill((self.labels == IGNORE_INDEX)[..., None], -1)


@dataclass(frozen=True)
class HeadSpec:
    """How a head is configured, built and trained; :func:`flame_ext.heads.registry.register_head` makes it known.

    The first three fields are enough for a head that is a module with one loss.
    """

    build: Callable[..., nn.Module]
    """
    The head (a :class:`Head`) from its arguments. Called when training, with parameters on meta and buffers on the CPU, and when
    an export is loaded.
    """

    arguments: Callable[[Any, Any], dict[str, Any]]
    """
    The head's section and the backbone, a transformers model on meta, to the arguments of ``build``, as plain data: an
    export keeps them as JSON. ``backbone.config.get_text_config()`` has the sizes.
    """

    loss: Callable[[Any, HeadBatch], Tensor | dict[str, Tensor]] | None = None
    """
    The head and a micro-batch to the head's loss. Either a scalar: a sum over this micro-batch, which is divided by the
    number of labelled tokens of the whole step and reported as ``loss_NAME``. Or scalars by name, each already divided by
    its number in the whole step, such as ``batch.tokens_in_step`` or ``batch.future.pairs_in_step``: those named by
    ``weights`` are the losses, the others are only reported.

    The head has to be called, ``head(…)``, not just its parts: FSDP gathers its parameters for the call. All its trained
    parameters have to take part in every call: DDP waits for their gradients. None: the head has no loss.
    """

    section: type[HeadSection] = WeightedHeadSection
    """The dataclass of the head's section; the string under each field is its ``--help``."""

    weights: Callable[[FlameJobConfig, int | None], dict[str, float]] | None = None
    """
    The job and a step, counted from 1, to the weight of each loss, by its name. Step None asks for the weights without any
    schedule: if all are 0 the loss is never computed. None: ``loss_NAME`` has the section's ``loss_weight``.
    """

    trains: Callable[[FlameJobConfig], bool] | None = None
    """Whether the head's parameters get gradients; None: if a weight of its losses is above 0."""

    needs_future: bool = False
    """Whether the loss needs summaries of the future. It then rests on steps without a teacher."""

    is_teacher: bool = False
    """
    Whether the head makes the summaries of the future (:mod:`flame_ext.step.teacher`). One enabled head can. Its section
    extends that of ``future_encoder``; its module is a :class:`BackboneTeacher`, or its ``forward`` returns
    :class:`FutureSummaries`.
    """

    candidates: Callable[[Any], int] | None = None
    """The head's section to the number K of likeliest next tokens whose log-probabilities the loss needs."""

    uses_embedding: bool = False
    """
    Whether the loss looks tokens up in the input embedding, which a pipeline's last stage then holds as well, and which FSDP
    keeps gathered for a step.
    """

    uses_unembedding: bool = False
    """Whether the loss calls ``batch.unembed``, with the backbone's output embedding, which FSDP then keeps gathered for a step."""

    multiplications: Callable[[Any, Any, FlameJobConfig], int] | None = None
    """
    The head, the backbone and the job to the multiplications of a forward of the loss for each token, from which throughput in
    operations and MFU follow. None: one for each of the head's parameters.
    """

    uses_logits: bool = True
    """Whether the loss reads ``batch.logits``. Tensor parallelism then gathers them instead of leaving them sharded."""

    tensor_parallel_plan: Mapping[str, ParallelStyle] = field(default_factory=dict)
    """Submodule of the head to its torch ``ParallelStyle``. What is not named has all its values on every rank."""

    check: Callable[[FlameJobConfig], Iterator[str]] | None = None
    """The job to one sentence for each thing that cannot be right in the head's options, before anything is built."""

    check_model: Callable[[FlameJobConfig, PreTrainedConfig], Iterator[str]] | None = None
    """The job and the backbone's configuration to the same, called for an enabled head."""

    record: Callable[[FlameJobConfig, int], dict[str, Any]] | None = None
    """
    The job and the number of sequences in a micro-batch of all ranks to what else determines the numbers of a run, by name;
    a resumed run is compared by it.
    """

    shown: tuple[str, ...] = ()
    """Metrics that stand on the console, beside those that begin with ``loss_``."""

    card_metrics: tuple[str, ...] = ()
    """Metrics that a model card lists."""

    card_options: tuple[str, ...] = ()
    """Options of the section that a model card lists."""

    takes_parts: bool = False
    """
    Whether the loss is right for a part of each sequence's positions, as context parallelism gives it, which is refused otherwise. It
    is if it takes each position by itself, or what follows it by ``batch.upcoming`` and ``batch.sequences.parts.following``.
    """
