"""Checks of the options of exports, and of what follows them."""

from collections.abc import Iterator

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

from flame_ext.config.sections import Export, FlameJobConfig
from flame_ext.errors import ConfigError
from flame_ext.files import parse_size
from flame_ext.object_stores import is_url, problem_of


def check_exports(config: FlameJobConfig) -> Iterator[str]:
    """Yields one sentence for each finding; asks no server."""
    export, interval, last = config.export, config.checkpoint.interval, config.checkpoint.last_save_in_hf
    if export.interval % interval:
        multiple = f"must be 0 or a multiple of checkpoint.interval = {interval}, got {export.interval}"
        yield f"export.interval {multiple}: what is exported is a step that was saved"
    try:
        parse_size(export.max_shard_size, "export.max_shard_size")
    except ConfigError as e:
        yield str(e)
    for name in ("upload", "push_to_hub"):
        if getattr(export, name) and not (export.interval or last):
            yield f"export.{name} has no export to follow: set export.interval, or checkpoint.last_save_in_hf = true"
    if export.upload and not is_url(export.upload):
        yield f"export.upload {export.upload!r}: expected a URL such as s3://bucket/prefix (for the Hub, set export.push_to_hub)"
    elif export.upload and (problem := problem_of(export.upload)):
        yield f"export.upload: {problem}"
    if export.push_to_hub:
        yield from _check_push(config)
    for name in ("push", "hub_private"):
        if not export.push_to_hub and getattr(export, name) != getattr(Export(), name):
            yield f"export.{name} has no effect without export.push_to_hub; leave it out"


def _check_push(config: FlameJobConfig) -> Iterator[str]:
    name = config.export.push_to_hub
    try:
        validate_repo_id(name)
        reason = "" if "/" in name else "the organisation or user is missing"
    except HFValidationError as e:
        reason = str(e)
    if reason:
        yield f"export.push_to_hub {name!r}: expected org/name ({reason})"
    if config.export.push == "last" and not config.checkpoint.last_save_in_hf:
        yield "export.push = 'last' needs an export of the last step: set checkpoint.last_save_in_hf = true"
