"""Reads ``config.json`` without importing what builds the model."""

import json
import logging
import re
from contextlib import suppress
from copy import deepcopy
from functools import cache
from pathlib import Path
from typing import Any

from transformers import AutoConfig, PreTrainedConfig
from transformers.models.auto.auto_factory import _get_model_class
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from flame_ext.errors import ConfigError

logger = logging.getLogger()  # torchtitan's: importing torchtitan for it would take seconds

# Fields that say how weights are stored, not what they compute. Nothing reads quantised weights here, so they are left-overs.
STORAGE_FIELDS = ("quantization_config", "compression_config")

# Our own field of a model that reads text from its end to its beginning; transformers keeps it.
REVERSE_FIELD = "flame_ext_reverse"

_SMALL = 2**15
# Fields that are read before the configuration's own class is known.
_READ_FIRST = {"model_type": str, "auto_map": dict, "quantization_config": dict, "configuration_files": list}


def is_part_of_transformers(config: PreTrainedConfig) -> bool:
    """Return whether the configuration's class is transformers' own, not registered by a user or brought by a folder."""
    return type(config).__module__.startswith("transformers.models.")


def random_fields(config: PreTrainedConfig) -> dict[str, float]:
    """Return the fields by which layers of a language model draw random numbers while it is trained: dropout, noise of routers."""
    fields = config.get_text_config().to_dict().items()
    # Heads that classify, and dropout of the embedding, are in no layer.
    names = re.compile(r"(?!classifier|summary|emb).*(drop|jitter)")
    return {name: value for name, value in fields if type(value) in (int, float) and value > 0 and names.match(name)}


def load_hf_config(
    path: str, trust_remote_code: bool = False, option: str = "model.hf_assets_path"
) -> PreTrainedConfig:
    """Read it from a local folder, which ``option`` names; raise ConfigError if it is absent, invalid, of an unknown type or needs the
    folder's code.

    Where ``AutoModelForCausalLM`` makes the text model alone of a multimodal configuration, it is the text model's.
    """
    try:
        config = AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=trust_remote_code)
        if not isinstance(config.get_text_config(), PreTrainedConfig):
            raise TypeError(f"{config.get_text_config()!r:.80} is no configuration of a text model")
        text = config.sub_configs.get("text_config")
        if text is not None and type(config) in MODEL_FOR_CAUSAL_LM_MAPPING:
            model = _get_model_class(config, MODEL_FOR_CAUSAL_LM_MAPPING)
            config = config.get_text_config() if getattr(model, "config_class", None) is text else config
    except Exception as e:  # transformers raises whatever a field of another type leads to
        if "trust_remote_code" in str(e):
            raise ConfigError(
                f"{option} {path!r}: config.json asks for modelling code from the folder; to run it, set "
                "seed.trust_remote_code = true"
            ) from e
        reason = " ".join(line.strip() for line in str(e).strip().splitlines()[:2])[:500] or type(e).__name__
        raise ConfigError(
            f"{option} {path!r}: no usable config.json: {_wrong_field(path)}{reason}; give the folder of a Hugging "
            "Face causal LM"
        ) from e
    for name in STORAGE_FIELDS:
        if getattr(config, name, None) is not None:
            _say_left_out(path, name)
            delattr(config, name)
    return config


def mark_direction(fields: dict[str, Any], reverse: bool) -> None:
    """Says in the fields of a ``config.json`` whether the model was trained with ``data.reverse``."""
    fields.pop(REVERSE_FIELD, None)
    if reverse:
        fields[REVERSE_FIELD] = True


def _wrong_field(path: str) -> str:
    """Name the field without which the rest can be read, since most of transformers' errors do not."""
    file = Path(path) / "config.json"
    fields: Any = {}
    with suppress(Exception):
        if file.stat().st_size < _SMALL:  # what follows takes as long as the file has bytes, for each field
            fields = json.loads(file.read_bytes())
    if not isinstance(fields, dict):
        return ""
    for field, kind in _READ_FIRST.items():
        if not isinstance(fields.get(field, kind()), kind):
            return f"{field} is {fields[field]!r:.80}: "
    for field in [None, *fields]:
        with suppress(Exception):
            AutoConfig.for_model(**deepcopy({key: value for key, value in fields.items() if key != field}))
            return "" if field is None else f"{field} is {fields[field]!r:.80}: "
    return ""


@cache
def _say_left_out(path: str, name: str) -> None:
    logger.info(f"{path}/config.json: {name} is left out: the weights that are trained and exported are not quantised")
