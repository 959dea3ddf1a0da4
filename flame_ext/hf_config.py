"""Reads ``config.json`` without importing what builds the model."""

import logging
from functools import cache

from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, PreTrainedConfig

from flame_ext.errors import ConfigError

logger = logging.getLogger()  # torchtitan's: importing torchtitan for it would take seconds

# Fields that say how weights are stored, not what they compute. Nothing reads quantised weights here, so they are left-overs.
STORAGE_FIELDS = ("quantization_config", "compression_config")


def is_part_of_transformers(config: PreTrainedConfig) -> bool:
    """Return whether the configuration's class is transformers' own, not registered by a user or brought by a folder."""
    return type(config).__module__.startswith("transformers.models.")


def load_hf_config(path: str, trust_remote_code: bool = False) -> PreTrainedConfig:
    """Read it from a local folder; raise ConfigError if it is absent, invalid, of an unknown type or needs the folder's code."""
    try:
        config = AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError, StrictDataclassError) as e:
        if "trust_remote_code" in str(e):
            raise ConfigError(
                f"model.hf_assets_path {path!r}: config.json asks for modelling code from the folder; to run it, set "
                "seed.trust_remote_code = true"
            ) from e
        reason = " ".join(line.strip() for line in str(e).strip().splitlines()[:2])
        raise ConfigError(
            f"model.hf_assets_path {path!r}: no usable config.json: {reason}; give the folder of a Hugging Face causal LM"
        ) from e
    for name in STORAGE_FIELDS:
        if getattr(config, name, None) is not None:
            _say_left_out(path, name)
            delattr(config, name)
    return config


@cache
def _say_left_out(path: str, name: str) -> None:
    logger.info(f"{path}/config.json: {name} is left out: the weights that are trained and exported are not quantised")
