"""One optimisation step with a part of each sequence on a rank against the same step in a single process."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torchtitan.components.metrics import MetricsProcessor
from transformers import (
    FalconConfig,
    LlamaConfig,
    MambaConfig,
    Phi3Config,
    PreTrainedConfig,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from flame_ext.errors import ConfigError, SeedError
from flame_ext.heads import registry
from flame_ext.run.metrics import FutureMetricsProcessor
from flame_ext.seeding.proof.attention import prove_context_parallel
from flame_ext.train import parse
from tests.faults.test_resume import assert_resumed_exactly, resumed_from, train
from tests.layouts import COMPILE, CP2, NO_HEADS, PER_OP, TP2, assert_same_step, steps
from tests.ranks import DEBUG_TOML, TINY_OLMO, TrainRun, run_ranks
from tests.tiny_models import CONFIGS

DOCUMENTS = ["--data.document_attention"]
FULL = ["--activation_checkpoint.mode=full"]
NEXT = ["--mtp.enable", "--mtp.depth=2", "--token_order.enable", "--future_bag.enable", "--next_latent.enable"]
FURTHER = [*NEXT, "--mtp.kind=sequential", "--next_latent.steps=20"]  # beyond a chunk
IN_ORDER = ["--parallelism.context_parallel_load_balancer=None"]

# Architecture and what is tried with it: job to options of its own.
JOBS: dict[str, list[str]] = {
    "olmo-tied": [],
    "llama-scaled-rope+documents": DOCUMENTS,
    "gemma2+documents": [*DOCUMENTS, *FULL],
    "olmo2+op": PER_OP,
    "olmo2+heads": [*FURTHER, *DOCUMENTS],
}
COVERED = {
    "cp2": ["olmo-tied", "llama-scaled-rope+documents", "olmo2+heads"],
    "fsdp2-cp2": ["gemma2+documents", "olmo2+op"],
}


@pytest.mark.parametrize("layout", COVERED)
def test_one_step_is_that_of_a_single_process(
    models: Path, single: dict[str, dict[str, Any]], tmp_path: Path, layout: str
) -> None:
    for rank in steps(models, tmp_path, layout, {name: JOBS[name] for name in COVERED[layout]}):
        for name, result in rank.items():
            assert_same_step(result, single[name])
            assert result["parameters"] == {"DTensor"}, "sharded over the ranks that share a sequence, too"


VARIANTS = {
    "olmo2+compiled": COMPILE,
    "gemma2+in order": IN_ORDER,
    "olmo2+in order+documents": [*IN_ORDER, *DOCUMENTS],
    "olmo-untied+offload": ["--training.enable_cpu_offload"],
    "gemma3-rope-per-layer+compiled": [*COMPILE, *DOCUMENTS],
}


@pytest.mark.matrix
@pytest.mark.parametrize("layout", ["cp2", "fsdp2-cp2", "cp4", "hsdp2-cp2", "cp2-tp2"])
@pytest.mark.parametrize("kind", ["", "+documents", "variants"])
def test_every_architecture_under_every_layout(models: Path, tmp_path: Path, layout: str, kind: str) -> None:
    # OPT's biases of keys have no effect: their gradients are rounding errors, which have no digits to compare.
    without = ("falcon", "opt", "gpt2") if layout == "cp2-tp2" else ("falcon", "opt")
    planned = [name for name in CONFIGS if not name.startswith(without)]
    jobs = VARIANTS if kind == "variants" else {name + kind: DOCUMENTS if kind else [] for name in planned}
    (expected,) = steps(models, tmp_path, "single", jobs)
    for rank in steps(models, tmp_path, layout, jobs):
        for name in jobs:
            assert_same_step(rank[name], expected[name])


def test_a_run_is_that_of_a_single_process_and_goes_on_as_one(tmp_path: Path) -> None:
    """Figures that are counted for sequences, not for their parts; validation; steps that are saved."""
    texts = [json.dumps({"text": f"Document {n} is read more than once. " * (n + 2)}) for n in range(12)]
    (tmp_path / "few.jsonl").write_text("\n".join(texts))
    options = ["--action_layer.enable", "--next_latent.enable", "--training.dataset=json"]
    options += [f"--training.dataset_path={tmp_path / 'few.jsonl'}", "--checkpoint.last_save_in_hf"]
    options += ["--validation.enable", "--validation.freq=1", "--validation.steps=2"]
    options += ["--validation.seq_len=64", "--validation.local_batch_size=2", "--validation.dataset=python_stdlib"]
    unbroken = train(tmp_path / "unbroken", *options, ranks=1, steps=3)
    shared = [*options, CP2, "--training.local_batch_size=4", "--checkpoint.allow_config_change=training.steps"]
    run = train(tmp_path / "shared", *shared, ranks=2, steps=2)
    folder = resumed_from(run, 2, tmp_path / "tail")
    exported = resumed_from(run, 2, tmp_path / "exported")
    train(exported, *options, ranks=1, steps=2)  # which only exports
    files = list((exported / "hf" / "step-2").rglob("*.safetensors"))
    assert len(files) == 2, "the model and its heads"
    for path in files:
        assert path.read_bytes() == (run.dump_folder / path.relative_to(exported)).read_bytes(), path
    tail = train(folder, *options, ranks=1, steps=3)
    assert_resumed_exactly(tail, run.dump_folder / "checkpoint" / "step-2")
    assert max(unbroken.values("epochs/few.jsonl")) > 0
    losses = ("loss", "loss_ce", "loss_future", "loss_action", "loss_action_model", "loss_next_latent")
    for name in (*losses, "future_keys", "grad_norm", "tokens_seen", "epochs/few.jsonl"):
        # Adam divides small gradients by themselves: a step on, roundings of 1e-7 are 1e-6.
        assert run.values(name) == pytest.approx(unbroken.values(name)[:2], rel=1e-5), name
        assert tail.values(name) == pytest.approx(unbroken.values(name), rel=1e-5), name
    for name in losses[1:]:
        held_out = [[json.loads(line)[name] for line in lines] for lines in map(validated, (run, unbroken))]
        assert held_out[0] == pytest.approx(held_out[1][:2], rel=1e-5), name


def test_figures_of_the_host_are_of_whole_sequences() -> None:
    """It divides the loss of a part by the labels of the whole, and adds up the tokens of all ranks."""
    processor = FutureMetricsProcessor.__new__(FutureMetricsProcessor)
    processor._progress, processor._evaluations = mock.Mock(**{"line.return_value": None}), None
    processor.parallel_dims = SimpleNamespace(cp=2, world_size=2, non_data_parallel_size=2)
    processor.ntokens_since_last_log, processor.time_last_log, processor._writes = 256, 0.0, False
    with mock.patch.object(MetricsProcessor, "log") as log:
        processor.log(1, 3.0, 1.5, 0.1, {"n_tokens_seen": 512})
    assert log.call_args.args == (1, 3.0, 3.0, 0.1, {"n_tokens_seen": 256})


def validated(run: TrainRun) -> list[str]:
    return (run.dump_folder / "validation.jsonl").read_text().splitlines()


def seed_with_flex_attention(dump_folder: str) -> int:
    """In a rank: seed, with the proof's parts under FlexAttention; how many masks of blocks that took."""
    from torchtitan.tools.logging import init_logger

    from flame_ext.model import attention
    from flame_ext.trainer import FutureTrainer

    init_logger()
    trainer = FutureTrainer(
        parse([f"--job.config_file={DEBUG_TOML}", f"--job.dump_folder={dump_folder}", *NO_HEADS, CP2])
    )
    make = attention.causal_block_mask
    with (
        mock.patch.object(attention, "mask_form", return_value="flex"),
        mock.patch.object(attention, "causal_block_mask", side_effect=make) as made,
    ):
        trainer.checkpointer.load()
    trainer.close()
    dist.destroy_process_group()
    return made.call_count


