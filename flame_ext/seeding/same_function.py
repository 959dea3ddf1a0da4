"""Weights alone do not say what a model computes: ``config.json`` of the source has to say the same as the model's.

A differing ``rope_theta`` or norm epsilon fits every shape, loads without a word and gives a model that is merely bad.
"""

from __future__ import annotations

from typing import Any

from transformers import AutoConfig, PreTrainedConfig

from flame_ext.errors import SeedError
from flame_ext.seeding.sources.source import Source

# What does not change the function of given weights on given tokens. Everything else does, or is treated so: fields
# differ between architectures, and an unknown one that is ignored would be the silent error that this file is against.
_HARMLESS = {
    "_name_or_path",
    "architectures",
    "auto_map",
    "bos_token_id",
    "dtype",
    "eos_token_id",
    "initializer_range",
    "output_attentions",
    "output_hidden_states",
    "pad_token_id",
    "pretraining_tp",
    "return_dict",
    "transformers_version",
    "use_cache",
    "vocab_size",  # compared by shape, with a message of its own
}


def require_same_function(source: Source, model_config: PreTrainedConfig, trust_remote_code: bool) -> None:
    """Compare the source's configuration with the model's, both as transformers completes them with defaults.

    Raises:
        SeedError: with each field that differs and both values.
    """
    try:
        found_config = AutoConfig.from_pretrained(
            source.path, local_files_only=True, trust_remote_code=trust_remote_code
        )
    except (OSError, ValueError, KeyError) as e:
        hint = " (seed.trust_remote_code = true runs the folder's code)" if "trust_remote_code" in str(e) else ""
        raise SeedError(f"{source.path / 'config.json'}: {str(e).strip().splitlines()[0]}{hint}") from e
    found, expected = _flat(found_config.to_dict()), _flat(model_config.to_dict())
    differences = [
        f"{field}: {found.get(field, 'absent')!r} in the source, {expected.get(field, 'absent')!r} in the model"
        for field in sorted(found.keys() | expected.keys())
        if found.get(field) != expected.get(field)
    ]
    if differences:
        raise SeedError(
            f"{source.path / 'config.json'} describes another function than config.json at model.hf_assets_path; the same "
            "weights would compute something else. Make them agree:\n  - " + "\n  - ".join(differences)
        )


def _flat(fields: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Without harmless fields; a field of a nested table under its full name."""
    flat: dict[str, Any] = {}
    for key, value in fields.items():
        if key in _HARMLESS or "dropout" in str(key):
            continue
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat
