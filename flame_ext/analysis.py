"""Loads the backbone and the heads of an export, and predicts with them, without a trainer."""

from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from flame_ext.errors import SeedError
from flame_ext.heads.registry import build_head
from flame_ext.seeding.sources.hf_safetensors import SINGLE_NAME
from flame_ext.seeding.sources.safe_files import as_seed_error, contained_file, find_file, read_json, require_contained
from flame_ext.seeding.sources.source import HEADS_FOLDER


class Prediction(NamedTuple):
    """Outputs of backbone and predictor for (B, T) tokens."""

    logits: Tensor  # (B, T, V)
    hidden_states: Tensor  # (B, T, D), after the final norm
    future: Tensor  # (B, T, D) float32 of unit length: the summary of the future that each position predicts


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
