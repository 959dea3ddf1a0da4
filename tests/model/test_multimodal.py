"""Multimodal checkpoints on text: whole, as ``AutoModelForCausalLM`` loads some of them, or their text model alone."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    Gemma3Config,
    LlavaConfig,
    PreTrainedConfig,
    PreTrainedModel,
)

from flame_ext.model.hf_causal_lm import HFModelArgs, build_hf_causal_lm
from flame_ext.tools.conversion import Conversion, convert
from tests.ranks import TINY_OLMO, train
from tests.tiny_models import CONFIGS

TEXT = {
    "vocab_size": 264, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "head_dim": 8,
    "num_key_value_heads": 2, "max_position_embeddings": 256, "pad_token_id": 1, "eos_token_id": 0, "bos_token_id": None,
}  # fmt: skip
VISION = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 28,
}
TOKENS = torch.arange(40, 140)[None]
FAST = ("--training.seq_len=32", "--seed.verify=parity", "--seed.dry_run", "--future_encoder.summary_method=mean")
WITHOUT_TOWER = "--seed.ignore_source_keys=vision_tower.*,multi_modal_projector.*"


def llava() -> PreTrainedConfig:
    vision = {**VISION, "model_type": "clip_vision_model", "projection_dim": 16, "patch_size": 14}
    return LlavaConfig(text_config={"model_type": "llama", **TEXT}, vision_config=vision, image_token_id=250)


def gemma3() -> PreTrainedConfig:
    return Gemma3Config(text_config=TEXT, vision_config=VISION, mm_tokens_per_image=4)


def qwen3_5() -> PreTrainedConfig:
    vision = {"depth": 2, "hidden_size": 16, "intermediate_size": 24, "num_heads": 2, "out_hidden_size": 32}
    return AutoConfig.for_model(
        "qwen3_5", text_config={**TEXT, "layer_types": ["full_attention"] * 2}, vision_config=vision
    )


def saved(config: PreTrainedConfig, folder: Path) -> PreTrainedModel:
    torch.manual_seed(0)
    model: Any = AutoModelForImageTextToText.from_config(config).eval()
    model.save_pretrained(folder)
    with_tokenizer(folder)
    return model


def with_tokenizer(folder: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(TINY_OLMO / name, folder / name)


def build(config: PreTrainedConfig) -> Any:
    args = HFModelArgs()
    args.load = lambda: config  # type: ignore[method-assign]
    return build_hf_causal_lm(args)


def dry_run(tmp_path: Path, assets: Path, source: Path, *options: str, check: bool = True) -> str:
    """Seeds, compares with ``from_pretrained`` under the same names, and writes nothing else; returns what was said."""
    places = (f"--model.hf_assets_path={assets}", f"--checkpoint.initial_load_path={source}")
    output = train(tmp_path / "run", *FAST, *places, *options, check=check).ranks[0].output
    assert not check or "logits differ by at most 0)" in output
    return output


def test_only_the_text_model_is_trained() -> None:
    """The gradients are those of tests/model/test_seeded_architectures.py."""
    model, alone = build(CONFIGS["gemma3-multimodal"]), build(CONFIGS["gemma3-rope-per-layer"])
    assert model.layers is model.base_model.language_model.layers
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    assert frozen == {
        n for n, _ in model.named_parameters() if n.startswith(("model.vision_tower.", "model.multi_modal_"))
    }
    flops, flops_alone = (m.model_args.get_nparams_and_flops(m, seq_len=64)[1] for m in (model, alone))
    assert flops == flops_alone, "the tower takes no part"


def test_the_text_model_of_a_checkpoint_that_is_loaded_whole(tmp_path: Path) -> None:
    model = saved(gemma3(), tmp_path / "whole")
    said = dry_run(tmp_path, tmp_path / "whole", tmp_path / "whole")
    assert "multimodal and trained on text: model.vision_tower, model.multi_modal_projector (" in said
    text = tmp_path / "text"
    model.config.get_text_config().save_pretrained(text)
    with_tokenizer(text)
    dry_run(tmp_path, text, tmp_path / "whole", "--seed.key_map=language_model.model=model", WITHOUT_TOWER)


def test_a_checkpoint_that_is_no_causal_lm_is_refused_and_its_text_model_is_not(tmp_path: Path) -> None:
    whole, text = tmp_path / "whole", tmp_path / "text"
    model = saved(llava(), whole)
    said = dry_run(tmp_path, whole, whole, check=False)
    assert "error: " in said and "'llava', which is no decoder-only causal LM" in said
    remedy = "write AutoConfig.from_pretrained(…).get_text_config() to a folder of its own, and name the keys by seed.key_map and seed."
    assert remedy in said
    AutoConfig.from_pretrained(whole).get_text_config().save_pretrained(text)
    with_tokenizer(text)
    rules = ("language_model.model=model", "language_model.lm_head=lm_head")
    dry_run(tmp_path, text, whole, f"--seed.key_map={','.join(rules)}", WITHOUT_TOWER)
    left_out = ("vision_tower.*", "multi_modal_projector.*")
    convert(str(whole), tmp_path / "out", "hf", Conversion(assets=text, key_map=rules, ignore_source_keys=left_out))
    alone = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    with torch.no_grad():
        assert torch.equal(alone(TOKENS).logits, model(TOKENS).logits)


def test_a_checkpoint_of_which_the_auto_class_takes_the_text_model(tmp_path: Path) -> None:
    whole = tmp_path / "whole"
    model = saved(qwen3_5(), whole)
    dry_run(tmp_path, whole, whole)
    convert(str(whole), tmp_path / "out", "hf", Conversion())
    fields = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (fields["architectures"], fields["model_type"]) == (["Qwen3_5ForCausalLM"], "qwen3_5_text")
    alone = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    with torch.no_grad():
        assert torch.equal(alone(TOKENS).logits, model(TOKENS).logits)
    assert not list((tmp_path / "out").glob("*vision*"))
