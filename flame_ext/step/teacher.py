"""The teacher of a step: summaries of the future, and the keys that predictions are compared with."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
import torch.distributed._functional_collectives as funcol
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torchtitan.config import TORCH_DTYPE_MAP

from flame_ext.config.sections import FlameJobConfig
from flame_ext.errors import ConfigError
from flame_ext.heads.registry import teacher_of
from flame_ext.heads.reverse_lm import ReverseEncoder
from flame_ext.heads.spec import BackboneTeacher, FutureSummaries, KeyBank
from flame_ext.model.attention import mask_form
from flame_ext.model.dropout import has_dropout
from flame_ext.model.routing import RouteListener
from flame_ext.model.runner import ModelRunner, StageInputs
from flame_ext.step.plan import FutureRows, MicroBatch, StepPlan
from flame_ext.step.reported import Stopwatch
from flame_ext.step.reverse_model import ReverseModel

_NO_KEYS = KeyBank(torch.empty(0), torch.empty(0), torch.empty(0))
"""On ranks of a pipeline without the last stage."""


class Teacher:
    """Makes the summaries of a model with a head that ``is_teacher``; ``mesh`` is that of the ranks that have different positions.

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
        self._device, self._stopwatch, self._parts = device, stopwatch, runner.model.context
        # Without "parts", a teacher is called as one that knows of whole sequences alone.
        self._given: dict[str, Any] = {"parts": self._parts} if self._parts.is_split else {}
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
        """Whether summaries come from a second forward of the backbone."""
        self._reverse: ReverseModel | None = None
        if isinstance(self._encoder, ReverseEncoder):
            self._reverse = ReverseModel(config, runner.dims, runner.has_last, device)
        # Else summaries are pooled from the student's states.
        self._has_forward = self.anticausal or self._reverse is not None
        self.remedy = self._encoder.remedy if isinstance(self._encoder, BackboneTeacher) else ""
        """What to do if the proof at step 0 finds a backbone that does not obey the mask; a part of its message."""
        self._sequences = max(1, round(self._options.teacher_fraction * config.training.local_batch_size))
        self._with_documents = self._options.respect_doc_boundaries
        self._mask_form = mask_form(self._options.teacher_attention, runner.model, device)
        # Keys have the dtype of the contrastive loss's matrix products on an accelerator.
        self._key_dtype = TORCH_DTYPE_MAP[config.training.mixed_precision_param]
        self._dropout = has_dropout(whole, with_heads=False)

    @property
    def record(self) -> dict[str, Any]:
        """What determines the numbers of a run beside its options, by full name."""
        if self._reverse is None:
            return {}
        code = {f"{self._name}.reverse_code/{name}": digest for name, digest in self._reverse.code.items()}
        return {f"{self._name}.reverse_weights": self._reverse.digest, **code}

    def prepare(self, plan: StepPlan) -> None:
        """Fill the banks of all micro-batches where each is compared with the keys of the whole step. Collective.

        The bank then holds all keys of all ranks: rank by rank, micro-batch by micro-batch.
        """
        if not (plan.has_future and self._has_forward and self._options.negatives == "global"):
            return
        taught = [(_future(m), self._taught(m)) for m in plan.microbatches]
        banks = [self._bank(summaries, future, plan.shift) for future, summaries in taught if summaries is not None]
        found: dict[str, Any] = {"bank": _NO_KEYS, "first_key": 0}
        if banks:
            found = self._shared(KeyBank(*(torch.cat(parts) for parts in zip(*banks, strict=True))))
        for future, _ in taught:
            _set(future, found)
            found["first_key"] += future.doc_ids.numel() // self._parts.ranks

    def teach(self, plan: StepPlan, microbatch: MicroBatch, attention_of: StageInputs) -> None:
        """Fill the bank of a micro-batch before the student's forward, where it is not known yet. Collective.

        ``attention_of`` maps a slice of its sequences to the attention inputs of those sequences.
        """
        future = microbatch.future
        if future is None or future.bank is not None:
            return
        if self._has_forward:
            summaries = self._taught(microbatch)
            found = None if summaries is None else self._shared(self._bank(summaries, future, plan.shift))
            _set(future, found or {"bank": _NO_KEYS})
        elif self._runner.cuts(len(microbatch.labels)):
            self._pool_before(plan, microbatch, attention_of)

    def summaries(
        self, input_ids: Tensor, doc_ids: Tensor | None = None, routes: RouteListener | None = None
    ) -> FutureSummaries | None:
        """(B, T) tokens and document numbers (None = each sequence is one) to anti-causal summaries (B, n, D). Collective.

        None on ranks of a pipeline without the last stage. The routers of a mixture report to ``routes``.
        """
        input_ids, encoder, parts = input_ids.to(self._device), self._encoder, self._parts
        assert isinstance(encoder, BackboneTeacher)

        def inputs_of(rows: slice) -> dict[str, Any]:
            tokens, documents = input_ids[rows], None if doc_ids is None else doc_ids[rows]
            mask = encoder.attention_mask(tokens, documents, self._mask_form, **self._given)
            inputs = {"attention_mask": mask, "output": "hidden_states", "routes": routes}
            if parts.is_split:
                positions = parts.positions(tokens.shape[1], tokens.device).expand(len(tokens), -1)
                inputs |= {"position_ids": positions, "part_of_sequence": True}
            return inputs

        with self._autocast(), self._without_dropout():
            states = self._runner.forward(parts.shard(input_ids), inputs_of)
        if states is None:
            return None
        joined = states[0] if len(states) == 1 else torch.cat(states)
        return encoder.summaries(joined, input_ids, doc_ids, **self._given)

    def summaries_of_one(self, input_ids: Tensor, routes: RouteListener | None = None) -> Tensor | None:
        """As :meth:`summaries`, from (1, T) tokens of one document to (1, T, D).

        Repeats the sequence to the batch size of training, so that the compiled graphs are those of the steps.
        """
        batch = input_ids.repeat(self._sequences, 1).to(self._device)
        found = self.summaries(batch, torch.zeros_like(batch) if self._with_documents else None, routes)
        return None if found is None else self._parts.unshard(found.states[:1])

    def pool(self, hidden_states: Tensor, future: FutureRows, shift: int) -> dict[str, Any]:
        """Pool the student's (b, n, D) hidden states into a bank; returns it and where this rank's summaries lie in it, by field."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self._options.detach_targets):
            return self._shared(self._bank(self._pooled(hidden_states, future.doc_ids), future, shift))

    def _pooled(self, hidden_states: Tensor, doc_ids: Tensor) -> FutureSummaries:
        return self._runner.model.get_submodule(self._name)(hidden_states, doc_ids, **self._given)

    def _taught(self, microbatch: MicroBatch) -> FutureSummaries | None:
        future = _future(microbatch)
        with self._stopwatch.measure("teacher"):
            if self._reverse is None:
                tokens = future.select(microbatch.inputs["input"])
                return self.summaries(tokens, future.doc_ids if self._with_documents else None)
            if not self._runner.has_last:
                return None
            with self._autocast():
                states = self._reverse.states(future.select(microbatch.next_tokens()), future.next_doc_ids())
            assert isinstance(self._encoder, ReverseEncoder)
            return self._encoder.summaries(states, future.doc_ids, self._parts)

    def _pool_before(self, plan: StepPlan, microbatch: MicroBatch, attention_of: StageInputs) -> None:
        """Pool summaries in a separate forward, because a pipelined student sees one part of the micro-batch at a time."""
        future = _future(microbatch)

        def inputs_of(rows: slice) -> dict[str, Any]:
            documents = future.doc_ids[rows]

            # On the last stage, which has the head.
            def pool(_logits: Tensor, hidden_states: Tensor, _unembed: Any) -> Any:
                return self._pooled(hidden_states, documents)

            return {**attention_of(rows), "compute": pool}

        with self._autocast(), self._without_dropout(), self._stopwatch.measure("teacher"):
            parts = self._runner.forward(self._parts.shard(microbatch.inputs["input"]), inputs_of)
        future.bank = _NO_KEYS
        if parts is not None:
            summaries = FutureSummaries(*map(torch.cat, zip(*parts, strict=True)))
            _set(future, self._shared(self._bank(summaries, future, plan.shift)))

    def _bank(self, summaries: FutureSummaries, future: FutureRows, shift: int) -> KeyBank:
        keys = F.normalize(summaries.states.float(), dim=-1).to(self._key_dtype)
        targets = torch.zeros_like(future.pairs)
        targets[:, shift:] = future.pairs[:, :-shift]
        return KeyBank(keys.flatten(0, 1), self._parts.shard(targets).flatten(), summaries.valid_mask.flatten())

    def _shared(self, bank: KeyBank) -> dict[str, Any]:
        """The banks of all ranks, or of those that share the same sequences, and where this rank's is, by field. Collective."""
        own, mesh = len(bank.keys), self._mesh if self._options.negatives == "global" else self._parts.mesh
        bank = bank if mesh is None else self._gathered(bank, mesh)
        return {"bank": bank, "first_key": mesh.get_local_rank() * own if mesh else 0, "keys_of_rank": own}

    def _gathered(self, bank: KeyBank, mesh: DeviceMesh) -> KeyBank:
        group = mesh.get_group()
        # With a gradient, each rank's comes back to where the key is from, as the sum over ranks.
        gather = funcol.all_gather_tensor_autograd if bank.keys.requires_grad else funcol.all_gather_tensor
        masks = torch.stack([bank.pair_mask, bank.valid_mask], dim=1).to(torch.uint8)
        pair, valid = funcol.all_gather_tensor(masks, 0, group).bool().unbind(dim=1)
        keys: Any = gather(bank.keys, 0, group)
        if isinstance(keys, funcol.AsyncCollectiveTensor) and not keys.requires_grad:
            keys = keys.wait()  # else every operation on a tile would ask whether the collective has ended
        return KeyBank(keys, pair, valid)

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


def _set(future: FutureRows, values: dict[str, Any]) -> None:
    for name, value in values.items():
        setattr(future, name, value)


def _future(microbatch: MicroBatch) -> FutureRows:
    assert microbatch.future is not None
    return microbatch.future
