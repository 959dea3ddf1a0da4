"""Plans: what follows from a rehearsal, remedies, first jobs; the commands from end to end in the matrix."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from flame_ext.config.manager import FlameConfigManager
from flame_ext.errors import ConfigError, UserError
from flame_ext.heads.registry import job_config_class
from flame_ext.planning import remedies, starting
from flame_ext.planning.figures import Rehearsal
from flame_ext.planning.plan import Machine, Plan
from flame_ext.planning.remedies import remedy
from flame_ext.tools import plan as command
from flame_ext.tools.main import main
from tests.ranks import DEBUG_TOML, TINY_OLMO, train
from tests.tiny_models import save_tiny

SETTINGS = {
    "training.local_batch_size": 8,
    "training.global_batch_size": -1,
    "training.seq_len": 1000,
    "training.enable_cpu_offload": False,
    "activation_checkpoint.mode": "selective",
    "compile.enable": True,
    "parallelism.data_parallel_replicate_degree": 1,
    "parallelism.data_parallel_shard_degree": -1,
    "parallelism.pipeline_parallel_degree": 1,
}
ONE_SEQUENCE = ["--training.local_batch_size=1", "--training.global_batch_size=64"]


def imagined(options: Sequence[str], machine: Machine) -> Plan:
    """A job of 160 GB of weights and moments, shared by the ranks, and 5 GB for each sequence, 1 GB with full checkpointing."""
    values = dict(option.removeprefix("--").partition("=")[::2] for option in options)
    batch = int(values.get("training.local_batch_size", 8))
    weights = 0 if "training.enable_cpu_offload" in values else int(160e9) // machine.ranks
    of_sequence = int(1e9 if values.get("activation_checkpoint.mode") == "full" else 5e9)
    parts = {"weights": weights, "activations": batch * of_sequence}
    settings = {**SETTINGS, "training.local_batch_size": batch}
    operations = {"backbone": 6e9, "heads": 1e9, "teacher": 2e9, "comparisons": 1e9}
    parameters = {"backbone": int(8e9), "future_predictor": int(2e9)}
    found = Rehearsal(
        **{"rank": 0, "peak": sum(parts.values()), "parts": parts, "on_host": 0, "parameters": parameters},
        **{"local_parameters": int(10e9) // machine.ranks, "tokens": 64_000, "operations": operations},
        **{"checkpoint": 12, "export": 2, "stored_parameter": 2.0, "source": "there", "settings": settings},
    )
    return Plan(tuple(options), machine, found)


def imagined_job(options: Sequence[str], machine: Machine) -> Plan:
    """The same of a TOML, which is the only option."""
    job = Path(options[0].partition("=")[2]).read_text()
    batch, mode = (re.findall(f"^{name} = (.*?) *#", job, re.MULTILINE)[0] for name in ("local_batch_size", "mode"))
    return imagined([f"--training.local_batch_size={batch}", f"--activation_checkpoint.mode={mode[1:-1]}"], machine)


@pytest.fixture
def by_imagination(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remedies, "make_plan", imagined)
    monkeypatch.setattr(starting, "make_plan", imagined_job)


def test_what_follows_from_a_rehearsal() -> None:
    plan = imagined([], Machine(ranks=8, tflops=100))
    assert plan.rehearsal.peak == 60e9 and plan.fits and not imagined([], Machine(ranks=8, memory=62)).fits
    assert plan.operations == 10e9
    assert plan.seconds(mfu=0.5) == pytest.approx(64_000 * 10e9 / (8 * 100e12 * 0.5))
    assert plan.seeding == 8e9 * 2  # the backbone, once
    assert imagined([], Machine(ranks=16)).seeding == 8e9  # of which each of two nodes reads a half
    assert Machine(memory=None).limit is None and imagined([], Machine(memory=None)).fits


@pytest.mark.parametrize(
    ("machine", "options"),
    [
        (Machine(8, 50), ["--training.local_batch_size=4", "--training.global_batch_size=64"]),
        (Machine(8, 28), ONE_SEQUENCE),
        (Machine(8, 24.5), [*ONE_SEQUENCE, "--activation_checkpoint.mode=full"]),
        (Machine(8, 5), [*ONE_SEQUENCE, "--activation_checkpoint.mode=full", "--training.enable_cpu_offload"]),
    ],
)
def test_the_least_remedy_that_fits(machine: Machine, options: list[str], by_imagination: None) -> None:
    said: list[str] = []
    plan = imagined(["--job.config_file=x"], machine)
    found = remedy(plan, said.append)
    assert not plan.fits and found is not None and found.fits
    assert list(found.options) == ["--job.config_file=x", *options]
    assert said[-1].startswith(f"tried {' '.join(options)} on 8: ")


def test_more_ranks_are_the_last_remedy_and_there_may_be_none(
    by_imagination: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def without_offload(options: Sequence[str], machine: Machine) -> Plan:
        if "--training.enable_cpu_offload" in options:
            raise ConfigError("refused by preflight")
        return imagined(options, machine)

    monkeypatch.setattr(remedies, "make_plan", without_offload)
    found = remedy(imagined([], Machine(8, 15)))
    assert found is not None and found.machine.ranks == 16 and found.fits
    assert remedy(imagined([], Machine(8, 3))) is None


def test_a_first_job_takes_the_largest_batch_that_fits(by_imagination: None) -> None:
    def settings(memory: float) -> str:
        return starting.first_job(str(TINY_OLMO), Machine(8, memory))

    assert "local_batch_size = 8 " in settings(80)
    assert "local_batch_size = 4 " in settings(50)
    smallest = settings(24.5)
    assert "local_batch_size = 2 " in smallest and 'mode = "full"' in smallest
    with pytest.raises(UserError, match=r"nothing that was tried fits 8 x 3 GB; give more --gpus"):
        settings(3)


def test_a_first_job_is_a_job(by_imagination: None, tmp_path: Path) -> None:
    file = tmp_path / "job.toml"
    file.write_text(starting.first_job(str(TINY_OLMO), Machine(4)))
    config = FlameConfigManager(job_config_class).parse_args([f"--job.config_file={file}"])
    training = config.training
    assert config.checkpoint.initial_load_path == config.model.hf_assets_path == str(TINY_OLMO)
    assert training.global_batch_size % (training.local_batch_size * 4) == 0
    assert training.global_batch_size * training.seq_len >= 2**19


@pytest.mark.parametrize(("name", "compiled"), [("olmoe", False), ("olmo2", True)])
def test_a_first_job_of_a_mixture_is_not_compiled(
    name: str, compiled: bool, by_imagination: None, tmp_path: Path
) -> None:
    """And a word in the configuration makes no mixture of a dense model."""
    folder = save_tiny(name, tmp_path / name)
    fields = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(fields | {"experts_asked": 3}))
    job = starting.first_job(str(folder), Machine(4))
    assert f"[compile]\nenable = {str(compiled).lower()}\n" in job


def test_options_of_the_trainer_belong_to_plan_alone(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seen: list[Any] = []

    def note(options: Sequence[str], machine: Machine) -> Plan:
        seen.append((list(options), machine))
        return imagined(options, machine)

    monkeypatch.setattr("flame_ext.planning.plan.make_plan", note)
    assert main(["plan", "x.toml", "--gpus", "8", "--training.steps", "4", "--compile.enable", "--json"]) == 0
    options, machine = seen[0]
    assert options == ["--job.config_file=x.toml", "--training.steps", "4", "--compile.enable"]
    assert machine == Machine(8) and json.loads(capsys.readouterr().out)["tokens_per_step"] == 64_000
    with pytest.raises(SystemExit, match="2"):
        main(["inspect", str(TINY_OLMO), "--training.local_batch_size", "4"])
    assert "unrecognized arguments: --training.local_batch_size 4" in capsys.readouterr().err
    assert main(["plan", "x.toml", "--gpus", "0"]) == 2
    assert "--gpus must be above 0, got 0" in capsys.readouterr().err


def test_a_verdict_names_a_remedy(
    by_imagination: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("flame_ext.planning.plan.make_plan", imagined)
    assert main(["plan", "x.toml", "--gpus", "8", "--gpu-memory", "50"]) == 1
    output = capsys.readouterr().out
    assert "does not fit: 60.0 GB of the 46.9 GB" in output
    assert "rehearsed, and fits with 40.0 GB: --training.local_batch_size=4 --training.global_batch_size=64" in output
    assert command.as_json(imagined([], Machine(8)), None, 0.4)["remedy"] is None


@pytest.mark.matrix
def test_the_debug_job_from_end_to_end(dump_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(DEBUG_TOML), "--gpus", "2", "--json", "--training.steps", "2"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["parameters"] == {"backbone": 1_082_368, "future_encoder": 0, "future_predictor": 66_176}
    assert found["tokens_per_step"] == 2 * 8 * 256 and found["fits"]
    train(dump_folder, "--training.steps=2", world_size=2)
    (step,) = (dump_folder / "checkpoint").glob("step-*")
    on_disk = sum(file.stat().st_size for file in step.glob("*.distcp"))
    assert found["checkpoint_bytes"] <= on_disk < found["checkpoint_bytes"] + 1.5e6  # of headers and the dataloader
    report = json.loads((dump_folder / "seed_report.json").read_text())
    assert found["seeding_bytes_per_node"] == pytest.approx(report["bytes_read"], rel=0.05)


@pytest.mark.matrix
@pytest.mark.parametrize("options", [["--optimizer.name=Muon"], ["--model.converters=lora,future_prediction"]])
def test_a_step_has_the_planned_size(options: list[str], dump_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Muon has one moment for a matrix, and steps with adapters do not hold the weights beside them."""
    assert main(["plan", str(DEBUG_TOML), "--gpus", "2", "--json", *options]) == 0
    planned = json.loads(capsys.readouterr().out)["checkpoint_bytes"]
    train(dump_folder, "--training.steps=2", *options, world_size=2)
    metadata = FileSystemReader(dump_folder / "checkpoint" / "step-2").read_metadata().state_dict_metadata.items()
    held = {key: of for key, of in metadata if isinstance(of, TensorStorageMetadata) and of.size}
    tensors = {key: of for key, of in held.items() if not key.startswith(("rng", "dataloader", "train_state"))}
    assert planned == sum(of.size.numel() * of.properties.dtype.itemsize for of in tensors.values())


