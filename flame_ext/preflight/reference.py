"""Generates docs/configuration.md from the sections' dataclasses: ``python -m flame_ext.preflight.reference > docs/configuration.md``."""

import json
import sys
from dataclasses import MISSING, fields, is_dataclass
from types import NoneType
from typing import get_args, get_type_hints

from docstring_parser import parse_from_object

from flame_ext.config.manager import spelled, table_in_list
from flame_ext.heads.registry import job_config_class
from flame_ext.host.names import JobConfig

# torchtitan's options whose meaning or valid values differ here. tests/preflight/test_reference.py tries the refusals.
TORCHTITAN_OPTIONS = {
    "model.name": '`"hf_causal_lm"`',
    "model.flavor": '`"auto"`: the model is what `config.json` says',
    "model.hf_assets_path": "folder with `config.json` and tokenizer; `config.json` builds the model",
    "model.converters": '`"future_prediction"` attaches the heads; without it, plain continued pre-training. Before it may stand '
    '`"lora"` or `"quantize.linear.float8"` ([running.md](running.md#float8)); torchtitan\'s other `quantize.*` are refused',
    "checkpoint.enable": "must be true",
    "checkpoint.initial_load_path": "any source of [seeding.md](seeding.md), the layout is recognised",
    "checkpoint.initial_load_in_hf": "without `checkpoint.initial_load_path`: seed from `model.hf_assets_path`; with it, no effect",
    "checkpoint.initial_load_model_only": "must be true",
    "checkpoint.initial_load_in_hf_quantized": "refused",
    "checkpoint.create_seed_checkpoint": "refused",
    "checkpoint.exclude_from_loading": "refused",
    "checkpoint.load_step": "a complete step; an error if there is none of this number",
    "checkpoint.keep_latest_k": "counts complete steps of this run, deletes only those; not 1",
    "checkpoint.interval": "at least 1",
    "checkpoint.async_mode": '`"async_with_pinned_mem"` is refused without an accelerator',
    "checkpoint.last_save_in_hf": "writes `hf/step-N` beside the last step, with the heads, also where that step is the model alone",
    "training.dataset": 'also `"json"`, `"text"`, `"parquet"` and `"python_stdlib"` (README)',
    "training.dataloader.num_workers": "divides the sequences that a rank has in a step, which its workers share",
    "training.global_batch_size": "-1, or a multiple of `training.local_batch_size` times the data-parallel ranks",
    "training.seq_len": "at most the model's `max_position_embeddings`",
    "training.max_norm": "above 0; for no clipping take 1e9",
    "validation.dataset": "read as `training.dataset` is; without a repetition at its end",
    "validation.dataloader.num_workers": "divides `validation.local_batch_size`",
    "validation.seq_len": "at most the model's `max_position_embeddings`",
    "lr_scheduler.total_steps": "at least `training.steps`",
    "optimizer.name": '`"AdamW"`, `"Adam"`, `"Muon"` ([running.md](running.md#muon))',
    "optimizer.early_step_in_backward": "refused with accumulation, DDP, pipelines, frozen parameters, and beside a head with `lr_scale`, "
    "`weight_decay` or `warmup_steps`; there is no clipping then",
    "profiling.enable_memory_snapshot": "refused without an accelerator",
    "quantize.linear.float8.filter_fqns": "names of transformers, such as `mlp.down_proj`; `output` is the output embedding",
    "quantize.linear.float8.enable_fsdp_float8_all_gather": "refused with the proofs of step 0 (`seed.verify`), which need high "
    "precision, with tensor parallelism, and on a CPU",
    "parallelism.tensor_parallel_degree": "divides heads, widths, vocabulary and `seq_len` ([parallelism.md](parallelism.md#tensor))",
    "parallelism.enable_async_tensor_parallel": "refused without an accelerator, and without a compiled model",
    "parallelism.context_parallel_degree": "ranks that share each sequence ([parallelism.md](parallelism.md#context))",
    "parallelism.context_parallel_load_balancer": '`"headtail"`, or none',
    "parallelism.context_parallel_rotate_method": '`"allgather"`',
    "parallelism.expert_parallel_degree": "divides the experts, and FSDP's ranks ([parallelism.md](parallelism.md#expert))",
    "parallelism.expert_tensor_parallel_degree": "must be 1",
    "parallelism.expert_parallel_comm_backend": '`"standard"`',
    "parallelism.pipeline_parallel_schedule": '`"GPipe"`, `"1F1B"`, `"Interleaved1F1B"` ([parallelism.md](parallelism.md#pipeline))',
    "parallelism.pipeline_parallel_schedule_csv": "refused",
    "parallelism.module_fqns_per_model_part": "layers by torchtitan's names, `layers.0`, whatever the architecture calls them",
    "fault_tolerance.enable": "refused",
    "comm.mode": '`"default"`',
    "metrics.log_freq": "at least 1",
    "job.custom_config_module": "sections of your own, merged on top of these ([extending.md](extending.md))",
    "experimental.custom_import": "imported before the configuration is checked; may register what the configuration names",
}

