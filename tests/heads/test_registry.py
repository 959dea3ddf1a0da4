"""Heads of a user's own, in whole runs and in what is refused. docs/extending.md is run by tests/test_docs.py."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn
from transformers import OPTConfig

from flame_ext.config.sections import Loss
from flame_ext.errors import CheckpointError, ConfigError
from flame_ext.heads import registry
from flame_ext.heads.registry import (
    attach_heads,
    build_head,
    check_heads,
    enabled_heads,
    job_config_class,
    register_head,
)
from flame_ext.heads.spec import HeadBatch, HeadSpec, Sequences, WeightedHeadSection
from flame_ext.model.hf_causal_lm import HFModelArgs, build_hf_causal_lm
from flame_ext.step.losses import Losses, StudentLosses
from flame_ext.step.plan import StepPlan
from tests.ranks import TINY_OLMO, train

PLUGIN = ("--experimental.custom_import=tests.heads.own_head",)
STEPS = ("--training.steps=2", "--lr_scheduler.total_steps=60")
WITHOUT_FUTURE = ("--future_encoder.no-enable", "--future_predictor.no-enable")


def test_a_head_beside_the_objective_is_the_same_on_any_layout(tmp_path: Path) -> None:
    head = (*STEPS, *PLUGIN, "--next_byte.enable", "--next_byte.loss_weight=0.5", "--next_byte.lr_scale=2")
    head += ("--future_encoder.teacher_interval=2",)  # on the second step the objective rests, and the head does not
    one = train(tmp_path / "one", *head)
    # DDP waits for every parameter's gradient, also on the step on which the teacher rests.
    two = train(tmp_path / "two", *head, "--training.local_batch_size=4", DDP2, world_size=2)
    for line, expected in zip(two.metrics, one.metrics, strict=True):
        for name in ("loss", "loss_ce", "loss_future", "loss_next_byte", "grad_norm", "grad_norm_heads"):
            wanted = expected[name]
            assert line[name] == (None if wanted is None else pytest.approx(wanted, rel=1e-5)), (line["step"], name)
    first, second = one.metrics
    assert first["loss"] == pytest.approx(
        first["loss_ce"] + 2 * 0.1 * first["loss_future"] + 0.5 * first["loss_next_byte"], rel=1e-6
    )
    assert math.log(264) * 0.8 < first["loss_next_byte"] < 10  # nothing learned yet
    assert second["loss_future"] is None and second["grad_norm_heads"] > 0
    exported = load_file(one.dump_folder / "hf" / "step-2" / "future_heads" / "model.safetensors")
    assert exported["next_byte.weight"].shape == (264, 128)


DDP2 = "--parallelism.data_parallel_replicate_degree=2"


def test_weight_zero_is_a_plain_run(tmp_path: Path) -> None:
    plain = train(tmp_path / "plain", *STEPS, *WITHOUT_FUTURE, "--model.converters=")
    zero = train(tmp_path / "zero", *STEPS, *PLUGIN, *WITHOUT_FUTURE, "--next_byte.enable", "--next_byte.loss_weight=0")
    assert zero.values("loss") == plain.values("loss") and zero.values("grad_norm") == plain.values("grad_norm")
    folders = [run.dump_folder / "hf" / "step-2" / "model.safetensors" for run in (plain, zero)]
    weights = [load_file(folder) for folder in folders]
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])


def test_a_backbone_is_frozen_whichever_head_is_enabled(tmp_path: Path) -> None:
    frozen = (*STEPS, *PLUGIN, *WITHOUT_FUTURE, "--next_byte.enable", "--future_predictor.freeze_backbone")
    run = train(tmp_path, *frozen, "--checkpoint.export_dtype=bfloat16")
    assert run.values("grad_norm_backbone") == [0, 0] and all(norm > 0 for norm in run.values("grad_norm_heads"))
    source, exported = load_file(TINY_OLMO / "model.safetensors"), run.dump_folder / "hf" / "step-2"
    weights = load_file(exported / "model.safetensors")
    assert weights.keys() == source.keys() and all(torch.equal(weights[key], source[key]) for key in source)


@pytest.fixture
def registered(monkeypatch: pytest.MonkeyPatch) -> HeadSpec:
    """One head, "mine", and no other: a linear map from 3 to 5 with the summed cross-entropy of the labels."""
    monkeypatch.setattr(registry, "_heads", {})
    monkeypatch.setattr(registry, "HEAD_NAMES", [])
    spec = HeadSpec(
        nn.Linear,
        lambda _section, _backbone: {"in_features": 3, "out_features": 5},
        lambda head, batch: F.cross_entropy(
            head(batch.hidden_states).flatten(0, 1), batch.labels.flatten(), reduction="sum"
        ),
    )
    register_head("mine", spec)
    return spec


def losses_of(model: nn.Module, weight: float, tokens: float, *batch: torch.Tensor) -> StudentLosses:
    """The losses of one micro-batch in a step with so many labelled tokens."""
    config = SimpleNamespace(
        mine=WeightedHeadSection(enable=True, loss_weight=weight), compile=SimpleNamespace(enable=False), loss=Loss()
    )
    model.get_input_embeddings = lambda: None
    run = Losses(SimpleNamespace(model=model, needs_all_gradients=False), config, None)
    plan = StepPlan([], tokens, int(tokens), registry.loss_weights("mine", config) if run.heads else {})
    inputs, labels, doc_ids = batch
    return StudentLosses(run, plan, None, inputs, labels, Sequences(inputs, doc_ids))


def test_the_cross_entropy_is_weighed_and_mixed(registered: HeadSpec) -> None:
    model, labels = nn.Module(), torch.randint(0, 5, (2, 4))
    model.mine = nn.Linear(3, 5)
    hidden, tokens = torch.randn(2, 4, 3), torch.zeros(2, 4, dtype=torch.int64)
    logits = torch.randn(2, 4, 5).requires_grad_()
    compute = losses_of(model, 0.25, 8.0, tokens, labels, tokens)
    plain = compute(logits, hidden)
    head, probabilities = plain.loss - plain.parts["loss_ce"], logits.softmax(-1).gather(-1, labels[..., None])
    weighted = (probabilities * -probabilities.log()).mean()
    compute.run.config.loss = Loss(ce_weight=0.5, weighting="dft", mix_ce=0.25)
    mixed = compute(logits, hidden)
    torch.testing.assert_close(mixed.parts["loss_dft"], weighted.detach())
    assert mixed.parts["loss_ce"] == plain.parts["loss_ce"]
    torch.testing.assert_close(mixed.loss, 0.5 * (0.25 * plain.parts["loss_ce"] + 0.75 * weighted) + head)
    compute.run.config.loss = Loss(ce_weight=0.0)
    alone = compute(logits, hidden)
    torch.testing.assert_close(alone.loss, head)
    assert not torch.autograd.grad(alone.loss, logits)[0].any()


def test_losses_are_added_with_their_weight(registered: HeadSpec) -> None:
    model = nn.Module()
    model.mine = nn.Linear(3, 5)
    hidden, logits = torch.randn(2, 4, 3), torch.randn(2, 4, 5)
    ids, labels = torch.tensor([[1, 0, 2, 3], [4, 2, 0, 1]]), torch.randint(0, 5, (2, 4))
    documents = torch.tensor([[0, 0, 1, 1], [0, 0, 0, 1]])
    seen = []
    watched = HeadSpec(
        registered.build, registered.arguments, lambda head, batch: seen.append(batch) or registered.loss(head, batch)
    )
    registry._heads["mine"] = watched
    loss, parts = losses_of(model, 0.25, 8.0, ids, labels, documents)(logits, hidden)
    cross_entropy = F.cross_entropy(logits.flatten(0, 1), labels.flatten())
    expected = F.cross_entropy(model.mine(hidden).flatten(0, 1), labels.flatten())
    torch.testing.assert_close(loss, cross_entropy + 0.25 * expected)
    torch.testing.assert_close(parts["loss_mine"], expected.detach())
    torch.testing.assert_close(parts["loss_ce"], cross_entropy)
    assert parts.keys() == {"loss_ce", "loss_mine"} and not parts["loss_mine"].requires_grad
    assert seen[0].doc_ids is documents and seen[0].input_ids is ids and seen[0].labels is labels
    _, parts = losses_of(model, 0.0, 8.0, ids, labels, documents)(logits, hidden)
    assert parts.keys() == {"loss_ce"} and len(seen) == 1, "nothing is computed"


def test_a_part_of_the_sequences_has_its_share_of_the_losses(registered: HeadSpec) -> None:
    model = nn.Module()
    model.mine = nn.Linear(3, 5)
    hidden, logits = torch.randn(4, 6, 3), torch.randn(4, 6, 5)
    whole = losses_of(model, 0.5, 24.0, *torch.randint(0, 5, (3, 4, 6)))
    parts = [whole.rows(rows)(logits[rows], hidden[rows]) for rows in (slice(0, 1), slice(1, 4))]
    expected = whole(logits, hidden)
    torch.testing.assert_close(parts[0].loss + parts[1].loss, expected.loss)
    for name, value in expected.parts.items():
        torch.testing.assert_close(parts[0].parts[name] + parts[1].parts[name], value)


def test_a_weight_without_its_loss_is_refused(registered: HeadSpec) -> None:
    model = nn.Module()
    model.mine = nn.Linear(3, 5)
    registry._heads["mine"] = replace(registered, weights=lambda _config, _step: {"loss_other": 1.0})
    compute = losses_of(model, 0.1, 4.0, *torch.zeros(3, 1, 4, dtype=torch.int64))
    with pytest.raises(ConfigError, match="the loss of head 'mine' gives loss_mine, and its weights are of loss_other"):
        compute(torch.zeros(1, 4, 5), torch.zeros(1, 4, 3))


def test_a_loss_sees_the_embeddings_that_its_spec_asks_for_and_the_tokens_of_the_step(registered: HeadSpec) -> None:
    model, seen = nn.Module(), []
    model.mine = nn.Linear(3, 5)

    def loss(head: nn.Module, batch: HeadBatch) -> torch.Tensor:
        seen.append(batch)
        return head(batch.hidden_states).sum()

    for uses in (False, True):
        registry._heads["mine"] = replace(registered, loss=loss, uses_embedding=uses, uses_unembedding=uses)
        compute = losses_of(model, 0.1, 9.0, *torch.zeros(3, 1, 4, dtype=torch.int64))
        model.get_input_embeddings = lambda: model.mine
        compute(torch.zeros(1, 4, 5), torch.zeros(1, 4, 3), model.mine.forward)
    assert [batch.embed for batch in seen] == [None, model.mine]
    assert [batch.unembed for batch in seen] == [None, model.mine.forward]
    assert [batch.tokens_in_step for batch in seen] == [9.0, 9.0]


def test_two_teachers_are_refused(registered: HeadSpec) -> None:
    registry._heads.update({name: replace(registered, is_teacher=True) for name in ("mine", "yours")})
    section = WeightedHeadSection(enable=True)
    config = SimpleNamespace(
        model=SimpleNamespace(converters=["future_prediction"]),
        optimizer=SimpleNamespace(early_step_in_backward=False),
        mine=section,
        yours=section,
    )
    assert list(check_heads(config)) == [
        "mine.enable and yours.enable: both make the summaries of the future; enable one of them"
    ]


def test_a_loss_that_is_no_sum_is_refused(registered: HeadSpec) -> None:
    model = nn.Module()
    model.mine = nn.Linear(3, 5)
    registry._heads["mine"] = HeadSpec(
        registered.build, registered.arguments, lambda head, batch: head(batch.hidden_states)
    )
    compute = losses_of(model, 0.1, 4.0, *torch.zeros(3, 1, 4, dtype=torch.int64))
    with pytest.raises(ConfigError, match=r"the loss of head 'mine' must be a scalar \(a sum\), got \[1, 4, 5\]"):
        compute(torch.randn(1, 4, 5), torch.randn(1, 4, 3))


def test_what_can_not_be_right_is_said(registered: HeadSpec) -> None:
    with pytest.raises(ConfigError, match="'a.b'.*must be an identifier"):
        register_head("a.b", registered)
    with pytest.raises(ConfigError, match="'training'.*there is a section of this name already"):
        register_head("training", registered)
    register_head("mine", registered)  # the same again is nothing new
    with pytest.raises(ConfigError, match="'mine'.*another head has this name"):
        register_head("mine", HeadSpec(registered.build, registered.arguments, registered.loss))

    @dataclass
    class Other:
        enable: bool = True

    def problem(**sections: object) -> str:
        config = SimpleNamespace(
            model=SimpleNamespace(
                converters=["future_prediction"] * bool(getattr(sections.get("mine"), "enable", False))
            ),
            optimizer=SimpleNamespace(early_step_in_backward=False),
            **sections,
        )
        return " ".join(check_heads(config))

    assert "name its module in experimental.custom_import" in problem() and "must extend" in problem(mine=Other())
    assert "mine.loss_weight must be >= 0" in problem(mine=WeightedHeadSection(loss_weight=-1.0))
    assert problem(mine=WeightedHeadSection()) == ""
    assert enabled_heads(SimpleNamespace(mine=WeightedHeadSection())) == {}
    with pytest.raises(CheckpointError, match="head 'theirs' is not known.*import the module that registers it first"):
        build_head("theirs", {})


def test_states_of_another_width_are_refused(tmp_path: Path) -> None:
    """OPT-350M projects what its decoder layers give before it makes logits."""
    OPTConfig(
        vocab_size=264, hidden_size=32, ffn_dim=48, num_attention_heads=4, word_embed_proj_dim=16
    ).save_pretrained(tmp_path)
    model = build_hf_causal_lm(HFModelArgs(hf_assets_path=str(tmp_path)))
    config = job_config_class()()
    config.model.converters, config.token_order.enable = ["future_prediction"], True
    with pytest.raises(ConfigError, match=r"hidden_size 32, and 'opt' projects them to 16 .* train it without heads"):
        attach_heads(model, config)


def test_built_in_names_are_taken() -> None:
    with pytest.raises(ConfigError, match="'future_predictor'.*another head has this name"):
        register_head("future_predictor", HeadSpec(nn.Linear, lambda _section, _backbone: {}))


def test_sections_and_defaults_come_from_the_registry(registered: HeadSpec) -> None:
    config = job_config_class()()
    assert isinstance(config.mine, WeightedHeadSection) and not hasattr(config, "future_encoder")
