"""A new built-in head is one file: configured, built, split, trained, exported and loaded by its HeadSpec alone."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.ranks import REPOSITORY, TrainRun, train

NEW_HEAD = '''
"""The head ``[later]``: which token comes ``distance`` positions later, and how sure the head is of it."""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel

from flame_ext.heads.registry import register_head
from flame_ext.heads.spec import HeadBatch, HeadSection, HeadSpec
from flame_ext.model.initialisation import ParameterInit, linear_inits


@dataclass
class LaterSection(HeadSection):
    """Which token comes later."""

    distance: int = 2
    """How many positions later."""

    later_weight: float = 0.5
    """Weight of the loss."""


class LaterHead(nn.Module):
    def __init__(self, hidden_size: int, vocab_size: int, distance: int) -> None:
        super().__init__()
        self.distance = distance
        self.norm = nn.LayerNorm(hidden_size)
        self.up = nn.Linear(hidden_size, 2 * hidden_size)
        self.down = nn.Linear(2 * hidden_size, vocab_size)

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.down(F.silu(self.up(self.norm(hidden_states))))

    def parameter_inits(self) -> dict[str, ParameterInit]:
        return linear_inits(self)


def losses(head: LaterHead, batch: HeadBatch) -> dict[str, Tensor]:
    future = batch.future
    assert future is not None and future.bank.keys.shape[-1] == batch.hidden_states.shape[-1]
    logits = head(batch.hidden_states).float().log_softmax(-1)
    own = logits[:, : -head.distance].gather(2, batch.input_ids[:, head.distance :, None])
    count = future.pairs_in_step
    return {"loss_later": -own.sum() / count, "later_sureness": logits.detach().exp().amax(-1).sum() / count}


def check(config):
    if config.later.distance < 1:
        yield f"later.distance must be >= 1, got {config.later.distance}"


register_head(
    "later",
    HeadSpec(
        build=LaterHead,
        arguments=lambda section, backbone: {
            "hidden_size": backbone.config.hidden_size,
            "vocab_size": backbone.config.vocab_size,
            "distance": section.distance,
        },
        loss=losses,
        section=LaterSection,
        weights=lambda config, _step: {"loss_later": config.later.later_weight},
        needs_future=True,
        tensor_parallel_plan={"up": ColwiseParallel(), "down": RowwiseParallel()},
        check=check,
        shown=("later_sureness",),
    ),
)
'''
OPTIONS = ("--experimental.custom_import=new_heads.later", "--later.enable", "--later.distance=3")
STEPS = ("--training.steps=2", "--lr_scheduler.total_steps=60")


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder with the package ``new_heads``, for PYTHONPATH."""
    folder = tmp_path_factory.mktemp("packages")
    (folder / "new_heads").mkdir()
    (folder / "new_heads" / "__init__.py").touch()
    (folder / "new_heads" / "later.py").write_text(NEW_HEAD)
    return str(folder)


def run(folder: Path, path: str, *options: str, world_size: int = 1, check: bool = True) -> TrainRun:
    return train(
        folder, *STEPS, *OPTIONS, *options, world_size=world_size, env={"FLAME_EXT_TEST_PATH": path}, check=check
    )


@pytest.mark.parametrize(
    "layout",
    [[], pytest.param(["--parallelism.tensor_parallel_degree=2"], marks=pytest.mark.matrix)],
    ids=["fsdp2", "tp2"],
)
def test_it_is_trained_on_two_ranks_exported_and_loaded(tmp_path: Path, path: str, layout: list[str]) -> None:
    one = run(tmp_path / "one", path, "--action_layer.enable", "--action_layer.top_k=4")
    batch = () if layout else ("--training.local_batch_size=4",)
    two = run(tmp_path / "two", path, "--action_layer.enable", "--action_layer.top_k=4", *layout, *batch, world_size=2)
    for line, expected in zip(two.metrics, one.metrics, strict=True):
        for name in (
            "loss",
            "loss_ce",
            "loss_future",
            "loss_action",
            "loss_later",
            "later_sureness",
            "grad_norm_heads",
        ):
            assert line[name] == pytest.approx(expected[name], rel=1e-5), (line["step"], name)
    first = one.metrics[0]
    parts = {"loss_ce": 1.0, "loss_future": 0.1, "loss_action": 0.1, "loss_action_model": 0.1, "loss_later": 0.5}
    assert first["loss"] == pytest.approx(sum(weight * first[name] for name, weight in parts.items()), rel=1e-6)
    assert "later_sureness:" in one.ranks[0].output
    export = two.dump_folder / "hf" / "step-2"
    weights = load_file(export / "future_heads" / "model.safetensors")
    assert weights["later.up.weight"].shape == (256, 128)
    code = (
        "import new_heads.later, sys, torch; from flame_ext.analysis import load_future_heads\n"
        "head = load_future_heads(sys.argv[1])['later']\n"
        "assert head.distance == 3 and head(torch.zeros(1, 4, 128)).shape == (1, 4, 264)\n"
        "torch.save(head.state_dict(), sys.argv[2])"
    )
    command = [sys.executable, "-c", code, str(export), str(tmp_path / "head.pt")]
    done = subprocess.run(
        command, cwd=REPOSITORY, capture_output=True, text=True, env={"PYTHONPATH": f"{path}:{REPOSITORY}", "PATH": ""}
    )
    assert done.returncode == 0, done.stderr
    loaded = torch.load(tmp_path / "head.pt")
    assert all(torch.equal(loaded[name], weights[f"later.{name}"]) for name in loaded) and len(loaded) == 6


def test_its_options_are_checked(tmp_path: Path, path: str) -> None:
    (rank,) = run(tmp_path / "run", path, "--later.distance=0", check=False).ranks
    assert rank.exit_code == 2 and "later.distance must be >= 1, got 0" in rank.output
