"""Heads of a user's own, in whole runs and in what is refused. docs/heads.md is run by tests/test_docs.py."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn

from flame_ext.config.sections import OwnHead
from flame_ext.errors import CheckpointError, ConfigError
from flame_ext.heads import own
from flame_ext.heads.converter import build_head
from flame_ext.heads.own import HeadSpec, OwnHeadLosses, check_own_heads, enabled_heads, register_head
from tests.ranks import train

PLUGIN = ("--job.custom_config_module=tests.heads.own_head", "--experimental.custom_import=tests.heads.own_head")
NEW = ("--seed.new_parameters=future_encoder.*,future_predictor.*,next_byte.*",)
STEPS = ("--training.steps=2", "--lr_scheduler.total_steps=60")
WITHOUT_FUTURE = ("--future_encoder.no-enable", "--future_predictor.no-enable")


def test_a_head_beside_the_objective_is_the_same_on_any_layout(tmp_path: Path) -> None:
    head = (*STEPS, *PLUGIN, *NEW, "--next_byte.enable", "--next_byte.loss_weight=0.5", "--next_byte.lr_scale=2")
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
    zero = train(
        tmp_path / "zero", *STEPS, *PLUGIN, *NEW, *WITHOUT_FUTURE, "--next_byte.enable", "--next_byte.loss_weight=0"
    )
    assert zero.values("loss") == plain.values("loss") and zero.values("grad_norm") == plain.values("grad_norm")
    folders = [run.dump_folder / "hf" / "step-2" / "model.safetensors" for run in (plain, zero)]
    weights = [load_file(folder) for folder in folders]
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])


@pytest.fixture
def registered(monkeypatch: pytest.MonkeyPatch) -> HeadSpec:
    """One head, "mine", and no other: a linear map from 3 to 5 with the summed cross-entropy of the labels."""
    monkeypatch.setattr(own, "_registered", {})
    spec = HeadSpec(
        nn.Linear,
        lambda _section, _config: {"in_features": 3, "out_features": 5},
        lambda head, batch: F.cross_entropy(
            head(batch.hidden_states).flatten(0, 1), batch.labels.flatten(), reduction="sum"
        ),
    )
    register_head("mine", spec)
    return spec


def test_losses_are_added_with_their_weight(registered: HeadSpec) -> None:
    model = nn.Module()
    model.mine = nn.Linear(3, 5)
    config = SimpleNamespace(mine=OwnHead(enable=True, loss_weight=0.25))
    hidden, logits = torch.randn(2, 4, 3), torch.randn(2, 4, 5)
    ids, labels = torch.tensor([[1, 0, 2, 3], [4, 2, 0, 1]]), torch.randint(0, 5, (2, 4))
    seen = []
    watched = HeadSpec(
        registered.build, registered.arguments, lambda head, batch: seen.append(batch) or registered.loss(head, batch)
    )
    own._registered["mine"] = watched
    before = {"loss_ce": torch.tensor(2.0)}
    compute = OwnHeadLosses(model, config, eos_id=0).beside(lambda _l, _h: (torch.tensor(2.0), before), ids, labels, 8)
    loss, parts = compute(logits, hidden)
    expected = F.cross_entropy(model.mine(hidden).flatten(0, 1), labels.flatten())
    torch.testing.assert_close(loss, 2.0 + 0.25 * expected)
    torch.testing.assert_close(parts["loss_mine"], expected.detach())
    assert before.keys() == {"loss_ce"} and not parts["loss_mine"].requires_grad
    assert seen[0].doc_ids.tolist() == [[0, 0, 1, 1], [0, 0, 0, 1]]
    of_the_data = torch.tensor([[0, 0, 0, 1], [0, 1, 1, 1]])
    losses = OwnHeadLosses(model, config, eos_id=0)
    losses.beside(lambda _l, _h: (torch.tensor(2.0), before), ids, labels, 8, of_the_data)(logits, hidden)
    assert seen[1].doc_ids is of_the_data
    config.mine.loss_weight = 0.0
    assert OwnHeadLosses(model, config, eos_id=0).beside(compute, ids, labels, 8) is compute, "nothing is computed"


def test_a_loss_that_is_no_sum_is_refused(registered: HeadSpec) -> None:
    model = nn.Module()
    model.mine = nn.Linear(3, 5)
    own._registered["mine"] = HeadSpec(
        registered.build, registered.arguments, lambda head, batch: head(batch.hidden_states)
    )
    losses = OwnHeadLosses(model, SimpleNamespace(mine=OwnHead(enable=True)), None)
    compute = losses.beside(lambda _l, _h: (torch.tensor(0.0), {}), *torch.zeros(2, 1, 4, dtype=torch.int64), 4)
    with pytest.raises(ConfigError, match=r"the loss of head 'mine' must be a scalar \(a sum\), got \[1, 4, 5\]"):
        compute(torch.randn(1, 4, 5), torch.randn(1, 4, 3))


def test_what_can_not_be_right_is_said(registered: HeadSpec) -> None:
    with pytest.raises(ConfigError, match="'a.b'.*must be an identifier"):
        register_head("a.b", registered)
    with pytest.raises(ConfigError, match="'future_predictor'.*there is a section of this name already"):
        register_head("future_predictor", registered)
    register_head("mine", registered)  # the same again is nothing new
    with pytest.raises(ConfigError, match="'mine'.*another head has this name"):
        register_head("mine", HeadSpec(registered.build, registered.arguments, registered.loss))

    @dataclass
    class Other:
        enable: bool = True

    def problem(**sections: object) -> str:
        return " ".join(check_own_heads(SimpleNamespace(**sections)))

    assert "no section [mine]" in problem() and "must extend" in problem(mine=Other())
    assert "mine.loss_weight must be >= 0" in problem(mine=OwnHead(loss_weight=-1.0))
    assert problem(mine=OwnHead()) == "" and enabled_heads(SimpleNamespace(mine=OwnHead())) == {}
    with pytest.raises(CheckpointError, match="head 'theirs' is not known.*import the module that registers it first"):
        build_head("theirs", {})
