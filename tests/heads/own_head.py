"""A user's own head, for ``job.custom_config_module`` and ``experimental.custom_import``: which of 264 bytes comes next.

No ``from __future__ import annotations`` here: the host merges the section by ``field.type``, which has to be a type.
"""

from dataclasses import dataclass, field

import torch.nn.functional as F
from torch import Tensor, nn

from flame_ext.config.sections import OwnHead
from flame_ext.heads.own import HeadBatch, HeadSpec, register_head
from flame_ext.model.initialisation import ParameterInit, linear_inits


class NextByte(nn.Linear):
    """A linear map."""

    def parameter_inits(self) -> dict[str, ParameterInit]:
        return linear_inits(self)


def loss(head: nn.Module, batch: HeadBatch) -> Tensor:
    """Of the labels: with the labels of the language model, so that the number to expect is known."""
    return F.cross_entropy(head(batch.hidden_states.detach()).flatten(0, 1), batch.labels.flatten(), reduction="sum")


@dataclass
class JobConfig:
    next_byte: OwnHead = field(default_factory=OwnHead)


register_head(
    "next_byte",
    HeadSpec(
        NextByte, lambda _section, config: {"in_features": config.hidden_size, "out_features": config.vocab_size}, loss
    ),
)
