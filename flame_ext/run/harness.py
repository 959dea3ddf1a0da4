"""Evaluates a Hugging Face folder by EleutherAI's lm-evaluation-harness, which is imported where it is used: it takes seconds."""

import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flame_ext.errors import UserError
from flame_ext.run.harness_tasks import find_tasks


@dataclass(frozen=True)
class Request:
    """What is asked of a model; the options of ``[evaluation]`` that its figures depend on."""

    tasks: tuple[str, ...]
    include_path: tuple[str, ...] = ()
    num_fewshot: int | None = None
    limit: float | None = None
    apply_chat_template: bool = False
    dtype: str = "auto"


def evaluate(
    folder: Path, request: Request, *, device: str = "cpu", batch_size: int = 1, trust_remote_code: bool = False
) -> dict[str, Any]:
    """Returns what a line of ``evaluations.jsonl`` holds of an evaluation, without its step.

    ``TASK/METRIC`` and ``TASK/METRIC_stderr`` have the figures (``TASK/METRIC/FILTER`` where a task filters answers); the number of
    examples, few-shot examples and version are by task.

    Raises:
        UserError: lm-eval cannot evaluate it, with its reason.
    """
    import lm_eval
    import torch
    import transformers
    from lm_eval.models.huggingface import HFLM

    began = time.perf_counter()
    try:
        manager, tasks = find_tasks(request.tasks, request.include_path)
        model = HFLM(
            pretrained=str(folder),
            backend="causal",
            device=device,
            dtype=request.dtype,
            batch_size=batch_size,
            trust_remote_code=trust_remote_code,
        )
        if model.device != torch.device(device):  # it takes another where there is none of this name
            raise UserError(f"device {device!r} is not there; lm-eval would take {str(model.device)!r}")
        results: Any = lm_eval.simple_evaluate(
            model,
            tasks=tasks,
            num_fewshot=request.num_fewshot,
            limit=request.limit,
            apply_chat_template=request.apply_chat_template,
            task_manager=manager,
            log_samples=False,
        )
    except UserError:
        raise
    except Exception as e:  # of lm-eval, datasets, transformers or code of a task: of any type
        message = " ".join(str(e).split()) or "no message"
        raise UserError(f"lm-eval cannot evaluate {folder}: {type(e).__name__}: {message}") from e
    return {
        "tasks": [*request.tasks],
        **figures(results["results"]),
        "examples": {task: count["effective"] for task, count in results["n-samples"].items()},
        "num_fewshot": results["n-shot"],
        "versions": results["versions"],
        "limit": request.limit,
        "dtype": str(next(model.model.parameters()).dtype).removeprefix("torch."),
        "device": device,
        "lm_eval": lm_eval.__version__,
        "transformers": transformers.__version__,
        "seconds": round(time.perf_counter() - began, 3),
    }


def figures(results: dict[str, dict[str, Any]]) -> dict[str, float | None]:
    """Returns the figures of lm-eval's ``results`` by name; None is one that is not finite, as JSON has none of these."""
    found: dict[str, float | None] = {}
    for task, metrics in results.items():
        for key, value in metrics.items():
            name, comma, answers = key.partition(",")
            if comma and isinstance(value, int | float):  # beside names, and "N/A" for an error that is not known
                full = f"{task}/{name}" if answers == "none" else f"{task}/{name}/{answers}"
                found[full] = float(value) if math.isfinite(value) else None
    return found
