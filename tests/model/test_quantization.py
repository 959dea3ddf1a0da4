"""Float8 without torchao: a linear layer that rounds with one scale, and torchtitan's own filter of names."""

from __future__ import annotations

import copy
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchtitan.components.quantization.utils import module_filter_fn

from flame_ext.assembly import register
from flame_ext.config.sections import FlameJobConfig
from flame_ext.errors import ConfigError
from flame_ext.host.high_precision import in_high_precision
from flame_ext.host.names import model_converters
from flame_ext.model.hf_causal_lm import HFModelArgs, build_hf_causal_lm
from flame_ext.model.quantization import FLOAT8, with_names_of_transformers
from tests.tiny_models import CONFIGS


class Rounded(nn.Linear):
    """Rounds its input by the largest number in it, as float8's scale of a tensor does."""

    def forward(self, x: Tensor) -> Tensor:
        scale = x.abs().max() / 8
        return super().forward((x / scale).round() * scale)


Rounded.__module__ = "torchao.float8.float8_linear"


class Converter:
    """Takes its filters as torchtitan's converters do, and notes what it would convert."""

    def __init__(self, job_config: FlameJobConfig, parallel_dims: Any) -> None:
        self.filter_fqns = job_config.quantize.linear.float8.filter_fqns
        self.filter_fn = partial(module_filter_fn, filter_fqns=self.filter_fqns)
        self.converted: list[str] = []

    def convert(self, model: nn.Module) -> None:
        self.converted = [name for name, module in model.named_modules() if self.filter_fn(module, name)]


def converted(folder: Any, name: str, filters: list[str]) -> list[str]:
    config = FlameJobConfig()
    config.quantize.linear.float8.filter_fqns = filters
    model_config = copy.deepcopy(CONFIGS[name])
    model_config.vocab_size = 272  # as 32 and 48, a multiple of 16
    model_config.save_pretrained(folder)
    made = with_names_of_transformers(Converter)(config, SimpleNamespace())
    made.convert(build_hf_causal_lm(HFModelArgs(hf_assets_path=str(folder))))
    assert config.quantize.linear.float8.filter_fqns == filters, "what the run records stays as it was given"
    return made.converted


def test_the_filter_output_spares_the_output_embedding(tmp_path: Any) -> None:
    assert "lm_head" in converted(tmp_path, "olmo2", [])
    spared = converted(tmp_path, "olmo2", ["output"])
    assert "lm_head" not in spared and len(spared) > 3, "what has another name is converted"


def test_other_filters_are_names_of_transformers(tmp_path: Any) -> None:
    assert not any("mlp" in name for name in converted(tmp_path, "olmo2", ["mlp"]))
    with pytest.raises(ConfigError, match=r"filter_fqns: 'attention.wq' is in the name of no linear layer .*k_proj"):
        converted(tmp_path, "olmo2", ["attention.wq"])


def test_proofs_run_in_high_precision_and_training_does_not() -> None:
    torch.manual_seed(0)
    layer, x = nn.Sequential(Rounded(16, 16)), torch.randn(4, 16)
    compiled = torch.compile(layer, backend="eager")
    exact = nn.functional.linear(x, layer[0].weight, layer[0].bias)
    config = FlameJobConfig()
    with in_high_precision([layer], config):
        assert torch.equal(layer(x), exact) and torch.equal(compiled(x), exact)
    rounded = layer(x)
    assert not torch.allclose(rounded, exact) and torch.equal(compiled(x), rounded)
    with in_high_precision([layer], config):
        assert torch.equal(compiled(x), exact), "what was compiled in the meantime is not used"
    config.quantize.linear.float8.enable_fsdp_float8_all_gather = True
    with in_high_precision([layer], config):
        assert torch.equal(layer(x), rounded), "gathered weights are in float8"


def test_a_tied_output_embedding_that_is_converted_stays_tied(tmp_path: Any) -> None:
    model_config = copy.deepcopy(CONFIGS["olmo-tied"])
    model_config.vocab_size = 272
    model_config.save_pretrained(tmp_path)
    config = FlameJobConfig()
    config.quantize.linear.float8.emulate = True
    register()
    model = build_hf_causal_lm(HFModelArgs(hf_assets_path=str(tmp_path)))
    model_converters[FLOAT8](config, SimpleNamespace(dp_shard_enabled=False)).convert(model)
    assert type(model.lm_head).__name__ == "Float8Linear" and model.tied_keys == {
        "lm_head.weight": "model.embed_tokens.weight"
    }
    model.to_empty(device="cpu")
    model.init_weights()
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.lm_head in model.tied_modules
