"""Whether a run that is resumed still names the source that it was seeded from."""

from __future__ import annotations

from typing import Any

from flame_ext.errors import SeedError
from flame_ext.seeding.sources.hub import HUB_PREFIX
from flame_ext.seeding.sources.open import open_source


def changed_source(identity: dict[str, Any] | None, path: str | None, allow_pickle: bool) -> str | None:
    """A sentence if ``checkpoint.initial_load_path`` names other weights than those the run grew from, else None.

    A source on the Hub is compared by name, since nothing is downloaded for a comparison; one that is gone, or can no longer
    be read, is not compared.

    Args:
        identity: ``SeedReport.identity``, as the step's manifest has it; None if it has none.
        path: the option's value now.
        allow_pickle: ``seed.allow_pickle``.
    """
    if identity is None or path is None or (path == identity["source"] and path.startswith(HUB_PREFIX)):
        return None
    now = "another name"
    if not path.startswith(HUB_PREFIX):
        try:
            digest = open_source(path, allow_pickle).digest
        except SeedError:
            return None
        if digest == identity["source_digest"]:
            return None
        now = f"digest {digest[:12]}"
    return (
        f"This run was seeded from {identity['source']} (digest {identity['source_digest'][:12]}), but "
        f"checkpoint.initial_load_path is now {path} ({now}). The run goes on with the weights of its step; to start from the "
        "other source, give it another job.dump_folder"
    )
