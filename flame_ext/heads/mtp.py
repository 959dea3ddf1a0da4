"""``[mtp]``: heads that predict the tokens after the next one, each by a decoder layer of the backbone's own kind."""

from collections.abc import Iterator
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import AutoConfig, AutoModel, PreTrainedConfig

from flame_ext.config.head_options import at_least
from flame_ext.config.sections import FlameJobConfig
from flame_ext.heads.spec import Head, HeadBatch, HeadSpec, WeightedHeadSection
from flame_ext.model.attention import BOOLEAN_ATTENTION, attention_options, attention_windows
from flame_ext.model.initialisation import Constant, ParameterInit
from flame_ext.objective.cross_entropy import IGNORE_INDEX, cross_entropy_loss
from flame_ext.objective.masks import causal_mask
from flame_ext.objective.windows import upcoming_tokens


@dataclass
class MtpSection(WeightedHeadSection):
    """Heads that predict the tokens after the next one (multi-token prediction, MTP)."""

    kind: Literal["parallel", "sequential"] = "parallel"
    """
    'parallel' (Gloeckle et al. 2024): each head is a decoder layer on the last hidden state. 'sequential' (DeepSeek-V3):
    each head's layer reads the state of the head before it and the embedding of the token that this one has predicted.
    """

    depth: int = 1
    """The number k of heads: they predict the tokens at t+2 .. t+k+1."""


class MtpBlock(Head):
    """One head: a model of one decoder layer of the backbone's class, with its final norm and without its embedding.

    With ``sequential`` its input is a linear map of the LayerNorms of a state and an embedding, 2 D to D.
    """

    def __init__(self, decoder: dict[str, Any], sequential: bool) -> None:
        super().__init__()
        config = AutoConfig.for_model(**decoder)
        self.sequential = sequential
        if sequential:
            self.state_norm = nn.LayerNorm(config.hidden_size)
            self.token_norm = nn.LayerNorm(config.hidden_size)
            self.proj = nn.Linear(2 * config.hidden_size, config.hidden_size, bias=False)
        self.decoder = AutoModel.from_config(config, dtype=torch.get_default_dtype(), **attention_options(config))
        self.decoder.set_input_embeddings(nn.Identity())
        self.own_attention = self.decoder.config._attn_implementation

    def forward(self, hidden_states: Tensor, embeddings: Tensor | None, mask: Tensor | None) -> Tensor:
        """(B, T, D) states and, if sequential, embeddings to (B, T, D); the mask is (B, 1, T, T) bool, None = causal."""
        if self.sequential:
            assert embeddings is not None
            hidden_states = self.proj(torch.cat([self.state_norm(hidden_states), self.token_norm(embeddings)], dim=-1))
        self.decoder.config._attn_implementation = self.own_attention if mask is None else BOOLEAN_ATTENTION
        return self.decoder(inputs_embeds=hidden_states, attention_mask=mask, use_cache=False).last_hidden_state

    def parameter_inits(self) -> dict[str, ParameterInit]:
        """As of every head, with norms as their architecture begins them: some have weights around 0 rather than 1."""
        inits = super().parameter_inits()
        for name, module in self.decoder.named_modules():
            own = dict(module.named_parameters(recurse=False))
            if not own or any(parameter.ndim != 1 for parameter in own.values()):
                continue
            fresh = deepcopy(module).to_empty(device="cpu")
            self.decoder._init_weights(fresh)
            for key, parameter in fresh.named_parameters(recurse=False):
                inits[f"decoder.{name}.{key}"] = Constant(parameter.flatten()[0].item())
        return inits


