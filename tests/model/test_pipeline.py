"""Runs on the stages of a pipeline against the same runs on one process: losses, gradients, weights, steps, exports."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import pytest
import torch
from torchtitan.config.job_config import Parallelism
from transformers import OlmoConfig
from transformers.models.olmo.modeling_olmo import OlmoModel

from flame_ext.errors import ConfigError
from flame_ext.model.pipeline_stages import layers_of_stages
from tests.faults.test_resume import AFTER_RESUME, assert_resumed_exactly
from tests.ranks import DEBUG_TOML, RankResult, TrainRun, run_ranks
from tests.step.test_objective_runs import assert_same_run
from tests.tiny_models import CONFIGS, save_tiny

PP2 = "--parallelism.pipeline_parallel_degree=2"
SCHEDULES = ("GPipe", "1F1B", "Interleaved1F1B")
MODELS = ("olmo-tied", "olmo2", "llama-scaled-rope")
HEADS = ("--action_layer.enable", "--action_layer.top_k=4")
PLAIN = ("--model.converters=", "--future_encoder.no-enable", "--future_predictor.no-enable")
BATCH, LENGTH = 4, 64
# A group of its own for a head, dropped sequences, documents, held-out text.
EVERYTHING = (
    *HEADS, "--action_layer.lr_scale=2", "--future_predictor.warmup_steps=3", "--data.document_attention",
    "--future_encoder.teacher_fraction=0.5", "--seed.verify=parity", "--validation.enable",
    "--validation.dataset=python_stdlib_validation", f"--validation.seq_len={LENGTH}", "--validation.steps=2",
    "--validation.freq=2", "--validation.local_batch_size=2",
)  # fmt: skip


DOCUMENTS = "documents.jsonl"


def assets(name: str, folder: Path) -> Path:
    """A tiny model, and documents of which several lie in a sequence."""
    save_tiny(name, folder)
    texts = (" ".join(str(number * step) for step in range(1, 2 + number % 9)) for number in range(1, 1200))
    (folder / DOCUMENTS).write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return folder


class Job(NamedTuple):
    """One run of the command among others in the same processes."""

    folder: Path
    model: Path
    options: tuple[str, ...]
    steps: int = 2


def run_jobs(jobs: list[Job]) -> list[dict[str, Any]]:
    """In a rank: train each job, saving every step, and what was resumed as soon as it is; digests of the input embedding."""
    import torch.distributed as dist
    import torch.distributed.checkpoint as dcp
    from torchtitan.components.checkpoint import MODEL, OPTIMIZER
    from torchtitan.tools.logging import init_logger

    from flame_ext.train import parse
    from flame_ext.trainer import FutureTrainer

    init_logger()
    results = []
    for job in jobs:
        arguments = [f"--job.config_file={DEBUG_TOML}", f"--job.dump_folder={job.folder}", "--seed.verify=finite"]
        arguments += [f"--model.hf_assets_path={job.model}", f"--checkpoint.initial_load_path={job.model}"]
        arguments += ["--training.dataset=json", f"--training.dataset_path={job.model / DOCUMENTS}"]
        arguments += ["--metrics.no-enable-tensorboard", "--checkpoint.interval=1", "--checkpoint.keep_latest_k=0"]
        arguments += [f"--training.seq_len={LENGTH}", f"--training.local_batch_size={BATCH}"]
        arguments += [
            "--lr_scheduler.total_steps=60",
            f"--training.steps={job.steps}",
            "--checkpoint.export_dtype=float32",
        ]
        arguments += [f"--training.global_batch_size={BATCH}", "--checkpoint.allow_config_change=training.steps"]
        trainer = FutureTrainer(parse([*arguments, *job.options]))
        resumes = (job.folder / "checkpoint").is_dir()
        load, states = trainer.checkpointer.load, trainer.checkpointer.states

        def loaded(load: Callable = load, states: dict = states, folder: Path = job.folder, **kwargs: Any) -> bool:
            result = load(**kwargs)
            dcp.save({**states[MODEL].state_dict(), OPTIMIZER: states[OPTIMIZER]}, checkpoint_id=folder / AFTER_RESUME)
            return result

        recorded = mock.patch.object(trainer.checkpointer, "load", loaded) if resumes else nullcontext()
        with recorded, mock.patch("torchtitan.train.time.sleep"):
            trainer.train()
        results.append(_embedding_digests(trainer))
        trainer.close()
    dist.destroy_process_group()
    return results


def _embedding_digests(trainer: Any) -> dict[str, str]:
    """Of this rank's shard of the input embedding and of its moments, where it has one."""

    def digest(tensor: torch.Tensor) -> str:
        local = tensor.to_local() if hasattr(tensor, "to_local") else tensor
        return hashlib.sha256(local.detach().contiguous().numpy().tobytes()).hexdigest()

    for part, optimizer in zip(trainer.model_parts, trainer.optimizers, strict=True):
        weight = next(iter(part.get_input_embeddings().parameters()), None)
        if weight is not None:
            state = {name: value for name, value in optimizer.state[weight].items() if name.startswith("exp")}
            return {"weight": digest(weight)} | {name: digest(value) for name, value in state.items()}
    return {}


