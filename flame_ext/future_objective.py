"""The future-prediction objective of a training step: teacher, keys, losses, and what is logged of them.

``plan`` decides, before the first micro-batch, everything that all ranks have to agree on and that needs the whole step:
the weights, the shift, the global numbers of pairs, and with global negatives the keys of all ranks and micro-batches.
``losses`` then runs inside the student's forward of each micro-batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as funcol
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from flame_ext.config.sections import FlameJobConfig
from flame_ext.data.packing import PADDING
from flame_ext.heads.converter import HEAD_BUILDERS
from flame_ext.heads.future_encoder import AnticausalEncoder, FutureSummaries, MaskForm
from flame_ext.model.hf_causal_lm import HFCausalLM
from flame_ext.model.pipeline import Pipeline, StageInputs
from flame_ext.objective.action import action_losses, candidate_mask
from flame_ext.objective.contrastive import info_nce
from flame_ext.objective.cross_entropy import IGNORE_INDEX, cross_entropy_sum, token_log_probs
from flame_ext.objective.masks import doc_ids_from_eos, has_future, pair_mask
from flame_ext.objective.schedules import scheduled_weight
from flame_ext.step.stopwatch import Stopwatch


class LossWeights(NamedTuple):
    """Weights of one step, beside the cross-entropy's 1."""

    future: float
    action: float
    action_model: float


class KeyBank(NamedTuple):
    """The summaries that predictions are compared with."""

    keys: Tensor
    """(M, D), of unit length."""
    pair_mask: Tensor
    """(M,) bool: summaries that are the target of a prediction."""
    valid_mask: Tensor
    """(M,) bool: positions whose own summary means something."""


@dataclass
class MicroBatch:
    """One micro-batch of the plan."""

    input_ids: Tensor
    """(B, T)"""
    selection: Tensor | None
    """(b,) indices of the sequences whose future is predicted; None = all."""
    doc_ids: Tensor
    """(b, T)"""
    pairs: Tensor
    """(b, T) bool: positions t with a valid summary at t + shift, in their document."""
    bank: KeyBank | None = None
    """None until it is known: pooled summaries come out of the student's forward."""
    first_key: int = 0
    """Where the micro-batch's own (b·T) rows begin in the bank."""

    def select(self, values: Tensor) -> Tensor:
        """(B, …) to (b, …)."""
        return values if self.selection is None else values[self.selection]

    def rows(self, rows: slice) -> MicroBatch:
        """A part of the sequences, which are compared with the same keys."""
        if rows == slice(None):
            return self
        begin, end, _ = rows.indices(len(self.input_ids))
        selection, own = None, slice(begin, end)
        if self.selection is not None:
            first, last = torch.searchsorted(self.selection, torch.tensor([begin, end]).to(self.selection)).tolist()
            selection, own = self.selection[first:last] - begin, slice(first, last)
        return MicroBatch(
            self.input_ids[rows],
            selection,
            self.doc_ids[own],
            self.pairs[own],
            self.bank,
            self.first_key + own.start * self.doc_ids.shape[1],
        )


@dataclass
class StepPlan:
    """What the objective does in one step."""

    weights: LossWeights
    shift: int
    pairs: float
    """Global number of pairs of the step, which the contrastive sum is divided by."""
    positions: float
    """Global number of positions with a future and a next token, which the action losses are divided by."""
    microbatches: list[MicroBatch]


_NO_KEYS = KeyBank(torch.empty(0), torch.empty(0), torch.empty(0))
"""Of a stage of a pipeline that is not the last one."""

Batch = tuple[Tensor, Tensor, Tensor | None]
"""(B, T) inputs, labels, and document numbers if the data have them."""


