"""The reference of all options that flame_ext adds, as Markdown, from config/sections.py itself.

python -m flame_ext.preflight.reference > docs/configuration.md

The test of the documentation fails when the file is another one.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import MISSING, Field, fields, is_dataclass
from types import NoneType
from typing import Any, NamedTuple, get_args, get_type_hints

from docstring_parser import parse_from_object
from torchtitan.config import JobConfig

from flame_ext.config.manager import spelled, table_in_list
from flame_ext.config.sections import FlameJobConfig


class HostOption(NamedTuple):
    """An option of torchtitan that is not what it is there."""

    name: str
    here: str
    """What it means, or what has to be."""
    refused: tuple[str, ...] = ()
    """Command-line options that are refused for it, beside those of configs/debug.toml."""


HOST_OPTIONS = (
    HostOption("model.name", '`"hf_causal_lm"`', ("--model.name=llama3",)),
    HostOption("model.flavor", '`"auto"`: the model is what `config.json` says', ("--model.flavor=1B",)),
    HostOption("model.hf_assets_path", "folder with `config.json` and tokenizer; `config.json` builds the model"),
    HostOption(
        "model.converters",
        '`"future_prediction"` attaches the heads; without it, plain continued pre-training',
        ("--model.converters=future_predictor",),
    ),
    HostOption("checkpoint.enable", "has to be true", ("--checkpoint.no-enable",)),
    HostOption("checkpoint.initial_load_path", "any source of [seeding.md](seeding.md), the layout is recognised"),
    HostOption(
        "checkpoint.initial_load_in_hf",
        "without `checkpoint.initial_load_path`: seed from `model.hf_assets_path`; with it, it has no meaning",
    ),
    HostOption("checkpoint.initial_load_model_only", "has to be true", ("--checkpoint.no-initial-load-model-only",)),
    HostOption("checkpoint.initial_load_in_hf_quantized", "refused", ("--checkpoint.initial-load-in-hf-quantized",)),
    HostOption("checkpoint.create_seed_checkpoint", "refused", ("--checkpoint.create-seed-checkpoint",)),
    HostOption("checkpoint.exclude_from_loading", "refused", ("--checkpoint.exclude-from-loading=optimizer",)),
    HostOption("checkpoint.load_step", "a complete step; an error if there is none of this number"),
    HostOption(
        "checkpoint.keep_latest_k",
        "counts complete steps of this run, deletes only those; not 1",
        ("--checkpoint.keep-latest-k=1",),
    ),
    HostOption("checkpoint.interval", "at least 1", ("--checkpoint.interval=0",)),
    HostOption("checkpoint.async_mode", '`"async_with_pinned_mem"` is refused without an accelerator'),
    HostOption(
        "checkpoint.last_save_in_hf",
        "writes `hf/step-N` beside the last step, with the heads, whether that is saved whole or the model alone",
    ),
    HostOption("training.dataset", 'also `"json"`, `"text"`, `"parquet"` and `"python_stdlib"` (README)'),
    HostOption(
        "training.dataloader.num_workers",
        "divides the sequences that a rank has in a step, which its workers share",
        ("--training.dataloader.num-workers=-1",),
    ),
    HostOption(
        "training.global_batch_size",
        "-1, or a multiple of `training.local_batch_size` times the ranks",
        ("--training.global-batch-size=9",),
    ),
    HostOption("training.seq_len", "at most the model's `max_position_embeddings`", ("--training.seq-len=4096",)),
    HostOption(
        "optimizer.early_step_in_backward",
        "refused beside a head with `lr_scale`, `weight_decay` or `warmup_steps`",
        ("--optimizer.early-step-in-backward", "--future-predictor.lr-scale=2"),
    ),
    HostOption(
        "parallelism.tensor_parallel_degree",
        "divides heads, widths, vocabulary and `training.seq_len`; what it is right for: [parallelism.md](parallelism.md#tensor)",
        ("--parallelism.tensor-parallel-degree=2",),
    ),
    HostOption(
        "parallelism.enable_async_tensor_parallel",
        "refused without an accelerator, and without a compiled model",
        ("--parallelism.enable-async-tensor-parallel",),
    ),
    HostOption(
        "parallelism.context_parallel_degree",
        "without heads and pipelines ([parallelism.md](parallelism.md#context))",
        ("--parallelism.context-parallel-degree=2",),
    ),
    HostOption(
        "parallelism.context_parallel_load_balancer",
        '`"headtail"`, or none',
        ("--parallelism.context-parallel-degree=2", "--parallelism.context-parallel-load-balancer=ptrr"),
    ),
    HostOption(
        "parallelism.context_parallel_rotate_method",
        '`"allgather"`',
        ("--parallelism.context-parallel-degree=2", "--parallelism.context-parallel-rotate-method=alltoall"),
    ),
    HostOption("parallelism.expert_parallel_degree", "has to be 1", ("--parallelism.expert-parallel-degree=2",)),
    HostOption(
        "parallelism.pipeline_parallel_schedule",
        '`"GPipe"`, `"1F1B"` or `"Interleaved1F1B"` ([parallelism.md](parallelism.md#pipeline))',
        ("--parallelism.pipeline-parallel-degree=2", "--parallelism.pipeline-parallel-schedule=ZBVZeroBubble"),
    ),
    HostOption(
        "parallelism.pipeline_parallel_schedule_csv",
        "refused",
        ("--parallelism.pipeline-parallel-degree=2", "--parallelism.pipeline-parallel-schedule-csv=schedule.csv"),
    ),
    HostOption(
        "parallelism.module_fqns_per_model_part",
        "layers by the host's names, `layers.0`, whatever the architecture calls them",
    ),
    HostOption("fault_tolerance.enable", "refused", ("--fault-tolerance.enable",)),
    HostOption("comm.mode", '`"default"`', ("--comm.mode=fake_backend",)),
    HostOption("metrics.log_freq", "at least 1", ("--metrics.log-freq=0",)),
    HostOption("job.custom_config_module", "sections of your own, merged on top of these ([heads.md](heads.md))"),
    HostOption(
        "experimental.custom_import", "imported before the configuration is checked; may register what it names"
    ),
)
"""Read off preflight/checks.py and the checkpoint manager; the tests try each refusal."""

_HEAD = """\
# Configuration

