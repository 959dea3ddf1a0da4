"""Heads under context parallelism: what comes from other ranks, and one optimisation step against that of a single process."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from flame_ext.model.context_parallel import _halo
from flame_ext.objective.masks import anticausal_block_mask, anticausal_mask
from tests.faults.test_resume import assert_resumed_exactly, resumed_from, train
from tests.layouts import COMPILE, CP2, PER_OP, assert_same_step, steps
from tests.model.test_context_parallel import DOCUMENTS, FURTHER, IN_ORDER, NEXT, what_seeding_says
from tests.ranks import TrainRun, run_ranks


def pooled(method: str, window: int = 0) -> list[str]:
    """With gradients through the summaries."""
    options = [f"--future_encoder.summary_method={method}", f"--future_encoder.future_k={window}"]
    return [*options, "--future_encoder.no-detach_targets"]


def order_of(ranks: int, chunks: int, length: int) -> list[int]:
    """The positions of all ranks, as torchtitan deals them out."""
    pieces = torch.arange(length).chunk(ranks * chunks)
    dealt = [[rank, ranks * chunks - 1 - rank][:chunks] for rank in range(ranks)]
    return torch.cat([pieces[number] for numbers in dealt for number in numbers]).tolist()


@pytest.mark.parametrize(("ranks", "chunks"), [(1, 2), (2, 1), (2, 2), (3, 2), (4, 1)])
@pytest.mark.parametrize("steps_ahead", [1, 3, 4, 9, 30])
def test_each_chunk_gets_what_follows_it(ranks: int, chunks: int, steps_ahead: int) -> None:
    size = 4
    length, count = ranks * chunks * size, chunks * size
    order = order_of(ranks, chunks, length)
    plans = [_halo(order, ranks, rank, chunks, steps_ahead, torch.device("cpu")) for rank in range(ranks)]
    local = [torch.tensor(order[rank * count : (rank + 1) * count]) for rank in range(ranks)]
    sent = [local[rank][plan.sent].split(plan.sent_to) for rank, plan in enumerate(plans)]
    for rank, plan in enumerate(plans):
        arrived = [sent[other][rank] for other in range(ranks)]
        assert list(map(len, arrived)) == plan.received_of and not len(arrived[rank])
        every = torch.cat([*arrived, local[rank][plan.own]])
        assert len(every.unique()) == len(every), "each once"
        found = torch.cat([every, torch.tensor([-1])])[plan.places].view(chunks, steps_ahead)
        for chunk, ahead in zip(local[rank].view(chunks, size), found, strict=True):
            wanted = chunk[-1] + 1 + torch.arange(steps_ahead)
            assert ahead.tolist() == wanted.where(wanted < length, -1).tolist()


@pytest.mark.parametrize("future_k", [0, 3])
def test_rows_of_a_rank_are_those_of_the_whole_mask(future_k: int) -> None:
    order = torch.tensor(order_of(2, 2, 16))
    rows, documents = order[8:], torch.tensor([[0] * 6 + [1] * 10])
    whole = anticausal_mask(16, future_k, documents)
    assert torch.equal(anticausal_mask(16, future_k, documents, "cpu", rows, order), whole[:, :, rows][..., order])
    block = anticausal_block_mask(16, future_k, documents, "cpu", rows, order)
    zero, i, j = torch.tensor(0), torch.arange(8)[:, None], torch.arange(16)
    assert torch.equal(block.mask_mod(zero, zero, i, j), whole[0, 0, rows][:, order])


def short_documents(folder: Path) -> list[str]:
    """Options for text of which several documents lie in a sequence, and some in two chunks."""
    texts = (" ".join(str(number * step) for step in range(1, 2 + number % 9)) for number in range(1, 400))
    (folder / "short.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return ["--training.dataset=json", f"--training.dataset_path={folder / 'short.jsonl'}"]


# Of each sequence a fraction, by data-parallel rank: where there are several, a step is another one.
ONE_RANK_OF_DATA = ["--future_encoder.teacher_fraction=0.5", "--future_encoder.negatives=local"]
JOBS: dict[str, list[str]] = {
    "olmo-tied+heads+next": NEXT,
    "gemma2+heads+further": [*FURTHER, *DOCUMENTS],
    "olmo2+heads+near": ["--future_encoder.future_k=5", *IN_ORDER],
    "olmo2+heads+flex": ["--future_encoder.teacher_attention=flex"],
    "olmo2+heads+mean": pooled("mean"),
    "olmo2+heads+mean in order": [*pooled("mean"), *IN_ORDER, "--future_encoder.no-respect_doc_boundaries"],
    "olmo2+heads+mean of a wide window": [*pooled("mean", 40), *DOCUMENTS],
    "olmo2+heads+max": pooled("max", 5),
    "llama-scaled-rope+heads+max of all": pooled("max"),
    "llama-scaled-rope+heads+attention": pooled("attention"),
    "olmo2+heads+constant": ["--future_encoder.summary_method=attention", "--future_encoder.future_k=5"],
    "qwen3-qk-norm+heads+query": [*pooled("query", 7), *DOCUMENTS, *IN_ORDER],
    "olmo2+heads+own": ["--experimental.custom_import=tests.heads.own_head", "--next_byte.enable"],
    "olmo2+heads+op": [*FURTHER, *PER_OP],
    "olmo2+heads+compiled": [*FURTHER, *COMPILE],
    "olmo-tied+heads+offload": [*NEXT, "--training.enable_cpu_offload"],
    "olmo-tied+heads+full": [*NEXT, *pooled("attention", 9), "--activation_checkpoint.mode=full"],
    "gpt2-learned-positions+heads": FURTHER,
}


@pytest.mark.matrix
@pytest.mark.parametrize("layout", ["cp2", "cp4", "fsdp2-cp2", "hsdp2-cp2", "cp2-tp2"])
def test_every_head_under_every_layout(models: Path, tmp_path: Path, layout: str) -> None:
    jobs = {name: options for name, options in JOBS.items() if layout != "cp2-tp2" or not name.startswith("gpt2")}
    if layout in ("cp2", "cp4"):
        jobs["llama-scaled-rope+heads+fraction"] = ONE_RANK_OF_DATA
    text = short_documents(tmp_path)
    (expected,) = steps(models, tmp_path, "single", jobs, *text)
    for rank in steps(models, tmp_path, layout, jobs, *text):
        for name in jobs:
            assert_same_step(rank[name], expected[name])


@pytest.mark.matrix
def test_a_run_goes_on_under_other_layouts(tmp_path: Path) -> None:
    """From one process to ranks that share sequences, to stages of such ranks, and back; the losses are those of one process."""
    options = [*short_documents(tmp_path), "--action_layer.enable", "--mtp.enable", "--next_latent.enable"]
    unbroken = train(tmp_path / "unbroken", *options, ranks=1)
    layouts = [(4, 2, [CP2]), (4, 4, [CP2, "--parallelism.pipeline_parallel_degree=2"]), (1, 4, [])]
    run: TrainRun = unbroken
    for step, (ranks, batch, more) in enumerate(layouts, start=1):
        folder = resumed_from(run, step, tmp_path / f"{step}")
        before = run.dump_folder / "checkpoint" / f"step-{step}"
        layout = [*more, f"--training.local_batch_size={batch}"]
        run = train(folder, *options, *layout, ranks=ranks, steps=step + 1)
        assert_resumed_exactly(run, before)
    for name in ("loss", "loss_ce", "loss_future", "loss_action", "loss_mtp", "loss_next_latent", "grad_norm"):
        assert run.values(name) == pytest.approx(unbroken.values(name), rel=1e-4), name


def seed_with_another_mask(dump_folder: str) -> str:
    """In a rank: what seeding says where the teacher takes the gathered keys for a sequence in order."""
    from flame_ext.heads import future_encoder

    def of_other_keys(seq_len: int, future_k: int, documents: Any, device: Any, rows: Any, order: Any) -> torch.Tensor:
        return anticausal_mask(seq_len, future_k, documents, device, rows, torch.arange(seq_len))

    return what_seeding_says(dump_folder, (), mock.patch.object(future_encoder, "anticausal_mask", of_other_keys))


def test_a_teacher_that_sees_the_past_of_another_rank_is_found_out(tmp_path: Path) -> None:
    for rank in run_ranks(seed_with_another_mask, 2, str(tmp_path / "run"), folder=tmp_path / "ranks"):
        assert rank.exit_code == 0, rank.output[-3000:]
        assert "the anti-causal forward leaks" in rank.value
