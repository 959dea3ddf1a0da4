"""Which modules FSDP shards again after their forward: torchtitan's policy, for pipelines as well."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from torch import nn

from flame_ext.config.sections import FlameJobConfig
from flame_ext.model import parallelize
from flame_ext.model.hf_causal_lm import HFModelArgs, build_hf_causal_lm
from tests.tiny_models import save_tiny


@pytest.mark.parametrize(
    ("policy", "stages", "layers", "output"),
    [
        ("default", 1, True, False),
        ("default", 2, False, False),  # each part of a batch would gather them anew
        ("always", 2, True, True),
        ("never", 1, False, False),
    ],
)
def test_parameters_stay_gathered_where_torchtitan_keeps_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, policy: str, stages: int, layers: bool, output: bool
) -> None:
    model = build_hf_causal_lm(HFModelArgs(hf_assets_path=str(save_tiny("olmo-untied", tmp_path))))
    resharded: dict[nn.Module, Any] = {}

    def record(module: nn.Module, reshard_after_forward: bool | None = None, **_: Any) -> None:
        resharded[module] = reshard_after_forward

    monkeypatch.setattr(parallelize, "fully_shard", record)
    config = FlameJobConfig()
    config.parallelism.fsdp_reshard_after_forward = policy
    config.parallelism.pipeline_parallel_degree = stages
    parallelize.apply_fsdp(model, SimpleNamespace(device_type="cpu"), config, None)
    blocks = [model.get_input_embeddings(), *model.layers.children()]
    assert resharded == {**dict.fromkeys(blocks, layers), model.get_output_embeddings(): output, model: None}
