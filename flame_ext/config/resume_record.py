"""What determines the numbers of a run, so that a run that is resumed goes on as the same run.

By exclusion: a field that is not known to be harmless matters, those of a user's own sections among them.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

from flame_ext.config.sections import FlameJobConfig
from flame_ext.errors import ConfigError

# Sections and fields that change where, how fast or under which eyes a run goes, but not its numbers beyond rounding.
_HARMLESS = (
    "activation_checkpoint",
    "checkpoint",
    "comm",
    "compile",
    "data.sources.label",
    "debug.deterministic",
    "debug.deterministic_warn_only",
    "export",
    "fault_tolerance",
    "job",
    "memory_estimation",
    "metrics",
    "model.hf_assets_path",  # its files are compared instead, see asset_digests
    "model.print_after_conversion",
    "parallelism",
    "profiling",
    "seed.allow_pickle",
    "seed.dry_run",
    "seed.verify",
    "training.dataloader",
    "training.enable_cpu_offload",
    "training.gc_debug",
    "training.gc_freq",
    "training.local_batch_size",  # the global one is compared
    "validation",
)

# Of model.hf_assets_path: what the model is, and what the host's tokenizer is built from.
_ASSETS = ("config.json", "tokenizer.json", "tokenizer_config.json", "vocab.json", "vocab.txt", "merges.txt")


def asset_digests(folder: Path, code: bool = False) -> dict[str, str]:
    """SHA-256 of the files in ``model.hf_assets_path`` that determine numbers, by name; those that are there.

    Args:
        folder: ``model.hf_assets_path``.
        code: also of its modelling code (``seed.trust_remote_code``).
    """
    names = [*_ASSETS, *(sorted(p.name for p in folder.glob("*.py")) if code else [])]
    return {
        name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in names if (folder / name).is_file()
    }


def config_record(config: FlameJobConfig, *, data_parallel_degree: int, assets: dict[str, str]) -> dict[str, Any]:
    """Full name of each field that matters to its value, as JSON has it.

    Args:
        config: of the run.
        data_parallel_degree: ranks that read different data (replicate times shard).
        assets: as :func:`asset_digests` gives them.
    """
    record = {name: value for name, value in _flat(config) if not _is_harmless(name)}
    step_batch = config.training.local_batch_size * data_parallel_degree
    # As the host has it: not positive means one micro-batch for each rank.
    record["training.global_batch_size"] = (
        config.training.global_batch_size if config.training.global_batch_size > 0 else step_batch
    )
    encoder = config.future_encoder
    if encoder.enable and (encoder.negatives == "local" or encoder.summary_method != "anticausal"):
        # These losses compare within a micro-batch, of one rank or of all: here its size is no matter of layout.
        local = encoder.negatives == "local"
        record["future_encoder.sequences_compared"] = config.training.local_batch_size if local else step_batch
    record |= {f"model.hf_assets_path/{name}": digest for name, digest in assets.items()}
    return json.loads(json.dumps(record, default=str))


def config_digest(record: dict[str, Any]) -> str:
    """SHA-256 of a record; 1 and 1.0 are the same."""
    return hashlib.sha256(json.dumps(_canonical(record), sort_keys=True).encode()).hexdigest()


def check_unchanged(then: dict[str, Any], now: dict[str, Any], allowed: list[str], where: str) -> list[str]:
    """Compare the record of a saved step with that of the run that would go on from it.

    Args:
        then: the step's, as its manifest has it.
        now: the run's.
        allowed: ``checkpoint.allow_config_change``.
        where: the step, for the message.

    Returns:
        One line for each change that is allowed, to be logged.

    Raises:
        ConfigError: a field that matters has changed and is not allowed to, or ``allowed`` names no such field.
    """
    names = sorted(name for name in {*then, *now} if not _is_harmless(name))
    allowed = [
        name for name in allowed if name
    ]  # the host splits "--checkpoint.allow_config_change=" into one empty name
    problems = [problem for name in allowed if (problem := _not_a_field(name, names)) is not None]
    if problems:
        raise ConfigError("checkpoint.allow_config_change: " + "; ".join(problems))
    changes = {name: change for name in names if (change := _change(name, then, now)) is not None}
    refused = [name for name in changes if name not in allowed]
    if refused:
        remedy = json.dumps([*dict.fromkeys([*allowed, *refused])])
        raise ConfigError(
            f"{where} was saved by a run with another configuration:\n  - "
            + "\n  - ".join(changes[name] for name in refused)
            + "\ntake back the change; or give this run another job.dump_folder; or, to go on with other numbers, set "
            f"checkpoint.allow_config_change = {remedy}"
        )
    return list(changes.values())


def _flat(section: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for field in fields(section):
        value = getattr(section, field.name)
        if is_dataclass(value):
            yield from _flat(value, f"{prefix}{field.name}.")
        elif isinstance(value, list) and any(map(is_dataclass, value)):
            for number, table in enumerate(value):
                yield from _flat(table, f"{prefix}{field.name}.{number}.")
        else:
            yield prefix + field.name, value


def _is_harmless(name: str) -> bool:
    name = re.sub(r"\.\d+\.", ".", name)  # a table in a list
    return any(name == harmless or name.startswith(f"{harmless}.") for harmless in _HARMLESS)


def _change(name: str, then: dict[str, Any], now: dict[str, Any]) -> str | None:
    if name in then and name in now and then[name] == now[name]:
        return None
    shown = [_shown(record[name]) if name in record else "absent" for record in (then, now)]
    return f"{name}: then {shown[0]}, now {shown[1]}"


def _shown(value: Any) -> str:
    if isinstance(value, str) and re.fullmatch("[0-9a-f]{64}", value):
        return f"SHA-256 {value[:12]}…"
    return json.dumps(value, ensure_ascii=False)


def _not_a_field(name: str, names: Iterable[str]) -> str | None:
    if name in names:
        return None
    if _is_harmless(name):
        return f"{name!r} is not compared and may always change: leave it out"
    inside = [known for known in names if known.startswith(f"{name}.")]
    if inside:
        return f"{name!r} is a section; name each field ({', '.join(inside)})"
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    return f"no field {name!r}{hint}"


def _canonical(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _canonical(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_canonical(item) for item in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value
