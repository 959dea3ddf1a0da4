"""Command line and TOML, or Python, to a configuration that is checked before a process group exists."""

from pathlib import Path

from flame_ext.assembly import register
from flame_ext.config.manager import FlameConfigManager
from flame_ext.config.model_config import load_model_config
from flame_ext.config.sections import FlameJobConfig
from flame_ext.errors import ConfigError, SeedError
from flame_ext.heads.registry import check_heads, check_heads_of_model, job_config_class
from flame_ext.preflight.evaluation import check_evaluation
from flame_ext.preflight.exports import check_exports
from flame_ext.preflight.model import check_model, check_model_config, check_reverse_model, warn_of_direction
from flame_ext.preflight.moe import check_mixture
from flame_ext.preflight.options import check_data, check_options
from flame_ext.preflight.parallelism import check_parallelism, check_parallelism_of_model
from flame_ext.preflight.quantized import check_quantization, check_quantized
from flame_ext.preflight.ranges import check_ranges
from flame_ext.preflight.trained import check_adapters, check_recomputed, check_trained
from flame_ext.preflight.urls import check_urls
from flame_ext.seeding.sources.safe_files import require_contained


def parse(args: list[str]) -> FlameJobConfig:
    """Returns the configuration; raises ConfigError, with a line for each finding, if it is wrong in itself or for the model."""
    register()  # names that the configuration may use
    return _checked(FlameConfigManager(job_config_class).parse_args(args))


def new_config() -> FlameJobConfig:
    """Returns a configuration with every option's default, as an empty TOML would give it, to be completed in Python.

    Heads, sources and architectures of one's own are registered before, by importing their module.
    """
    register()
    return job_config_class()()


def check(config: FlameJobConfig) -> FlameJobConfig:
    """Checks a configuration that Python code has built or changed, as :func:`parse` does; completes its paths in place.

    Raises ConfigError.
    """
    register()
    return _checked(FlameConfigManager(job_config_class).check_built(config))


def _checked(config: FlameJobConfig) -> FlameJobConfig:
    checks = (
        check_model,
        check_quantization,
        check_parallelism,
        check_options,
        check_exports,
        check_evaluation,
        check_heads,
        check_adapters,
        check_data,
        check_urls,
    )
    # The other checks calculate with numbers that are in their ranges.
    problems = [*check_ranges(config)] or [problem for check in checks for problem in check(config)]
    try:  # before any of it is read
        require_contained(Path(config.model.hf_assets_path), config.seed.follow_links)
    except SeedError as e:
        problems.append(str(e))
    if not problems:
        hf_config = load_model_config(config)
        warn_of_direction(config)
        of_model = (
            check_model_config,
            check_heads_of_model,
            check_parallelism_of_model,
            check_mixture,
            check_quantized,
            check_reverse_model,
            check_recomputed,
            check_trained,
        )
        problems = [problem for check in of_model for problem in check(config, hf_config)]
    if len(problems) > 1:
        problems = ["\n  - ".join([f"{len(problems)} problems in the configuration:", *problems])]
    if problems:
        raise ConfigError(problems[0])
    return config
