"""The models of configs/ready/, as their configurations say, and how many parameters they are known to have.

Shapes are those of torchtune (torchtune/models/llama3_2, qwen3), allenai/OLMo (configs/official-0425 and -1124) and
EleutherAI/pythia (models/1.4B); of Gemma-3, keras-hub's gemma3_presets.py confirms the number of parameters alone. The other
numbers are those of the model pages on the Hub, from memory: a wrong shape would hardly give one of them.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from transformers import Gemma3TextConfig, GPTNeoXConfig, LlamaConfig, Olmo2Config, PreTrainedConfig, Qwen3Config
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from tests.ranks import TINY_OLMO

_LENGTH, _NO_TOKENS = "max_position_embeddings", {"bos_token_id": None, "eos_token_id": 0, "pad_token_id": 1}
_OLMO2 = {"vocab_size": 100352, _LENGTH: 4096, "rope_theta": 500000.0, "tie_word_embeddings": False, **_NO_TOKENS}
_QWEN3 = {"vocab_size": 151936, _LENGTH: 32768, "num_key_value_heads": 8, "head_dim": 128, **_NO_TOKENS}


def _sizes(hidden: int, intermediate: int, layers: int, heads: int) -> dict[str, int]:
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    return dict(zip(names, (hidden, intermediate, layers, heads), strict=True))


READY: dict[str, tuple[PreTrainedConfig, int]] = {
    "olmo2_1b": (Olmo2Config(**_OLMO2, **_sizes(2048, 8192, 16, 16)), 1_484_916_736),
    "olmo2_7b": (Olmo2Config(**_OLMO2, **_sizes(4096, 11008, 32, 32)), 7_298_617_344),
    "llama3.2_1b": (
        LlamaConfig(
            **{"vocab_size": 128256, _LENGTH: 131072, "num_key_value_heads": 8, "tie_word_embeddings": True},
            **_sizes(2048, 8192, 16, 32),
            **_NO_TOKENS,
        ),
        1_235_814_400,
    ),
    "qwen3_0.6b": (Qwen3Config(**_QWEN3, **_sizes(1024, 3072, 28, 16), tie_word_embeddings=True), 596_049_920),
    "qwen3_8b": (Qwen3Config(**_QWEN3, **_sizes(4096, 12288, 36, 32), tie_word_embeddings=False), 8_190_735_360),
    "gemma3_1b": (
        Gemma3TextConfig(
            **{"vocab_size": 262144, _LENGTH: 32768, "num_key_value_heads": 1, "head_dim": 256, "sliding_window": 512},
            **_sizes(1152, 6912, 26, 4),
            **_NO_TOKENS,
        ),
        999_885_952,
    ),
    "pythia_1.4b": (
        GPTNeoXConfig(
            **{"vocab_size": 50304, _LENGTH: 2048, "rotary_pct": 0.25, "tie_word_embeddings": False},
            **_sizes(2048, 8192, 24, 16),
            **_NO_TOKENS,
        ),
        1_414_647_808,
    ),
}


def save_config(name: str, folder: Path) -> Path:
    """Saves the configuration of a model of :data:`READY`."""
    return save_config_of(READY[name][0], folder)


def save_config_of(config: PreTrainedConfig, folder: Path) -> Path:
    """Saves a model's configuration, and the tiny OLMo's tokenizer, without weights; returns ``folder``."""
    config.architectures = [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[config.model_type]]
    config.save_pretrained(folder)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(TINY_OLMO / file, folder / file)
    return folder
