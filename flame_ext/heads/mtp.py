"""``[mtp]``: heads that predict the tokens after the next one, each by a decoder layer of the backbone's own kind."""

import math
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, cast

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, PreTrainedConfig
from transformers.pytorch_utils import Conv1D

from flame_ext.config.head_options import at_least
from flame_ext.config.sections import FlameJobConfig
from flame_ext.heads.spec import Head, HeadBatch, HeadSpec, WeightedHeadSection
from flame_ext.hf_config import is_part_of_transformers
from flame_ext.model.attention import BOOLEAN_ATTENTION, attention_options, attention_windows
from flame_ext.model.context_parallel import ContextParallel
from flame_ext.model.experts import has_experts
from flame_ext.model.initialisation import Constant, ParameterInit, Uniform
from flame_ext.model.parameters import attention_multiplications, parameters_of, parameters_on_meta
from flame_ext.objective.chunks import chunk_elements, sum_over_chunks
from flame_ext.objective.cross_entropy import IGNORE_INDEX, cross_entropy_loss
from flame_ext.objective.masks import causal_mask


@dataclass
class MtpSection(WeightedHeadSection):
    """Heads that predict the tokens after the next one (multi-token prediction, MTP)."""

    kind: Literal["parallel", "sequential"] = "parallel"
    """
    'parallel' (Gloeckle et al. 2024): each head is a decoder layer on the last hidden state. 'sequential' (DeepSeek-V3):
    the i-th head's layer reads the state of the head before it and the embedding of the token at t+i.
    """

    depth: int = 1
    """The number k of heads: they predict the tokens at t+2 .. t+k+1."""


class Within(NamedTuple):
    """What keeps a layer within documents, or within what precedes the positions of a part of the sequences."""

    mask: Tensor  # (B or 1, 1, n, T) bool
    positions: Tensor  # (B, n), from 0 in each document
    attention: str  # transformers' name for it


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

    @property
    def layers(self) -> nn.ModuleList | None:
        """The list of the one decoder layer; None if there is no such list."""
        lists = (module for module in self.decoder.modules() if isinstance(module, nn.ModuleList))
        return next((layers for layers in lists if len(layers) == 1), None)

    def forward(self, hidden_states: Tensor, embeddings: Tensor | None, within: Within | None) -> Tensor:
        """(B, n, D) states and, if sequential, embeddings to (B, n, D); attention is causal, and ``within`` documents."""
        if self.sequential:
            assert embeddings is not None
            hidden_states = self.proj(torch.cat([self.state_norm(hidden_states), self.token_norm(embeddings)], dim=-1))
        self.decoder.config._attn_implementation = self.own_attention if within is None else within.attention
        given = {} if within is None else {"attention_mask": within.mask, "position_ids": within.positions}
        return self.decoder(inputs_embeds=hidden_states, use_cache=False, **given).last_hidden_state

    def parameter_inits(self) -> dict[str, ParameterInit]:
        """As of every head, with norms as their architecture begins them: some have weights around 0 rather than 1."""
        inits = super().parameter_inits()
        for name, module in self.decoder.named_modules():
            own = dict(module.named_parameters(recurse=False))
            if isinstance(module, Conv1D):  # it has a column for each output
                inits[f"decoder.{name}.weight"] = Uniform(math.sqrt(3.0 / module.weight.shape[0]))
            elif own and all(parameter.ndim == 1 for parameter in own.values()):
                inits |= {f"decoder.{name}.{key}": init for key, init in self._constants(module).items()}
        return inits

    def _constants(self, module: nn.Module) -> dict[str, ParameterInit]:
        """The values with which the architecture begins a module of vectors; without those that are none."""
        fresh = deepcopy(module).to_empty(device="cpu")
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            for parameter in fresh.parameters():
                parameter.fill_(float("nan"))  # what stays so is not known to the architecture's code
            self.decoder._init_weights(fresh)
        found = {key: parameter.unique() for key, parameter in fresh.named_parameters(recurse=False)}
        return {key: Constant(values.item()) for key, values in found.items() if len(values) == 1 and values.isfinite()}


