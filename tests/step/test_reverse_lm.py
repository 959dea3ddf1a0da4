"""Summaries by a frozen model that reads backwards, compared with that model on documents reversed by hand; whole runs with it."""

from __future__ import annotations

import json
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor

from flame_ext.data.loader import positions_in_documents
from flame_ext.data.packing import PADDING
from flame_ext.heads.future_encoder import build_future_encoder
from flame_ext.heads.future_predictor import FuturePredictor, future_loss
from flame_ext.heads.reverse_lm import ReverseEncoder
from flame_ext.heads.spec import FutureBatch, FutureSummaries, HeadBatch, KeyBank
from flame_ext.hf_config import REVERSE_FIELD, load_hf_config
from flame_ext.objective.cross_entropy import TokenLogProbs
from flame_ext.objective.masks import pair_mask
from flame_ext.preflight.parse import parse
from flame_ext.step.plan import Planner
from flame_ext.step.reverse_model import ReverseModel, reverse_model_problems
from tests.data.test_masked import EOS, packed
from tests.preflight.refusals import refusal
from tests.ranks import DEBUG_TOML, REPOSITORY, TINY_OLMO, TrainRun, run_ranks, train
from tests.step.test_objective_runs import assert_same_run
from tests.tiny_models import load_stock, save_tiny

# Two documents and what comes after the data's end; three documents, one of a single token.
DOC_IDS = torch.tensor([[0] * 9 + [1] * 13 + [PADDING, PADDING + 1], [0] * 11 + [1] + [2] * 12])
REVERSE, PREDICTOR = (REPOSITORY / "configs" / "reverse_lm" / f"{name}.toml" for name in ("reverse", "predictor"))


def said_to_be_reverse(folder: Path) -> Path:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {REVERSE_FIELD: True}))
    return folder


def with_reverse(folder: Path, *options: str) -> list[str]:
    return ["--future_encoder.summary_method=reverse_lm", f"--future_encoder.reverse_model={folder}", *options]


def model_and_encoder(
    folder: Path, *options: str, mesh: DeviceMesh | None = None
) -> tuple[ReverseModel, ReverseEncoder]:
    """The teacher of a run whose backbone is that of ``folder`` as well, by FSDP if there is a mesh."""
    options = (f"--model.hf_assets_path={folder}", f"--checkpoint.initial_load_path={folder}", *options)
    config = parse([f"--job.config_file={DEBUG_TOML}", *with_reverse(folder), "--future_encoder.future_k=0", *options])
    dims: Any = SimpleNamespace(fsdp_enabled=mesh is not None, dp_replicate_enabled=False, get_mesh=lambda _: mesh)
    encoder = build_future_encoder("reverse_lm", config.future_encoder.future_k, 32, 4)
    assert isinstance(encoder, ReverseEncoder) and not list(encoder.parameters())
    return ReverseModel(config, dims, True, torch.device("cpu")), encoder


def summaries(teacher: tuple[ReverseModel, ReverseEncoder], tokens: Tensor, doc_ids: Tensor) -> FutureSummaries:
    """Of (B, T + 1) tokens and documents, for the first T positions."""
    model, encoder = teacher
    return encoder.summaries(model.states(tokens[:, 1:], doc_ids[:, 1:]), doc_ids[:, :-1])


@pytest.mark.parametrize(
    "name", ["olmo-tied", "gpt2-learned-positions", "gemma2", "gemma3-rope-per-layer", "phi3-fused-qkv"]
)
def test_summaries_are_the_models_states_on_documents_reversed_by_hand(tmp_path: Path, name: str) -> None:
    folder = said_to_be_reverse(save_tiny(name, tmp_path / "model"))
    tokens = torch.randint(2, 264, DOC_IDS.shape, generator=torch.Generator().manual_seed(0))
    found, stock = summaries(model_and_encoder(folder), tokens, DOC_IDS), load_stock(folder).eval()
    for row in range(len(tokens)):
        for number in DOC_IDS[row].unique():
            at = (DOC_IDS[row] == number).nonzero().flatten()
            ends = at[-1] == tokens.shape[1] - 1  # with the last label, which is no position
            inner = at[:-1] if ends else at
            assert not found.valid_mask[row, inner[-1:]].any() and found.valid_mask[row, inner[:-1]].all()
            if len(at) == 1:
                continue
            backwards = tokens[row, at].flip(0)[None]
            with torch.no_grad():
                states = (
                    stock.base_model(backwards).last_hidden_state[0].flip(0)
                )  # that at x_t has read x_t and what follows
            torch.testing.assert_close(found.states[row, at[:-1]], states[1:], rtol=1e-5, atol=1e-5)


