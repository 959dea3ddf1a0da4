"""Checks of ``[model]``, and of what the model's ``config.json`` allows."""

import difflib
from collections.abc import Iterator
from pathlib import Path

from transformers import PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from flame_ext.assembly import MODEL_NAME
from flame_ext.config.sections import FlameJobConfig
from flame_ext.host.names import model_converters
from flame_ext.model.attention import mask_problem
from flame_ext.seeding.sources.safe_files import TOKENIZER_FILES


def check_model(config: FlameJobConfig) -> Iterator[str]:
    """Yields one sentence for each finding in ``[model]`` itself."""
    model = config.model
    if model.name != MODEL_NAME:
        yield f"model.name must be {MODEL_NAME!r}, got {model.name!r}; torchtitan's own models run with torchtitan.train"
    if model.flavor != "auto":
        yield f"model.flavor must be 'auto' (the model is what its config.json says), got {model.flavor!r}"
    for name in model.converters:
        if name not in model_converters:
            close = difflib.get_close_matches(name, model_converters, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            yield f"model.converters: unknown converter {name!r}{hint} (known: {', '.join(sorted(model_converters))})"


def not_a_causal_lm(hf_config: PreTrainedConfig) -> str | None:
    """Returns why ``AutoModelForCausalLM`` makes no decoder of the configuration; None if it does.

    As in transformers, ``model_type`` decides; ``architectures`` may be absent, or name the base model or a classifier of a decoder.
    """
    names = (hf_config.architectures or [])[:1]
    known = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(hf_config.model_type)
    # By name, since a folder may bring its own class; by transformers' table, since GPT-2's is a GPT2LMHeadModel.
    if any(name.endswith("ForCausalLM") or name == known for name in names):
        return None
    of_a_decoder = all(name.endswith(("Model", "Classification", "QuestionAnswering")) for name in names)
    if known is None or not of_a_decoder or hf_config.is_encoder_decoder or not getattr(hf_config, "is_decoder", True):
        return (
            f"architectures is {hf_config.architectures} and model_type {hf_config.model_type!r}, which is no decoder-only causal LM "
            "(…ForCausalLM)"
        )
    return None


def check_model_config(config: FlameJobConfig, hf_config: PreTrainedConfig) -> Iterator[str]:
    """Yields one sentence for each finding in architecture, tokenizer files, attention and sequence length."""
    assets = Path(config.model.hf_assets_path)
    if (reason := not_a_causal_lm(hf_config)) is not None:
        yield f"{assets / 'config.json'}: {reason}"
    if not any((assets / name).is_file() for name in TOKENIZER_FILES):
        yield f"model.hf_assets_path {str(assets)!r}: no tokenizer ({' or '.join(TOKENIZER_FILES)}); copy the model's there"
    if config.data.document_attention and (reason := mask_problem(hf_config)) is not None:
        yield f"data.document_attention cannot be right for {hf_config.model_type!r}: {reason}"
    limit = getattr(hf_config.get_text_config(), "max_position_embeddings", None)
    if limit is not None and config.training.seq_len > limit:
        beyond = f"({config.training.seq_len}) is beyond the model's max_position_embeddings ({limit})"
        yield f"training.seq_len {beyond}; shorten it, or extend the model (also rope_parameters in config.json)"
