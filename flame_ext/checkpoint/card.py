"""The ``README.md`` of an export: where the weights come from and what was done to them."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData

from flame_ext.checkpoint.steps import MANIFEST_NAME
from flame_ext.seeding.sources.hub import HUB_PREFIX
from flame_ext.seeding.sources.safe_files import parse_json

METRICS_NAME = "metrics.jsonl"

_OPTIONS = (
    "training.dataset",
    "training.dataset_path",
    "training.seq_len",
    "training.global_batch_size",
    "training.steps",
    "optimizer.name",
    "optimizer.lr",
    "future_encoder.summary_method",
    "future_encoder.loss_weight",
    "action_layer.loss_weight",
)
_HEAD_SECTIONS = ("future_encoder", "action_layer")
_SOURCE = re.compile(r"data\.sources\.\d+\.(path|name|split|weight|max_samples)")


def card_of_step(step: Path) -> str | None:
    """The card of an export of ``checkpoint/step-N``, from its manifest and the run's metrics; None without a manifest."""
    file = step / MANIFEST_NAME
    if not file.is_file():
        return None
    manifest = parse_json(file.read_bytes(), file, "file")
    return model_card(manifest, _metrics_of(step.parent.parent / METRICS_NAME, manifest.get("step")))


def _metrics_of(file: Path, step: Any) -> dict[str, Any]:
    """The line of a step; empty if there is none."""
    if not file.is_file():
        return {}
    for line in reversed(file.read_text(errors="replace").splitlines()):
        try:
            values = json.loads(line)
        except ValueError:  # cut off by a kill
            continue
        if isinstance(values, dict) and values.get("step") == step:
            return values
    return {}


def model_card(manifest: Mapping[str, Any], metrics: Mapping[str, Any]) -> str:
    """Markdown, with the metadata that the Hub reads in front.

    Args:
        manifest: of the step.
        metrics: the step's line of ``metrics.jsonl``.
    """
    seed = manifest.get("seed") or {}
    source, config, heads = str(seed.get("source", "unknown")), manifest.get("config") or {}, manifest.get("heads")
    data = ModelCardData(
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["flame_ext", "torchtitan"],
        base_model=source.removeprefix(HUB_PREFIX).split("@")[0] if source.startswith(HUB_PREFIX) else None,
    )
    lines = ["---", data.to_yaml(), "---", "", f"# Step {manifest.get('step')} of a continued pre-training", ""]
    lines += ["Trained with flame_ext in torchtitan.", "", "| | |", "|---|---|"]
    digest = f", digest of its headers {seed['source_digest'][:16]}" if seed.get("source_digest") else ""
    revision = f", revision {seed['revision']}" if seed.get("revision") else ""
    lines.append(f"| continues from | `{source}`{revision}{digest} |")
    rows = {"run": manifest.get("run"), "step": manifest.get("step"), "tokens seen": metrics.get("tokens_seen")}
    rows |= {name: metrics.get(name) for name in ("loss", "loss_ce", "loss_future", "loss_action", "future_top1")}
    off = tuple(f"{name}." for name in _HEAD_SECTIONS if not config.get(f"{name}.enable"))
    sources = [name for name in config if _SOURCE.fullmatch(name)]
    if sources:
        off += ("training.dataset",)  # is not read then
    rows |= {name: config.get(name) for name in (*sources, *_OPTIONS) if not name.startswith(off)}
    rows["versions"] = ", ".join(f"{name} {version}" for name, version in (manifest.get("versions") or {}).items())
    lines += [f"| {name} | {_cell(value)} |" for name, value in rows.items() if value not in (None, "")]
    lines += ["", "```python", "from transformers import AutoModelForCausalLM, AutoTokenizer", ""]
    lines += ['model = AutoModelForCausalLM.from_pretrained("path/of/this/folder")']
    lines += ['tokenizer = AutoTokenizer.from_pretrained("path/of/this/folder")', "```"]
    if heads:
        lines += [
            "",
            f"`future_heads/` holds {', '.join(f'`{name}`' for name in heads)}, which no loader of the base model reads:",
        ]
        lines += ["", "```python", "from flame_ext.analysis import load_with_heads", ""]
        lines += ['model, heads = load_with_heads("path/of/this/folder")', "```"]
    return "\n".join([*lines, ""])


def _cell(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value).replace("|", "\\|")
