"""Runs that are broken off and resumed against the unbroken one, on real processes."""

from __future__ import annotations

import io
import random
import shutil
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from flame_ext.checkpoint.files import RankRNG
from flame_ext.config.sections import FlameJobConfig
from tests.ranks import DEBUG_TOML, TrainRun, run_ranks

BATCH, LENGTH, STEPS = 4, 64, 4
AFTER_RESUME = "after_resume"
LOSSES = ("loss", "loss_ce", "loss_future", "grad_norm")


@dataclass
class Recorded(TrainRun):
    """A run that remembers its data."""

    @property
    def batches(self) -> dict[int, list[list[int]]]:
        """The sequences of each step's global batch, sorted; a sequence is its inputs and its last label."""
        steps: dict[int, list[list[int]]] = defaultdict(list)
        for rank in self.ranks:
            for step, samples in rank.value.items():
                steps[step] += samples
        return {step: sorted(samples) for step, samples in steps.items()}


def train(dump_folder: Path, *options: str, ranks: int, steps: int = STEPS, dropout: float = 0.0) -> Recorded:
    """Train in ``ranks`` processes, saving every step, and what has been resumed as soon as it is."""
    arguments = [f"--job.config_file={DEBUG_TOML}", f"--job.dump_folder={dump_folder}", "--seed.verify=none"]
    arguments += ["--metrics.no-enable-tensorboard", "--checkpoint.interval=1", "--checkpoint.keep_latest_k=0"]
    arguments += [f"--training.seq_len={LENGTH}", f"--training.global_batch_size={BATCH}"]
    # All sequences of a step in one micro-batch: as many negatives for any number of ranks.
    arguments += [f"--training.local_batch_size={BATCH // ranks}", f"--future_predictor.dropout={dropout}"]
    arguments += ["--checkpoint.no-last_save_in_hf", "--lr_scheduler.total_steps=60", f"--training.steps={steps}"]
    arguments.append("--checkpoint.allow_config_change=training.steps")
    logs = dump_folder.parent / f"{dump_folder.name}.ranks"
    run = Recorded(run_ranks(_train_recording, ranks, [*arguments, *options], folder=logs), dump_folder)
    if any(run.exit_codes):
        raise AssertionError(f"exit codes {run.exit_codes}\n" + "\n".join(rank.output[-3000:] for rank in run.ranks))
    return run


def _train_recording(arguments: list[str]) -> dict[int, list[list[int]]]:
    """The command in one rank; returns the rank's sequences of each step."""
    from torchtitan.components.checkpoint import MODEL, OPTIMIZER

    from flame_ext.checkpoint.manager import SeedingCheckpointManager
    from flame_ext.checkpoint.steps import find_steps
    from flame_ext.train import main
    from flame_ext.trainer import FutureTrainer

    seen: dict[int, list[list[int]]] = defaultdict(list)

    def forward_backward_step(self: FutureTrainer, *, input_dict: dict, labels: torch.Tensor, **kwargs: Any) -> Any:
        rows = zip(input_dict["input"].tolist(), labels[:, -1].tolist(), strict=True)
        seen[self.step] += [[*row, last] for row, last in rows]
        return step(self, input_dict=input_dict, labels=labels, **kwargs)

    def load(self: SeedingCheckpointManager, **kwargs: Any) -> bool:
        steps, _ = find_steps(Path(self.folder))
        result = resume(self, **kwargs)
        if steps:
            states = {**self.states[MODEL].state_dict(), OPTIMIZER: self.states[OPTIMIZER]}
            dcp.save(states, checkpoint_id=Path(self.folder).parent / AFTER_RESUME)
        return result

    step, resume = FutureTrainer.forward_backward_step, SeedingCheckpointManager.load
    with (
        mock.patch.object(FutureTrainer, "forward_backward_step", forward_backward_step),
        mock.patch.object(SeedingCheckpointManager, "load", load),
        mock.patch("torchtitan.train.time.sleep"),
    ):
        main(arguments)
    return dict(seen)


