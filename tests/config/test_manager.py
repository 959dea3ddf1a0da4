"""TOML and command line become a typed configuration, or are refused by name; every option explains itself."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from dataclasses import fields, is_dataclass
from pathlib import Path

import pytest

from flame_ext.config.manager import table_in_list
from flame_ext.config.resume_record import config_record
from flame_ext.config.sections import FlameJobConfig
from flame_ext.errors import ConfigError
from flame_ext.heads.registry import job_config_class
from flame_ext.train import parse
from tests.ranks import DEBUG_TOML, REPOSITORY, TINY_OLMO


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
        ("a = " + "[" * 10**5, "not valid TOML"),
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


def test_an_unknown_summary_method_is_refused(tmp_path: Path) -> None:
    text = MINIMAL + '[future_encoder]\nsummary_method = "median"\n'
    with pytest.raises(
        ConfigError,
        match="summary_method' must be one of 'anticausal', 'reverse_lm', 'mean', 'max', 'attention', 'query', got 'median'",
    ):
        parse_toml(tmp_path, text)


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


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "LOCAL_RANK", "WORLD_SIZE")}
    return subprocess.run(
        [sys.executable, "-m", "flame_ext.train", *arguments],
        capture_output=True, text=True, cwd=REPOSITORY, env=environment, timeout=60,
    )  # fmt: skip


@pytest.mark.slow
def test_without_torchrun_it_says_how_to_launch() -> None:
    done = command("--job.config_file", str(DEBUG_TOML))
    assert done.returncode == 2
    assert done.stderr.strip().splitlines()[-1].startswith("error: launch with torchrun: torchrun --nproc_per_node")


@pytest.mark.slow
def test_help_explains_every_option_of_ours() -> None:
    done = command("--help")
    assert done.returncode == 0
    text = " ".join(done.stdout.replace("│", " ").split())
    assert "--training.steps" in text and "--checkpoint.initial-load-path" in text
    for section in ("seed", "future_encoder", "future_predictor", "action_layer", "data"):
        cls = next(f.type for f in fields(job_config_class()) if f.name == section)
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
    text = DEBUG_TOML.read_text().replace('dataset = "python_stdlib"\n', "")
    toml.write_text(text + '\n[[data.sources]]\npath = "a"\n[[data.sources]]\npath = "b"\nweight = 2\n')
    config = parse([f"--job.config_file={toml}", "--data.sources.1.weight=3"])
    assert [(s.path, s.weight) for s in config.data.sources] == [("a", 1.0), ("b", 3.0)]
    record = config_record(config, data_parallel_degree=1, assets={})
    assert record["data.sources.1.path"] == "b" and record["data.sources.1.weight"] == 3.0
    for line, message in (
        ("wieght = 2", "unknown key 'data.sources[0].wieght' (did you mean 'data.sources[0].weight'?)"),
        ('weight = "2"', "'data.sources[0].weight' must be a number, got '2'"),
    ):
        toml.write_text(text + f'\n[[data.sources]]\npath = "a"\n{line}\n')
        with pytest.raises(ConfigError, match=re.escape(message)):
            parse([f"--job.config_file={toml}"])
    toml.write_text(text + "\n[data]\nsources = 3\n")
    with pytest.raises(ConfigError, match="'data.sources' must be a list of tables, got 3"):
        parse([f"--job.config_file={toml}"])


def test_home_and_variables_in_paths_are_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("CORPUS", "/corpus")
    text = (
        DEBUG_TOML.read_text()
        .replace('dataset = "python_stdlib"\n', "")
        .replace("./outputs/debug", "~/runs/$USER_NAME")
    )
    (tmp_path / "job.toml").write_text(
        text + '\n[[data.sources]]\npath = "${CORPUS}/*.txt"\ndata_files = ["~/a", "b$"]\n'
    )
    command = ["--job.config_file=~/job.toml", f"--model.hf_assets_path={TINY_OLMO}"]
    with pytest.raises(ConfigError, match=r"job.dump_folder = '~/runs/\$USER_NAME': no such user or variable"):
        parse(command)
    monkeypatch.setenv("USER_NAME", "me")
    config = parse([*command, "--metrics.save_tb_folder=~/tb"])
    assert config.job.dump_folder == f"{tmp_path}/runs/me" and config.metrics.save_tb_folder == f"{tmp_path}/tb"
    (source,) = config.data.sources
    assert source.path == "/corpus/*.txt" and source.data_files == [f"{tmp_path}/a", "b$"]
    with pytest.raises(ConfigError, match="'~nobody-here/x': no such user or variable"):
        parse([*command, "--job.dump_folder=~nobody-here/x"])
