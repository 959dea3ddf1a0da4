"""Reads the weights that steps of a run with adapters do not hold, since they stay as the source has them."""

from collections.abc import Mapping
from typing import Any

from torchtitan.tools.logging import logger

from flame_ext.config.sections import Seed
from flame_ext.distributed import failing_together
from flame_ext.errors import SeedError
from flame_ext.seeding.proof.replicas import compare_replicas, weights_digest
from flame_ext.seeding.read import logged_progress, read_weights
from flame_ext.seeding.seed import match
from flame_ext.seeding.sources.hub import locate
from flame_ext.seeding.target import SeedTarget


def read_again(target: SeedTarget, path: str, options: Seed, identity: Mapping[str, Any]) -> None:
    """Read the frozen weights of the backbone from ``path``, in place. Collective.

    Args:
        identity: of the source of step 0, from the manifest of the step that is loaded.

    Raises SeedError, on all ranks, unless the weights are those that step 0 was seeded with, bit for bit.
    """
    folder, _ = locate(path, options.allow_pickle)
    with failing_together(SeedError):
        source, keys, _, _ = match(target, folder, options)
        kept = {key: target.whole[key] for key in keys.loaded if key in target.model.whole.frozen}
        held = {key: tensor for key, tensor in target.state.items() if key in kept}
        read_weights(source, held, target.model.tied_keys, False, logged_progress())
    digest = weights_digest(compare_replicas(held, kept, target.part), kept, kept)
    if digest != identity.get("frozen_digest"):
        revision = f" at revision {identity['revision']}" if identity.get("revision") else ""
        raise SeedError(
            f"checkpoint.initial_load_path {path}: its weights are not those beside which this run's adapters were trained, "
            f"{identity.get('source')}{revision} (frozen_digest {str(identity.get('frozen_digest'))[:12]}, now {digest[:12]}); the steps "
            "hold adapters and heads alone: name that source"
        )
    logger.info(f"Read {len(kept)} frozen tensors again from {path}: they are those of step 0")
