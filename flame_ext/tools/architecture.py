"""Builds the model of a ``config.json`` or of a job on meta, to compare a source with it."""

from dataclasses import dataclass, replace
from pathlib import Path

from torchtitan.config import TORCH_DTYPE_MAP
from torchtitan.tools.utils import set_default_dtype

from flame_ext.config.sections import FlameJobConfig
from flame_ext.errors import ConfigError, SeedError
from flame_ext.hf_config import load_hf_config
from flame_ext.model.hf_causal_lm import HFCausalLM, HFModelArgs, build_hf_causal_lm
from flame_ext.seeding.names import KeyNames
from flame_ext.seeding.sources.hub import locate
from flame_ext.seeding.sources.source import Source, TensorEntry
from flame_ext.seeding.target import key_names, seed_target


@dataclass(frozen=True)
class Architecture:
    """The model of a ``config.json``, without weights."""

    model: HFCausalLM
    names: KeyNames

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of each parameter and saved buffer, each tied parameter once."""
        return {name: shape for name, shape in self.names.model_keys.items() if name not in self.model.tied_keys}

    def tied_once(self, source: Source) -> Source:
        """Returns a source, whose entries are under the model's names, with each tied parameter once."""
        entries: dict[str, TensorEntry] = {}
        for name, entry in source.entries.items():
            entries.setdefault(self.model.tied_keys.get(name, name), entry)
        return replace(source, entries=entries)


def load_architecture(
    folder: Path, trust_remote_code: bool = False, tensors: int | None = None, vocab_size: int | None = None
) -> Architecture:
    """Builds the model of a folder's ``config.json``, or with another ``vocab_size``, on meta.

    Raises a ConfigError if there is none of a causal LM, or it has more layers than there are ``tensors``.
    """
    if tensors is not None:
        layers = load_hf_config(str(folder), trust_remote_code).get_text_config().num_hidden_layers
        if layers > tensors:  # before so many are built
            raise ConfigError(
                f"{folder / 'config.json'}: num_hidden_layers is {layers}, and the source holds {tensors} tensors: it is another model's"
            )
    model = build_hf_causal_lm(
        HFModelArgs(hf_assets_path=str(folder), trust_remote_code=trust_remote_code, vocab_size=vocab_size)
    )
    return Architecture(model, key_names(model, {name: tuple(t.shape) for name, t in model.state_dict().items()}))


def why_not_seedable(config: FlameJobConfig, path: str) -> tuple[str | None, str | None]:
    """Returns why a checked job could not be seeded from ``path``, judged by headers, None if it could; and what would grow."""
    from flame_ext.heads.registry import CONVERTER_NAME, attach_heads  # here, since a conversion needs none of it
    from flame_ext.seeding.seed import match

    args = HFModelArgs()
    args.update_from_config(config)
    with set_default_dtype(TORCH_DTYPE_MAP[config.training.dtype]):
        model = build_hf_causal_lm(args)
    if CONVERTER_NAME in config.model.converters:
        attach_heads(model, config)
    state = {name: tensor for name, tensor in model.state_dict().items() if name not in model.tied_keys}
    try:
        folder, _ = locate(path, config.seed.allow_pickle)
        *_, growth = match(seed_target(model, state, args.load()), folder, config.seed)
    except SeedError as e:
        return str(e), None
    return None, None if growth is None else str(growth)