def jobs_on(world_size: int, jobs: list[Job], folder: Path) -> list[RankResult]:
    ranks = run_ranks(run_jobs, world_size, jobs, folder=folder, timeout=800)
    assert all(rank.exit_code == 0 for rank in ranks), "\n".join(rank.output[-3000:] for rank in ranks)
    return ranks


class Untimed(TrainRun):
    """Without the seconds: a pipeline measures some that one process has not."""

    @property
    def metrics(self) -> list[dict[str, Any]]:
        return [{k: v for k, v in line.items() if not k.startswith("time_")} for line in super().metrics]


def metrics_of(folder: Path) -> TrainRun:
    return Untimed([], folder)


def schedule(name: str) -> str:
    return f"--parallelism.pipeline_parallel_schedule={name}"


CASES: dict[str, tuple[str, tuple[str, ...], tuple[str, ...]]] = {
    "everything": ("olmo-tied", EVERYTHING, (schedule("1F1B"),)),
    "untied": ("olmo2", HEADS, (schedule("GPipe"), "--parallelism.pipeline_parallel_microbatch_size=2")),
    "interleaved": ("llama-scaled-rope", (), (schedule("Interleaved1F1B"), "--activation_checkpoint.mode=full")),
    "pooled": (
        "olmo2",
        ("--future_encoder.summary_method=attention", "--data.document_attention"),
        (schedule("1F1B"),),
    ),
    "plain": ("llama-scaled-rope", PLAIN, (schedule("1F1B"),)),
}
"""Name to a model, options, and options of the pipeline."""


class Runs(NamedTuple):
    """Dump folders of the same jobs on one process, on two stages, and on two stages of two ranks each."""

    single: Path
    pipeline: Path
    pipeline_fsdp: Path
    pipeline_ranks: list[RankResult]
    pipeline_fsdp_ranks: list[RankResult]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    folder = tmp_path_factory.mktemp("pipeline")
    models = {name: assets(name, folder / "models" / name) for name in MODELS}
    single, pipeline, both = (folder / name for name in ("single", "pipeline", "pipeline-fsdp"))

    def job(where: Path, name: str, *options: str) -> Job:
        model, common, _ = CASES[name]
        return Job(where / name, models[model], (*common, *options))

    jobs_on(1, [job(single, name) for name in CASES], folder / "logs-1")
    # Steps of another layout to go on from, and the last one to export again.
    for source, target, step in ((single, pipeline, 1), (single, both, 1)):
        resumed_from(source / "everything", target / "resumed", step)
    resumed_from(single / "everything", pipeline / "exported", 2)
    two = [job(pipeline, name, PP2, *CASES[name][2]) for name in CASES]
    everything = Job(pipeline / "everything", models["olmo-tied"], (*EVERYTHING, PP2))
    two += [everything._replace(folder=pipeline / "resumed"), everything._replace(folder=pipeline / "exported")]
    on_two = jobs_on(2, two, folder / "logs-2")
    # Two sequences for each data-parallel rank; a fraction would be other sequences.
    half = ("--training.local_batch_size=2", PP2)
    four = [job(both, "untied", *half), Job(both / "plain", models["llama-scaled-rope"], (*PLAIN, *half, REPLICATED))]
    four.append(Job(both / "resumed", models["olmo-tied"], (*EVERYTHING, *half)))
    four.append(
        Job(both / "everything", models["olmo-tied"], (*EVERYTHING, PP2, "--parallelism.tensor_parallel_degree=2"))
    )
    on_four = jobs_on(4, four, folder / "logs-4")
    # And back.
    for source, target in ((pipeline, single / "from-pipeline"), (both, single / "from-both")):
        resumed_from(source / "resumed", target, 2)
    back = everything._replace(options=EVERYTHING, steps=3)
    jobs_on(1, [back._replace(folder=single / name) for name in ("from-pipeline", "from-both")], folder / "logs-back")
    return Runs(single, pipeline, both, on_two, on_four)


