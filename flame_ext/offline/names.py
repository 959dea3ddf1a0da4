"""What a source is called without a trainer: its model's part under plain names, heads apart."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from flame_ext.errors import SeedError
from flame_ext.heads.converter import HEAD_BUILDERS
from flame_ext.heads.own import own_head
from flame_ext.model.hf_causal_lm import HFCausalLM, HFModelArgs, build_hf_causal_lm
from flame_ext.seeding.hub import locate
from flame_ext.seeding.key_names import KeyNames
from flame_ext.seeding.layouts.dcp import DcpSource, in_noted_layout
from flame_ext.seeding.source import Source
from flame_ext.seeding.target import key_names


def folder_of(path: str, allow_pickle: bool = False) -> Path:
    """The local folder of a path, as the trainer locates a source.

    Raises:
        SeedError: there is none.
    """
    folder, _ = locate(path, allow_pickle)
    if not folder.is_dir():
        found = f"is a file; name its folder, {folder.parent}" if folder.exists() else "does not exist"
        raise SeedError(f"{path}: {found}")
    return folder


def plain(source: Source) -> Source:
    """The model's part of a source: without what a trainer saves beside it, and without the nesting of its keys."""
    return in_noted_layout(source) if isinstance(source, DcpSource) else source


def is_heads(name: str) -> bool:
    """Whether a plain name is that of a head's parameter."""
    head = name.split(".")[0]
    return head in HEAD_BUILDERS or own_head(head) is not None


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
