"""The model of a ``config.json`` or of a job, as far as sources are compared with it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from flame_ext.errors import ConfigError
from flame_ext.preflight.parse import parse
from flame_ext.seeding.conversion import in_files
from flame_ext.seeding.sources.open import open_source
from flame_ext.seeding.sources.traced import TracedTensor
from flame_ext.tools.architecture import load_architecture, why_not_seedable
from tests.ranks import DEBUG_TOML, TINY_OLMO
from tests.sources import save_dcp
from tests.tiny_models import save_tiny


@pytest.mark.parametrize("model", ["olmo-tied", "olmo-untied", "gpt-neox-tied"])
def test_shapes_are_those_of_the_model_each_tied_tensor_once(tmp_path: Path, model: str) -> None:
    folder = save_tiny(model, tmp_path / "model")
    architecture = load_architecture(folder)
    assert all(tensor.is_meta for tensor in architecture.model.parameters())
    shapes = architecture.shapes.items()
    stored = in_files(architecture.model, {n: TracedTensor.whole(s, torch.float32, n) for n, s in shapes})
    held = {key: tuple(tensor.shape) for key, tensor in load_file(folder / "model.safetensors").items()}
    assert {key: tuple(tensor.shape) for key, tensor in stored.items()} == held
    assert set(architecture.names.model_keys) == {*architecture.shapes, *architecture.model.tied_keys}


def test_a_tied_tensor_is_kept_once_under_its_owner_s_name(tmp_path: Path) -> None:
    architecture = load_architecture(save_tiny("olmo-tied", tmp_path / "model"))
    embedding, rest = torch.ones(264, 32), {"model.norm.weight": torch.ones(32)}
    for names in (["lm_head.weight"], ["model.embed_tokens.weight"], ["lm_head.weight", "model.embed_tokens.weight"]):
        folder = save_dcp({**rest, **dict.fromkeys(names, embedding)}, tmp_path / "-".join(names))
        once = architecture.tied_once(open_source(folder))
        assert set(once.entries) == {"model.norm.weight", "model.embed_tokens.weight"}


def test_without_a_causal_lm_s_configuration_there_is_none(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no usable config.json"):
        load_architecture(tmp_path)


def test_a_job_is_seedable_from_what_has_all_of_its_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(DEBUG_TOML.parent.parent)
    config = parse([f"--job.config_file={DEBUG_TOML}", "--checkpoint.initial_load_path=nowhere"])
    tensors = load_file(TINY_OLMO / "model.safetensors")
    assert why_not_seedable(config, str(TINY_OLMO)) == (None, None), "the path counts, not that of the job"
    assert why_not_seedable(config, str(save_dcp(dict(tensors), tmp_path / "dcp"))) == (None, None)
    assert "does not exist" in str(why_not_seedable(config, str(tmp_path / "absent")))
    tensors["model.embed_tokens.weight"] = tensors["model.embed_tokens.weight"][:100].clone()
    (tmp_path / "cut").mkdir()
    (tmp_path / "cut" / "config.json").write_bytes((TINY_OLMO / "config.json").read_bytes())
    save_file(tensors, tmp_path / "cut" / "model.safetensors")
    reason = str(why_not_seedable(config, str(tmp_path / "cut")))
    assert "'model.embed_tokens.weight'" in reason and "[100, 128]" in reason and "[264, 128]" in reason
