"""An architecture that transformers does not know, registered as a user's ``experimental.custom_import`` does it."""

from __future__ import annotations

import torch
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM


class OwnConfig(LlamaConfig):
    model_type = "flame_ext_test_own"


class OwnForCausalLM(LlamaForCausalLM):
    """Llama with buffers that are saved: a float one that scales the logits, and an integer one."""

    config_class = OwnConfig

    def __init__(self, config: OwnConfig) -> None:
        super().__init__(config)
        self.register_buffer("logit_scale", torch.tensor(1.0))
        self.register_buffer("tokens_seen", torch.tensor(0, dtype=torch.int64))

    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        output.logits = output.logits * self.logit_scale
        return output


AutoConfig.register(OwnConfig.model_type, OwnConfig)
AutoModelForCausalLM.register(OwnConfig, OwnForCausalLM)
