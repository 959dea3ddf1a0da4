"""What a batch has to tell the backbone's causal attention: its documents, and which positions are this rank's."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from flame_ext.future_objective import mask_form
from flame_ext.model.attention import attention_windows
from flame_ext.model.hf_causal_lm import HFCausalLM
from flame_ext.objective.masks import causal_block_mask, causal_mask


def causal_attention(
    model: HFCausalLM,
    input_dict: dict[str, Tensor],
    within_documents: bool,
    device: torch.device,
    rows: slice = slice(None),
) -> dict[str, Any]:
    """Arguments of the model's forward, beside the tokens; none if it may attend as it does by itself.

    Args:
        model: with its ``context``, if a rank has a part of each sequence. Collective for a new length then.
        input_dict: as a dataloader gives it, (B, T) each: "input", "doc_ids" and "positions" if there are documents.
        within_documents: ``data.document_attention``.
        device: of the masks.
        rows: sequences of the batch.
    """
    context = model.context
    within = within_documents and "doc_ids" in input_dict
    if not within and context is None:
        return {}
    batch_size, seq_len = input_dict["input"][rows].shape
    part: dict[str, Any] = {}
    queries = keys = torch.arange(seq_len, device=device)
    if context is not None:
        queries, keys, part = context.positions(seq_len), context.order(seq_len), {"part_of_sequence": True}
    doc_ids, positions = None, queries.expand(batch_size, -1)
    if within:
        doc_ids, positions = (input_dict[name][rows].to(device) for name in ("doc_ids", "positions"))
        positions = positions if context is None else context.shard(positions)
    make = causal_block_mask if mask_form("auto", model, device) == "flex" else causal_mask
    masks = {kind: make(doc_ids, window, queries, keys) for kind, window in attention_windows(model.config).items()}
    mask = masks if len(masks) > 1 else next(iter(masks.values()))
    return {"attention_mask": mask, "position_ids": positions, **part}