class FutureObjective:
    """Losses of a model with heads.

    Args:
        model: parallelised.
        config: of the job.
        eos_id: ends a document; None = a sequence is one document.
        mesh: of the ranks that have different data; None = one.
        amp: autocast for forwards, where the host uses it.
        key_dtype: of the summaries as keys, and so of the contrastive loss's matrix products on an accelerator.
        device: of the model.
        pipeline: what runs the model, where ``model`` is its last stage on this rank; the heads are on the last of all.
    """

    def __init__(
        self,
        model: HFCausalLM,
        config: FlameJobConfig,
        eos_id: int | None,
        mesh: DeviceMesh | None,
        amp: AbstractContextManager[None],
        key_dtype: torch.dtype,
        device: torch.device,
        pipeline: Pipeline | None = None,
    ) -> None:
        self.model, self.config, self._mesh, self._amp, self._pipeline = model, config, mesh, amp, pipeline
        self._parts = [model] if pipeline is None else pipeline.parts
        self._encoder_config, self._action = config.future_encoder, config.action_layer
        self._respects_documents = self._encoder_config.respect_doc_boundaries
        self._eos_id = eos_id if self._respects_documents else None
        self._key_dtype, self._device = key_dtype, device
        self._compile_backend = loss_compile_backend(config)
        self.anticausal = isinstance(model.whole.future_encoder, AnticausalEncoder)
        self._mask_form = mask_form(self._encoder_config.teacher_attention, model, device)
        self._dropout = _has_dropout(model.whole)
        self._full_weights = LossWeights(
            self._encoder_config.loss_weight,
            self._action.loss_weight if self._action.enable else 0.0,
            self._action.model_loss_weight if self._action.enable else 0.0,
        )
        self.stopwatch = Stopwatch(device)

    # -- before the first micro-batch ----------------------------------------------------------------------------

    def plan(self, step: int, batches: list[Batch]) -> StepPlan | None:
        """Collective: every rank calls it for every step.

        Args:
            step: counted from 1.
            batches: (B, T) inputs, labels, and document numbers (None: by EOS) of each micro-batch.

        Returns:
            None on a step on which all weights are 0.
        """
        self.stopwatch.restart()
        weights = self._weights(step)
        if not any(weights):
            return None
        encoder = self._encoder_config
        generator = torch.Generator().manual_seed((self.config.seed.rng_seed * 1_000_003 + step) % 2**63)
        shift = int(torch.randint(1, encoder.shift_k + 1, (), generator=generator))  # before ranks draw their own
        rank = 0 if self._mesh is None else self._mesh.get_local_rank()
        generator.manual_seed(((self.config.seed.rng_seed * 1_000_003 + step) * 65_537 + rank) % 2**63)
        selections = [_draw(inputs.shape[0], encoder.teacher_fraction, generator) for inputs, _, _ in batches]
        return self._plan(weights, shift, batches, selections)

    def plan_evaluation(self, batch: Batch) -> StepPlan:
        """A plan for losses that are only to be known: shift 1, every sequence."""
        return self._plan(self._full_weights, 1, [batch], [None])

    def _plan(
        self,
        weights: LossWeights,
        shift: int,
        batches: list[Batch],
        selections: list[Tensor | None],
    ) -> StepPlan:
        counts = torch.zeros(2, dtype=torch.float64, device=self._device)
        microbatches = []
        for (inputs, labels, given), selection in zip(batches, selections, strict=True):
            inputs, labels = inputs.to(self._device), labels.to(self._device)
            doc_ids = self._doc_ids(inputs, given if given is None else given.to(self._device))
            valid = has_future(doc_ids)
            # Of all sequences, times the share that is used: a sum over those is then unbiased.
            share = 1.0 if selection is None else len(selection) / len(inputs)
            pairs = pair_mask(valid, doc_ids, shift)
            counts[0] += pairs.sum() * share
            counts[1] += (valid & (labels != IGNORE_INDEX)).sum() * share
            if selection is not None:
                selection = selection.to(self._device)
                doc_ids, pairs = doc_ids[selection], pairs[selection]
            microbatches.append(MicroBatch(inputs, selection, doc_ids, pairs))
        if self._mesh is not None:
            dist.all_reduce(counts, group=self._mesh.get_group())
        pairs_in_all, positions = counts.clamp_min(1.0).tolist()
        plan = StepPlan(weights, shift, pairs_in_all, positions, microbatches)
        if self.anticausal and self._encoder_config.negatives == "global":
            self._fill_banks(plan)
        return plan

    def _weights(self, step: int) -> LossWeights:
        encoder, action, total = self._encoder_config, self._action, self.config.training.steps
        interval = encoder.teacher_interval
        if (step - 1) % interval != 0:
            return LossWeights(0.0, 0.0, 0.0)
        future, policy = (
            scheduled_weight(weight, step, total, section.loss_weight_warmup_steps, section.loss_weight_decay_steps)
            for weight, section in ((self._full_weights.future, encoder), (self._full_weights.action, action))
        )
        return LossWeights(future * interval, policy * interval, self._full_weights.action_model * interval)

    def _doc_ids(self, inputs: Tensor, given: Tensor | None) -> Tensor:
        """(B, T): documents, as far as they count here, numbered in order."""
        if given is None:
            return torch.zeros_like(inputs) if self._eos_id is None else doc_ids_from_eos(inputs, self._eos_id)
        if self._respects_documents:
            return given
        return torch.where(given < PADDING, 0, given)  # what comes after the end of the data belongs to nothing

    # -- the summaries -------------------------------------------------------------------------------------------

    def teach(self, plan: StepPlan, index: int, attention_of: StageInputs = lambda _rows: {}) -> None:
        """Run the teacher for a micro-batch, where its keys are not known yet. Before the student's forward.

        Args:
            plan: of the step.
            index: of the micro-batch.
            attention_of: rows of it to what the student's attention goes by there.
        """
        microbatch = plan.microbatches[index]
        if self.anticausal and microbatch.bank is None:
            summaries = self._taught(microbatch)
            microbatch.bank = _NO_KEYS if summaries is None else self._bank(summaries, microbatch, plan.shift)
        elif not self.anticausal and self._pipeline is not None and self._pipeline.cuts(len(microbatch.input_ids)):
            self._pool_before(self._pipeline, plan, microbatch, attention_of)

    def summaries(self, input_ids: Tensor, doc_ids: Tensor | None = None) -> FutureSummaries | None:
        """(B, T) tokens, and (B, T) document numbers or None, to anti-causal summaries. Collective.

        None on ranks of a pipeline that do not have its last stage.
        """
        input_ids = input_ids.to(self._device)
        with self._amp, self._without_dropout():
            if self._pipeline is None:
                return self.model.future_encoder(self.model, input_ids, doc_ids, form=self._mask_form)
            encoder = self.model.whole.future_encoder  # without parameters, so it need not be on a stage

            def inputs_of(rows: slice) -> dict[str, Any]:
                documents = None if doc_ids is None else doc_ids[rows]
                mask = encoder.attention_mask(input_ids[rows], documents, self._mask_form)
                return {"attention_mask": mask, "output": "hidden_states"}

            states = self._pipeline.forward(input_ids, inputs_of)
        return None if states is None else encoder.summaries(torch.cat(states), input_ids, doc_ids)

    def _fill_banks(self, plan: StepPlan) -> None:
        """All keys of the step, of all ranks: rank by rank, micro-batch by micro-batch."""
        taught = [self._taught(m) for m in plan.microbatches]
        banks = [
            self._bank(summaries, m, plan.shift)
            for summaries, m in zip(taught, plan.microbatches, strict=True)
            if summaries is not None
        ]
        if not banks:  # not the last stage of a pipeline
            for microbatch in plan.microbatches:
                microbatch.bank = _NO_KEYS
            return
        bank, first = self._gathered(KeyBank(*(torch.cat(parts) for parts in zip(*banks, strict=True))))
        for microbatch in plan.microbatches:
            microbatch.bank, microbatch.first_key = bank, first
            first += microbatch.doc_ids.numel()

    def _taught(self, microbatch: MicroBatch) -> FutureSummaries | None:
        doc_ids = None if self._eos_id is None else microbatch.doc_ids
        with self.stopwatch.measure("teacher"):
            return self.summaries(microbatch.select(microbatch.input_ids), doc_ids)

    def _pooled(self, hidden_states: Tensor, microbatch: MicroBatch, shift: int) -> tuple[KeyBank, int]:
        """The bank of pooled summaries, and where this rank's begin."""
        detach = self._encoder_config.detach_targets
        with torch.set_grad_enabled(torch.is_grad_enabled() and not detach):
            summaries = self.model.future_encoder(hidden_states, microbatch.doc_ids)
            bank = self._bank(summaries, microbatch, shift)
        return self._gathered(bank) if self._encoder_config.negatives == "global" else (bank, 0)

    def _pool_before(
        self, pipeline: Pipeline, plan: StepPlan, microbatch: MicroBatch, attention_of: StageInputs
    ) -> None:
        """The bank of pooled summaries by a forward of its own, where the student's is of one part of them after the other."""

        def inputs_of(rows: slice) -> dict[str, Any]:
            documents = microbatch.doc_ids[rows]
            return {
                **attention_of(rows),
                "compute": lambda _logits, hidden_states: self.model.future_encoder(hidden_states, documents),
            }

        with self._amp, self._without_dropout(), self.stopwatch.measure("teacher"):
            parts = pipeline.forward(microbatch.input_ids, inputs_of)
        microbatch.bank = _NO_KEYS
        if parts is not None:
            bank = self._bank(FutureSummaries(*map(torch.cat, zip(*parts, strict=True))), microbatch, plan.shift)
            everywhere = self._encoder_config.negatives == "global"
            microbatch.bank, microbatch.first_key = self._gathered(bank) if everywhere else (bank, 0)

    def _bank(self, summaries: FutureSummaries, microbatch: MicroBatch, shift: int) -> KeyBank:
        keys = F.normalize(summaries.states.float(), dim=-1).to(self._key_dtype)
        targets = torch.zeros_like(microbatch.pairs)
        targets[:, shift:] = microbatch.pairs[:, :-shift]
        return KeyBank(keys.flatten(0, 1), targets.flatten(), summaries.valid_mask.flatten())

    def _gathered(self, bank: KeyBank) -> tuple[KeyBank, int]:
        """The banks of all data-parallel ranks, and where this rank's begins."""
        if self._mesh is None:
            return bank, 0
        group = self._mesh.get_group()
        # With a gradient, each rank's comes back to where the key is from, as the sum over ranks.
        gather = funcol.all_gather_tensor_autograd if bank.keys.requires_grad else funcol.all_gather_tensor
        masks = torch.stack([bank.pair_mask, bank.valid_mask], dim=1).to(torch.uint8)
        pair, valid = funcol.all_gather_tensor(masks, 0, group).bool().unbind(dim=1)
        first = self._mesh.get_local_rank() * len(bank.keys)
        return KeyBank(gather(bank.keys, 0, group), pair, valid), first

    @contextmanager
    def _without_dropout(self) -> Iterator[None]:
        """A target is not to be noisy; most language models have no dropout, and nothing to switch."""
        switch = self._parts if self._dropout and self.model.training else []
        for part in switch:
            part.eval()
        try:
            yield
        finally:
            for part in switch:
                part.train()

    # -- the losses ----------------------------------------------------------------------------------------------

    def losses(
        self,
        plan: StepPlan,
        index: int,
        labels: Tensor,
        global_valid_tokens: Tensor | float,
        rows: slice = slice(None),
    ) -> Callable[[Tensor, Tensor], tuple[Tensor, dict[str, Tensor]]]:
        """What the student's forward is to compute: logits and hidden states to the total loss and its parts.

        All of them are local sums over global numbers: they add up over micro-batches and ranks.

        Args:
            plan: of the step.
            index: of the micro-batch.
            labels: (B, T), of these rows.
            global_valid_tokens: of the step, which the cross-entropy is divided by.
            rows: of the micro-batch that the forward is of: a pipeline cuts it further.
        """

        def compute(logits: Tensor, hidden_states: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
            trains_action = self._full_weights.action > 0 or self._full_weights.action_model > 0
            log_probs = token_log_probs(
                logits.flatten(0, 1), labels.flatten(), self._action.top_k * trains_action, self._compile_backend
            )
            loss = cross_entropy_sum(log_probs.values[:, 0], labels.flatten()) / global_valid_tokens
            parts = {"loss_ce": loss}
            microbatch = plan.microbatches[index].rows(rows)
            hidden_states = microbatch.select(hidden_states)
            bank, first_key = microbatch.bank, microbatch.first_key
            if bank is None:
                bank, first_key = self._pooled(hidden_states, microbatch, plan.shift)
            if self._full_weights.future > 0:
                future = self._future_losses(plan, microbatch, hidden_states, bank, first_key)
                loss = loss + plan.weights.future * future["loss_future"]
                parts |= future
            if trains_action:
                of_own, token_ids = (
                    microbatch.select(values.unflatten(0, labels.shape)).flatten(0, 1) for values in log_probs
                )
                known = microbatch.select(labels).flatten() != IGNORE_INDEX
                bank = bank._replace(keys=bank.keys.detach())
                action = self._action_losses(plan, of_own, token_ids, known, hidden_states, bank, first_key)
                loss = loss + plan.weights.action * action["loss_action"]
                loss = loss + plan.weights.action_model * action["loss_action_model"]
                parts |= action
            return loss, {name: value.detach() for name, value in parts.items()}

        return compute

    def _future_losses(
        self, plan: StepPlan, microbatch: MicroBatch, hidden_states: Tensor, bank: KeyBank, first_key: int
    ) -> dict[str, Tensor]:
        """InfoNCE of the prediction at t with F_{t+shift}, over all pairs."""
        predictions = self.model.future_predictor(hidden_states).flatten(0, 1)
        pairs = microbatch.pairs.flatten()
        rows = torch.arange(len(pairs), device=pairs.device)
        targets = torch.where(pairs, rows + (first_key + plan.shift), 0)
        out = info_nce(
            predictions,
            bank.keys,
            pairs,
            bank.pair_mask,
            targets,
            self._encoder_config.temperature,
            self._compile_backend,
        )
        sums = {
            "loss_future": out.loss_sum,
            "future_mi_bound": out.information_sum,
            "future_top1": out.top1_sum,
            "future_keys": out.keys_sum,
            "future_cos_positive": out.positive_cosine_sum,
            "future_cos_negative": out.negative_cosine_sum,
        }
        return {name: value / plan.pairs for name, value in sums.items()}

    def _action_losses(
        self,
        plan: StepPlan,
        log_probs: Tensor,
        token_ids: Tensor,
        known: Tensor,
        hidden_states: Tensor,
        bank: KeyBank,
        first_key: int,
    ) -> dict[str, Tensor]:
        """Policy loss, and the head's own: the true token's prediction against other candidates and other positions.

        Args:
            log_probs, token_ids: (n, 1 + K), of the candidates.
            known: (n,) bool, positions with a next token.
            hidden_states: (b, T, D), b·T = n.
        """
        states = hidden_states.flatten(0, 1)
        own = slice(first_key, first_key + len(states))
        summaries, valid = bank.keys[own], bank.valid_mask[own] & known
        with torch.no_grad():  # the head learns what a token leads to; the embeddings stay the language model's
            embeddings = self.model.get_input_embeddings()(token_ids)
        scores, predictions = self.model.action_layer(states, embeddings, summaries)
        out = action_losses(scores, log_probs, candidate_mask(token_ids), valid, self._action.tau)
        rows = torch.arange(first_key, first_key + len(states), device=states.device)
        among_positions = info_nce(
            predictions,
            bank.keys,
            valid,
            bank.valid_mask,
            rows,
            self._encoder_config.temperature,
            self._compile_backend,
        )
        sums = {
            "loss_action": out.policy_loss_sum,
            "loss_action_model": out.choice_loss_sum + among_positions.loss_sum,
            "action_reward": out.reward_sum,
            "action_rank": out.rank_sum,
            "action_cosine": out.cosine_sum,
        }
        return {name: value / plan.positions for name, value in sums.items()}

    def idle(self, hidden_states: Tensor) -> Tensor:
        """Zero, from every trained head of the objective: on a step without the objective, DDP still waits for their gradients.

        Args:
            hidden_states: (B, T, D).
        """
        state = hidden_states[:1, :2].detach()
        nothing = state.new_zeros((), dtype=torch.float32)
        for name in self._heads():
            head = self.model.get_submodule(name)
            if not any(p.requires_grad for p in head.parameters()):
                continue
            if name == "action_layer":
                output = head(state[0], state[0].unsqueeze(1), state[0])[0]
            elif name == "future_encoder":
                output = head(state, torch.zeros(state.shape[:2], dtype=torch.int64, device=state.device)).states
            else:
                output = head(state)
            nothing = nothing + 0.0 * output.float().sum()
        return nothing

    def _heads(self) -> list[str]:
        """The attached heads that are the objective's; a user's own have losses of their own on every step."""
        return [name for name in self.model.head_names if name in HEAD_BUILDERS]

    def drop_idle_gradients(self) -> None:
        """After the backward of an idle step: no gradient rather than zero, so that no optimizer moves the heads."""
        for name in self._heads():
            for parameter in self.model.get_submodule(name).parameters():
                parameter.grad = None


def trains_future(config: FlameJobConfig) -> bool:
    """Whether there is an objective beside the cross-entropy at all. If not, the step is the host's own."""
    action = config.action_layer
    weights = [config.future_encoder.loss_weight]
    weights += [action.loss_weight, action.model_loss_weight] if action.enable else []
    return config.future_encoder.enable and any(weight > 0 for weight in weights)


def mask_form(teacher_attention: str, model: HFCausalLM, device: torch.device) -> MaskForm:
    """The masks of the teacher, for a ``future_encoder.teacher_attention``."""
    if teacher_attention == "flex" or (
        teacher_attention == "auto" and device.type == "cuda" and model._supports_flex_attn
    ):
        return "flex"
    return "windows" if teacher_attention == "auto" and model._supports_attention_backend else "dense"


def loss_compile_backend(config: FlameJobConfig) -> str | None:
    """The backend that the parts of the loss are compiled with (``compile.components`` has "loss"), or None."""
    return config.compile.backend if config.compile.enable and "loss" in config.compile.components else None


def _draw(count: int, fraction: float, generator: torch.Generator) -> Tensor | None:
    if fraction == 1.0:
        return None
    return torch.randperm(count, generator=generator)[: round(fraction * count)].sort().values


def _has_dropout(model: HFCausalLM) -> bool:
    heads = tuple(f"{name}." for name in model.head_names)
    modules = (module for name, module in model.named_modules() if not f"{name}.".startswith(heads))
    config = model.config.get_text_config()
    return any(isinstance(m, nn.Dropout) and m.p > 0 for m in modules) or bool(getattr(config, "attention_dropout", 0))
