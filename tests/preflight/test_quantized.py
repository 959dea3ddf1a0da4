"""Refusals of torchtitan's converters to float8 and MX."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from torchtitan.components.quantization import float8

from flame_ext.preflight import quantized
from flame_ext.train import parse
from tests.preflight.refusals import refusal
from tests.ranks import DEBUG_TOML
from tests.tiny_models import save_tiny

NAME = "quantize.linear.float8"
FLOAT8 = f"--model.converters={NAME},future_prediction"
EMULATE = f"--{NAME}.emulate"
GATHER = f"--{NAME}.enable_fsdp_float8_all_gather"
ONE_SEQUENCE = "--training.local_batch_size=1"
TP2 = "--parallelism.tensor_parallel_degree=2"


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")


@pytest.fixture
def on_gpu(launched: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(float8, "has_cuda_capability", lambda *_: True)
    monkeypatch.setattr(quantized, "torch", SimpleNamespace(accelerator=SimpleNamespace(is_available=lambda: True)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], f"model.converters: '{NAME}': Failed to swap to Float8Linear because float8 is only supported on SM89"),
        ([EMULATE, "--compile.enable"], f"'{NAME}': Failed to swap"),
        ([EMULATE, f"--{NAME}.recipe_name=rowwise"], f"emulate has no effect with {NAME}.recipe_name"),
        ([EMULATE, f"--{NAME}.precompute_float8_dynamic_scale_for_fsdp"], "has no effect without enable_fsdp_float8_all_gather"),
        ([EMULATE, "--model.converters=future_prediction"], f"[{NAME}] has no effect without model.converters"),
        ([EMULATE, f"--model.converters=future_prediction,{NAME}"], f'must have "{NAME}" once and before "future_prediction"'),
        ([EMULATE, f"--model.converters={NAME},quantize.linear.mx"], "'quantize.linear.mx' is not supported: it needs a GPU of SM100"),
        (["--model.converters=quantize.grouped_mm.float8"], "'quantize.grouped_mm.float8' is not supported: it is for torchtitan's own"),
        (["--model.converters=quantize.grouped_mm.mx"], "'quantize.grouped_mm.mx' is not supported: it is for torchtitan's own mixtures"),
        ([EMULATE, GATHER], "leaves no weights in high precision, by which step 0 is compared with from_pretrained: prove it once"),
        ([EMULATE, GATHER, "--seed.verify=none"], "needs an accelerator: gloo, which gathers on a CPU, does not know float8"),
        ([EMULATE, f"--{NAME}.filter_fqns=attention.wq"], "filter_fqns: 'attention.wq' is in the name of no linear layer"),
        ([EMULATE, f"--{NAME}.filter_fqns=proj"], "would convert no layer of OlmoForCausalLM"),
        ([EMULATE, f"--model.converters=lora,{NAME},future_prediction"], f"'{NAME}' does not go with model.converters 'lora'"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused(launched: None, options: list[str], message: str) -> None:
    assert message in refusal(FLOAT8, *options)


def test_a_missing_torchao_names_the_extra(launched: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchao.float8", None)
    said = refusal(FLOAT8, EMULATE)
    assert "needs torchao" in said and said.endswith("pip install 'flame_ext[float8]'") and "\n" not in said


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([ONE_SEQUENCE, "--training.seq_len=72"], "takes multiples of 16 tokens, and a rank's forward has 72"),
        ([ONE_SEQUENCE, "--training.seq_len=32", "--parallelism.context_parallel_degree=2", EMULATE], None),
        ([TP2], "'model.layers.0.mlp.gate_proj' has 24 rows or columns on a rank"),
        ([TP2, f"--{NAME}.filter_fqns=mlp"], None),
        ([TP2, GATHER, EMULATE], "enable_fsdp_float8_all_gather does not go with parallelism.tensor_parallel_degree = 2"),
    ],
)  # fmt: skip
def test_sizes_that_the_kernels_do_not_take_are_refused(
    on_gpu: None, tmp_path: Path, options: list[str], message: str | None
) -> None:
    model = save_tiny("olmo2", tmp_path)
    job = [FLOAT8, f"--model.hf_assets_path={model}", "--training.seq_len=64", "--seed.verify=none", *options]
    if message is None:
        parse([f"--job.config_file={DEBUG_TOML}", *job])
    else:
        assert message in refusal(*job)


def grown(folder: Path) -> Path:
    """The tiny OLMo's architecture with a vocabulary that float8 takes."""
    model = save_tiny("olmo-tied", folder)
    text = (folder / "config.json").read_text()
    (folder / "config.json").write_text(text.replace('"vocab_size": 264', '"vocab_size": 272'))
    return model


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([GATHER, "--seed.verify=none"], "would untie 'lm_head.weight' from 'model.embed_tokens.weight': add 'output' to"),
        (["--mtp.enable"], f"{NAME} with mtp: it gives the output embedding any number of states"),
        ([], None),
    ],
)  # fmt: skip
def test_an_output_embedding_may_have_to_be_spared(
    on_gpu: None, tmp_path: Path, options: list[str], message: str | None
) -> None:
    job = [FLOAT8, EMULATE, f"--model.hf_assets_path={grown(tmp_path)}", "--training.seq_len=64", *options]
    if message is not None:
        assert message in refusal(*job)
        job.append(f"--{NAME}.filter_fqns=output")
    parse([f"--job.config_file={DEBUG_TOML}", *job])


def test_a_tool_reads_a_configuration_for_another_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    options = [FLOAT8, "--profiling.enable_memory_snapshot", "--parallelism.data_parallel_shard_degree=8"]
    parse([f"--job.config_file={DEBUG_TOML}", *options])