REPLICATED = "--parallelism.data_parallel_replicate_degree=2"


def resumed_from(source: Path, target: Path, step: int) -> None:
    """A dump folder that was broken off after ``step``."""
    (target / "checkpoint").mkdir(parents=True)
    shutil.copytree(source / "checkpoint" / f"step-{step}", target / "checkpoint" / f"step-{step}")
    shutil.copy(source / "metrics.jsonl", target)


@pytest.mark.parametrize("name", CASES)
def test_losses_and_gradients_are_those_of_one_process(runs: Runs, name: str) -> None:
    assert_same_run(metrics_of(runs.pipeline / name), metrics_of(runs.single / name))


def test_every_rank_knows_the_losses(runs: Runs) -> None:
    first, last = (re.findall(r"step: +\d+  loss_ce: .*", rank.output) for rank in runs.pipeline_ranks)
    assert first == last and len(first) == 2 * len(CASES) + 1, "two steps of each job, one of the resumed one"


@pytest.mark.parametrize("name", ["untied", "plain", "everything"], ids=["fsdp", "replicated", "tensor"])
def test_products_with_other_parallelisms_are_those_of_one_process(runs: Runs, name: str) -> None:
    assert_same_run(metrics_of(runs.pipeline_fsdp / name), metrics_of(runs.single / name))


@pytest.mark.parametrize("name", CASES)
def test_seeding_accounts_for_the_whole_model(runs: Runs, name: str) -> None:
    reports = [json.loads((folder / name / "seed_report.json").read_text()) for folder in (runs.single, runs.pipeline)]
    for report in reports:
        for field in ("seconds", "world_size", "bytes_read"):
            del report[field]
    assert reports[0] == reports[1]
    if name == "everything":
        assert reports[1]["verification"]["mode"] == "parity" and reports[1]["verification"]["max_abs_diff"] == 0
        assert all("Verified that no summary of the future" in rank.output for rank in runs.pipeline_ranks)


def test_held_out_losses_are_those_of_one_process(runs: Runs) -> None:
    files = (folder / "everything" / "validation.jsonl" for folder in (runs.single, runs.pipeline))
    single, pipeline = ([json.loads(line) for line in file.read_text().splitlines()] for file in files)
    assert [line["step"] for line in single] == [line["step"] for line in pipeline] == [1, 2]
    for expected, found in zip(single, pipeline, strict=True):
        assert {"loss_ce", "loss_future", "loss_action"} <= set(expected)
        assert found == pytest.approx(expected, rel=1e-5)


def test_both_ends_hold_the_same_embedding(runs: Runs) -> None:
    first, last = (rank.value for rank in runs.pipeline_ranks)
    for name, a, b in zip((*CASES, "resumed", "exported"), first, last, strict=True):
        if name == "pooled":  # untied, and nothing looks embeddings up
            assert a and not b
        else:
            assert a == b and set(a) == ({"weight"} if name == "exported" else {"weight", "exp_avg", "exp_avg_sq"}), (
                name
            )
    shards = [rank.value[0] for rank in runs.pipeline_fsdp_ranks]
    assert shards[0] == shards[2] and shards[1] == shards[3] and shards[0] != shards[1]


def test_steps_go_on_under_any_layout_with_the_same_bits(runs: Runs) -> None:
    step = runs.single / "everything" / "checkpoint" / "step-1"
    for folder, back in ((runs.pipeline, "from-pipeline"), (runs.pipeline_fsdp, "from-both")):
        assert_resumed_exactly(metrics_of(folder / "resumed"), step)
        assert_resumed_exactly(metrics_of(runs.single / back), folder / "resumed" / "checkpoint" / "step-2")
    assert_same_run(metrics_of(runs.pipeline / "resumed"), metrics_of(runs.single / "everything"))


