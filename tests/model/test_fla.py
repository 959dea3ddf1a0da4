"""flame's own models, where the package that has them is installed: seeded, but not run, since their kernels need a GPU."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

from flame_ext.model.hf_causal_lm import HFModelArgs, build_hf_causal_lm
from flame_ext.seeding.accounting import account
from flame_ext.seeding.names import KeyNames, in_model_names
from flame_ext.seeding.read import read_weights
from flame_ext.seeding.sources.open import open_source

pytest.importorskip("fla", reason="flash-linear-attention is not installed")


def test_a_gated_linear_attention_model_is_seeded(tmp_path: Path) -> None:
    config = AutoConfig.for_model(
        "gla", hidden_size=64, num_hidden_layers=2, num_heads=2, vocab_size=264, intermediate_size=96
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    model = build_hf_causal_lm(HFModelArgs(hf_assets_path=str(tmp_path)))
    assert len(model.layers) == 2
    model.to_empty(device="cpu")
    model.init_weights()
    state = {k: t for k, t in model.state_dict().items() if k not in model.tied_keys}
    shapes = {key: tuple(tensor.shape) for key, tensor in state.items()}
    names = KeyNames(shapes, model.weight_transforms, model.base_model_prefix)
    source = in_model_names(open_source(tmp_path), names)
    keys = account(state, model.tied_keys, model.computed_buffers, [], source, [], [])
    read_weights(source, state, model.tied_keys, check_finite=True)
    held = load_file(tmp_path / "model.safetensors")
    assert set(keys.loaded) == set(held) and all(torch.equal(state[key], held[key]) for key in held)
