"""Writes the ``README.md`` of an export: the origin of the weights, the run's main options and its last metrics."""

import json
import re
from collections.abc import Mapping
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData

from flame_ext.checkpoint.steps import MANIFEST_NAME, parse_manifest
from flame_ext.files import METRICS_NAME
from flame_ext.heads.registry import shown_on_cards
from flame_ext.seeding.sources.hub import HUB_PREFIX
from flame_ext.seeding.sources.safe_files import find_file

_OPTIONS = (
    *("training.dataset", "training.dataset_path", "training.seq_len", "training.global_batch_size"),
    *("training.steps", "optimizer.name", "optimizer.lr"),
)
_SOURCE = re.compile(r"data\.sources\.\d+\.(path|name|split|weight|max_samples)")


def card_of_step(step: Path, dump_folder: Path | None = None) -> str | None:
    """Returns the card for a step from its manifest and the run's metrics; None without a manifest. Metrics lie in the run's
    ``dump_folder``, by default two folders above the step.
    """
    if not (step / MANIFEST_NAME).is_file():
        return None
    manifest, metrics = parse_manifest(step), {}
    number, file = manifest.get("step"), find_file(dump_folder or step.parent.parent, METRICS_NAME)
    of_step = re.compile(rf'"step": *{number}\b')  # there may be millions of lines
    source: Any = nullcontext([]) if file is None else file.open(errors="replace")
    with source as lines:
        for line in filter(of_step.search, lines):
            with suppress(ValueError, RecursionError):  # the line was cut off by a kill, or edited
                values = json.loads(line)
                if isinstance(values, dict) and values.get("step") == number:
                    metrics = values
    return model_card(manifest, metrics)


def model_card(manifest: Mapping[str, Any], metrics: Mapping[str, Any]) -> str:
    """Returns the Markdown for a step's manifest and its line of ``metrics.jsonl``, with the Hub's metadata in front."""
    seed, config, heads = manifest.get("seed") or {}, manifest.get("config") or {}, manifest.get("heads")
    source = str(seed.get("source", "unknown"))
    base = source.removeprefix(HUB_PREFIX).split("@")[0] if source.startswith(HUB_PREFIX) else None
    tags = ["flame_ext", "torchtitan"]
    data = ModelCardData(library_name="transformers", pipeline_tag="text-generation", tags=tags, base_model=base)
    revision = f", revision {seed['revision']}" if seed.get("revision") else ""
    digest = f", digest of its headers {str(seed['source_digest'])[:16]}" if seed.get("source_digest") else ""
    head_metrics, head_options = shown_on_cards()
    rows: dict[str, Any] = {"continues from": f"`{source}`{revision}{digest}"}
    rows |= {"run": manifest.get("run"), "step": manifest.get("step"), "tokens seen": metrics.get("tokens_seen")}
    rows |= {name: metrics.get(name) for name in ("loss", "loss_ce", *head_metrics)}
    of_heads = [name for name in head_options if config.get(f"{name.partition('.')[0]}.enable")]
    sources = [name for name in config if _SOURCE.fullmatch(name)]
    named = [name for name in _OPTIONS if not (sources and name.startswith("training.dataset"))]  # unused then
    rows |= {name: config.get(name) for name in (*sources, *named, *of_heads)}
    rows["versions"] = ", ".join(f"{name} {version}" for name, version in (manifest.get("versions") or {}).items())
    table = "\n".join(f"| {name} | {_cell(value)} |" for name, value in rows.items() if value not in (None, ""))
    card = f"""---
{data.to_yaml()}
---

# Step {manifest.get("step")} of a continued pre-training

Trained with flame_ext in torchtitan.

| | |
|---|---|
{table}

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("path/of/this/folder")
tokenizer = AutoTokenizer.from_pretrained("path/of/this/folder")
```
"""
    if config.get("data.reverse"):
        card += """
The model reads text from its end to its beginning (`data.reverse`): give it the ids of a text in reverse order, EOS first, and
read what it generates backwards.
"""
    if heads:
        card += f"""
`future_heads/` holds {", ".join(f"`{name}`" for name in heads)}, which no loader of the base model reads:

```python
from flame_ext.analysis import load_with_heads

model, heads = load_with_heads("path/of/this/folder")
```
"""
    return card.encode(errors="replace").decode()


def _cell(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, float) else " ".join(str(value).split()).replace("|", "\\|")