_HEAD = """\
# Configuration

The options that flame_ext adds to torchtitan's, from the dataclasses of `flame_ext/config/sections.py` and `flame_ext/heads/`
(`python -m flame_ext.preflight.reference > docs/configuration.md` writes this page). In TOML a section is a table, on the command
line an option is `--section.key value`; the command line wins. Every option of torchtitan 0.2.2 exists as well
(`python -m flame_ext.train --help`); those that mean something else here, or are refused, are in [the last
table](#options-of-torchtitan). A wrong type, an unknown key or a combination that cannot be right ends the command with exit code 2.
"""


def reference() -> str:
    """Returns the text of docs/configuration.md."""
    config_class = job_config_class()
    torchtitan = {field.name: field.default_factory for field in fields(JobConfig)}
    added = [field.name for field in fields(config_class) if torchtitan.get(field.name) is not field.default_factory]
    sections = "".join(_section(name, f"[{name}]", get_type_hints(config_class)[name]) for name in added)
    rows = "".join(f"| `{name}` | {here} |\n" for name, here in TORCHTITAN_OPTIONS.items())
    heading = "## Options of torchtitan\n\nAll others keep their meaning.\n\n| option | here |\n|---|---|\n"
    return f"{_HEAD}\n{sections}{heading}{rows}"


def _section(name: str, heading: str, section: type) -> str:
    """The section's docstring and a row for each option that torchtitan's section lacks; then its tables in lists."""
    hints, torchtitan = get_type_hints(section), get_type_hints(JobConfig).get(name)
    dataclasses = [cls for cls in section.__mro__[::-1] if is_dataclass(cls)]  # base classes first
    texts = {p.arg_name: p.description or "" for cls in dataclasses for p in parse_from_object(cls).params}
    known = {field.name for field in fields(torchtitan)} if is_dataclass(torchtitan) else set()
    rows, tables = "", ""
    for field in fields(section):
        hint, full_name = hints[field.name], f"{name}.{field.name}"
        if field.name not in known:
            words = _one_line(spelled(hint)) + (" or absent" if NoneType in get_args(hint) else "")
            default = field.default if field.default_factory is MISSING else field.default_factory()
            shown = "absent" if default is None else f"`{json.dumps(default)}`"
            rows += f"| `{full_name}` | {words} | {shown} | {_one_line(texts[field.name])} |\n"
        if (table := table_in_list(hint)) is not None:
            tables += _section(full_name, f"[[{full_name}]]", table)
    purpose = _one_line(section.__doc__ or "")
    return f"## {heading}\n\n{purpose}\n\n| option | type | default | |\n|---|---|---|---|\n{rows}\n{tables}"


def _one_line(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


if __name__ == "__main__":
    sys.stdout.write(reference())