@pytest.mark.matrix
def test_what_preflight_refuses_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(DEBUG_TOML), "--gpus", "3", "--parallelism.tensor_parallel_degree", "2"]) == 2
    assert "must divide the number of processes (3)" in capsys.readouterr().err
    assert main(["plan", str(DEBUG_TOML), "--training.local_batch", "2"]) == 2


@pytest.mark.matrix
@pytest.mark.parametrize(
    "options",
    [
        ["--parallelism.tensor_parallel_degree=2"],
        ["--parallelism.pipeline_parallel_degree=2"],
        ["--parallelism.context_parallel_degree=2"],
        ["--parallelism.data_parallel_replicate_degree=2", "--parallelism.data_parallel_shard_degree=1"],
        ["--data.document_attention", "--future_encoder.negatives=global", "--training.global_batch_size=48"],
        ["--future_encoder.summary_method=mean"],
        ["--mtp.enable", "--token_order.enable", "--future_bag.enable", "--next_latent.enable"],
    ],
)
def test_every_parallelism_and_objective_can_be_rehearsed(
    options: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", str(DEBUG_TOML), "--gpus", "2", "--json", *options]) == 0, capsys.readouterr().err
    memory = json.loads(capsys.readouterr().out)["memory"]
    assert sum(memory["parts"].values()) == memory["peak"] > 10e6


@pytest.mark.matrix
@pytest.mark.parametrize(
    "options",
    [[], ["--quantize.linear.float8.enable_fsdp_float8_all_gather"], ["--quantize.linear.float8.recipe_name=rowwise"]],
)
def test_a_job_in_float8_is_rehearsed_as_on_a_gpu_that_knows_it(
    options: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """Its layers keep inputs, weights and gradients as layers in high precision do."""
    job = ["plan", str(DEBUG_TOML), "--gpus", "2", "--json", "--seed.verify=none"]
    assert main([*job, "--model.converters=quantize.linear.float8,future_prediction", *options]) == 0
    float8 = json.loads(capsys.readouterr().out)
    assert main(job) == 0
    plain = json.loads(capsys.readouterr().out)
    assert float8["checkpoint_bytes"] == plain["checkpoint_bytes"]
    parts, others = float8["memory"]["parts"], plain["memory"]["parts"]
    assert all(parts[name] == others[name] for name in ("weights", "moments"))
    assert parts["activations"] == pytest.approx(others["activations"], rel=0.1)


MIXTURE = ["--training.seq_len=64", "--training.local_batch_size=2"]


@pytest.mark.matrix
@pytest.mark.parametrize("name", ["olmoe", "deepseek-v3", "gpt-oss"])
def test_a_mixture_can_be_rehearsed(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = save_tiny(name, tmp_path)
    job = ["plan", str(DEBUG_TOML), "--gpus", "2", *MIXTURE, f"--model.hf_assets_path={folder}"]
    job += [f"--checkpoint.initial_load_path={folder}", "--json"]
    found = []
    for dtype in ("bfloat16", "float32"):
        assert main([*job, f"--training.mixed_precision_param={dtype}"]) == 0, capsys.readouterr().err
        found.append(json.loads(capsys.readouterr().out))
    with safe_open(folder / "model.safetensors", "pt") as file:
        keys = [key for key in file.keys() if not key.endswith("e_score_correction_bias")]  # noqa: SIM118
        sizes = [file.get_slice(key).get_shape() for key in keys]
    elements = sum(math.prod(size) for size in sizes)
    heads = sum(count for part, count in found[0]["parameters"].items() if part != "backbone")
    for plan in found:
        assert plan["parameters"]["backbone"] == elements
        assert plan["memory"]["parts"]["weights"] == pytest.approx(4 * (elements + heads) / 2, rel=0.05), (
            "in float32, sharded"
        )
    half, whole = (plan["memory"]["parts"]["activations"] for plan in found)
    assert half < whole < 2.1 * half
    for option in ("--moe.experts_implementation=eager", "--parallelism.expert_parallel_degree=2"):
        assert main([*job, "--training.mixed_precision_param=bfloat16", option]) == 2
        said = capsys.readouterr().err
        assert "this job cannot be rehearsed, since sizes in its forward depend on values" in said, said
        assert "moe.experts_implementation = 'grouped_mm' and parallelism.expert_parallel_degree = 1" in said


@pytest.mark.matrix
@pytest.mark.parametrize(
    "options", [[], ["--compile.enable"], ["--data.document_attention", "--parallelism.tensor_parallel_degree=2"]]
)
def test_a_reverse_model_is_rehearsed_with_its_weights(options: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    job = ["plan", str(DEBUG_TOML), "--gpus", "2", "--json", *options]
    reverse = ["--future_encoder.summary_method=reverse_lm", "--future_encoder.assume_reverse"]
    assert main([*job, *reverse, f"--future_encoder.reverse_model={TINY_OLMO}"]) == 0, capsys.readouterr().err
    found = json.loads(capsys.readouterr().out)
    assert main(job) == 0
    plain = json.loads(capsys.readouterr().out)
    assert found["checkpoint_bytes"] == plain["checkpoint_bytes"] and found["parameters"] == plain["parameters"]
    more = found["memory"]["parts"]["weights"] - plain["memory"]["parts"]["weights"]
    whole = (
        1 if "--parallelism.tensor_parallel_degree=2" in options else 2
    )  # ranks of tensor parallelism have all of it
    assert more == pytest.approx(4 * plain["parameters"]["backbone"] / whole, rel=0.05)