def test_an_export_from_the_stages_is_that_of_one_process(runs: Runs) -> None:
    single, pipeline = (runs.single / "everything" / "hf" / "step-2", runs.pipeline / "exported" / "hf" / "step-2")
    files = sorted(str(p.relative_to(single)) for p in single.rglob("*") if p.is_file())
    assert "model.safetensors" in files and "future_heads/model.safetensors" in files
    for name in files:
        assert (single / name).read_bytes() == (pipeline / name).read_bytes(), name


def parse_debug(*options: str) -> Any:
    from flame_ext.train import parse

    return parse([f"--job.config_file={DEBUG_TOML}", *options])


@pytest.mark.parametrize("name", ["gpt2-learned-positions", "falcon-multi-query", "opt-inner-decoder"])
def test_an_architecture_without_a_plan_is_refused_by_name(name: str, tmp_path: Path) -> None:
    folder = save_tiny(name, tmp_path / name)
    with pytest.raises(
        ConfigError, match=r"cannot be right for '(gpt2|falcon|opt)': transformers has no pipeline plan for it"
    ):
        parse_debug(PP2, f"--model.hf_assets_path={folder}")


def test_an_architecture_that_does_more_than_its_plan_says_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    forward = OlmoModel.forward

    def scaled(self: OlmoModel, inputs_embeds: torch.Tensor | None = None, **kwargs: Any) -> Any:
        states = self.embed_tokens(kwargs.pop("input_ids")) if inputs_embeds is None else inputs_embeds
        return forward(self, inputs_embeds=states * 2, **kwargs)

    monkeypatch.setattr(OlmoModel, "forward", scaled)
    with pytest.raises(ConfigError, match="for 'olmo': its forward does more to hidden states than its layers do"):
        parse_debug(PP2)
    plan = {key: value for key, value in OlmoConfig.base_model_pp_plan.items() if key != "embed_tokens"}
    monkeypatch.setattr(OlmoConfig, "base_model_pp_plan", plan)
    with pytest.raises(ConfigError, match=r"its pipeline plan leaves out embed_tokens\.weight"):
        parse_debug(PP2)


def test_layers_of_stages_are_the_hosts(tmp_path: Path) -> None:
    def layers(num_layers: int, degree: int, name: str = "1F1B", **options: Any) -> list[list[int]]:
        options = {
            f"pipeline_parallel_{key}" if key != "module_fqns_per_model_part" else key: v for key, v in options.items()
        }
        return layers_of_stages(
            Parallelism(pipeline_parallel_degree=degree, pipeline_parallel_schedule=name, **options), num_layers
        )

    assert layers(4, 2) == [[0, 1], [2, 3]]
    assert layers(4, 2, first_stage_less_layers=0, last_stage_less_layers=2) == [[0, 1, 2], [3]]
    assert layers(6, 2, "Interleaved1F1B") == [[0], [1, 2], [3, 4], [5]]
    assert layers(6, 2, "Interleaved1F1B", layers_per_stage=2) == [[0], [1, 2], [3, 4], [5]]
    given = [["tok_embeddings", "layers.0", "layers.1", "layers.2"], ["layers.3", "norm", "output"]]
    assert layers(4, 2, module_fqns_per_model_part=given) == [[0, 1, 2], [3]]
    with pytest.raises(ConfigError, match=r"must hold layers\.0 to layers\.3 in order, each once"):
        layers(4, 2, module_fqns_per_model_part=[["layers.1", "layers.0"], ["layers.2", "layers.3"]])