def test_a_token_reaches_the_summaries_before_it_in_its_document_and_no_other(tmp_path: Path) -> None:
    folder = said_to_be_reverse(save_tiny("olmo-tied", tmp_path / "model"))
    tokens = torch.randint(2, 264, DOC_IDS.shape, generator=torch.Generator().manual_seed(0))
    for future_k, layers in ((0, 3), (2, 3)):
        teacher = model_and_encoder(folder, f"--future_encoder.future_k={future_k}")
        before = summaries(teacher, tokens, DOC_IDS).states
        for s in (0, 4, 8, 9, 15, 21, 23):
            changed = tokens.clone()
            changed[0, s] += 1
            after = summaries(teacher, changed, DOC_IDS).states
            reached = {t for t in range(tokens.shape[1] - 1) if not before[0, t].equal(after[0, t])}
            # A layer carries a token future_k - 1 positions on, and F_t is the state at t + 1.
            farthest = s - 1 - layers * (future_k - 1) if future_k else 0
            first = int((DOC_IDS[0] == DOC_IDS[0, s]).nonzero()[0])
            # That of the last position of the document before is the state at the next one's first token, and counts for nothing.
            expected = set(range(max(farthest, first - 1, 0), s))
            assert reached == expected, (future_k, s)
            assert before[1].equal(after[1])


@pytest.mark.parametrize("loss", ["info_nce", "regression"])
def test_the_loss_against_a_naive_one_in_float64(loss: str) -> None:
    torch.manual_seed(0)
    shape, shift, temperature, in_step = (2, 24), 1, 0.2, 50.0
    states, targets = torch.randn(*shape, 8), torch.randn(*shape, 8)
    found = ReverseEncoder().summaries(targets.roll(-1, 1).flip(1), DOC_IDS)
    pairs = pair_mask(found.valid_mask, DOC_IDS, shift)
    of_pairs = torch.zeros_like(pairs)
    of_pairs[:, shift:] = pairs[:, :-shift]
    bank = KeyBank(F.normalize(found.states, dim=-1).flatten(0, 1), of_pairs.flatten(), found.valid_mask.flatten())
    rows = (torch.arange(48) + shift).clamp_max(47)
    head = FuturePredictor(8, "mlp")
    none: Any = torch.zeros(0)
    future = FutureBatch(states, none, TokenLogProbs(none, none), pairs, bank, 0, shift, in_step, 1.0, rows)
    sections = {
        "future_encoder": SimpleNamespace(temperature=temperature),
        "future_predictor": SimpleNamespace(loss=loss),
    }
    batch = HeadBatch(states, none, none, none, DOC_IDS, none, SimpleNamespace(**sections), future=future)
    value = future_loss(head, batch)["loss_future"]
    value.backward()
    gradients = [p.grad for p in head.parameters()]

    exact = FuturePredictor(8, "mlp").double()
    exact.load_state_dict({k: v.double() for k, v in head.state_dict().items()})
    inner = exact.proj(exact.norm(states.double()))
    total = torch.zeros((), dtype=torch.float64)
    # By tokens: t is compared with the state at t + 2, and with those at all tokens that are so compared.
    where = [(b, t) for b in range(2) for t in range(22) if DOC_IDS[b, t] == DOC_IDS[b, t + 2]]
    for b, t in where:
        query = inner[b, t] / inner[b, t].norm()
        keys = [targets[c, u + 2].double() / targets[c, u + 2].double().norm() for c, u in where]
        own = keys[where.index((b, t))]
        if loss == "regression":
            total = total + ((query - own) ** 2).sum()
        else:
            logits = torch.stack([query @ key / temperature for key in keys])
            total = total + logits.logsumexp(0) - query @ own / temperature
    (total / in_step).backward()
    assert len(where) == int(pairs.sum()) > 20
    assert value.item() == pytest.approx((total / in_step).item(), rel=1e-5)
    for gradient, parameter in zip(gradients, exact.parameters(), strict=True):
        torch.testing.assert_close(gradient.double(), parameter.grad, rtol=1e-4, atol=1e-6)


