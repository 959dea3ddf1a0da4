"""Checks of ``[model]``, and of what the model's ``config.json`` allows."""

import difflib
from collections.abc import Iterator
from operator import attrgetter
from pathlib import Path

from torchtitan.config import TORCH_DTYPE_MAP
from torchtitan.tools.logging import logger
from torchtitan.tools.utils import set_default_dtype
from transformers import PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from flame_ext.assembly import MODEL_NAME
from flame_ext.config.sections import FlameJobConfig, sequence_lengths
from flame_ext.heads.registry import teacher_of
from flame_ext.hf_config import REVERSE_FIELD
from flame_ext.host.names import model_converters
from flame_ext.model.attention import mask_problem
from flame_ext.model.hf_causal_lm import HFCausalLM, HFModelArgs, build_hf_causal_lm
from flame_ext.object_stores import is_url, problem_of
from flame_ext.seeding.sources.hub import HUB_PREFIX
from flame_ext.seeding.sources.safe_files import TOKENIZER_FILES, read_json
from flame_ext.step.reverse_model import reverse_model_problems


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


def model_on_meta(config: FlameJobConfig) -> HFCausalLM:
    """Builds the job's backbone in the dtype of its parameters, on the meta device. Raises a ConfigError, as the build does."""
    args = HFModelArgs()
    args.update_from_config(config)
    with set_default_dtype(TORCH_DTYPE_MAP[config.training.dtype]):
        return build_hf_causal_lm(args)


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
        text, hint = hf_config.get_text_config(), ""
        if text is not hf_config and text.model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
            hint = (
                "; to train its text model alone, write AutoConfig.from_pretrained(…).get_text_config() to a folder of its own, "
                "and name the keys by seed.key_map and seed.ignore_source_keys"
            )
        return (
            f"architectures is {hf_config.architectures} and model_type {hf_config.model_type!r}, which is no decoder-only causal LM "
            f"(…ForCausalLM){hint}"
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
    for section, seq_len in sequence_lengths(config).items():
        if limit is not None and seq_len > limit:
            beyond = f"({seq_len}) is beyond the model's max_position_embeddings ({limit})"
            yield f"{section}.seq_len {beyond}; shorten it, or extend the model (also rope_parameters in config.json)"


def warn_of_direction(config: FlameJobConfig) -> None:
    """Warns of a run from left to right that begins with a model that was trained from right to left."""
    for option in ("model.hf_assets_path", "checkpoint.initial_load_path"):
        path = attrgetter(option)(config)
        file = Path(path or "") / "config.json"
        if path and not config.data.reverse and file.is_file() and read_json(file, "file").get(REVERSE_FIELD):
            logger.warning(
                f"{option} {path!r} was trained from right to left, and data.reverse is false: it will learn to read from left to right"
            )


def check_reverse_model(config: FlameJobConfig, hf_config: PreTrainedConfig) -> Iterator[str]:
    """Yields one sentence for each finding in ``future_encoder.reverse_model``; one elsewhere is looked at once it is here."""
    options = config.future_encoder
    if teacher_of(config) != "future_encoder" or options.summary_method != "reverse_lm":
        return
    if is_url(options.reverse_model):
        if problem := problem_of(options.reverse_model):
            yield f"future_encoder.reverse_model {problem}"
    elif not options.reverse_model.startswith(HUB_PREFIX):
        yield from reverse_model_problems(config, Path(options.reverse_model), hf_config)