@pytest.mark.matrix
@pytest.mark.parametrize("heads", [HEADS, PLAIN], ids=["heads", "plain"])
@pytest.mark.parametrize("model", MODELS)
def test_every_schedule_and_product_is_one_process(model: str, heads: tuple[str, ...], tmp_path: Path) -> None:
    folder = assets(model, tmp_path / "model")
    held = "--training.enable_cpu_offload"
    half = "--training.local_batch_size=2"
    pipelines = {
        2: {
            **{name: (PP2, schedule(name)) for name in SCHEDULES},
            "accumulated": (PP2, half),
            "whole": (PP2, schedule("GPipe"), f"--parallelism.pipeline_parallel_microbatch_size={BATCH}"),
            "compiled": (
                PP2,
                "--compile.enable",
                "--compile.backend=aot_eager",
                "--activation_checkpoint.mode=selective",
            ),
        },
        3: {"three": ("--parallelism.pipeline_parallel_degree=3",)},
        4: {
            "fsdp": (PP2, half),
            "fsdp-interleaved": (PP2, half, schedule("Interleaved1F1B")),
            "fsdp-offload": (PP2, half, held),
            "ddp-interleaved": (PP2, half, schedule("Interleaved1F1B"), REPLICATED),
        },
        8: {"hsdp": (PP2, REPLICATED, "--training.local_batch_size=1", schedule("GPipe"))},
    }
    jobs_on(1, [Job(tmp_path / "single", folder, heads)], tmp_path / "logs")
    for world_size, of_size in pipelines.items():
        jobs = [Job(tmp_path / name, folder, (*heads, *options)) for name, options in of_size.items()]
        jobs_on(world_size, jobs, tmp_path / "logs")
        for name in of_size:
            assert_same_run(metrics_of(tmp_path / name), metrics_of(tmp_path / "single"))


@pytest.mark.matrix
@pytest.mark.parametrize("more", ["", "fsdp", "tp"])
def test_stages_of_parts_of_sequences_are_one_process(more: str, tmp_path: Path) -> None:
    """With context parallelism, and more beside it: heads, pooled summaries, held-out text, the proofs of step 0."""
    cp = (PP2, "--parallelism.context_parallel_degree=2")
    size = "--parallelism.pipeline_parallel_microbatch_size"
    others = {"": (), "fsdp": ("--training.local_batch_size=2",), "tp": ("--parallelism.tensor_parallel_degree=2",)}
    of_others = (
        "--mtp.enable",
        "--next_latent.enable",
        "--next_latent.steps=9",
        "--future_bag.enable",
        "--token_order.enable",
    )
    gradients = ("--future_encoder.summary_method=query", "--future_encoder.no-detach_targets", schedule("GPipe"))
    whole = f"{size}={2 if more == 'fsdp' else BATCH}"
    cases = {
        "pooled": ("olmo2", CASES["pooled"][1], (schedule("GPipe"),)),
        "gradients": ("olmo2", gradients, (whole,)),
        "interleaved": ("llama-scaled-rope", of_others, (schedule("Interleaved1F1B"),)),
        "plain": ("llama-scaled-rope", PLAIN, (schedule("GPipe"),)),
    }
    if more != "fsdp":  # where a fraction would be other sequences
        cases["everything"] = ("olmo-tied", (*EVERYTHING, *of_others), (schedule("1F1B"),))
    models = {name: assets(name, tmp_path / "models" / name) for name in MODELS}
    for where, world_size, options in (("one", 1, ()), ("parts", 8 if more else 4, (*cp, *others[more]))):
        jobs = [
            Job(tmp_path / where / name, models[model], (*common, *options, *(in_stages if options else ())))
            for name, (model, common, in_stages) in cases.items()
        ]
        jobs_on(world_size, jobs, tmp_path / where / "logs")
    for name in cases:
        assert_same_run(metrics_of(tmp_path / "parts" / name), metrics_of(tmp_path / "one" / name))
    if "everything" in cases:
        files = (tmp_path / where / "everything" / "validation.jsonl" for where in ("one", "parts"))
        expected, found = ([json.loads(line) for line in file.read_text().splitlines()] for file in files)
        for line, other in zip(found, expected, strict=True):
            assert line == pytest.approx(other, rel=1e-5)


@pytest.mark.matrix
@pytest.mark.parametrize("name", [n for n in CONFIGS if not n.startswith(("gpt2", "falcon", "opt"))])
def test_every_architecture_in_stages_is_from_pretrained(name: str, tmp_path: Path) -> None:
    folder = assets(name, tmp_path / "model")
    options = ("--seed.verify=parity", "--data.document_attention", *HEADS)
    jobs_on(1, [Job(tmp_path / "single", folder, options)], tmp_path / "logs")
    jobs = [Job(tmp_path / layout, folder, (*options, PP2, schedule(layout))) for layout in ("1F1B", "Interleaved1F1B")]
    jobs_on(2, jobs, tmp_path / "logs")
    for job in jobs:
        assert json.loads((job.folder / "seed_report.json").read_text())["verification"]["max_abs_diff"] == 0
        assert_same_run(metrics_of(job.folder), metrics_of(tmp_path / "single"))
