"""Evaluates an exported model on the held-out rows of a task, outside the trainer and by transformers alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModelForCausalLM

from flame_ext.lab.data import TaskFolder, read_task
from flame_ext.lab.tasks.creativity import Creative

_BATCH = 256  # rows


def evaluate(export: Path, folder: Path, generations: int, temperature: float, seed: int) -> dict[str, Any]:
    """Returns the figures of a model on a task, shares and means in nats.

    Of the held-out rows' answers, given all tokens before each (teacher forcing): ``loss_answer``, ``accuracy_forced`` and the
    latter by its position in the answer, ``accuracy_by_position``. Of at most ``generations`` rows that the model makes of their
    prompts alone: ``exact``, or for tasks that ask for creativity, by ``temperature`` and ``seed``, ``coherent``, ``new`` and
    ``creative`` (:meth:`Creative.judged`).
    """
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
    model = AutoModelForCausalLM.from_pretrained(export, dtype=torch.float32, local_files_only=True).eval().to(device)
    rows = read_task(folder)
    return forced(model, rows) | generated(model, rows, generations, temperature, seed)


@torch.no_grad()
def forced(model: Any, rows: TaskFolder) -> dict[str, Any]:
    """The figures under teacher forcing."""
    first = max(1, rows.task.prompt)  # the first token of a row follows from nothing
    losses, hits = [], []
    for part in torch.from_numpy(rows.test).split(_BATCH):
        tokens = part.to(model.device)
        logits = model(tokens[:, :-1], use_cache=False).logits[:, first - 1 :].float()
        losses.append(F.cross_entropy(logits.transpose(1, 2), tokens[:, first:], reduction="none").double().cpu())
        hits.append((logits.argmax(-1) == tokens[:, first:]).double().cpu())
    hit = torch.cat(hits)
    found = {"loss_answer": torch.cat(losses).mean().item(), "accuracy_forced": hit.mean().item()}
    return found | ({"accuracy_by_position": hit.mean(0).tolist()} if rows.task.prompt else {})


def generated(model: Any, rows: TaskFolder, count: int, temperature: float, seed: int) -> dict[str, float]:
    """The figures of what the model makes of prompts."""
    task = rows.task
    if isinstance(task, Creative):
        prompts = task.prompts(count, np.random.default_rng((seed, 3)))
        made = _continued(model, torch.from_numpy(prompts), task.length, temperature, seed)
        return task.judged(made.numpy(), rows.train)
    if task.evaluation == "none":
        return {}
    expected = rows.test[:count]
    made = _continued(model, torch.from_numpy(expected[:, : task.prompt]), task.length, 0.0, seed)
    right = task.right(made.numpy(), expected)
    return {"exact": sum(right) / len(right)}


@torch.no_grad()
def _continued(model: Any, prompts: Tensor, length: int, temperature: float, seed: int) -> Tensor:
    """(N, P) prompts to (N, length) rows, the likeliest token each time, or at a temperature above 0 a random one."""
    generator = torch.Generator().manual_seed(seed)
    parts = []
    for part in prompts.split(_BATCH):
        for _ in range(length - part.shape[1]):
            logits = model(part.to(model.device), use_cache=False).logits[:, -1].float().cpu()
            if temperature > 0:
                token = torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator)
            else:
                token = logits.argmax(-1, keepdim=True)
            part = torch.cat([part, token], dim=1)
        parts.append(part)
    return torch.cat(parts)
