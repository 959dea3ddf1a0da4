"""What an architecture keeps in float32 stays so in conversions to another dtype, as transformers saves it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, DeepseekV3PreTrainedModel

from flame_ext.seeding.sources.source import same_bits
from flame_ext.tools.conversion import Conversion, convert
from tests.tiny_models import MIXTURES, save_tiny


def saved(source: Path, folder: Path, dtype: torch.dtype) -> dict[str, Tensor]:
    """What transformers alone writes of ``source`` in another dtype."""
    AutoModelForCausalLM.from_pretrained(source, dtype=dtype).save_pretrained(folder)
    return load_file(folder / "model.safetensors")


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert set(found) == set(expected)
    for key, tensor in expected.items():
        assert same_bits(found[key], tensor), (key, found[key].dtype, tensor.dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["olmo2", "gemma3-multimodal", *MIXTURES])
def test_a_conversion_to_a_dtype_is_what_transformers_saves(tmp_path: Path, name: str, dtype: torch.dtype) -> None:
    source = save_tiny(name, tmp_path / "source")
    expected = saved(source, tmp_path / "expected", dtype)
    convert(str(source), tmp_path / "found", "hf", Conversion(dtype=dtype))
    assert_same(load_file(tmp_path / "found" / "model.safetensors"), expected)
    assert json.loads((tmp_path / "found" / "config.json").read_text())["dtype"] == str(dtype).removeprefix("torch.")
    kept = [key for key, tensor in expected.items() if tensor.dtype == torch.float32]
    assert bool(kept) == (name in ("deepseek-v3", "glm4-moe") or (name == "gpt-oss" and dtype == torch.float16))


@pytest.mark.parametrize("router", [torch.float32, torch.bfloat16])
def test_what_is_stored_in_two_dtypes_goes_to_dcp_and_back(tmp_path: Path, router: torch.dtype) -> None:
    """Published files of DeepSeek-V3 have the biases alone in float32, those of transformers the routers as well."""
    source = save_tiny("deepseek-v3", tmp_path / "source")
    files = saved(source, tmp_path / "mixed", torch.bfloat16)
    files |= {key: tensor.to(router) for key, tensor in files.items() if key.endswith("gate.weight")}
    save_file(files, tmp_path / "mixed" / "model.safetensors", {"format": "pt"})
    convert(str(tmp_path / "mixed"), tmp_path / "dcp", "dcp", Conversion())
    convert(str(tmp_path / "dcp"), tmp_path / "back", "hf", Conversion())
    assert_same(load_file(tmp_path / "back" / "model.safetensors"), files)
    # Routers in another dtype than the rest, by an architecture that casts them: as transformers 5.17 would.
    kept = router == torch.bfloat16 or "gate.weight" in DeepseekV3PreTrainedModel._keep_in_fp32_modules_strict
    dtype = json.loads((tmp_path / "back" / "config.json").read_text())["dtype"]
    assert dtype == ("bfloat16" if kept else "float32")
