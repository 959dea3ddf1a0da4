"""Tiny random models, saved as ``save_pretrained`` saves them, with the byte-level tokenizer of the tiny OLMo."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from transformers import (
    AutoModelForCausalLM,
    DeepseekV3Config,
    FalconConfig,
    Gemma2Config,
    Gemma3Config,
    Gemma3TextConfig,
    Glm4MoeConfig,
    GPT2Config,
    GPTNeoXConfig,
    GptOssConfig,
    GraniteMoeConfig,
    LlamaConfig,
    MixtralConfig,
    Olmo2Config,
    Olmo3Config,
    OlmoConfig,
    OlmoeConfig,
    OPTConfig,
    Phi3Config,
    PhiConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2MoeConfig,
    Qwen3Config,
    Qwen3MoeConfig,
)

from tests.ranks import TINY_OLMO

_SHAPE = {
    "vocab_size": 264,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
    "bos_token_id": None,
    "eos_token_id": 0,
    "pad_token_id": 1,
}
_LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}

CONFIGS: dict[str, PreTrainedConfig] = {
    "olmo-tied": OlmoConfig(**_SHAPE, tie_word_embeddings=True),
    "olmo-untied": OlmoConfig(**_SHAPE, tie_word_embeddings=False),
    "olmo2": Olmo2Config(**_SHAPE, tie_word_embeddings=False),
    "llama-scaled-rope": LlamaConfig(
        **_SHAPE, num_key_value_heads=2, tie_word_embeddings=True, rope_parameters=_LLAMA3_ROPE
    ),
    "gemma2": Gemma2Config(**_SHAPE, num_key_value_heads=2, head_dim=8, sliding_window=16, tie_word_embeddings=True),
    "olmo3-sliding-window": Olmo3Config(**_SHAPE, num_key_value_heads=2, sliding_window=16, tie_word_embeddings=False),
    "gpt-neox-renamed-keys": GPTNeoXConfig(**_SHAPE, tie_word_embeddings=False),
    "gpt-neox-tied": GPTNeoXConfig(**_SHAPE, tie_word_embeddings=True),
    "gpt2-learned-positions": GPT2Config(**_SHAPE, n_inner=48, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0),
    "qwen3-qk-norm": Qwen3Config(**_SHAPE, num_key_value_heads=2, head_dim=8, tie_word_embeddings=True),
    "phi-biases-partial-rope": PhiConfig(**_SHAPE),
    "phi3-fused-qkv": Phi3Config(**_SHAPE, num_key_value_heads=2),
    "falcon-multi-query": FalconConfig(**_SHAPE, multi_query=True, new_decoder_architecture=False),
    # Its forward calls the decoder in the backbone.
    "opt-inner-decoder": OPTConfig(**_SHAPE, ffn_dim=48, word_embed_proj_dim=32, dropout=0.0),
    "gemma3-rope-per-layer": Gemma3TextConfig(
        **_SHAPE,
        num_key_value_heads=2,
        head_dim=8,
        sliding_window=16,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
    ),
}
CONFIGS["gemma3-multimodal"] = Gemma3Config(
    text_config=CONFIGS["gemma3-rope-per-layer"].to_dict(),
    # As many layers as the text model, which must not be taken for its own.
    vision_config={
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "image_size": 28,
    },
    mm_tokens_per_image=4,
)

_TWO_LAYERS = {**_SHAPE, "num_hidden_layers": 2, "num_key_value_heads": 2}
_TWO_EACH = {"moe_intermediate_size": 24, "num_experts_per_tok": 2}
_EIGHT = {**_TWO_EACH, "num_experts": 8}
_FOUR = {"intermediate_size": 24, "num_local_experts": 4, "num_experts_per_tok": 2}
_ROUTED = {**_TWO_EACH, "n_routed_experts": 8, "n_shared_experts": 1, "topk_group": 1, "first_k_dense_replace": 1}
_LATENT = {"kv_lora_rank": 16, "q_lora_rank": 24, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8}

# Mixtures of experts; with shared experts, with biases of the router, with first layers that are dense.
MIXTURES: dict[str, PreTrainedConfig] = {
    "olmoe": OlmoeConfig(**{**_TWO_LAYERS, "intermediate_size": 24}, num_experts=8, num_experts_per_tok=2),
    "qwen2-moe": Qwen2MoeConfig(**_TWO_LAYERS, **_EIGHT, shared_expert_intermediate_size=40),
    # Enough layers for two stages of a pipeline on each of two ranks.
    "qwen3-moe": Qwen3MoeConfig(**{**_TWO_LAYERS, "num_hidden_layers": 4}, **_EIGHT, head_dim=8),
    "mixtral": MixtralConfig(**{**_TWO_LAYERS, **_FOUR}),
    # Fewer experts than ranks, which share each.
    "mixtral-two": MixtralConfig(**{**_TWO_LAYERS, **_FOUR, "num_local_experts": 2, "num_experts_per_tok": 1}),
    "deepseek-v3": DeepseekV3Config(**_SHAPE, **_ROUTED, **_LATENT, n_group=2),
    "glm4-moe": Glm4MoeConfig(**_SHAPE, **_ROUTED, num_key_value_heads=2, head_dim=8, n_group=1),
    "gpt-oss": GptOssConfig(**{**_TWO_LAYERS, **_FOUR}, head_dim=8, sliding_window=16),
    "granite-moe": GraniteMoeConfig(**{**_TWO_LAYERS, **_FOUR}),
}


def load_stock(folder: Path) -> PreTrainedModel:
    """By transformers alone, in float32."""
    # Before 5.21 its own choice for Gemma-2 drops the soft-capping of scores.
    capped = "Gemma2" in (folder / "config.json").read_text()
    options = {"attn_implementation": "eager"} if capped else {}
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options)


def save_tiny(name: str, folder: Path, dtype: torch.dtype = torch.float32, max_shard_size: str = "5GB") -> Path:
    """Save the model of ``CONFIGS[name]`` or ``MIXTURES[name]`` with weights from a fixed seed; returns ``folder``."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config((CONFIGS | MIXTURES)[name], dtype=dtype)
    with torch.no_grad():
        for parameter in model.parameters():  # norms and biases too, so that nothing passes by being one or zero
            parameter.add_(torch.randn_like(parameter) * 0.05)
        for key, buffer in model.named_buffers():
            if key.endswith("e_score_correction_bias"):
                buffer.add_(torch.randn_like(buffer) * 0.1)  # routers prefer some experts
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(TINY_OLMO / file, folder / file)
    return folder
