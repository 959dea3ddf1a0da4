"""Which modules FSDP shards again after their forward: torchtitan's policy, for pipelines as well."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from torch import nn

from flame_ext.config.sections import FlameJobConfig
from flame_ext.model import parallelize
from flame_ext.model.hf_causal_lm import AttachedHead, HFModelArgs, build_hf_causal_lm
from flame_ext.model.initialisation import linear_inits
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
    config = FlameJobConfig()
    config.parallelism.fsdp_reshard_after_forward = policy
    config.parallelism.pipeline_parallel_degree = stages
    blocks = [model.get_input_embeddings(), *model.layers.children()]
    expected = {**dict.fromkeys(blocks, layers), model.get_output_embeddings(): output, model: None}
    assert sharded(monkeypatch, model, config) == expected


@pytest.mark.parametrize(("looks_up", "unembeds"), [(False, False), (True, False), (False, True)])
def test_an_embedding_that_a_head_calls_again_belongs_to_the_root(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, looks_up: bool, unembeds: bool
) -> None:
    model = build_hf_causal_lm(HFModelArgs(hf_assets_path=str(save_tiny("olmo-untied", tmp_path))))
    head = nn.Linear(2, 2)
    model.add_head("mine", head, linear_inits(head), AttachedHead(uses_embedding=looks_up, uses_unembedding=unembeds))
    assert model.get_input_embeddings() is not model.get_output_embeddings()
    found = sharded(monkeypatch, model, FlameJobConfig())
    assert (model.get_input_embeddings() in found) == (not looks_up)
    assert (model.get_output_embeddings() in found) == (not unembeds)


def sharded(monkeypatch: pytest.MonkeyPatch, model: Any, config: FlameJobConfig) -> dict[nn.Module, Any]:
    """The modules that FSDP is applied to, and whether each is sharded again after its forward."""
    found: dict[nn.Module, Any] = {}

    def record(module: nn.Module, reshard_after_forward: bool | None = None, **_: Any) -> None:
        found[module] = reshard_after_forward

    monkeypatch.setattr(parallelize, "fully_shard", record)
    parallelize.apply_fsdp(model, SimpleNamespace(device_type="cpu"), config, None)
    return found
