"""Records the options that determine a run's numbers, and refuses to resume a step under other ones."""

import difflib
import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

from flame_ext.config.head_options import HEAD_NAMES
from flame_ext.config.sections import FlameJobConfig
from flame_ext.errors import ConfigError

# Sections and options that do not change the numbers of a run beyond rounding; all others count, also those of a user's sections.
# The files in model.hf_assets_path are compared (asset_digests), the weights of a reverse model, and the global batch size.
_HARMLESS = (
    "activation_checkpoint", "checkpoint", "comm", "compile", "data.sources.label", "debug.deterministic",
    "debug.deterministic_warn_only", "evaluation", "export", "fault_tolerance", "future_encoder.assume_reverse",
    "future_encoder.reverse_model", "job", "memory_estimation", "metrics",
    "model.hf_assets_path", "model.print_after_conversion", "moe.experts_implementation", "parallelism", "profiling",
    "seed.allow_config_difference", "seed.allow_pickle", "seed.dry_run", "record", "seed.follow_links", "seed.verify",
    "training.dataloader", "training.enable_cpu_offload", "training.gc_debug", "training.gc_freq",
    "training.local_batch_size", "validation",
)  # fmt: skip

# The files in model.hf_assets_path from which the model and the tokenizer are built.
_FIRST_ASSETS = ("config.json", "tokenizer.json", "tokenizer_config.json", "vocab.json", "vocab.txt", "merges.txt")
_ASSETS = (*_FIRST_ASSETS, "special_tokens_map.json", "added_tokens.json", "tekken.json")


def asset_digests(folder: Path, code: bool = False) -> dict[str, str]:
    """Returns the name and SHA-256 of each file in ``folder`` that determines a run's numbers; with ``code``, also the Python files."""
    patterns = ("*.model", "*.tiktoken", *(["*.py"] if code else []))
    paths = [
        *(folder / name for name in _ASSETS),
        *sorted(file for pattern in patterns for file in folder.glob(pattern)),
    ]
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in paths if path.is_file()}


def config_record(
    config: FlameJobConfig, *, data_parallel_degree: int, assets: dict[str, str], heads: dict[str, Any] | None = None
) -> dict[str, Any]:
    """Returns the name and JSON value of each option that determines the run's numbers, of ``heads``, and :func:`asset_digests`."""
    record = {name: value for name, value in flat(config) if not _is_harmless(name)}
    # In torchtitan, a global batch size that is not positive means one micro-batch for each rank.
    if record["training.global_batch_size"] <= 0:
        record["training.global_batch_size"] = config.training.local_batch_size * data_parallel_degree
    record |= (heads or {}) | {f"model.hf_assets_path/{name}": digest for name, digest in assets.items()}
    record["record.version"] = 2  # the first had none
    return json.loads(json.dumps(record, default=str))


def config_digest(record: dict[str, Any]) -> str:
    """Returns the SHA-256 of a record, in which 1 and 1.0 are equal."""

    def number(text: str) -> int | float:
        return int(value) if (value := float(text)).is_integer() else value

    canonical = json.loads(json.dumps(record), parse_float=number)
    return hashlib.sha256(json.dumps(canonical, sort_keys=True).encode()).hexdigest()


def check_unchanged(then: dict[str, Any], now: dict[str, Any], allowed: list[str], where: str) -> list[str]:
    """Compare the record of a saved step (``where``) with that of the run that resumes it; returns one line for each allowed change.

    Raises ConfigError if an option has changed that is not allowed to, or if ``allowed`` names no recorded option.
    """
    then = _as_of_this_version(then, now)
    absent = [head for head in HEAD_NAMES if not (then.get(f"{head}.enable") or now.get(f"{head}.enable"))]
    recorded = sorted(name for name in {*then, *now} if not _is_harmless(name))
    then, now = _without_absent_heads(then, absent), _without_absent_heads(now, absent)
    names = [name for name in recorded if name in then or name in now]
    allowed = list(filter(None, allowed))  # torchtitan parses "--checkpoint.allow_config_change=" as one empty name
    if problems := [_not_a_field(name, recorded) for name in allowed if name not in recorded]:
        raise ConfigError("checkpoint.allow_config_change: " + "; ".join(problems))
    differ = [name for name in names if (name in then, then.get(name)) != (name in now, now.get(name))]
    changes = {name: f"{name}: then {_shown(name, then)}, now {_shown(name, now)}" for name in differ}
    if refused := [name for name in changes if name not in allowed]:
        remedy = json.dumps([*dict.fromkeys([*allowed, *refused])])
        raise ConfigError(
            f"{where} was saved by a run with another configuration:\n  - "
            + "\n  - ".join(changes[name] for name in refused)
            + "\ntake back the change; or give this run another job.dump_folder; or, to go on with other numbers, set "
            f"checkpoint.allow_config_change = {remedy}"
        )
    return list(changes.values())