def test_flex_attention_computes_the_same(tmp_path: Path) -> None:
    """Forward only: on a CPU it has no backward."""
    for rank in run_ranks(seed_with_flex_attention, 2, str(tmp_path / "run"), folder=tmp_path / "ranks"):
        assert rank.exit_code == 0, rank.output[-3000:]
        assert rank.value == 1 and "sequences in parts give the logits of whole ones" in rank.output


# -- what cannot be right ---------------------------------------------------------------------------------------


def what_seeding_says(dump_folder: str, options: Sequence[str], *changes: AbstractContextManager[Any]) -> str:
    """In a rank of two: the message with which the debug job is refused under ``changes``."""
    from torchtitan.tools.logging import init_logger

    from flame_ext.trainer import FutureTrainer

    init_logger()
    arguments = [f"--job.config_file={DEBUG_TOML}", f"--job.dump_folder={dump_folder}", *options, CP2]
    trainer = FutureTrainer(parse(arguments))
    try:
        with ExitStack() as entered:
            for change in changes:
                entered.enter_context(change)
            trainer.checkpointer.load()
    except SeedError as e:
        return str(e)
    finally:
        trainer.close()
        dist.destroy_process_group()
    return "seeded"


def seed_with_keys_out_of_order(dump_folder: str) -> str:
    """In a rank: what seeding says where masks take the gathered keys for a sequence in order."""
    from flame_ext.model.context_parallel import ContextParallel

    order = ContextParallel.order
    return what_seeding_says(
        dump_folder,
        NO_HEADS,
        mock.patch.object(ContextParallel, "positions", lambda self, *n: order(self, *n).chunk(2)[dist.get_rank()]),
        mock.patch.object(ContextParallel, "order", lambda _self, seq_len, _device: torch.arange(seq_len)),
    )


