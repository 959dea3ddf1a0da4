"""Valid configurations pass; findings reach the user in one line before a process group exists."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from flame_ext.model.hf_causal_lm import HFModelArgs, build_hf_causal_lm
from flame_ext.seeding.sources.safe_files import TOKENIZER_FILES
from flame_ext.train import parse
from tests.ranks import REPOSITORY, TINY_OLMO, train


@pytest.mark.parametrize("name", sorted(p.name for p in (REPOSITORY / "configs").glob("*.toml")))
def test_committed_configurations_are_valid(name: str) -> None:
    options = [] if name == "debug.toml" else [f"--model.hf_assets_path={TINY_OLMO}", "--training.seq_len=512"]
    config = parse([f"--job.config_file={REPOSITORY / 'configs' / name}", *options])
    assert config.future_encoder.enable and config.model.converters == ["future_prediction"]


# As it lies beside the weights of allenai/OLMoE-1B-7B-0924.
OLMOE = {
    "architectures": ["OlmoeForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "clip_qkv": None,
    "eos_token_id": 50279,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "initializer_range": 0.02,
    "intermediate_size": 1024,
    "max_position_embeddings": 4096,
    "model_type": "olmoe",
    "norm_topk_prob": False,
    "num_attention_heads": 16,
    "num_experts": 64,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 16,
    "num_key_value_heads": 16,
    "output_router_logits": False,
    "pad_token_id": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "rope_theta": 10000.0,
    "router_aux_loss_coef": 0.01,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "vocab_size": 50304,
}


def test_the_configuration_for_olmoe_is_one_for_its_real_shape(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "8")
    (tmp_path / "config.json").write_text(json.dumps(OLMOE))
    for name in TOKENIZER_FILES:
        if (TINY_OLMO / name).is_file():
            shutil.copyfile(TINY_OLMO / name, tmp_path / name)
    config = parse(
        [f"--job.config_file={REPOSITORY / 'configs' / 'olmoe_fp.toml'}", f"--model.hf_assets_path={tmp_path}"]
    )
    args = HFModelArgs()
    args.update_from_config(config)
    model = build_hf_causal_lm(args)
    assert all(parameter.is_meta for parameter in model.parameters())
    assert len(model.routing.routers) == 16 and model.routing.experts == 64
    assert model.routing.coefficient == 0.01 and not model.routing.problem
    nparams, flops = args.get_nparams_and_flops(model, config.training.seq_len)
    # The name says it: 7 B, of which a token goes through 1 B. Attention's scores and the input embedding are beside them.
    active = (flops - 12 * 16 * 2048 * 4096) / 6 + 50304 * 2048
    assert round(nparams / 1e9, 2) == 6.92 and round(active / 1e9, 2) == 1.28
    tokens = config.training.global_batch_size * config.training.seq_len
    assert tokens == 2**19 and config.training.global_batch_size % (8 * config.training.local_batch_size) == 0


def test_errors_reach_the_user_in_one_line_before_anything_is_made(tmp_path: Path) -> None:
    run = train(tmp_path / "run", "--future_encoder.future_k=-3", world_size=2, check=False)
    assert run.exit_codes == [2, 2] and not run.dump_folder.exists()
    for rank in run.ranks:
        assert "error: future_encoder.future_k must be >= 0 (0 = all the future), got -3" in rank.output
        assert "Traceback" not in rank.output
