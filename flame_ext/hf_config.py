"""Reads ``config.json`` without importing what builds the model."""

from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, PreTrainedConfig

from flame_ext.errors import ConfigError


def load_hf_config(path: str, trust_remote_code: bool = False) -> PreTrainedConfig:
    """Read it from a local folder; raise ConfigError if it is absent, invalid, of an unknown type or needs the folder's code."""
    try:
        return AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=trust_remote_code)
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