def resumed_from(run: TrainRun, step: int, folder: Path) -> Path:
    """A dump folder in which ``run`` was broken off after ``step``; its metrics know more, as they may."""
    (folder / "checkpoint").mkdir(parents=True)
    shutil.copytree(run.dump_folder / "checkpoint" / f"step-{step}", folder / "checkpoint" / f"step-{step}")
    shutil.copy(run.dump_folder / "metrics.jsonl", folder)
    return folder


def saved(folder: Path) -> dict[str, Any]:
    """All that DCP wrote into a folder, by its full name; none of it is code."""
    read = torch.load
    metadata = dcp.FileSystemReader(folder).read_metadata().state_dict_metadata
    state = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        if isinstance(entry, TensorStorageMetadata)
        else None
        for name, entry in metadata.items()
    }
    with mock.patch.object(torch, "load", lambda file, **kwargs: read(file, **{**kwargs, "weights_only": True})):
        dcp.load(state, checkpoint_id=folder, no_dist=True)
    return state


def assert_equal(found: dict[str, Any], expected: dict[str, Any], leave_out: tuple[str, ...] = ()) -> None:
    found, expected = (
        {name: value for name, value in state.items() if not name.startswith(leave_out)} for state in (found, expected)
    )
    assert set(found) == set(expected)
    for name, value in expected.items():
        same = torch.equal(found[name], value) if isinstance(value, torch.Tensor) else found[name] == value
        assert same, name


def assert_resumed_exactly(run: TrainRun, step: Path) -> None:
    """The weights and moments with which ``run`` began are those of a saved step, bit for bit."""
    found = saved(run.dump_folder / AFTER_RESUME)
    assert sum("exp_avg" in name for name in found) > 10 and "model.embed_tokens.weight" in found
    expected = saved(step)
    assert_equal(found, {name: expected[name] for name in found})


def assert_same_course(run: Recorded, unbroken: Recorded, steps: int, rel: float) -> None:
    """Metrics of all steps, and the data of those that ``run`` made itself."""
    assert run.values("step") == list(range(1, steps + 1))
    assert run.values("tokens_seen") == [step * BATCH * LENGTH for step in range(1, steps + 1)]
    for name in LOSSES:
        expected = unbroken.values(name)[:steps]
        assert run.values(name) == (pytest.approx(expected, rel=rel) if rel else expected), name
    assert {step: unbroken.batches[step] for step in run.batches} == run.batches
    assert all(len(samples) == BATCH for samples in run.batches.values())


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Recorded:
    """Unbroken, on one process."""
    return train(tmp_path_factory.mktemp("alone") / "run", ranks=1)


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Recorded:
    """Unbroken, on two processes with FSDP, and with dropout: a mask depends on all that was drawn before."""
    return train(tmp_path_factory.mktemp("sharded") / "run", ranks=2, dropout=0.1)


@pytest.mark.parametrize(("layout", "ranks", "dropout"), [("alone", 1, 0.0), ("sharded", 2, 0.1)])
def test_on_the_same_ranks_it_goes_on_bit_for_bit(
    request: pytest.FixtureRequest, dump_folder: Path, layout: str, ranks: int, dropout: float
) -> None:
    unbroken: Recorded = request.getfixturevalue(layout)
    assert len({str(sample) for samples in unbroken.batches.values() for sample in samples}) == STEPS * BATCH
    run = train(resumed_from(unbroken, 2, dump_folder), ranks=ranks, dropout=dropout)
    assert set(run.batches) == {3, 4}
    step = saved(unbroken.dump_folder / "checkpoint" / "step-2")
    generators = {name: value for name, value in step.items() if name.startswith("rng.rank_") and name.endswith(".cpu")}
    assert len({bytes(state.tolist()) for state in generators.values()}) == len(generators) == ranks, "masks of its own"
    assert_resumed_exactly(run, unbroken.dump_folder / "checkpoint" / "step-2")
    assert_same_course(run, unbroken, STEPS, rel=0)
    last = Path("checkpoint") / f"step-{STEPS}"
    assert_equal(saved(run.dump_folder / last), saved(unbroken.dump_folder / last))