The options that flame_ext adds to torchtitan's, made from `flame_ext/config/sections.py` by
`python -m flame_ext.preflight.reference > docs/configuration.md`. In TOML a section is a table, on the command line an option is
`--section.key value`; the command line wins. Every option of torchtitan 0.2.2 is there as well and is explained by
`python -m flame_ext.train --help`; those that mean something else here, or are refused, are in [the last
table](#options-of-torchtitan). A wrong type, an unknown key or a combination that can not be right ends the command with exit
code 2, before any process group exists.
"""

_HOST_HEAD = """\
## Options of torchtitan

All others keep their meaning.

| option | here |
|---|---|
"""


def reference() -> str:
    """The whole of docs/configuration.md."""
    host = {field.name: field.default_factory for field in fields(JobConfig)}
    added = [field for field in fields(FlameJobConfig) if host.get(field.name) is not field.default_factory]
    sections = "".join(_section(field.name, get_type_hints(FlameJobConfig)[field.name]) for field in added)
    rows = "".join(f"| `{option.name}` | {option.here} |\n" for option in HOST_OPTIONS)
    return f"{_HEAD}\n{sections}{_HOST_HEAD}{rows}"


def _section(name: str, section: type, brackets: str = "[]") -> str:
    """A heading, what the section is for, and a row for each of its options that the host does not have; then its tables."""
    hints, texts = get_type_hints(section), dict(_docstrings(section))
    host = {field.name: field.type for field in fields(JobConfig)}.get(name)
    known = {field.name for field in fields(host)} if is_dataclass(host) else set()
    rows = "".join(
        f"| `{name}.{field.name}` | {_type(hints[field.name])} | {_default(field)} | {_cell(texts[field.name])} |\n"
        for field in fields(section)
        if field.name not in known
    )
    tables = {field.name: table for field in fields(section) if (table := table_in_list(hints[field.name])) is not None}
    return (
        f"## {brackets[: len(brackets) // 2]}{name}{brackets[len(brackets) // 2 :]}\n\n"
        f"{' '.join((section.__doc__ or '').split())}\n\n| option | type | default | |\n|---|---|---|---|\n{rows}\n"
        + "".join(_section(f"{name}.{field}", table, "[[]]") for field, table in tables.items())
    )


def _docstrings(section: type) -> Iterator[tuple[str, str]]:
    """The string under each field, those of base classes first."""
    for cls in reversed(section.__mro__):
        if is_dataclass(cls):
            yield from ((p.arg_name, p.description or "") for p in parse_from_object(cls).params)


def _type(hint: Any) -> str:
    return _cell(spelled(hint)) + (" or absent" if NoneType in get_args(hint) else "")


def _default(field: Field[Any]) -> str:
    value = field.default if field.default_factory is MISSING else field.default_factory()
    return "absent" if value is None else f"`{json.dumps(value)}`"


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


if __name__ == "__main__":
    sys.stdout.write(reference())