def sharded_after_forwards(folder: str) -> tuple[bool, int]:
    """In a rank: whether every parameter is sharded after three forwards, and how many of these FSDP remembers."""
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("fsdp",))
    (teacher, _), tokens = model_and_encoder(Path(folder), mesh=mesh), torch.arange(24)[None]
    for _ in range(3):
        teacher.states(tokens, torch.zeros_like(tokens))
    model: Any = teacher._model
    remembered = len(model._get_fsdp_state()._comm_ctx.post_forward_order)
    return all(isinstance(parameter, DTensor) for parameter in model.parameters()), remembered


@pytest.mark.matrix
def test_a_sharded_model_is_freed_after_each_forward(tmp_path: Path) -> None:
    folder = said_to_be_reverse(save_tiny("olmo-tied", tmp_path / "reverse"))
    for rank in run_ranks(sharded_after_forwards, 2, str(folder), folder=tmp_path / "ranks"):
        assert rank.value == (True, 0), rank.output


@pytest.mark.matrix
def test_the_recipe_trains_a_reverse_model_and_then_predicts_its_states(tmp_path: Path) -> None:
    two = ("--training.steps=2", "--lr_scheduler.total_steps=60", "--checkpoint.export_dtype=float32")
    train(tmp_path / "reverse", *two, config=REVERSE)
    export = tmp_path / "reverse" / "hf" / "step-2"
    assert json.loads((export / "config.json").read_text())[REVERSE_FIELD] is True
    assert "reads text from its end to its beginning" in (export / "README.md").read_text()
    options = (*two, f"--future_encoder.reverse_model={export}", "--training.local_batch_size=4")
    run = train(tmp_path / "predictor", *options, world_size=2, config=PREDICTOR)
    line = run.metrics[0]
    assert line["loss"] == pytest.approx(line["loss_ce"] + 0.1 * line["loss_future"], rel=1e-6)
    assert line["loss_future"] == pytest.approx(2 - 2 * line["future_cos_positive"], rel=1e-5)
    after = tmp_path / "predictor" / "hf" / "step-2"
    assert REVERSE_FIELD not in json.loads((after / "config.json").read_text())
    assert "reads text from" not in (after / "README.md").read_text()
    heads = load_file(after / "future_heads" / "model.safetensors")
    assert {key.split(".")[0] for key in heads} == {"future_predictor"}
    with (
        safe_open(after / "model.safetensors", "pt") as ours,
        safe_open(TINY_OLMO / "model.safetensors", "pt") as stock,
    ):
        assert set(ours.keys()) == set(stock.keys())
    manifest = json.loads((tmp_path / "predictor" / "checkpoint" / "step-2" / "manifest.json").read_text())
    assert len(manifest["config"]["future_encoder.reverse_weights"]) == 64
    again = train(tmp_path / "predictor", *options[1:], "--training.steps=3", f"--future_encoder.reverse_model={after}",
                  "--future_encoder.assume_reverse", config=PREDICTOR, check=False)  # fmt: skip
    assert again.exit_codes == [1] and "future_encoder.reverse_weights: then" in again.ranks[0].output


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of the tiny OLMo's sizes with other weights, said to be a reverse one."""
    folder = tmp_path_factory.mktemp("reverse") / "model"
    torch.manual_seed(7)
    from transformers import AutoConfig, AutoModelForCausalLM

    AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(TINY_OLMO), dtype=torch.float32).save_pretrained(folder)
    (folder / "tokenizer.json").write_bytes((TINY_OLMO / "tokenizer.json").read_bytes())
    return said_to_be_reverse(folder)


THREE_STEPS = ("--training.steps=3", "--lr_scheduler.total_steps=60", "--checkpoint.interval=100")
ACTION = ("--action_layer.enable", "--action_layer.top_k=4")
HALF = "--training.local_batch_size=4"
DDP2 = "--parallelism.data_parallel_replicate_degree=2"