def test_the_number_of_ranks_may_change_at_every_resume(alone: Recorded, tmp_path: Path) -> None:
    before: TrainRun = alone
    for step, ranks in ((1, 2), (2, 4), (3, 1)):
        folder = resumed_from(before, step, tmp_path / f"from-{step}-on-{ranks}")
        run = train(folder, ranks=ranks, steps=step + 1)
        assert_resumed_exactly(run, before.dump_folder / "checkpoint" / f"step-{step}")
        assert_same_course(run, alone, step + 1, rel=1e-5)
        before = run
    last = Path("checkpoint") / f"step-{STEPS}"
    found, expected = saved(before.dump_folder / last), saved(alone.dump_folder / last)
    for name in (name for name in expected if name.startswith(("dataloader.", "train_state.", "lr_scheduler."))):
        assert torch.equal(torch.as_tensor(found[name]), torch.as_tensor(expected[name])), name


def test_from_fsdp_to_ddp_and_back(sharded: Recorded, tmp_path: Path) -> None:
    ddp = ["--parallelism.data_parallel_replicate_degree=2", "--parallelism.data_parallel_shard_degree=1"]
    before: TrainRun = sharded
    for step, options in ((1, ddp), (2, [])):
        folder = resumed_from(before, step, tmp_path / f"from-{step}")
        run = train(folder, *options, ranks=2, steps=step + 1, dropout=0.1)
        assert_resumed_exactly(run, before.dump_folder / "checkpoint" / f"step-{step}")
        assert_same_course(run, sharded, step + 1, rel=1e-5)
        before = run


def test_generators_go_on_where_they_were() -> None:
    def draw() -> list[Any]:
        legacy = np.random.standard_normal(3).tolist()  # noqa: NPY002
        return [torch.rand(3).tolist(), random.random(), random.gauss(0, 1), legacy]

    draw()  # one normal number of a pair is left over in each of them
    rng, stream = RankRNG(), io.BytesIO()
    torch.save(rng.state_dict(), stream)
    expected = draw()
    assert draw() != expected
    stream.seek(0)
    rng.load_state_dict(torch.load(stream, weights_only=True))
    assert draw() == expected
    assert rng.fits(1) and not rng.fits(2)


def test_the_accelerators_generator_goes_on_where_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    restored: list[torch.Tensor] = []
    state = torch.arange(0, 256, 16, dtype=torch.uint8)
    module = SimpleNamespace(get_rng_state=lambda: state, set_rng_state=restored.append)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: torch.device("cuda"))
    monkeypatch.setattr(torch, "get_device_module", lambda _device: module)
    rng = RankRNG()
    rng.load_state_dict(rng.state_dict())
    assert len(restored) == 1 and restored[0].dtype == torch.uint8 and torch.equal(restored[0], state)


def test_generators_of_another_kind_of_device_are_left_as_they_are(caplog: pytest.LogCaptureFixture) -> None:
    rng = RankRNG()
    state = rng.state_dict()
    state["rank_0"]["accelerator"] = "nowhere:00"
    rng.load_state_dict(state)
    assert "random numbers come from nowhere" in caplog.text


@pytest.mark.parametrize("tokens", [12, 13, 14])
def test_tokens_seen_are_shared_without_a_rest(tokens: int) -> None:
    trainers = [_trainer(3, rank) for rank in range(3)]
    for trainer in trainers:
        trainer.load_state_dict({"step": 7, "tokens_seen": tokens})
    assert sum(trainer.ntokens_seen for trainer in trainers) == tokens
    for trainer in trainers:
        trainer.ntokens_seen += 5
    assert [trainer.state_dict() for trainer in trainers] == [{"step": 7, "tokens_seen": tokens + 15}] * 3


def _trainer(ranks: int, rank: int) -> Any:
    from flame_ext.trainer import FutureTrainer

    trainer = FutureTrainer.__new__(FutureTrainer)
    mesh = SimpleNamespace(size=lambda: ranks, get_local_rank=lambda: rank)
    trainer.parallel_dims = SimpleNamespace(get_optional_mesh=lambda _name: mesh)
    trainer.metrics_processor, trainer.job_config = mock.Mock(), FlameJobConfig()
    return trainer
