"""Writes ``seed_report.json``, which records what was put into the model, from where, and how it was proved."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from flame_ext.errors import SeedError
from flame_ext.object_stores import is_url, once
from flame_ext.seeding.accounting import Account
from flame_ext.seeding.proof.parity import Verification
from flame_ext.seeding.sources.hub import HUB_PREFIX
from flame_ext.seeding.sources.open import open_source
from flame_ext.seeding.sources.remote import copied

REPORT_NAME = "seed_report.json"


@dataclass(frozen=True)
class SeedReport:
    """The fields of the file, in its order."""

    source: str
    layout: str
    keys: Account
    bytes_read: int  # Sum over all ranks
    seconds: float  # Time of the slowest rank from the first header to the last weight, without the proof
    world_size: int
    source_digest: str
    verification: Verification
    revision: str | None  # The Hub's commit, for a source on the Hub
    weights_digest: str
    """SHA-256 over the loaded values as they are in the model, whatever the number of ranks and the parallelism."""
    config_differences: list[str]
    """A line for each field of ``config.json`` that ``seed.allow_config_difference`` lets differ from the source's."""

    vocabulary: dict[str, Any] | None = None
    """Of a vocabulary that has grown: rows loaded and initialised, and how."""

    frozen: Sequence[str] = ()
    """The loaded keys that stay as they are (``training.freeze``, ``freeze`` of a head, adapters)."""

    frozen_digest: str | None = None
    """As ``weights_digest``, over these keys, in a run with adapters, whose steps do not hold them."""

    @property
    def fields(self) -> dict[str, Any]:
        """The content of the file, which has the last of these fields only if there is something to say."""
        fields = asdict(self)
        absent = {name for name in ("config_differences", "vocabulary", "frozen", "frozen_digest") if not fields[name]}
        return {name: value for name, value in fields.items() if name not in absent}

    @property
    def identity(self) -> dict[str, Any]:
        """The fields that manifests of later steps carry on."""
        names = ("source", "revision", "source_digest", "weights_digest")
        kept = {} if self.frozen_digest is None else {"frozen_digest": self.frozen_digest}
        return {name: getattr(self, name) for name in names} | kept


def changed_source(
    identity: dict[str, Any] | None, path: str | None, allow_pickle: bool, follow_links: bool
) -> str | None:
    """Return a warning if ``path`` (``checkpoint.initial_load_path``) holds other weights than ``identity`` says, else None.

    A source on the Hub is compared by name only; one that cannot be read any more is not compared.
    """
    if identity is None or path is None:
        return None
    on_hub = path.startswith(HUB_PREFIX)
    try:
        with once():
            folder = copied(path, with_tokenizer=False) if is_url(path) else path
        now = "another name" if on_hub else f"digest {open_source(folder, allow_pickle, follow_links).digest[:12]}"
    except SeedError:
        return None
    source, then = identity.get("source"), f"digest {str(identity.get('source_digest'))[:12]}"
    if now == then or (on_hub and path == source):
        return None
    return (
        f"This run was seeded from {source} ({then}), but "
        f"checkpoint.initial_load_path is now {path} ({now}). The run goes on with the weights of its step; to start from the "
        "other source, give it another job.dump_folder"
    )