@pytest.fixture(scope="module")
def three_steps(tmp_path_factory: pytest.TempPathFactory, other: Path) -> TrainRun:
    return train(tmp_path_factory.mktemp("three") / "run", *THREE_STEPS, *ACTION, *with_reverse(other))


@pytest.mark.matrix
@pytest.mark.parametrize(
    ("world_size", "options"),
    [
        (2, [HALF]),
        (2, [HALF, DDP2]),
        (4, ["--training.local_batch_size=2", DDP2]),
        (1, ["--training.local_batch_size=2", "--training.global_batch_size=8"]),
        (1, ["--future_encoder.negatives=local"]),
        (1, ["--future_encoder.teacher_attention=flex"]),
        (1, ["--future_encoder.teacher_attention=sdpa", "--activation_checkpoint.mode=full"]),
        (2, ["--parallelism.tensor_parallel_degree=2"]),
        (2, ["--parallelism.context_parallel_degree=2"]),
        (2, ["--parallelism.pipeline_parallel_degree=2", "--parallelism.pipeline_parallel_microbatch_size=2"]),
        (4, ["--parallelism.pipeline_parallel_degree=2", HALF]),
        (2, [HALF, "--training.enable_cpu_offload"]),
        (2, [HALF, "--compile.enable", "--compile.backend=eager"]),
    ],
    ids=[
        *("fsdp2", "ddp2", "hsdp4", "accumulation4", "local-on-one-rank", "flex", "checkpointing", "tp2", "cp2", "pp2"),
        *("pp2-fsdp2", "offload", "compiled"),
    ],
)  # fmt: skip
def test_losses_and_gradients_do_not_depend_on_the_layout(
    three_steps: TrainRun, other: Path, dump_folder: Path, world_size: int, options: list[str]
) -> None:
    run = train(dump_folder, *THREE_STEPS, *ACTION, *with_reverse(other), *options, world_size=world_size)
    assert_same_run(run, three_steps)


@pytest.mark.matrix
def test_at_zero_weight_a_run_is_the_plain_one_and_never_opens_the_model(dump_folder: Path, other: Path) -> None:
    plain = ["--model.converters=", "--future_encoder.no-enable", "--future_predictor.no-enable"]
    options = (*THREE_STEPS, "--checkpoint.export_dtype=float32")
    train(dump_folder / "plain", *options, *plain)
    run = train(dump_folder / "zero", *options, *with_reverse(other / "absent"), "--future_encoder.loss_weight=0")
    one, zero = (load_file(dump_folder / name / "hf" / "step-3" / "model.safetensors") for name in ("plain", "zero"))
    assert all(torch.equal(one[key], zero[key]) for key in one) and "loss_future" not in run.metrics[0]


@pytest.mark.matrix
def test_a_run_that_was_stopped_evaluated_and_resumed(dump_folder: Path, other: Path) -> None:
    held_out = ["--validation.enable", "--validation.dataset=python_stdlib_validation", "--validation.seq_len=256"]
    held_out += ["--validation.steps=2", "--validation.freq=1", "--future_encoder.teacher_interval=2"]
    options = [*with_reverse(other), *held_out, "--future_encoder.teacher_fraction=0.5", "--checkpoint.interval=2"]
    steps = ["--lr_scheduler.total_steps=60", "--checkpoint.no-last_save_model_only"]
    whole = train(dump_folder / "whole", *steps, "--training.steps=4", *options)
    train(dump_folder / "cut", *steps, "--training.steps=2", *options)
    changed = "--checkpoint.allow_config_change=training.steps"
    cut = train(dump_folder / "cut", *steps, "--training.steps=4", *options, changed)
    assert [line["loss"] for line in cut.metrics] == [line["loss"] for line in whole.metrics]
    assert whole.metrics[1]["loss_future"] is None and whole.metrics[2]["loss_future"] > 0
    lines = [json.loads(line) for line in (dump_folder / "whole" / "validation.jsonl").read_text().splitlines()]
    assert lines[3]["loss_future"] < lines[0]["loss_future"]


