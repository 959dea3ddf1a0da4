"""The dtypes in which transformers holds and saves the tensors of a model."""

from collections.abc import Mapping
from typing import cast

import torch
from torchtitan.tools.utils import set_default_dtype
from transformers import PreTrainedModel
from transformers.core_model_loading import build_glob_alternation

from flame_ext.model.hf_causal_lm import HFCausalLM, build_hf_causal_lm


def dtypes_in(model: HFCausalLM, dtype: torch.dtype, held: Mapping[str, torch.dtype]) -> dict[str, torch.dtype]:
    """Returns what becomes of the dtypes of tensors, by the model's keys, in ``from_pretrained(dtype=dtype)``.

    This is ``dtype`` but for what the architecture keeps in float32 (a router, its biases), and for what is no floating-point
    number. Tensors that transformers does not know, of heads, are in ``dtype``.
    """
    with set_default_dtype(dtype):
        built = build_hf_causal_lm(model.model_args)
    plan = cast(PreTrainedModel, built)._get_dtype_plan(dtype)
    pattern, names, _ = build_glob_alternation([*plan])
    known = {key: tensor.dtype for key, tensor in built.state_dict().items()}

    def of(key: str) -> torch.dtype:
        found = pattern.search(key) if plan and key in known else None
        return plan[names[str(found.lastgroup)]] if found else known.get(key, dtype)

    return {key: of(key) if own.is_floating_point else own for key, own in held.items()}
