"""The model of a ``config.json``, without weights and without a trainer."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from flame_ext.model.hf_causal_lm import HFCausalLM, HFModelArgs, build_hf_causal_lm
from flame_ext.seeding.key_names import KeyNames
from flame_ext.seeding.target import key_names


@dataclass(frozen=True)
class Architecture:
    """The model of a ``config.json``, without weights."""

    model: HFCausalLM
    names: KeyNames

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Name of each parameter and saved buffer, each tied parameter once, to its shape."""
        return {name: shape for name, shape in self.names.model_keys.items() if name not in self.model.tied_keys}


def load_architecture(folder: Path, trust_remote_code: bool = False) -> Architecture:
    """Build the model of a folder's ``config.json`` on meta.

    Raises:
        ConfigError: there is none, or it is not one of a causal LM.
    """
    args = HFModelArgs(hf_assets_path=str(folder), trust_remote_code=trust_remote_code)
    model = build_hf_causal_lm(args)
    return Architecture(model, key_names(model, {name: tuple(t.shape) for name, t in model.state_dict().items()}))
