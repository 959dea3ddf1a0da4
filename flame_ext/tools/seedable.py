"""Whether a job could be seeded from a path."""

from __future__ import annotations

from torchtitan.config import TORCH_DTYPE_MAP
from torchtitan.tools.utils import set_default_dtype

from flame_ext.assembly import CONVERTER_NAME
from flame_ext.config.sections import FlameJobConfig
from flame_ext.errors import SeedError
from flame_ext.heads.converter import FuturePredictionConverter
from flame_ext.model.hf_causal_lm import HFModelArgs, build_hf_causal_lm
from flame_ext.seeding.seed import match
from flame_ext.seeding.sources.hub import locate
from flame_ext.seeding.target import seed_target


def why_not_seedable(config: FlameJobConfig, path: str) -> str | None:
    """Why a job could not be seeded from a path; None if it could. From headers: weights are not read.

    Args:
        config: of the job, checked.
        path: in the place of its ``checkpoint.initial_load_path``.

    Raises:
        ConfigError: the job's model can not be built.
    """
    args = HFModelArgs()
    args.update_from_config(config)
    with set_default_dtype(TORCH_DTYPE_MAP[config.training.dtype]):
        model = build_hf_causal_lm(args)
    if CONVERTER_NAME in config.model.converters:
        FuturePredictionConverter(config).convert(model)
    state = {name: tensor for name, tensor in model.state_dict().items() if name not in model.tied_keys}
    try:
        folder, _ = locate(path, config.seed.allow_pickle)
        match(seed_target(model, state, args.load()), folder, config.seed)
    except SeedError as e:
        return str(e)
    return None
