"""A user's own head, for ``experimental.custom_import``: which of 264 bytes comes next."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from flame_ext.heads.registry import register_head
from flame_ext.heads.spec import HeadBatch, HeadSpec
from flame_ext.model.initialisation import ParameterInit, linear_inits


class NextByte(nn.Linear):
    """A linear map."""

    def parameter_inits(self) -> dict[str, ParameterInit]:
        return linear_inits(self)


def loss(head: nn.Module, batch: HeadBatch) -> Tensor:
    """Of the labels: with the labels of the language model, so that the number to expect is known."""
    return F.cross_entropy(head(batch.hidden_states.detach()).flatten(0, 1), batch.labels.flatten(), reduction="sum")


def arguments(_section: object, backbone: nn.Module) -> dict[str, int]:
    config = backbone.config.get_text_config()
    return {"in_features": config.hidden_size, "out_features": config.vocab_size}


register_head("next_byte", HeadSpec(NextByte, arguments, loss, takes_parts=True))