class Mtp(Head):
    """The k heads."""

    def __init__(self, decoder: dict[str, Any], kind: Literal["parallel", "sequential"], depth: int) -> None:
        super().__init__()
        self.kind = kind
        self.blocks = nn.ModuleList([MtpBlock(decoder, kind == "sequential") for _ in range(depth)])

    @property
    def layer_lists(self) -> list[nn.ModuleList]:
        """The layer of each."""
        return [layers for block in self.blocks if (layers := cast(MtpBlock, block).layers) is not None]

    def forward(self, hidden_states: Tensor, embeddings: Tensor | None = None, within: Within | None = None) -> Tensor:
        """(B, n, D) states and, if sequential, (k, B, n, D) embeddings of the tokens at t+1 .. t+k to (k, B, n, D) states.

        The output embedding makes of the i-th the logits of the token at t+1+i.
        """
        states = []
        for number, block in enumerate(self.blocks):
            state = block(hidden_states, None if embeddings is None else embeddings[number], within)
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
    chunk of states exist at a time: they are computed again in the backward.
    """
    unembed, depth = batch.unembed, len(head.blocks)
    assert unembed is not None
    upcoming = batch.upcoming(depth + 1).movedim(-1, 0)[1:]  # (k, B, n)
    labels = upcoming.masked_fill(upcoming < 0, IGNORE_INDEX)
    embeddings = None
    if head.kind == "sequential":
        assert batch.embed is not None
        tokens, _, parts, _ = batch.sequences
        # What stands after the end of the sequence is read for nothing: no label depends on it.
        ahead = torch.cat([parts.shard(tokens.roll(-1 - number, dims=1)) for number in range(depth)])
        with torch.no_grad():
            embeddings = batch.embed(ahead).to(batch.hidden_states.dtype).unflatten(0, (depth, -1))
    states = head(batch.hidden_states, embeddings, _documents(head, batch))

    def of_chunk(states: Tensor, labels: Tensor) -> Tensor:
        return cross_entropy_loss(unembed(states[None]), labels[None], batch.compile_backend)

    rows = max(1, chunk_elements(batch.logits.device) // batch.logits.shape[-1])
    loss = sum_over_chunks(of_chunk, rows, states.flatten(0, 2), labels.flatten())
    return {"loss_mtp": loss / (depth * batch.tokens_in_step)}


def _documents(head: Mtp, batch: HeadBatch) -> Within | None:
    _, documents, parts, _ = batch.sequences
    within = batch.config.data.document_attention
    if not (within or parts.is_split):
        return None
    (batch_size, seq_len), device = documents.shape, documents.device
    queries, keys = parts.positions(seq_len, device), parts.order(seq_len, device)
    block = cast(MtpBlock, head.blocks[0])
    (window,) = attention_windows(block.decoder.config).values()
    mask, positions = causal_mask(documents if within else None, window, queries, keys), queries.expand(batch_size, -1)
    if within:
        begins = torch.ones_like(documents, dtype=torch.bool)
        begins[:, 1:] = documents[:, 1:] != documents[:, :-1]
        first = torch.where(begins, torch.arange(seq_len, device=device), 0).cummax(dim=1).values
        positions = positions - parts.shard(first)
    name = "sdpa" if block.own_attention == "sdpa" else BOOLEAN_ATTENTION  # as in the backbone: it has dropout
    return Within(mask, positions, ContextParallel.attention_name(name) if parts.is_split else name)


def _arguments(section: MtpSection, backbone: Any) -> dict[str, Any]:
    decoder = _one_layer(backbone.config.get_text_config())
    return {"decoder": decoder, "kind": section.kind, "depth": section.depth}


def _one_layer(config: PreTrainedConfig) -> dict[str, Any]:
    config = deepcopy(config)
    config.num_hidden_layers = 1
    if kinds := getattr(config, "layer_types", None):
        config.layer_types = kinds[-1:]
    if hasattr(config, "embedding_multiplier"):  # of embeddings, which the input is not
        config.embedding_multiplier = 1.0
    return config.to_dict()


def _multiplications(head: Mtp, backbone: Any, config: FlameJobConfig) -> int:
    """Of the blocks' weights, their attention's scores and values, and the output embedding."""
    text, output = backbone.config.get_text_config(), backbone.get_output_embeddings()
    of_attention = attention_multiplications(text, config.training.seq_len)
    return parameters_of(head) + len(head.blocks) * (of_attention + output.weight.numel())


def _check(config: FlameJobConfig) -> Iterator[str]:
    yield from at_least("mtp", config.mtp, {"depth": (1, "the token after the next one")})


def _check_model(_config: FlameJobConfig, hf_config: PreTrainedConfig) -> Iterator[str]:
    text = hf_config.get_text_config()
    if (problem := _problem(text)) is not None:
        yield f"mtp.enable with {text.model_type!r}: its heads are decoder layers of the backbone's class, and {problem}; take token_order"


def _problem(config: PreTrainedConfig) -> str | None:
    """Says why a model of one layer of an architecture is no head; None if it is one. Builds it with parameters on meta."""
    if not is_part_of_transformers(config):
        return "its code is not part of transformers"
    try:
        attention_windows(config)
        with parameters_on_meta():
            block = MtpBlock(_one_layer(config), sequential=False)
    except Exception as e:  # what an architecture makes of one layer may be anything
        return f"a model of one layer cannot be built ({type(e).__name__}: {str(e)[:100]})"
    if block.layers is None:
        return "a model of one layer has another number of them"
    inside = {id(parameter) for parameter in block.layers.parameters()}
    positions = {
        id(p) for module in block.decoder.modules() if isinstance(module, nn.Embedding) for p in module.parameters()
    }
    for key, parameter in block.decoder.named_parameters():
        if parameter.ndim > 1 and id(parameter) not in inside | positions:
            return f"a model of one layer also has {key!r}"
    if has_experts(block.decoder):
        return "its layers are mixtures of experts, between which no loss would balance a head's tokens"
    kept = set(block.decoder.state_dict()) - {key for key, _ in block.decoder.named_parameters()}
    return f"a layer has buffers that no source holds ({', '.join(sorted(kept))})" if kept else None


HEAD = HeadSpec(
    section=MtpSection,
    build=Mtp,
    arguments=_arguments,
    loss=mtp_loss,
    multiplications=_multiplications,
    uses_embedding=True,
    uses_unembedding=True,
    takes_parts=True,
    uses_logits=False,
    check=_check,
    check_model=_check_model,
    card_metrics=("loss_mtp",),
    card_options=("loss_weight", "kind", "depth"),
)
