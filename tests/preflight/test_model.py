"""Refusals of the model, and of backbones that cannot look ahead."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from transformers import AutoConfig

from flame_ext.errors import ConfigError
from flame_ext.model.attention import mask_problem
from flame_ext.train import parse
from tests.preflight.refusals import refusal
from tests.ranks import DEBUG_TOML, TINY_OLMO


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--model.converters=future_predicton"], "unknown converter 'future_predicton'; did you mean 'future_prediction'?"),
        (["--model.name=llama3"], "model.name must be 'hf_causal_lm', got 'llama3'"),
        (["--model.flavor=1B"], "model.flavor must be 'auto'"),
        (["--model.hf_assets_path=nowhere"], "model.hf_assets_path 'nowhere': no usable config.json"),
        (["--training.seq_len=513"], "beyond the model's max_position_embeddings (512)"),
    ],
)  # fmt: skip
def test_values_that_can_not_be_right(options: list[str], message: str) -> None:
    assert message in refusal(*options)


FLOAT8 = "--model.converters=quantize.linear.float8,future_prediction"
EMULATE = "--quantize.linear.float8.emulate"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "model.converters: 'quantize.linear.float8': Failed to swap to Float8Linear because float8 is only supported on SM89"),
        ([EMULATE, "--compile.enable"], "'quantize.linear.float8': Failed to swap"),
        ([EMULATE], "'quantize.linear.float8': torchao is not installed"),
    ],
)  # fmt: skip
def test_what_float8_lacks_is_said(monkeypatch: pytest.MonkeyPatch, options: list[str], message: str) -> None:
    monkeypatch.setenv("WORLD_SIZE", "1")
    monkeypatch.setitem(sys.modules, "torchao.float8", None)
    assert message in refusal(FLOAT8, *options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["--quantize.linear.float8.recipe_name=rowwise"],
            "emulate has no effect with quantize.linear.float8.recipe_name",
        ),
        (
            ["--quantize.linear.float8.enable_fsdp_float8_all_gather"],
            "leaves no weights in high precision, by which step 0 is",
        ),
        ([], None),
    ],
)
def test_proofs_in_float8_are_refused_where_there_is_no_high_precision(
    monkeypatch: pytest.MonkeyPatch, options: list[str], message: str | None
) -> None:
    class Options(SimpleNamespace):
        from_recipe_name = staticmethod(lambda _name: SimpleNamespace())

    monkeypatch.setenv("WORLD_SIZE", "1")
    monkeypatch.setitem(sys.modules, "torchao.float8", SimpleNamespace(Float8LinearConfig=Options))
    if message is not None:
        assert message in refusal(FLOAT8, EMULATE, *options)
        options = [*options, "--seed.verify=none"]
    if "recipe" not in (message or ""):
        parse([f"--job.config_file={DEBUG_TOML}", FLOAT8, EMULATE, *options])


@pytest.mark.parametrize(
    ("model_type", "reason"),
    [
        ("mamba", "it has layers of type linear_attention"),
        ("qwen3_next", "it has layers of type linear_attention"),
        ("llama4_text", "it has layers of type chunked_attention"),
        ("rwkv", "it carries a recurrent state from left to right"),
        ("gpt_neo", "its own attention code takes no boolean mask"),
        ("gemma2", None),
        ("mistral", None),
        ("olmo3", None),
    ],
)
def test_backbones_that_can_not_look_ahead_are_refused(model_type: str, reason: str | None) -> None:
    assert mask_problem(AutoConfig.for_model(model_type)) == reason


def test_a_model_without_tokenizer_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((TINY_OLMO / "config.json").read_bytes())
    with pytest.raises(ConfigError, match="no tokenizer"):
        parse([f"--job.config_file={DEBUG_TOML}", f"--model.hf_assets_path={tmp_path}"])


def test_a_tool_reads_a_configuration_for_another_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    options = [FLOAT8, "--profiling.enable_memory_snapshot", "--parallelism.data_parallel_shard_degree=8"]
    parse([f"--job.config_file={DEBUG_TOML}", *options])
