"""Loads the backbone and the heads of an export, and predicts with them, without a trainer."""

from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from flame_ext.errors import ConfigError, SeedError
from flame_ext.heads.registry import build_head
from flame_ext.heads.reverse_lm import ReverseEncoder
from flame_ext.heads.spec import BackboneTeacher, FutureSummaries
from flame_ext.model.attention import BOOLEAN_ATTENTION
from flame_ext.seeding.sources.hf_safetensors import SINGLE_NAME
from flame_ext.seeding.sources.safe_files import as_seed_error, contained_file, find_file, read_json, require_contained
from flame_ext.seeding.sources.source import HEADS_FOLDER


class Prediction(NamedTuple):
    """Outputs of backbone and predictor for (B, T) tokens."""

    logits: Tensor  # (B, T, V)
    hidden_states: Tensor  # (B, T, D), after the final norm
    future: Tensor  # (B, T, D) float32 of unit length: the summary of the future that each position predicts


class Information(NamedTuple):
    """What each position of (B, T) tokens says of what follows, in nats; NaN where a position has nothing to be compared with."""

    future: Tensor
    """
    (B, T) float32: cos(p_t, F_{t+1}) / temperature, less the logarithm of the mean of its exponential over the summaries of all
    positions. Its mean is InfoNCE's lower bound of the mutual information of past and future, at most ln of their number.
    """
    next_token: Tensor  # (B, T) float32: -ln of the probability of the next token


def load_future_heads(folder: str | Path) -> nn.ModuleDict:
    """Returns the heads of an export (``hf/step-N``) by name, such as ``future_predictor``, in evaluation mode.

    Raises:
        SeedError: there are none, or they cannot be read.
        CheckpointError: a head of your own is not registered: import its module first.
    """
    heads_folder = Path(folder) / HEADS_FOLDER
    if find_file(Path(folder), f"{HEADS_FOLDER}/config.json") is None:
        raise SeedError(f"{heads_folder}: no config.json; name an export (hf/step-N) of a run with heads")
    with as_seed_error(f"{heads_folder}: cannot be read", "; export the step again"):
        config = read_json(heads_folder / "config.json", "file")
        heads = nn.ModuleDict({name: build_head(name, arguments) for name, arguments in config.items()})
        heads.load_state_dict(load_file(contained_file(heads_folder, SINGLE_NAME, "the folder")), strict=True)
    return heads.eval()


def load_with_heads(
    folder: str | Path, dtype: torch.dtype | None = None, device: torch.device | str = "cpu"
) -> tuple[PreTrainedModel, nn.ModuleDict]:
    """Returns the backbone and the heads of an export (``hf/step-N``) in evaluation mode, in ``dtype`` (None = as stored).
    Raises what :func:`load_future_heads` raises, and a SeedError if the backbone cannot be loaded.
    """
    heads = load_future_heads(folder)  # first, since it is quick
    require_contained(Path(folder))
    try:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype or "auto", local_files_only=True)
    except (OSError, ValueError, SafetensorError) as e:
        raise SeedError(f"{folder}: cannot be loaded: {e}") from e
    return model.eval().to(device), heads.to(device=device, dtype=model.dtype)


@torch.no_grad()
def predict_future(model: PreTrainedModel, heads: nn.ModuleDict, input_ids: Tensor) -> Prediction:
    """Runs the backbone and the predictor of :func:`load_with_heads` on (B, T) tokens."""
    captured: list[Tensor] = []
    hook = model.base_model.register_forward_hook(lambda _m, _i, result: captured.append(result.last_hidden_state))
    try:
        logits = model(input_ids, use_cache=False).logits
    finally:
        hook.remove()
    return Prediction(logits, captured[0], heads["future_predictor"](captured[0]))


@torch.no_grad()
def future_summaries(model: PreTrainedModel, heads: nn.ModuleDict, input_ids: Tensor) -> FutureSummaries:
    """Returns the summaries of the future that the encoder of an export makes of (B, T) tokens, each row one document.

    Raises a KeyError if there is no ``future_encoder``, and a ConfigError if it is 'reverse_lm', whose model is in no export.
    """
    encoder, config = heads["future_encoder"], model.config
    if isinstance(encoder, ReverseEncoder):
        raise ConfigError(
            "future_encoder.summary_method is 'reverse_lm': its summaries are the states of future_encoder.reverse_model, "
            "which no export has; take an export of a run with another summary_method"
        )
    if not isinstance(encoder, BackboneTeacher):
        return encoder(predict_future(model, heads, input_ids).hidden_states, torch.zeros_like(input_ids))
    own = config._attn_implementation
    try:
        if own != "sdpa":  # which takes boolean masks as it is
            config._attn_implementation = BOOLEAN_ATTENTION
        mask = encoder.attention_mask(input_ids, None, "dense")
        states = model.base_model(input_ids, attention_mask=mask, use_cache=False).last_hidden_state
    finally:
        config._attn_implementation = own
    return encoder.summaries(states, input_ids, None)


@torch.no_grad()
def future_information(
    model: PreTrainedModel, heads: nn.ModuleDict, input_ids: Tensor, temperature: float
) -> Information:
    """Returns what backbone and predictor know of the future at each of (B, T) tokens, each row one document.

    ``temperature`` is the ``future_encoder.temperature`` of training, where ``shift_k`` is 1.
    """
    prediction, summaries = predict_future(model, heads, input_ids), future_summaries(model, heads, input_ids)
    valid = summaries.valid_mask[:, 1:]
    keys = F.normalize(summaries.states[:, 1:].float(), dim=-1)
    future, next_token = (torch.full(input_ids.shape, float("nan"), device=input_ids.device) for _ in range(2))
    scores = prediction.future[:, :-1][valid] @ keys[valid].T / temperature
    count = torch.tensor(float(len(scores)), device=scores.device)
    future[:, :-1][valid] = scores.diagonal() - scores.logsumexp(dim=-1) + count.log()
    logits = prediction.logits[:, :-1].float()
    next_token[:, :-1] = F.cross_entropy(logits.transpose(1, 2), input_ids[:, 1:], reduction="none")
    return Information(future, next_token)
