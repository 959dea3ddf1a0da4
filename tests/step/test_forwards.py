"""The forwards of proofs, steps and validation: in autocast, which is off again after each, and compiled for one another."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.ranks import DEBUG_TOML, run_ranks

OPTIONS = (
    "--training.mixed_precision_param=bfloat16", "--training.steps=1", "--lr_scheduler.total_steps=60", "--seed.verify=parity",
    "--training.local_batch_size=2", "--validation.enable", "--validation.dataset=python_stdlib", "--validation.steps=1",
    "--validation.freq=1", "--validation.seq_len=256", "--validation.local_batch_size=2", "--checkpoint.no-last_save_in_hf",
)  # fmt: skip


def run_watched(folder: str) -> dict[str, Any]:
    """Runs proofs, a step and a validation; returns whether autocast was on after each, and what the teacher was given."""
    from flame_ext.checkpoint.run_hooks import RunHooks
    from flame_ext.step.teacher import Teacher
    from flame_ext.train import main
    from flame_ext.trainer import FutureTrainer

    states, given = [], []

    def watch(cls: type, name: str) -> None:
        method = getattr(cls, name)

        def watched(self: Any, *arguments: Any, **options: Any) -> Any:
            result = method(self, *arguments, **options)
            states.append((name, torch.is_autocast_enabled("cpu")))
            if name == "summaries":
                tokens, documents = arguments[:2]
                given.append((tuple(tokens.shape), documents.shape, documents.stride(), documents.dtype))
            if name == "_evaluate":
                with self.autocast(), self.autocast():
                    states.append(("inside", torch.is_autocast_enabled("cpu")))
                states.append(("after two", torch.is_autocast_enabled("cpu")))
            return result

        setattr(cls, name, watched)

    for cls, name in (
        (FutureTrainer, "train_step"),
        (FutureTrainer, "_evaluate"),
        (RunHooks, "seed"),
        (Teacher, "summaries"),
    ):
        watch(cls, name)
    main([f"--job.config_file={DEBUG_TOML}", f"--job.dump_folder={folder}", *OPTIONS])
    dynamo = torch._dynamo.config
    return {"autocast": states, "given": given, "dynamo": (dynamo.automatic_dynamic_shapes, dynamo.recompile_limit)}


@pytest.fixture(scope="module")
def watched(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("watched")
    (rank,) = run_ranks(run_watched, 1, str(folder / "run"), folder=folder / "ranks")
    assert rank.exit_code == 0, rank.output[-3000:]
    return rank.value


def test_autocast_is_off_after_proofs_steps_and_validation(watched: dict[str, Any]) -> None:
    assert {name for name, _ in watched["autocast"]} == {
        "summaries",
        "seed",
        "train_step",
        "_evaluate",
        "inside",
        "after two",
    }
    assert [name for name, on in watched["autocast"] if on] == ["inside"]


def test_the_proof_gives_the_teacher_what_a_step_does_so_that_its_graphs_serve_both(watched: dict[str, Any]) -> None:
    proof, *others = watched["given"]
    assert len(others) == 3, "two of the proof, a step's, a validation's"
    assert proof[0] == (2, 256) and {*others} == {proof}
    assert watched["dynamo"] == (False, 64)
