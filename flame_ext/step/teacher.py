"""The teacher of a step: summaries of the future, and the keys that predictions are compared with."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
import torch.distributed._functional_collectives as funcol
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torchtitan.config import TORCH_DTYPE_MAP

from flame_ext.config.sections import FlameJobConfig
from flame_ext.errors import ConfigError
from flame_ext.heads.registry import teacher_of
from flame_ext.heads.spec import BackboneTeacher, FutureSummaries, KeyBank
from flame_ext.model.attention import mask_form
from flame_ext.model.hf_causal_lm import HFCausalLM
from flame_ext.model.routing import RouteListener
from flame_ext.model.runner import ModelRunner, StageInputs
from flame_ext.step.plan import FutureRows, MicroBatch, StepPlan
from flame_ext.step.reported import Stopwatch

_NO_KEYS = KeyBank(torch.empty(0), torch.empty(0), torch.empty(0))
"""On ranks of a pipeline without the last stage."""


class Teacher:
    """Makes the summaries of a model with a head that ``is_teacher``; ``mesh`` is that of the ranks that have different data.

    Raises a ConfigError if summaries have to respect documents, and the tokenizer has no EOS.
    """

    def __init__(
        self,
        runner: ModelRunner,
        config: FlameJobConfig,
        eos_id: int | None,
        mesh: DeviceMesh | None,
        autocast: Callable[[], AbstractContextManager[None]],
        device: torch.device,
        stopwatch: Stopwatch,
    ) -> None:
        self._runner, self._mesh, self._autocast = runner, mesh, autocast
        self._device, self._stopwatch = device, stopwatch
        name = teacher_of(config)
        assert name is not None
        self._name, self._options = name, getattr(config, name)
        if self._options.respect_doc_boundaries and eos_id is None:
            raise ConfigError(
                f"{name}.respect_doc_boundaries needs an EOS token, which {config.model.hf_assets_path}/"
                "tokenizer_config.json does not name; name it there, or set respect_doc_boundaries = false"
            )
        whole = runner.model.whole
        self._encoder = whole.get_submodule(name)
        self.anticausal = isinstance(self._encoder, BackboneTeacher)
        """Whether summaries come from a second forward of the backbone; else they are pooled from the student's states."""
        self.remedy = self._encoder.remedy if isinstance(self._encoder, BackboneTeacher) else ""
        """What to do if the proof at step 0 finds a backbone that does not obey the mask; a part of its message."""
        self._sequences = max(1, round(self._options.teacher_fraction * config.training.local_batch_size))
        self._with_documents = self._options.respect_doc_boundaries
        self._mask_form = mask_form(self._options.teacher_attention, runner.model, device)
        # Keys have the dtype of the contrastive loss's matrix products on an accelerator.
        self._key_dtype = TORCH_DTYPE_MAP[config.training.mixed_precision_param]
        self._dropout = _has_dropout(whole)

    def prepare(self, plan: StepPlan) -> None:
        """Fill the banks of all micro-batches where each is compared with the keys of the whole step. Collective.

        The bank then holds all keys of all ranks: rank by rank, micro-batch by micro-batch.
        """
        if not (plan.has_future and self.anticausal and self._options.negatives == "global"):
            return
        taught = [(_future(m), self._taught(m)) for m in plan.microbatches]
        banks = [self._bank(summaries, future, plan.shift) for future, summaries in taught if summaries is not None]
        bank, first = _NO_KEYS, 0
        if banks:
            bank, first = self._gathered(KeyBank(*(torch.cat(parts) for parts in zip(*banks, strict=True))))
        for future, _ in taught:
            future.bank, future.first_key = bank, first
            first += future.doc_ids.numel()

    def teach(self, plan: StepPlan, microbatch: MicroBatch, attention_of: StageInputs) -> None:
        """Fill the bank of a micro-batch before the student's forward, where it is not known yet. Collective.

        ``attention_of`` maps a slice of its sequences to the attention inputs of those sequences.
        """
        future = microbatch.future
        if future is None or future.bank is not None:
            return
        if self.anticausal:
            summaries = self._taught(microbatch)
            future.bank = _NO_KEYS if summaries is None else self._bank(summaries, future, plan.shift)
        elif self._runner.cuts(len(microbatch.labels)):
            self._pool_before(plan, microbatch, attention_of)

    def summaries(
        self, input_ids: Tensor, doc_ids: Tensor | None = None, routes: RouteListener | None = None
    ) -> FutureSummaries | None:
        """(B, T) tokens and document numbers (None = each sequence is one) to anti-causal summaries (B, T, D). Collective.

        None on ranks of a pipeline without the last stage. The routers of a mixture report to ``routes``.
        """
        input_ids, encoder = input_ids.to(self._device), self._encoder
        assert isinstance(encoder, BackboneTeacher)

        def inputs_of(rows: slice) -> dict[str, Any]:
            documents = None if doc_ids is None else doc_ids[rows]
            mask = encoder.attention_mask(input_ids[rows], documents, self._mask_form)
            return {"attention_mask": mask, "output": "hidden_states", "routes": routes}

        with self._autocast(), self._without_dropout():
            states = self._runner.forward(input_ids, inputs_of)
        if states is None:
            return None
        return encoder.summaries(states[0] if len(states) == 1 else torch.cat(states), input_ids, doc_ids)

    def summaries_of_one(self, input_ids: Tensor, routes: RouteListener | None = None) -> Tensor | None:
        """As :meth:`summaries`, from (1, T) tokens of one document to (1, T, D).

        Repeats the sequence to the batch size of training, so that the compiled graphs are those of the steps.
        """
        batch = input_ids.repeat(self._sequences, 1).to(self._device)
        found = self.summaries(batch, torch.zeros_like(batch) if self._with_documents else None, routes)
        return None if found is None else found.states[:1]

    def pool(self, hidden_states: Tensor, future: FutureRows, shift: int) -> tuple[KeyBank, int]:
        """Pool the student's (b, T, D) hidden states into a bank; also returns the row where this rank's summaries begin."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self._options.detach_targets):
            summaries = self._runner.model.get_submodule(self._name)(hidden_states, future.doc_ids)
            return self._shared(self._bank(summaries, future, shift))

    def _taught(self, microbatch: MicroBatch) -> FutureSummaries | None:
        future = _future(microbatch)
        with self._stopwatch.measure("teacher"):
            return self.summaries(
                future.select(microbatch.inputs["input"]), future.doc_ids if self._with_documents else None
            )

    def _pool_before(self, plan: StepPlan, microbatch: MicroBatch, attention_of: StageInputs) -> None:
        """Pool summaries in a separate forward, because a pipelined student sees one part of the micro-batch at a time."""
        future = _future(microbatch)

        def inputs_of(rows: slice) -> dict[str, Any]:
            documents = future.doc_ids[rows]

            # On the last stage, which has the head.
            def pool(_logits: Tensor, hidden_states: Tensor, _unembed: Any) -> Any:
                return self._runner.model.get_submodule(self._name)(hidden_states, documents)

            return {**attention_of(rows), "compute": pool}

        with self._autocast(), self._without_dropout(), self._stopwatch.measure("teacher"):
            parts = self._runner.forward(microbatch.inputs["input"], inputs_of)
        future.bank = _NO_KEYS
        if parts is not None:
            summaries = FutureSummaries(*map(torch.cat, zip(*parts, strict=True)))
            future.bank, future.first_key = self._shared(self._bank(summaries, future, plan.shift))

    def _bank(self, summaries: FutureSummaries, future: FutureRows, shift: int) -> KeyBank:
        keys = F.normalize(summaries.states.float(), dim=-1).to(self._key_dtype)
        targets = torch.zeros_like(future.pairs)
        targets[:, shift:] = future.pairs[:, :-shift]
        return KeyBank(keys.flatten(0, 1), targets.flatten(), summaries.valid_mask.flatten())

    def _shared(self, bank: KeyBank) -> tuple[KeyBank, int]:
        return self._gathered(bank) if self._options.negatives == "global" else (bank, 0)

    def _gathered(self, bank: KeyBank) -> tuple[KeyBank, int]:
        """The banks of all data-parallel ranks, and the row where this rank's begins. Collective."""
        if self._mesh is None:
            return bank, 0
        group = self._mesh.get_group()
        # With a gradient, each rank's comes back to where the key is from, as the sum over ranks.
        gather = funcol.all_gather_tensor_autograd if bank.keys.requires_grad else funcol.all_gather_tensor
        masks = torch.stack([bank.pair_mask, bank.valid_mask], dim=1).to(torch.uint8)
        pair, valid = funcol.all_gather_tensor(masks, 0, group).bool().unbind(dim=1)
        first = self._mesh.get_local_rank() * len(bank.keys)
        keys: Any = gather(bank.keys, 0, group)
        if isinstance(keys, funcol.AsyncCollectiveTensor) and not keys.requires_grad:
            keys = keys.wait()  # else every operation on a tile would ask whether the collective has ended
        return KeyBank(keys, pair, valid), first

    @contextmanager
    def _without_dropout(self) -> Iterator[None]:
        """Targets must not be noisy; most language models have no dropout, and nothing to switch."""
        switch = self._runner.parts if self._dropout and self._runner.model.training else []
        for part in switch:
            part.eval()
        try:
            yield
        finally:
            for part in switch:
                part.train()


def _future(microbatch: MicroBatch) -> FutureRows:
    assert microbatch.future is not None
    return microbatch.future


def _has_dropout(model: HFCausalLM) -> bool:
    heads = tuple(f"{name}." for name in model.heads)
    modules = (module for name, module in model.named_modules() if not f"{name}.".startswith(heads))
    config = model.config.get_text_config()
    return any(isinstance(m, nn.Dropout) and m.p > 0 for m in modules) or bool(getattr(config, "attention_dropout", 0))
