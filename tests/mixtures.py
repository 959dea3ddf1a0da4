"""Tiny random mixtures of experts, saved as ``save_pretrained`` saves them, with the tokenizer of the tiny OLMo."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from transformers import (
    AutoModelForCausalLM,
    DeepseekV3Config,
    Glm4MoeConfig,
    GptOssConfig,
    GraniteMoeConfig,
    MixtralConfig,
    OlmoeConfig,
    PreTrainedConfig,
    Qwen2MoeConfig,
    Qwen3MoeConfig,
)

from tests.ranks import TINY_OLMO

_SHAPE = {
    "vocab_size": 264,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": 1,
    "bos_token_id": None,
    "eos_token_id": 0,
}
_EIGHT = {"moe_intermediate_size": 24, "intermediate_size": 48, "num_experts_per_tok": 2}
_OF_DEEPSEEK = _SHAPE | _EIGHT | {"num_hidden_layers": 3, "n_routed_experts": 8, "n_shared_experts": 1}

MIXTURES: dict[str, PreTrainedConfig] = {
    "olmoe": OlmoeConfig(**_SHAPE, intermediate_size=24, num_experts=8, num_experts_per_tok=2),
    "qwen3-moe": Qwen3MoeConfig(**_SHAPE | _EIGHT | {"num_hidden_layers": 4}, head_dim=8, num_experts=8),
    "qwen2-moe": Qwen2MoeConfig(**_SHAPE, **_EIGHT, shared_expert_intermediate_size=40, num_experts=8),
    "mixtral": MixtralConfig(**_SHAPE, intermediate_size=24, num_local_experts=4, num_experts_per_tok=2),
    "granite-moe": GraniteMoeConfig(**_SHAPE, intermediate_size=24, num_local_experts=4, num_experts_per_tok=2),
    "gpt-oss": GptOssConfig(
        **_SHAPE, head_dim=8, intermediate_size=24, num_local_experts=4, num_experts_per_tok=2, sliding_window=16
    ),
    "deepseek-v3": DeepseekV3Config(
        **_OF_DEEPSEEK
        | {"num_key_value_heads": 4, "n_group": 2, "topk_group": 1, "first_k_dense_replace": 1, "head_dim": 8}
        | {"kv_lora_rank": 16, "q_lora_rank": 24, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8}
    ),
    "glm4-moe": Glm4MoeConfig(**_OF_DEEPSEEK, head_dim=8, n_group=1, topk_group=1, first_k_dense_replace=1),
}


def save_mixture(name: str, folder: Path) -> Path:
    """Save the model of ``MIXTURES[name]`` with weights from a fixed seed, whose routers prefer some experts."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(MIXTURES[name], dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
        for key, buffer in model.named_buffers():
            if key.endswith("e_score_correction_bias"):
                buffer.copy_(torch.randn_like(buffer) * 0.1)
    model.save_pretrained(folder)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(TINY_OLMO / file, folder / file)
    return folder
