"""The operations of a run, against those that torch's counter sees."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM

from flame_ext.heads.registry import job_config_class
from flame_ext.objective.contrastive import info_nce
from flame_ext.operations import operations_per_token, tokens_of_a_step
from tests.flops import flop_counter
from tests.ranks import TINY_OLMO

BATCH, LENGTH, SIZE = 2, 24, 128
TOKENS = BATCH * LENGTH


def job(**sections: dict[str, Any]) -> Any:
    config = job_config_class()()
    config.model.hf_assets_path, config.training.seq_len, config.training.local_batch_size = (
        str(TINY_OLMO),
        LENGTH,
        BATCH,
    )
    for name, values in sections.items():
        for option, value in values.items():
            setattr(getattr(config, name), option, value)
    return config


FUTURE: dict[str, dict[str, Any]] = {"future_encoder": {"enable": True}, "future_predictor": {"enable": True}}


def test_backbone_and_teacher_are_those_of_the_model() -> None:
    found = operations_per_token(job(**FUTURE))
    model = AutoModelForCausalLM.from_pretrained(TINY_OLMO, dtype=torch.float32)
    tokens = torch.randint(3, 200, (BATCH, LENGTH))
    with sdpa_kernel(SDPBackend.MATH), flop_counter() as step:
        F.cross_entropy(model(tokens, use_cache=False).logits.transpose(1, 2), tokens).backward()
    assert step.get_total_flops() == TOKENS * found.backbone
    mask = torch.ones(BATCH, 1, LENGTH, LENGTH, dtype=torch.bool).triu()
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), flop_counter() as teacher:
        model.base_model(tokens, attention_mask=mask, use_cache=False)
    assert teacher.get_total_flops() == TOKENS * found.teacher
    assert found.total == found.backbone + found.heads + found.teacher + found.comparisons


def test_a_reverse_model_costs_a_forward_of_its_own(tmp_path: Path) -> None:
    found = []
    for layers in (1, 4):
        config = AutoConfig.from_pretrained(TINY_OLMO, num_hidden_layers=layers)
        config.save_pretrained(tmp_path / str(layers))
        options = {"enable": True, "summary_method": "reverse_lm", "reverse_model": str(tmp_path / str(layers))}
        found.append(operations_per_token(job(**{**FUTURE, "future_encoder": options})))
    anticausal = operations_per_token(job(**FUTURE))
    assert found[1] == anticausal  # the tiny model has four layers
    assert 0 < found[0].teacher < found[1].teacher and found[0].backbone == found[1].backbone
    # Trained by the lab on as many tokens, one of four layers, as the tiny model, costs what the backbone does.
    config = job(**{**FUTURE, "future_encoder": options})
    trained = operations_per_token(config, trains_reverse=True)
    assert trained.reverse_training == trained.backbone and trained.total == found[1].total + trained.backbone


def test_comparisons_are_those_of_the_loss() -> None:
    config = job(**FUTURE, training={"global_batch_size": 3 * BATCH})
    keys = F.normalize(torch.randn(tokens_of_a_step(config), SIZE), dim=-1)
    queries, every = keys[:TOKENS].clone().requires_grad_(), torch.ones(len(keys), dtype=torch.bool)
    in_place = {
        torch.ops.aten.addmm_: lambda _sum, a, b, **_: 2 * a[0] * a[1] * b[1]
    }  # which the counter does not know
    with FlopCounterMode(display=False, custom_mapping=in_place) as counter:
        info_nce(queries, keys, every[:TOKENS], every, torch.arange(TOKENS), 0.1).loss_sum.backward()
    reported = 2 * (len(queries) + len(keys)) * SIZE  # of the mean cosine
    assert counter.get_total_flops() - reported == TOKENS * operations_per_token(config).comparisons


def test_what_runs_on_a_share_costs_that_share() -> None:
    whole = operations_per_token(job(**FUTURE))
    half = operations_per_token(job(**{**FUTURE, "future_encoder": {"enable": True, "teacher_interval": 2}}))
    names = ("heads", "teacher", "comparisons")
    assert [getattr(half, name) for name in names] == [getattr(whole, name) / 2 for name in names]
    assert half.backbone == whole.backbone
    action = job(**FUTURE, action_layer={"enable": True})
    assert operations_per_token(action).comparisons == 2 * whole.comparisons
    without = operations_per_token(job())
    assert (without.backbone, without.total) == (whole.backbone, whole.backbone)


@pytest.mark.parametrize(("method", "maps"), [("mean", 0), ("attention", 1)])
def test_a_pooling_teacher_has_no_second_forward(method: str, maps: int) -> None:
    pooled = operations_per_token(job(**{**FUTURE, "future_encoder": {"enable": True, "summary_method": method}}))
    assert pooled.teacher == maps * 2 * (3 * SIZE * SIZE + 2 * LENGTH * SIZE)
    # Its keys are those of a micro-batch.
    assert pooled.comparisons == 4 * TOKENS * SIZE
