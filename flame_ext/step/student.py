"""The student's forwards of a step: the attention inputs, what the teacher gives it, its losses, and its routes."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from flame_ext.config.sections import FlameJobConfig
from flame_ext.heads.spec import Sequences
from flame_ext.model.attention import causal_attention
from flame_ext.model.routing import Routes
from flame_ext.model.runner import ModelRunner
from flame_ext.step.losses import Losses, StudentLosses
from flame_ext.step.plan import MicroBatch, StepPlan
from flame_ext.step.reported import Stopwatch
from flame_ext.step.teacher import Teacher


class Student:
    """Runs the model on micro-batches. ``prepared`` is torchtitan's ``post_dataloading_process``, which splits sequences."""

    def __init__(
        self,
        runner: ModelRunner,
        config: FlameJobConfig,
        teacher: Teacher | None,
        losses: Losses,
        prepared: Callable[[dict[str, Tensor], Tensor], tuple[Any, ...]],
        autocast: Callable[[], AbstractContextManager[None]],
        device: torch.device,
        stopwatch: Stopwatch,
    ) -> None:
        self._runner, self._teacher, self._losses, self._prepared = runner, teacher, losses, prepared
        self._autocast, self._device, self._stopwatch = autocast, device, stopwatch
        self._within_documents = config.data.document_attention

    def attention(self, input_dict: dict[str, Tensor], rows: slice) -> dict[str, Any]:
        """The attention inputs of some sequences of a batch."""
        return causal_attention(self._runner.parts[0], input_dict, self._within_documents, self._device, rows)

    def run(self, plan: StepPlan, microbatch: MicroBatch, run: Any, routes: Routes | None = None) -> Any:
        """Lets the teacher summarise a micro-batch's future, then calls ``run``, a method of the runner, on it."""
        if self._teacher is not None:
            self._teacher.teach(plan, microbatch, lambda rows: self.attention(microbatch.inputs, rows))
        inputs, labels, _, _ = self._prepared({"input": microbatch.inputs["input"]}, microbatch.labels)
        context = self._runner.model.context
        whole = Sequences(microbatch.inputs["input"], microbatch.doc_ids, context, microbatch.labels)
        losses = StudentLosses(self._losses, plan, microbatch.future, inputs, labels, whole)

        def inputs_of(rows: slice) -> dict[str, Any]:
            return {**self.attention(microbatch.inputs, rows), "compute": losses.rows(rows), "routes": routes}

        with self._autocast(), self._stopwatch.measure("student"):
            return run(inputs, inputs_of)

    def count(self, microbatch: MicroBatch, routes: Routes) -> None:
        """Runs the layers without gradients, so that ``routes`` knows where a micro-batch's tokens will go. Collective."""
        inputs, *_ = self._prepared({"input": microbatch.inputs["input"]}, microbatch.labels)

        def inputs_of(rows: slice) -> dict[str, Any]:
            return {**self.attention(microbatch.inputs, rows), "output": "hidden_states", "routes": routes}

        with self._autocast(), self._stopwatch.measure("routes"):
            self._runner.forward(inputs, inputs_of)