# Options that came after records, and what was done before; those of heads that are not attached are not compared.
ADDED = {
    "data.reverse": False,
    "training.freeze": [],
    "future_predictor.loss": "info_nce",
    "seed.resize_vocabulary": False,
    "seed.new_rows": "mean",
    "seed.pad_vocabulary_to_multiple_of": 1,
    "optimizer.muon_momentum": 0.95,
    "loss.ce_weight": 1.0,
    "loss.weighting": "none",
    "loss.mix_ce": 0.0,
    "action_layer.gt_bias": 0.0,
    "action_layer.reward": "future",
    "action_layer.label_smoothing": 0.1,
    "action_layer.entropy_weight": 0.0,
}


def _as_of_this_version(then: dict[str, Any], now: dict[str, Any]) -> dict[str, Any]:
    """Returns a saved record; one of an earlier version with what was not recorded, or had another default, as it is ``now``."""
    # Without effect on a dense model, and before [moe] there were no others; or without adapters, before which there was no [lora].
    then = {name: value for name, value in now.items() if name.startswith(("moe.", "lora."))} | then
    added = ADDED | {f"{head}.freeze": False for head in HEAD_NAMES}
    then = {name: value for name, value in added.items() if name in now} | then
    if "record.version" in then:
        return then
    files = {name for name in now if name.startswith("model.hf_assets_path/") and name not in then}
    files = {name for name in files if name.rpartition("/")[2] not in _FIRST_ASSETS and not name.endswith(".py")}
    headers = {name for name, value in then.items() if name.endswith(".tokens_dtype") and value == "uint16"}
    return then | {name: now[name] for name in files | {name for name in headers if now.get(name, 0) is None}}


def _without_absent_heads(record: dict[str, Any], absent: list[str]) -> dict[str, Any]:
    """Returns a record without the options of heads that are not attached, which have no effect, and their parameters' patterns."""
    kept = {name: value for name, value in record.items() if name.partition(".")[0] not in absent}
    if isinstance(patterns := kept.get("seed.new_parameters"), list):
        kept["seed.new_parameters"] = [p for p in patterns if str(p).partition(".")[0] not in absent]
    return kept


def flat(section: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yields the full name and the value of each option."""
    for field in fields(section):
        value = getattr(section, field.name)
        if is_dataclass(value):
            yield from flat(value, f"{prefix}{field.name}.")
        elif isinstance(value, list) and any(map(is_dataclass, value)):
            for number, table in enumerate(value):
                yield from flat(table, f"{prefix}{field.name}.{number}.")
        else:
            yield prefix + field.name, value


def _is_harmless(name: str) -> bool:
    name = re.sub(r"\.\d+\.", ".", name)  # a table in a list
    return any(name == harmless or name.startswith(f"{harmless}.") for harmless in _HARMLESS)


def _shown(name: str, record: dict[str, Any]) -> str:
    value = record.get(name)
    if isinstance(value, str) and re.fullmatch("[0-9a-f]{64}", value):
        return f"SHA-256 {value[:12]}…"
    return json.dumps(value, ensure_ascii=False) if name in record else "absent"


def _not_a_field(name: str, names: list[str]) -> str:
    if _is_harmless(name):
        return f"{name!r} is not compared and may always change: leave it out"
    if inside := [known for known in names if known.startswith(f"{name}.")]:
        return f"{name!r} is a section; name each field ({', '.join(inside)})"
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    return f"no field {name!r}" + (f"; did you mean {close[0]!r}?" if close else "")
