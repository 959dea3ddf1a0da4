"""What is refused before a process group exists, in which words; and that every option explains itself."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from dataclasses import fields, is_dataclass
from pathlib import Path

import pytest
from transformers import AutoConfig, AutoModelForCausalLM

from flame_ext.config.manager import table_in_list
from flame_ext.config.resume_record import config_record
from flame_ext.config.sections import FlameJobConfig
from flame_ext.errors import ConfigError
from flame_ext.model.attention import mask_problem
from flame_ext.train import parse
from tests.ranks import DEBUG_TOML, REPOSITORY, TINY_OLMO, train


def parse_toml(tmp_path: Path, text: str, *options: str) -> FlameJobConfig:
    file = tmp_path / "job.toml"
    file.write_text(text)
    return parse([f"--job.config_file={file}", *options])


MINIMAL = f"""
[model]
name = "hf_causal_lm"
flavor = "auto"
hf_assets_path = "{TINY_OLMO}"

[checkpoint]
enable = true
initial_load_path = "{TINY_OLMO}"

[training]
seq_len = 128
"""


def test_a_minimal_job_is_plain_continued_pretraining(tmp_path: Path) -> None:
    config = parse_toml(tmp_path, MINIMAL, "--training.steps", "7")
    assert config.training.steps == 7 and config.training.seq_len == 128
    assert not config.future_encoder.enable and config.model.converters == []


@pytest.mark.parametrize("name", sorted(p.name for p in (REPOSITORY / "configs").glob("*.toml")))
def test_committed_configurations_are_valid(name: str) -> None:
    options = [] if name == "debug.toml" else [f"--model.hf_assets_path={TINY_OLMO}", "--training.seq_len=512"]
    config = parse([f"--job.config_file={REPOSITORY / 'configs' / name}", *options])
    assert config.future_encoder.enable and config.model.converters == ["future_prediction"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('[checkpoint]\ninterval = "100"', "'checkpoint.interval' must be an integer, got '100' (str)"),
        ('[checkpoint]\nenable = "false"', "'checkpoint.enable' must be true or false, got 'false' (str)"),
        ("[training]\nsteps = true", "'training.steps' must be an integer, got True (bool)"),
        ("[training]\nsteps = 10.0", "'training.steps' must be an integer, got 10.0 (float)"),
        ("[optimizer]\nlr = '1e-4'", "'optimizer.lr' must be a number, got '1e-4' (str)"),
        ('[model]\nconverters = "future_prediction"', "'model.converters' must be a list, each a string"),
        ("[model]\nconverters = [1]", "'model.converters' must be a list, each a string, got [1]"),
        ("[future_encoder]\nsummary_method = 'median'", "'future_encoder.summary_method' must be one of 'anticausal'"),
        ("[training]\nsequence_len = 10", "unknown key 'training.sequence_len' (did you mean 'training.seq_len'?)"),
        ("[future_encodr]\nenable = true", "unknown section 'future_encodr' (did you mean 'future_encoder'?)"),
        ("[training.dataloader]\nworkers = 2", "unknown key 'training.dataloader.workers' (did you mean 'training.dataloader.num_w"),
        ("training = 3", "'training' is a section ([training] in TOML), got 3"),
        ("[training\n", "not valid TOML"),
    ],
)  # fmt: skip
def test_toml_with_wrong_types_or_unknown_names(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError) as e:
        parse_toml(tmp_path, text)
    assert message in str(e.value) and "job.toml" in str(e.value)


def test_every_finding_is_reported_at_once(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as e:
        parse_toml(tmp_path, "[training]\nsteps = 'x'\nseq_length = 1\n[nowhere]\n")
    assert all(name in str(e.value) for name in ("training.steps", "training.seq_length", "nowhere"))


def test_a_missing_file_is_named() -> None:
    with pytest.raises(ConfigError, match="nowhere.toml: No such file"):
        parse(["--job.config_file", "nowhere.toml"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--future_encoder.future_k=-3"], "future_encoder.future_k must be >= 0 (0 = all the future), got -3"),
        (["--future_encoder.shift_k=0"], "future_encoder.shift_k must be in 1..training.seq_len - 1 (255), got 0"),
        (["--future_encoder.temperature=0"], "future_encoder.temperature must be > 0"),
        (["--future_encoder.loss_weight=-1"], "future_encoder.loss_weight must be >= 0"),
        (["--future_predictor.dropout=1.0"], "future_predictor.dropout must be in [0, 1)"),
        (["--future_predictor.no-enable"], "go together"),
        (["--model.converters="], 'nothing attaches the heads: set model.converters = ["future_prediction"]'),
        (["--future_encoder.no-enable", "--future_predictor.no-enable"], "enable it or drop the converter"),
        (["--model.converters=future_predicton"], "unknown converter 'future_predicton'; did you mean 'future_prediction'?"),
        (["--model.name=llama3"], "model.name must be 'hf_causal_lm', got 'llama3'"),
        (["--model.flavor=1B"], "model.flavor must be 'auto'"),
        (["--model.hf_assets_path=nowhere"], "model.hf_assets_path 'nowhere': no usable config.json"),
        (["--checkpoint.no-enable"], "checkpoint.enable must be true"),
        (["--checkpoint.initial_load_path", "None"], "checkpoint.initial_load_path is not set, and training never starts from random"),
        (["--checkpoint.create_seed_checkpoint"], "create_seed_checkpoint has no use here"),
        (["--checkpoint.keep_latest_k=1"], "keep_latest_k must be 0 (keep all) or at least 2"),
        (["--checkpoint.async_mode=async_with_pinned_mem"], "needs an accelerator"),
        (["--parallelism.expert_parallel_degree=2"], "parallelism.expert_parallel_degree must be 1"),
        (["--training.seq_len=513"], "beyond the model's max_position_embeddings (512)"),
        (["--training.dataloader.num_workers=-1"], "num_workers must be >= 0"),
        (["--training.epochs=-1"], "training.epochs must be >= 0"),
        (["--action_layer.enable", "--model.converters="], "nothing attaches the heads"),
        (["--action_layer.enable", "--future_encoder.no-enable"], "action_layer.enable needs future_encoder.enable"),
        (["--action_layer.enable", "--action_layer.top_k=0"], "action_layer.top_k must be >= 1"),
        (["--action_layer.enable", "--action_layer.top_k=265"], "action_layer.top_k (265) is above the model's vocabulary (264)"),
        (["--action_layer.enable", "--action_layer.tau=0"], "action_layer.tau must be > 0"),
        (["--action_layer.enable", "--action_layer.model_loss_weight=0"], "nothing would train the head that gives the rewards"),
        (["--action_layer.enable", "--action_layer.loss_weight=-1"], "action_layer.loss_weight must be >= 0"),
        (["--action_layer.enable", "--action_layer.model_loss_weight=-1"], "action_layer.model_loss_weight must be >= 0"),
        (["--action_layer.ffn_hidden_size=0"], "action_layer.ffn_hidden_size must be >= 1"),
        (["--future_encoder.loss_weight_warmup_steps=-1"], "future_encoder.loss_weight_warmup_steps must be >= 0"),
        (["--future_predictor.lr_scale=0"], "future_predictor.lr_scale must be > 0"),
        (["--future_predictor.weight_decay=-0.1"], "future_predictor.weight_decay must be >= 0"),
        (["--future_predictor.warmup_steps=-1"], "future_predictor.warmup_steps must be >= 0"),
        (["--future_predictor.lr_scale=2", "--optimizer.early_step_in_backward"], "which optimizer.early_step_in_backward does not have"),
        (["--future_predictor.freeze_backbone", "--future_encoder.loss_weight=0"], "freeze_backbone leaves nothing to train"),
        (["--future_encoder.teacher_interval=0"], "future_encoder.teacher_interval must be >= 1"),
        (["--future_encoder.teacher_fraction=0"], "future_encoder.teacher_fraction must be in (0, 1]"),
        (["--future_encoder.teacher_fraction=0.3"], "must be a whole number of sequences; for 2 of them, set it to 0.25"),
        (["--future_encoder.teacher_interval=2", "--future_encoder.summary_method=mean"], "'mean' has none"),
        (["--future_encoder.no-detach_targets"], "detach_targets = false is for pooled summaries"),
        (["--training.global_batch_size=12"], "must be a positive multiple of training.local_batch_size (8)"),
    ],
)  # fmt: skip
def test_values_that_can_not_be_right(options: list[str], message: str) -> None:
    if "accelerator" in message:
        import torch

        if torch.accelerator.is_available():
            pytest.skip("there is an accelerator")
    with pytest.raises(ConfigError) as e:
        parse([f"--job.config_file={DEBUG_TOML}", *options])
    assert message in str(e.value)


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


@pytest.mark.parametrize(
    ("model_type", "supported"), [("olmo", True), ("gpt_neox", True), ("gpt2", False), ("falcon", False)]
)
def test_flex_attention_is_refused_where_transformers_has_none(
    tmp_path: Path, model_type: str, supported: bool
) -> None:
    config = AutoConfig.for_model(model_type, vocab_size=264)
    config.architectures = [AutoModelForCausalLM._model_mapping[type(config)].__name__]
    config.save_pretrained(tmp_path)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / file).write_bytes((TINY_OLMO / file).read_bytes())
    options = [f"--job.config_file={DEBUG_TOML}", f"--model.hf_assets_path={tmp_path}"]
    parse(options)
    if supported:
        parse([*options, "--future_encoder.teacher_attention=flex"])
        return
    with pytest.raises(ConfigError, match=f"'flex': transformers has no FlexAttention for '{model_type}'; take 'auto'"):
        parse([*options, "--future_encoder.teacher_attention=flex"])


def test_an_unknown_summary_method_is_refused(tmp_path: Path) -> None:
    text = MINIMAL + '[future_encoder]\nsummary_method = "median"\n'
    with pytest.raises(
        ConfigError, match="summary_method' must be one of 'anticausal', 'mean', 'max', 'attention', got 'median'"
    ):
        parse_toml(tmp_path, text)


def test_an_anticausal_encoder_of_a_recurrent_backbone_is_refused_with_the_remedy(tmp_path: Path) -> None:
    AutoConfig.for_model(
        "rwkv", vocab_size=264, hidden_size=32, num_hidden_layers=2, architectures=["RwkvForCausalLM"]
    ).save_pretrained(tmp_path)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / file).write_bytes((TINY_OLMO / file).read_bytes())
    with pytest.raises(ConfigError, match="can not be right for 'rwkv': it carries a recurrent state.*take 'mean'"):
        parse([f"--job.config_file={DEBUG_TOML}", f"--model.hf_assets_path={tmp_path}"])


def test_a_users_own_section_is_merged_on_top(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_config.py").write_text(
        "from dataclasses import dataclass, field\n"
        "@dataclass\nclass Mine:\n    answer: int = 1\n    '''An answer'''\n"
        "@dataclass\nclass Training:\n    my_own: float = 0.5\n"
        "@dataclass\nclass JobConfig:\n"
        "    mine: Mine = field(default_factory=Mine)\n    training: Training = field(default_factory=Training)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    text = '[job]\ncustom_config_module = "my_config"\n' + MINIMAL + "my_own = 2\n[mine]\nanswer = 42\n"
    config = parse_toml(tmp_path, text, "--seed.rng_seed=3")
    assert config.mine.answer == 42 and config.training.my_own == 2 and config.seed.rng_seed == 3
    with pytest.raises(ConfigError, match="'mine.answer' must be an integer"):
        parse_toml(tmp_path, text.replace("42", '"42"'))
    module = (tmp_path / "my_config.py").read_text()
    (tmp_path / "my_lazy_config.py").write_text(f"from __future__ import annotations\n{module}")
    with pytest.raises(
        ConfigError, match="the types of .*mine.* are strings.*remove 'from __future__ import annotations'"
    ):
        parse_toml(tmp_path, text.replace("my_config", "my_lazy_config"))


def test_a_users_own_converter_is_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_converters.py").write_text(
        "from torchtitan.protocols.model_converter import register_model_converter\n"
        "register_model_converter(object, 'my_own')\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    config = parse_toml(tmp_path, MINIMAL, "--experimental.custom_import=my_converters", "--model.converters=my_own")
    assert config.model.converters == ["my_own"]
    with pytest.raises(ConfigError, match="experimental.custom_import: No module named 'nowhere'"):
        parse_toml(tmp_path, MINIMAL, "--experimental.custom_import=nowhere")


def test_a_model_without_tokenizer_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((TINY_OLMO / "config.json").read_bytes())
    with pytest.raises(ConfigError, match="no tokenizer"):
        parse([f"--job.config_file={DEBUG_TOML}", f"--model.hf_assets_path={tmp_path}"])


def test_errors_reach_the_user_in_one_line_before_anything_is_made(tmp_path: Path) -> None:
    run = train(tmp_path / "run", "--future_encoder.future_k=-3", world_size=2, check=False)
    assert run.exit_codes == [2, 2] and not run.dump_folder.exists()
    for rank in run.ranks:
        assert "error: future_encoder.future_k must be >= 0 (0 = all the future), got -3" in rank.output
        assert "Traceback" not in rank.output


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "LOCAL_RANK", "WORLD_SIZE")}
    return subprocess.run(
        [sys.executable, "-m", "flame_ext.train", *arguments],
        capture_output=True, text=True, cwd=REPOSITORY, env=environment, timeout=60,
    )  # fmt: skip


def test_without_torchrun_it_says_how_to_launch() -> None:
    done = command("--job.config_file", str(DEBUG_TOML))
    assert done.returncode == 2
    assert done.stderr.strip().splitlines()[-1].startswith("error: launch with torchrun: torchrun --nproc_per_node")


def test_help_explains_every_option_of_ours() -> None:
    done = command("--help")
    assert done.returncode == 0
    text = " ".join(done.stdout.replace("│", " ").split())
    assert "--training.steps" in text and "--checkpoint.initial-load-path" in text
    for section in ("seed", "future_encoder", "future_predictor", "action_layer", "data"):
        cls = next(f.type for f in fields(FlameJobConfig) if f.name == section)
        assert is_dataclass(cls)
        for field in fields(cls):
            if table_in_list(field.type) is not None:
                continue  # tables of a TOML
            flag = f"--{section}.{field.name}".replace("_", "-")
            assert flag in text, flag
    for words in (
        "How many following positions a summary may attend to",
        "Where text comes from and in which order",
        "stop before step 1",
    ):
        assert words in text, words


def test_tables_of_a_toml_are_checked_and_typed(tmp_path: Path) -> None:
    toml = tmp_path / "job.toml"
    text = DEBUG_TOML.read_text()
    toml.write_text(text + '\n[[data.sources]]\npath = "a"\n[[data.sources]]\npath = "b"\nweight = 2\n')
    config = parse([f"--job.config_file={toml}", "--data.sources.1.weight=3"])
    assert [(s.path, s.weight) for s in config.data.sources] == [("a", 1.0), ("b", 3.0)]
    record = config_record(config, data_parallel_degree=1, assets={})
    assert record["data.sources.1.path"] == "b" and record["data.sources.1.weight"] == 3.0
    for line, message in (
        ("wieght = 2", "unknown key 'data.sources[0].wieght' (did you mean 'data.sources[0].weight'?)"),
        ('weight = "2"', "'data.sources[0].weight' must be a number, got '2'"),
        ("weight = 0.0", "data.sources[0].weight must be > 0"),
        (
            'label = "a"\n[[data.sources]]\npath = "x/a"',
            "data.sources[1] is reported as 'a', as data.sources[0] is; give it a label",
        ),
        ("max_samples = 0", "data.sources[0].max_samples must be >= 1"),
    ):
        toml.write_text(text + f'\n[[data.sources]]\npath = "a"\n{line}\n')
        with pytest.raises(ConfigError, match=re.escape(message)):
            parse([f"--job.config_file={toml}"])
    toml.write_text(text + "\n[data]\nsources = 3\n")
    with pytest.raises(ConfigError, match="'data.sources' must be a list of tables, got 3"):
        parse([f"--job.config_file={toml}"])
