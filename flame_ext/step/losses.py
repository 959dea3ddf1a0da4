"""What the student's forward computes: the cross-entropy and the loss of every trained head, added up."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor, nn

from flame_ext.config.sections import FlameJobConfig, loss_compile_backend
from flame_ext.errors import ConfigError
from flame_ext.heads.registry import enabled_heads, loss_weights, trained_heads
from flame_ext.heads.spec import FutureBatch, HeadBatch, HeadSpec, Sequences
from flame_ext.model.hf_causal_lm import LossOutput, Unembed
from flame_ext.model.runner import ModelRunner
from flame_ext.objective.cross_entropy import TokenLogProbs, cross_entropy_sum, token_log_probs, weighted_sum
from flame_ext.step.plan import FutureRows, StepPlan
from flame_ext.step.teacher import Teacher


class Losses:
    """Computes the losses of a run's micro-batches from the model, the options and the teacher."""

    def __init__(self, runner: ModelRunner, config: FlameJobConfig, teacher: Teacher | None) -> None:
        self.model, self.config, self.teacher = runner.model, config, teacher
        self.heads = trained_heads(config)
        self.weighed = {head: [n for n, weight in loss_weights(head, config).items() if weight] for head in self.heads}
        """Name of each trained head to the names of the losses that it has to give."""
        self.resting_heads = [
            name for name, spec in enabled_heads(config).items() if spec.needs_future or spec.is_teacher
        ]
        """Heads without gradients on a step without a teacher."""
        self.needs_all_gradients = runner.needs_all_gradients
        self.candidates = max(
            (spec.candidates(getattr(config, name)) for name, spec in self.heads.items() if spec.candidates), default=0
        )
        self.compile_backend = loss_compile_backend(config)

    def resting_parameters(self) -> list[nn.Parameter]:
        """The parameters, on this rank, of heads that rest on a step without a teacher."""
        here = (name for name in self.resting_heads if name in self.model.heads)
        return [p for name in here for p in self.model.get_submodule(name).parameters()]


@dataclass(frozen=True)
class StudentLosses:
    """The losses of some sequences of a micro-batch. Called in the student's forward, where FSDP has gathered the heads.

    Everything is a local sum over a number of the whole step: it adds up over micro-batches and ranks.
    """

    run: Losses
    plan: StepPlan
    future: FutureRows | None
    inputs: Tensor  # (B, n) of this rank's positions
    labels: Tensor  # (B, n)
    whole: Sequences

    def rows(self, rows: slice) -> StudentLosses:
        """The losses of a part of the sequences."""
        if rows == slice(None):
            return self
        future = None if self.future is None else self.future.rows(rows, *self.labels.shape)
        tokens, documents, parts, labels = self.whole
        whole = Sequences(tokens[rows], documents[rows], parts, None if labels is None else labels[rows])
        return replace(self, future=future, inputs=self.inputs[rows], labels=self.labels[rows], whole=whole)

    def __call__(self, logits: Tensor, hidden_states: Tensor, unembed: Unembed | None = None) -> LossOutput:
        """(B, n, V) logits, a DTensor under loss parallelism, and (B, n, D) hidden states after the final norm to the losses."""
        labels, run = self.labels.flatten(), self.run
        candidates = run.candidates if self.plan.has_future else 0
        log_probs = token_log_probs(logits.flatten(0, 1), labels, candidates, run.compile_backend)
        loss = cross_entropy_sum(log_probs.values[:, 0], labels) / self.plan.tokens
        parts = {"loss_ce": loss}
        options = run.config.loss
        if options.weighting == "dft":
            parts["loss_dft"] = weighted_sum(log_probs.values[:, 0], labels) / self.plan.tokens
            loss = options.mix_ce * loss + (1 - options.mix_ce) * parts["loss_dft"]
        if options.ce_weight != 1:
            loss = options.ce_weight * loss
        doc_ids = self.whole.parts.shard(self.whole.doc_ids)
        tensors = (hidden_states, logits, self.inputs, self.labels, doc_ids)
        future = self._future(hidden_states, log_probs)
        batch = HeadBatch(
            *tensors, self.plan.tokens, run.config, None, unembed, future, run.compile_backend, self.whole
        )
        for name, spec in run.heads.items():
            if spec.needs_future and batch.future is None:
                continue
            values = self._losses_of(name, spec, batch)
            for value_name, value in values.items():
                if value_name in self.plan.weights:
                    loss = loss + self.plan.weights[value_name] * value
            parts |= values
        if batch.future is None and run.needs_all_gradients:
            for parameter in run.resting_parameters():
                if parameter.requires_grad:  # DDP waits for its gradient
                    loss = loss + 0.0 * parameter.sum()
        return LossOutput(loss, {name: value.detach() for name, value in parts.items()})

    def _future(self, hidden_states: Tensor, log_probs: TokenLogProbs) -> FutureBatch | None:
        future, plan = self.future, self.plan
        if future is None:
            return None
        hidden_states = future.select(hidden_states)
        parts = self.whole.parts
        if future.bank is None:
            assert self.run.teacher is not None
            future = replace(future, **self.run.teacher.pool(hidden_states, future, plan.shift))
        assert future.bank is not None
        shape, labels = self.labels.shape, future.select(self.labels)
        selected = TokenLogProbs(*(future.select(values.unflatten(0, shape)).flatten(0, 1) for values in log_probs))
        keys, counts = (future.bank, future.first_key, plan.shift), (plan.pairs, plan.positions)
        pairs, targets = parts.shard(future.pairs), future.targets(plan.shift, parts)
        return FutureBatch(hidden_states, labels, selected, pairs, *keys, *counts, targets)

    def _losses_of(self, name: str, spec: HeadSpec, batch: HeadBatch) -> dict[str, Tensor]:
        assert spec.loss is not None
        model = self.run.model
        if spec.uses_embedding:
            batch = batch._replace(embed=model.get_input_embeddings())
        if not spec.uses_unembedding:
            batch = batch._replace(unembed=None)
        values = spec.loss(model.get_submodule(name), batch)
        if not isinstance(values, dict):
            if values.ndim != 0:
                raise ConfigError(f"the loss of head {name!r} must be a scalar (a sum), got {list(values.shape)}")
            values = {f"loss_{name}": values.float() / self.plan.tokens}
        if missing := [loss for loss in self.run.weighed[name] if loss not in values]:
            raise ConfigError(
                f"the loss of head {name!r} gives {', '.join(values)}, and its weights are of {', '.join(missing)}: name them alike"
            )
        return values
