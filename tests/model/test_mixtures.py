"""Mixtures of experts under FSDP, HSDP and DDP: the stock model, its gradients, and an export with the source's keys."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from flame_ext.seeding.sources.source import same_bits
from tests.layouts import EP2, spreads_experts
from tests.model.test_seeded_architectures import LAYOUTS, TOKENS, digest, next_token_loss, seed_all
from tests.ranks import DEBUG_TOML, run_ranks, train
from tests.tiny_models import MIXTURES, load_stock, save_tiny

MORE_RANKS = {
    "fsdp4": (4, []),
    "hsdp4": (4, ["--parallelism.data_parallel_replicate_degree=2"]),
}
OF_EXPERTS = {"ep2": (2, [EP2]), "fsdp4-ep2": (4, [EP2])}
ALL_LAYOUTS = LAYOUTS | MORE_RANKS | OF_EXPERTS


@pytest.mark.matrix
@pytest.mark.parametrize(
    "layout", [*LAYOUTS, *MORE_RANKS, *(pytest.param(layout, marks=spreads_experts) for layout in OF_EXPERTS)]
)
def test_seeded_model_is_the_stock_model(tmp_path: Path, layout: str) -> None:
    world_size, options = ALL_LAYOUTS[layout]
    for name in MIXTURES:
        save_tiny(name, tmp_path / name, max_shard_size="50KB")
    ranks = run_ranks(seed_all, world_size, str(tmp_path), options, [*MIXTURES], folder=tmp_path / "ranks", timeout=600)
    assert all(rank.exit_code == 0 for rank in ranks), ranks[0].output[-3000:]
    for name in MIXTURES:
        stock = load_stock(tmp_path / name)
        logits = stock(TOKENS, use_cache=False).logits
        next_token_loss(logits).backward()
        expected = {key: p.grad for key, p in stock.named_parameters() if p.grad is not None}
        for result in (rank.value[name] for rank in ranks):
            if layout == "single":
                assert torch.equal(result["logits"], logits.detach()), name
            torch.testing.assert_close(result["logits"], logits.detach(), rtol=1e-5, atol=1e-6, msg=name)
            for key, value in stock.state_dict().items():
                assert result["digests"][key] == digest(value), f"{name} {key}"
            assert set(result["gradients"]) == set(expected)
            for key, gradient in expected.items():
                # The same sums; FSDP and DDP add parts of them in another order.
                torch.testing.assert_close(
                    result["gradients"][key], gradient, rtol=1e-5, atol=1e-8, msg=f"{name} {key}"
                )


@pytest.mark.parametrize(("name", "dtype"), [("olmoe", torch.float32), ("deepseek-v3", torch.bfloat16)])
def test_an_export_has_the_keys_and_values_of_the_source_and_a_run_goes_on_from_a_step(
    tmp_path: Path, name: str, dtype: torch.dtype
) -> None:
    """In bfloat16 an export is what transformers saves of the source, whose routers and their biases stay in float32."""
    source = save_tiny(name, tmp_path / name, max_shard_size="100KB")
    options = [f"--model.hf_assets_path={source}", f"--checkpoint.initial_load_path={source}", "--optimizer.lr=0"]
    options += ["--training.seq_len=32", "--training.local_batch_size=2", "--training.global_batch_size=4"]
    options += [
        "--checkpoint.interval=1",
        "--lr_scheduler.total_steps=60",
        "--checkpoint.allow_config_change=training.steps",
        "--export.max_shard_size=100KB",
        f"--checkpoint.export_dtype={str(dtype).removeprefix('torch.')}",
    ]
    train(tmp_path / "run", *options, "--training.steps=1", "--seed.verify=parity", world_size=2)
    train(tmp_path / "run", *options, "--training.steps=2", "--export.interval=1")
    expected = source
    if dtype != torch.float32:
        expected = tmp_path / "expected"
        AutoModelForCausalLM.from_pretrained(source, dtype=dtype).save_pretrained(expected)
    held = {key: tensor for file in expected.glob("*.safetensors") for key, tensor in load_file(file).items()}
    for step in (1, 2):
        export = tmp_path / "run" / "hf" / f"step-{step}"
        written = {key: t for file in export.glob("*.safetensors") for key, t in load_file(file).items()}
        assert set(written) == set(held)
        assert all(same_bits(written[key], tensor) for key, tensor in held.items())
        _, loading = AutoModelForCausalLM.from_pretrained(export, output_loading_info=True)
        assert not any(loading.values()), loading


def prove(folder: str, leaks: bool) -> str:
    """In a rank: seed an OLMoE in bfloat16 with the proof of its anti-causal forward; returns why it is refused."""
    from flame_ext.errors import SeedError
    from flame_ext.heads.future_encoder import AnticausalEncoder
    from flame_ext.train import parse
    from flame_ext.trainer import FutureTrainer

    exact = AnticausalEncoder.attention_mask

    def leaking(self: AnticausalEncoder, input_ids: Tensor, *args: Any) -> Tensor:
        """Lets each position attend to the one before it, too."""
        return exact(self, input_ids, *args) | torch.eye(input_ids.shape[1], dtype=torch.bool).roll(-1, dims=1).tril()

    options = [f"--model.hf_assets_path={folder}", f"--checkpoint.initial_load_path={folder}", "--seed.verify=finite"]
    options += [
        "--training.mixed_precision_param=bfloat16",
        "--training.seq_len=64",
        f"--job.dump_folder={folder}/{leaks}",
    ]
    with mock.patch.object(AnticausalEncoder, "attention_mask", leaking if leaks else exact):
        trainer = FutureTrainer(parse([f"--job.config_file={DEBUG_TOML}", *options]))
        try:
            trainer.checkpointer.load()
        except SeedError as e:
            return str(e)
        finally:
            trainer.close()
    return ""


@pytest.mark.parametrize("leaks", [False, True])
def test_summaries_in_bfloat16_are_proved_to_the_last_bit(tmp_path: Path, leaks: bool) -> None:
    """Though another token at one position changes how many tokens other experts get."""
    source = save_tiny("olmoe", tmp_path / "olmoe")
    (rank,) = run_ranks(prove, 1, str(source), leaks, folder=tmp_path / "ranks")
    assert rank.exit_code == 0, rank.output[-3000:]
    assert ("the anti-causal forward leaks" in rank.value) == leaks, rank.value