def test_what_can_not_be_the_teacher_is_refused(tmp_path: Path, other: Path) -> None:
    method = "--future_encoder.summary_method=reverse_lm"
    assert "reverse_model is not set: summary_method = 'reverse_lm' needs" in refusal(method)
    assert "is for summary_method = 'reverse_lm', and it is 'anticausal'" in refusal(*with_reverse(other)[1:])
    assert "future_encoder.assume_reverse is for" in refusal("--future_encoder.assume_reverse")
    assert "would read backwards what is backwards already" in refusal(*with_reverse(other), "--data.reverse")
    assert "the reverse_lm forward has no gradient" in refusal(
        *with_reverse(other), "--future_encoder.no-detach_targets"
    )
    assert "no config.json: name the Hugging Face folder" in refusal(*with_reverse(tmp_path))
    regression = ("--future_predictor.loss=regression", "--future_encoder.no-detach_targets")
    assert "would meet in a constant" in refusal(*regression, "--future_encoder.summary_method=mean")


def test_a_folder_that_does_not_fit_the_model_is_refused(tmp_path: Path) -> None:
    config = parse([f"--job.config_file={DEBUG_TOML}", *with_reverse(TINY_OLMO, "--future_encoder.assume_reverse")])
    backbone = load_hf_config(str(TINY_OLMO))

    def problems(folder: Path, **fields: Any) -> str:
        file = folder / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | fields))
        return "\n".join(reverse_model_problems(config, folder, backbone))

    folder = save_tiny("olmo-tied", tmp_path / "model")
    assert "has hidden_size 32, and the model 128: take a reverse model" in problems(folder)
    assert "has vocab_size 270, and the model 264" in problems(folder, hidden_size=128, vocab_size=270)
    fields = {"vocab_size": 264, "max_position_embeddings": 128}
    assert "seq_len (256) is beyond max_position_embeddings (128)" in problems(folder, **fields)
    tokenizer = json.loads((TINY_OLMO / "tokenizer.json").read_text())
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer, indent=3))
    assert problems(folder, max_position_embeddings=512) == ""
    config.future_encoder.assume_reverse = False
    assert "does not say that it reads from right to left (flame_ext_reverse in config.json)" in problems(folder)
    assert problems(folder, **{REVERSE_FIELD: True}) == ""
    vocabulary = tokenizer["model"]["vocab"]
    one, two = list(vocabulary)[5:7]
    vocabulary[one], vocabulary[two] = vocabulary[two], vocabulary[one]
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    assert "its tokenizer.json has other tokens" in problems(folder)
    assert "cannot keep documents apart: it has layers" in problems(folder, model_type="mamba")
    for damage in ("{", "", "[]", '{"model_type": 3}'):
        (folder / "config.json").write_text(damage)
        (found,) = reverse_model_problems(config, folder, backbone)
        assert "config.json" in found and "model.hf_assets_path" not in found


def test_a_run_from_left_to_right_from_a_reverse_model_is_warned_of(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = said_to_be_reverse(save_tiny("olmo-tied", tmp_path / "reverse"))
    job = [f"--job.config_file={DEBUG_TOML}", f"--checkpoint.initial_load_path={folder}"]
    parse([*job, "--data.reverse"])
    assert "right to left" not in caplog.text
    parse(job)
    assert f"checkpoint.initial_load_path '{folder}' was trained from right to left" in caplog.text


TOKENS = st.lists(st.sampled_from([1, 2, 3, EOS]), min_size=1, max_size=12)


@given(st.lists(TOKENS, min_size=4, max_size=9), st.integers(2, 9))
@settings(max_examples=100, deadline=None)
def test_the_teacher_reads_what_a_reverse_model_is_trained_to_read(documents: list[list[int]], seq_len: int) -> None:
    learned = [[(token, True) for token in document] for document in documents]
    config = parse([f"--job.config_file={DEBUG_TOML}"])
    planner = Planner(config, EOS, None, torch.device("cpu"))
    ((forwards,), (backwards,)) = (packed(learned, 1, seq_len, reverse) for reverse in (False, True))
    for batch, (trained, _) in islice(zip(forwards, backwards, strict=True), 2):
        if (batch[1] < 0).any():
            continue  # not filled, or nothing is left
        (microbatch,) = planner.plan(1, [batch]).microbatches
        future = microbatch.future
        assert future is not None and microbatch.next_tokens().flip(1).equal(trained["input"])
        assert positions_in_documents(future.next_doc_ids().flip(1)).equal(trained["positions"])
