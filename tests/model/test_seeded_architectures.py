"""Every architecture, seeded on one and on two processes, against ``from_pretrained`` and its autograd."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.ranks import DEBUG_TOML, run_ranks
from tests.tiny_models import CONFIGS, load_stock, save_tiny

LAYOUTS: dict[str, tuple[int, list[str]]] = {
    "single": (1, []),
    "fsdp2": (2, []),
    "ddp2": (2, ["--parallelism.data_parallel_replicate_degree=2"]),
}
TOKENS = torch.randint(264, (2, 96), generator=torch.Generator().manual_seed(1))


def seed_all(folder: str, options: list[str], names: list[str]) -> dict[str, Any]:
    """In a rank: seed each architecture and run one forward and backward on :data:`TOKENS`."""
    import torch.distributed as dist
    from torch.distributed.tensor import DTensor
    from torchtitan.components.checkpoint import MODEL

    from flame_ext.train import parse
    from flame_ext.trainer import FutureTrainer

    def full(tensor: Tensor) -> Tensor:
        return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor.detach()

    results: dict[str, Any] = {}
    for name in names:
        path = f"{folder}/{name}"
        arguments = [f"--job.config_file={DEBUG_TOML}", f"--model.hf_assets_path={path}", "--training.seq_len=96"]
        arguments += [f"--checkpoint.initial_load_path={path}", f"--job.dump_folder={folder}/out-{name}", *options]
        # The plain objective: heads that get no gradient must not be waited for.
        arguments += ["--metrics.no-enable-tensorboard", "--future_encoder.loss_weight=0"]
        trainer = FutureTrainer(parse(arguments))
        trainer.checkpointer.load()
        model = trainer.model
        logits = model(TOKENS)
        # Every rank has the same tokens, and gradients are summed over ranks.
        (next_token_loss(logits) / dist.get_world_size()).backward()
        results[name] = {
            "logits": logits.detach(),
            "tied": model.get_output_embeddings().weight is model.get_input_embeddings().weight,
            "gradients": {key: full(p.grad) for key, p in model.named_parameters() if p.grad is not None},
            "digests": {
                key: digest(full(value)) for key, value in trainer.checkpointer.states[MODEL].state_dict().items()
            },
        }
        trainer.close()
    dist.destroy_process_group()
    return results


def digest(tensor: Tensor) -> str:
    return hashlib.sha256(tensor.contiguous().numpy().tobytes()).hexdigest()


def next_token_loss(logits: Tensor) -> Tensor:
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), TOKENS[:, 1:].flatten())


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    for name in CONFIGS:
        save_tiny(name, folder / name, max_shard_size="50KB")
    return folder


@pytest.fixture(scope="module")
def seeded(models: Path) -> dict[str, list[dict[str, Any]]]:
    """Layout to the results of its ranks."""
    seeded = {}
    for layout, (world_size, options) in LAYOUTS.items():
        ranks = run_ranks(seed_all, world_size, str(models), options, [*CONFIGS], folder=models / layout)
        assert all(rank.exit_code == 0 for rank in ranks), ranks[0].output[-3000:]
        seeded[layout] = [rank.value for rank in ranks]
    return seeded


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", CONFIGS)
def test_seeded_model_is_the_stock_model(
    models: Path, seeded: dict[str, list[dict[str, Any]]], name: str, layout: str
) -> None:
    stock = load_stock(models / name)
    logits = stock(TOKENS, use_cache=False).logits
    next_token_loss(logits).backward()
    expected = {key: p.grad for key, p in stock.named_parameters() if p.grad is not None}
    tied = CONFIGS[name].tie_word_embeddings
    for rank in seeded[layout]:
        result = rank[name]
        assert torch.equal(result["logits"], logits.detach())
        assert result["tied"] is tied
        assert set(result["gradients"]) == set(expected), "each parameter once, a tied one under its first name"
        for key, gradient in expected.items():
            # The same sums; FSDP and DDP add halves of them in another order.
            torch.testing.assert_close(result["gradients"][key], gradient, rtol=1e-5, atol=1e-8, msg=key)


@pytest.mark.parametrize("name", CONFIGS)
def test_weights_and_heads_are_the_same_under_every_layout(
    models: Path, seeded: dict[str, list[dict[str, Any]]], name: str
) -> None:
    stock = load_stock(models / name)
    expected = {key: hashlib.sha256(p.detach().numpy().tobytes()).hexdigest() for key, p in stock.named_parameters()}
    reference = seeded["single"][0][name]["digests"]
    heads = {key for key in reference if key.startswith("future_predictor.")}
    assert len(heads) == 6 and {key: reference[key] for key in expected} == expected
    for layout in LAYOUTS:
        for rank in seeded[layout]:
            assert rank[name]["digests"] == reference, layout