class Mtp(Head):
    """The k heads."""

    def __init__(self, decoder: dict[str, Any], kind: Literal["parallel", "sequential"], depth: int) -> None:
        super().__init__()
        self.kind = kind
        self.blocks = nn.ModuleList([MtpBlock(decoder, kind == "sequential") for _ in range(depth)])

    def forward(self, hidden_states: Tensor, embeddings: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """(B, T, D) states and, if sequential, (k, B, T, D) embeddings of the tokens at t+1 .. t+k to (k, B, T, D) states.

        The output embedding makes of the i-th the logits of the token at t+1+i.
        """
        states = []
        for number, block in enumerate(self.blocks):
            state = block(hidden_states, None if embeddings is None else embeddings[number], mask)
            states.append(state)
            if self.kind == "sequential":
                hidden_states = state
        return torch.stack(states)

    def parameter_inits(self) -> dict[str, ParameterInit]:
        """Those of the blocks."""
        blocks = cast(list[MtpBlock], list(self.blocks))
        return {
            f"blocks.{n}.{key}": init for n, block in enumerate(blocks) for key, init in block.parameter_inits().items()
        }


def mtp_loss(head: Mtp, batch: HeadBatch) -> dict[str, Tensor]:
    """The cross-entropy of the tokens at t+2 .. t+k+1 in the document of t, the mean of the k heads, over the labelled tokens.

    Sources: https://arxiv.org/abs/2404.19737 (parallel), https://arxiv.org/abs/2412.19437 (sequential). The output embedding is
    the language model's and learns from all of them; the embeddings of tokens that are read are constant. The logits of one
    head exist at a time: they are computed again in the backward.
    """
    assert batch.unembed is not None
    upcoming = upcoming_tokens(batch.input_ids, batch.doc_ids, len(head.blocks) + 1).movedim(-1, 0)  # (k + 1, B, T)
    embeddings = None
    if head.kind == "sequential":
        assert batch.embed is not None
        read = upcoming_tokens(batch.input_ids, torch.zeros_like(batch.doc_ids), len(head.blocks)).movedim(-1, 0)
        with torch.no_grad():  # what is read after the end of the sequence is read for nothing
            embeddings = batch.embed(read.clamp_min(0)).to(batch.hidden_states.dtype)
    states = head(batch.hidden_states, embeddings, _mask(head, batch))
    losses = [
        checkpoint(partial(_cross_entropy, batch), state, tokens, use_reentrant=False, preserve_rng_state=False)
        for state, tokens in zip(states, upcoming[1:], strict=True)
    ]
    return {"loss_mtp": torch.stack(losses).mean() / batch.tokens_in_step}


def _cross_entropy(batch: HeadBatch, states: Tensor, tokens: Tensor) -> Tensor:
    assert batch.unembed is not None
    labels = tokens.masked_fill(tokens < 0, IGNORE_INDEX)
    return cross_entropy_loss(batch.unembed(states), labels, batch.compile_backend)


def _mask(head: Mtp, batch: HeadBatch) -> Tensor | None:
    if not batch.config.data.document_attention:
        return None
    positions = torch.arange(batch.input_ids.shape[1], device=batch.input_ids.device)
    (window,) = attention_windows(cast(MtpBlock, head.blocks[0]).decoder.config).values()
    return causal_mask(batch.doc_ids, window, positions, positions)


def _arguments(section: MtpSection, backbone: Any) -> dict[str, Any]:
    config: PreTrainedConfig = deepcopy(backbone.config.get_text_config())
    config.num_hidden_layers = 1
    if kinds := getattr(config, "layer_types", None):
        config.layer_types = kinds[-1:]
    return {"decoder": config.to_dict(), "kind": section.kind, "depth": section.depth}


def _check(config: FlameJobConfig) -> Iterator[str]:
    yield from at_least(
        "mtp", config.mtp, {"depth": (1, "the token after the next one"), "loss_weight": (0, "0 = not computed")}
    )


def _check_model(_config: FlameJobConfig, hf_config: PreTrainedConfig) -> Iterator[str]:
    try:
        attention_windows(hf_config)
    except ValueError as e:
        yield f"mtp.enable with {hf_config.model_type!r}: its heads are decoder layers of attention, and {e}; take token_order"


HEAD = HeadSpec(
    section=MtpSection,
    build=Mtp,
    arguments=_arguments,
    loss=mtp_loss,
    uses_embedding=True,
    uses_unembedding=True,
    uses_logits=False,
    check=_check,
    check_model=_check_model,
    card_metrics=("loss_mtp",),
    card_options=("loss_weight", "kind", "depth"),
)
