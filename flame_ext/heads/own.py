"""Heads of a user's own: ``register_head`` makes one known, the converter attaches it, the trainer adds its loss.

A module named by ``experimental.custom_import`` registers; docs/heads.md is a worked example.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torchtitan.config import JobConfig
from transformers import PreTrainedConfig

from flame_ext.config.sections import FlameJobConfig, OwnHead
from flame_ext.errors import ConfigError
from flame_ext.heads.names import registered_names
from flame_ext.model.initialisation import ParameterInit
from flame_ext.objective.masks import doc_ids_from_eos

# What the student's forward computes: logits and hidden states to the total loss and its parts.
Losses = Callable[[Tensor, Tensor], tuple[Tensor, dict[str, Tensor]]]


class Head(Protocol):
    """What a head's module has beside ``forward``."""

    def parameter_inits(self) -> dict[str, ParameterInit]:
        """Name of each parameter to its initialisation (``heads/initialisation.py``)."""
        ...


class HeadBatch(NamedTuple):
    """One micro-batch of this rank, as a head's loss sees it."""

    hidden_states: Tensor
    """(B, T, D), after the final norm."""
    logits: Tensor
    """(B, T, V), of the language model."""
    input_ids: Tensor
    """(B, T)"""
    labels: Tensor
    """(B, T): the next token, or -100 where there is none."""
    doc_ids: Tensor
    """(B, T): documents of a sequence numbered from 0; all 0 where the tokenizer has no EOS."""


@dataclass(frozen=True)
class HeadSpec:
    """How a head is built and trained."""

    build: Callable[..., nn.Module]
    """The head from its arguments, a :class:`Head`. Also when an export is loaded."""

    arguments: Callable[[Any, PreTrainedConfig], dict[str, Any]]
    """
    The head's section of the job and the backbone's (text) configuration to the arguments of ``build``, as plain data: an
    export keeps them as JSON.
    """

    loss: Callable[[nn.Module, HeadBatch], Tensor]
    """
    The head and a micro-batch to a scalar: a sum over this micro-batch. It is divided by the number of labelled tokens of
    the whole step, of all ranks and micro-batches. The head has to be called, ``head(…)``, not just its parts: FSDP gathers
    its parameters for the call. All its parameters have to take part in every call: DDP waits for their gradients.
    """


_registered: dict[str, HeadSpec] = {}


def register_head(name: str, spec: HeadSpec) -> None:
    """Make a head known. It is attached where its section, ``[name]``, says ``enable = true``.

    Args:
        name: of the section (a dataclass that extends :class:`flame_ext.config.sections.OwnHead`), of the module in the
            model, and the first part of its parameters' keys.
        spec: the rest.

    Raises:
        ConfigError: the name is taken, or is none.
    """
    if not name.isidentifier():
        raise ConfigError(
            f"register_head({name!r}): a head's name must be an identifier, it names a section and a module"
        )
    if name in {field.name for field in fields(FlameJobConfig)}:
        raise ConfigError(f"register_head({name!r}): there is a section of this name already; take another one")
    if _registered.setdefault(name, spec) is not spec:
        raise ConfigError(f"register_head({name!r}): another head has this name; take another one")
    registered_names.add(name)


def own_head(name: str) -> HeadSpec | None:
    """A registered head."""
    return _registered.get(name)


def enabled_heads(config: JobConfig) -> dict[str, OwnHead]:
    """Name of each registered head that the job enables to its section, in the order of registration."""
    sections = {name: getattr(config, name, None) for name in _registered}
    return {name: section for name, section in sections.items() if isinstance(section, OwnHead) and section.enable}


def trains_own_heads(config: JobConfig) -> bool:
    """Whether a head of the user's own has a loss."""
    return any(section.loss_weight > 0 for section in enabled_heads(config).values())


def check_own_heads(config: JobConfig) -> Iterator[str]:
    """What is wrong with the sections of the registered heads, one sentence each."""
    for name in _registered:
        section = getattr(config, name, None)
        if section is None:
            yield (
                f"head {name!r} is registered, but there is no section [{name}]: job.custom_config_module must name a module "
                f"whose JobConfig has a field {name!r}"
            )
        elif not isinstance(section, OwnHead):
            yield f"[{name}]: its dataclass must extend flame_ext.config.sections.OwnHead, got {type(section).__name__}"
        elif section.loss_weight < 0:
            yield f"{name}.loss_weight must be >= 0 (0 = not computed), got {section.loss_weight}"


class OwnHeadLosses:
    """Adds the losses of the user's own heads to those of a micro-batch.

    Args:
        model: parallelised.
        config: of the job.
        eos_id: ends a document; None = a sequence is one document.
    """

    def __init__(self, model: nn.Module, config: JobConfig, eos_id: int | None) -> None:
        self._model, self._eos_id = model, eos_id
        self._weights = {n: s.loss_weight for n, s in enabled_heads(config).items() if s.loss_weight > 0}

    def beside(
        self,
        compute: Losses,
        input_ids: Tensor,
        labels: Tensor,
        global_valid_tokens: Tensor | float,
        doc_ids: Tensor | None = None,
    ) -> Losses:
        """``compute``, and then the heads, each as ``loss_NAME`` among the parts.

        Args:
            compute: the losses so far.
            input_ids, labels: (B, T).
            global_valid_tokens: of the step.
            doc_ids: (B, T), if the data have them; else by EOS.
        """
        if not self._weights:
            return compute

        documents = doc_ids
        if documents is None:
            documents = (
                torch.zeros_like(input_ids) if self._eos_id is None else doc_ids_from_eos(input_ids, self._eos_id)
            )

        def with_heads(logits: Tensor, hidden_states: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
            loss, parts = compute(logits, hidden_states)
            batch = HeadBatch(hidden_states, logits, input_ids, labels, documents)
            for name, weight in self._weights.items():
                value = _registered[name].loss(self._model.get_submodule(name), batch)
                if value.ndim != 0:
                    raise ConfigError(f"the loss of head {name!r} must be a scalar (a sum), got {list(value.shape)}")
                value = value.float() / global_valid_tokens
                loss = loss + weight * value
                parts = {**parts, f"loss_{name}": value.detach()}
            return loss, parts

        return with_heads