def test_a_backbone_that_computes_something_else_is_found_out(tmp_path: Path) -> None:
    for rank in run_ranks(seed_with_keys_out_of_order, 2, str(tmp_path / "run"), folder=tmp_path / "ranks"):
        assert rank.exit_code == 0, rank.output[-3000:]
        assert "does not compute what it does with all of it" in rank.value
        assert "set parallelism.context_parallel_degree = 1" in rank.value
    assert not list((tmp_path / "run").glob("checkpoint/*"))


@pytest.mark.parametrize("difference", [1e-3, float("nan")])
def test_logits_that_differ_are_refused(difference: float) -> None:
    whole = torch.linspace(-1, 1, 24).view(1, 4, 6)
    prove_context_parallel(lambda: whole + 1e-6, lambda: whole, 1e-5)
    with pytest.raises(SeedError, match="logits differ by up to"):
        prove_context_parallel(lambda: whole + difference, lambda: whole, 1e-5)


_SHAPE = {"vocab_size": 264, "hidden_size": 48, "intermediate_size": 48, "num_hidden_layers": 2, "eos_token_id": 0}
_SHAPE |= {"num_attention_heads": 4, "bos_token_id": None, "pad_token_id": 1}
_LONG = {"rope_type": "longrope", "short_factor": [1.0] * 6, "long_factor": [2.0] * 6, "rope_theta": 1e4}


def refusal(folder: Path, config: PreTrainedConfig, *options: str, world_size: int = 4) -> str:
    """The message of the checks before any process group exists."""
    config.architectures = [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[config.model_type]]
    config.save_pretrained(folder)
    shutil.copy(TINY_OLMO / "tokenizer.json", folder)
    arguments = [f"--job.config_file={DEBUG_TOML}", f"--model.hf_assets_path={folder}", "--training.seq_len=64", CP2]
    with mock.patch.dict("os.environ", {"WORLD_SIZE": str(world_size)}), pytest.raises(ConfigError) as refused:
        parse([*arguments, *options])
    return str(refused.value)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--parallelism.context_parallel_degree=0", *NO_HEADS], "context_parallel_degree must be >= 1"),
        (["--parallelism.context_parallel_degree=3", *NO_HEADS], "must divide the number of processes (4)"),
        (["--parallelism.pipeline_parallel_degree=3"], "pipeline_parallel_degree (3) must divide the number of processes (4)"),
        (["--parallelism.context_parallel_load_balancer=ptrr", *NO_HEADS], "must be one of 'headtail', None, got 'ptrr'"),
        (["--parallelism.context_parallel_rotate_method=alltoall", *NO_HEADS], "must be 'allgather', got 'alltoall'"),
        (["--training.seq_len=62", *NO_HEADS], "training.seq_len (62) must be a multiple of 4"),
        (["--training.seq_len=68", TP2, *NO_HEADS], "training.seq_len (68) must be a multiple of 8"),
        (["--validation.enable", "--validation.seq_len=62", *NO_HEADS], "validation.seq_len (62) must be a multiple of 4"),
        (["--training.global_batch_size=12", *NO_HEADS], "times the data-parallel ranks (2)"),
    ],
)  # fmt: skip
def test_options_that_do_not_go_together_are_refused(tmp_path: Path, options: list[str], expected: str) -> None:
    assert expected in refusal(tmp_path, LlamaConfig(**_SHAPE), *options)


def test_a_head_that_does_not_say_that_it_takes_parts_is_refused(tmp_path: Path) -> None:
    spec = replace(registry._heads["next_latent"], takes_parts=False)
    with mock.patch.dict(registry._heads, {"next_latent": spec}):
        message = refusal(tmp_path, LlamaConfig(**_SHAPE), "--next_latent.enable")
    assert "the spec of next_latent does not say" in message and "takes_parts = True" in message


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (MambaConfig(vocab_size=264, hidden_size=32, num_hidden_layers=2), "cannot be right for 'mamba': it "),
        (
            FalconConfig(vocab_size=264, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, alibi=True),
            "'falcon': its own attention code cannot be exchanged",
        ),
        (
            Phi3Config(**_SHAPE, max_position_embeddings=128, original_max_position_embeddings=64, rope_parameters=_LONG),
            "its RoPE ('longrope') depends on the length of what a rank sees",
        ),
        (
            LlamaConfig(**_SHAPE, rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}),
            "its RoPE ('dynamic') depends on the length",
        ),
    ],
    ids=["recurrent", "own-attention", "longrope", "dynamic"],
)  # fmt: skip
def test_a_model_that_needs_whole_sequences_is_refused(tmp_path: Path, config: PreTrainedConfig, expected: str) -> None:
    message = refusal(tmp_path, config, *NO_HEADS)
    assert expected in message and "parallelism.context_parallel_degree > 1 cannot be right for" in message
