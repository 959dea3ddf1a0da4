"""Which changes of a configuration a resumed run refuses, and the messages."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flame_ext.config.head_options import HEAD_NAMES
from flame_ext.config.resume_record import ADDED, asset_digests, check_unchanged, config_digest, config_record, flat
from flame_ext.config.sections import DataSource, FlameJobConfig
from flame_ext.errors import ConfigError
from flame_ext.heads.registry import job_config_class, record_of_heads
from flame_ext.train import parse
from tests.ranks import DEBUG_TOML, TINY_OLMO

HARMLESS_SECTIONS = {
    "activation_checkpoint", "checkpoint", "comm", "compile", "evaluation", "export", "fault_tolerance", "job",
    "memory_estimation", "metrics",
    "parallelism", "profiling", "validation",
}  # fmt: skip
HARMLESS_FIELDS = {
    "debug.deterministic", "debug.deterministic_warn_only",
    "model.hf_assets_path", "model.print_after_conversion", "moe.experts_implementation",
    "seed.allow_config_difference", "seed.allow_pickle", "seed.dry_run", "seed.follow_links", "seed.verify",
    "future_encoder.assume_reverse", "future_encoder.reverse_model",
    "training.dataloader.num_workers", "training.dataloader.persistent_workers", "training.dataloader.pin_memory",
    "training.dataloader.prefetch_factor", "training.enable_cpu_offload", "training.gc_debug", "training.gc_freq",
}  # fmt: skip

BATCH_SIZES = ("training.local_batch_size", "training.global_batch_size")  # compared together, see below


def leaves(section: Any, prefix: str = "") -> list[str]:
    names = []
    for f in fields(section):
        value = getattr(section, f.name)
        names += leaves(value, f"{prefix}{f.name}.") if is_dataclass(value) else [prefix + f.name]
    return names


CONFIG_CLASS = job_config_class()
LEAVES = leaves(CONFIG_CLASS())


def change(config: FlameJobConfig, name: str, value: Any = None) -> None:
    *path, last = name.split(".")
    section: Any = config
    for part in path:
        section = getattr(section, part)
    old = getattr(section, last)
    if value is None:
        value = not old if isinstance(old, bool) else old + 1 if isinstance(old, int | float) else "another"
    setattr(section, last, value)


def record(*changed: str, degree: int = 4, assets: dict[str, str] | None = None, **values: Any) -> dict[str, Any]:
    config = CONFIG_CLASS()
    for head in HEAD_NAMES:  # the options of others have no effect
        getattr(config, head).enable = True
    for name in changed:
        change(config, name)
    for name, value in values.items():
        change(config, name.replace("__", "."), value)
    heads = record_of_heads(config, config.training.local_batch_size * degree)
    return config_record(config, data_parallel_degree=degree, assets=assets or {}, heads=heads)


def refusal(then: dict[str, Any], now: dict[str, Any], allowed: list[str] | None = None) -> str:
    with pytest.raises(ConfigError) as e:
        check_unchanged(then, now, allowed or [], "outputs/checkpoint/step-5")
    return str(e.value)


@pytest.mark.parametrize("name", [n for n in LEAVES if n not in BATCH_SIZES])
def test_every_field_matters_unless_it_is_known_to_be_harmless(name: str) -> None:
    then, now = record(), record(name)
    if name.split(".")[0] in HARMLESS_SECTIONS or name in HARMLESS_FIELDS:
        assert check_unchanged(then, now, [], "step-5") == [] and config_digest(then) == config_digest(now)
        return
    assert f"\n  - {name}: then " in refusal(then, now) and config_digest(then) != config_digest(now)
    follow = [key for key in {*then, *now} if then.get(key) != now.get(key)]  # heads record what follows from an option
    lines = check_unchanged(then, now, follow, "step-5")
    assert any(line.startswith(f"{name}: then ") for line in lines) and len(lines) == len(follow)


@given(st.sets(st.sampled_from(LEAVES), max_size=8))
def test_exactly_the_changes_that_matter_are_asked_for(names: set[str]) -> None:
    then, now = record(), record(*names)
    differ = sorted(name for name in {*then, *now} if then.get(name) != now.get(name))
    if not differ:
        assert check_unchanged(then, now, [], "step-5") == []
        return
    remedy = refusal(then, now).rpartition("checkpoint.allow_config_change = ")[2]
    assert json.loads(remedy) == differ
    assert len(check_unchanged(then, now, differ, "step-5")) == len(differ)


def test_the_message_says_then_and_now_and_the_remedy() -> None:
    then = record(optimizer__lr=1e-3, training__dataset="json", model__converters=["future_prediction"])
    now = record(optimizer__lr=2e-3, training__dataset="text", training__dataset_path="a.txt")
    assert refusal(then, now, ["optimizer.lr"]) == (
        "outputs/checkpoint/step-5 was saved by a run with another configuration:\n"
        '  - model.converters: then ["future_prediction"], now []\n'
        '  - training.dataset: then "json", now "text"\n'
        '  - training.dataset_path: then null, now "a.txt"\n'
        "take back the change; or give this run another job.dump_folder; or, to go on with other numbers, set "
        'checkpoint.allow_config_change = ["optimizer.lr", "model.converters", "training.dataset", "training.dataset_path"]'
    )


def test_allowed_changes_come_back_as_lines_and_may_stay_allowed() -> None:
    then, now = record(), record(optimizer__lr=2.0)
    assert check_unchanged(then, now, ["optimizer.lr", "optimizer.eps", ""], "step-5") == [
        "optimizer.lr: then 0.0008, now 2.0"
    ]
    assert check_unchanged(now, now, ["optimizer.lr"], "step-5") == []


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("optimizer.lrr", "no field 'optimizer.lrr'; did you mean 'optimizer.lr'?"),
        ("optimizer", "'optimizer' is a section; name each field (optimizer.beta1, optimizer.beta2,"),
        ("quantize.linear", "'quantize.linear' is a section; name each field (quantize.linear.float8."),
        ("job.dump_folder", "'job.dump_folder' is not compared and may always change: leave it out"),
        ("*", "no field '*'"),
    ],
)
def test_what_can_not_be_allowed(name: str, message: str) -> None:
    text = refusal(record(), record("optimizer.lr"), [name])
    assert text.startswith("checkpoint.allow_config_change: ") and message in text


def test_the_global_batch_is_compared_not_how_it_is_spread() -> None:
    then = record(training__local_batch_size=8, degree=4)
    assert then["training.global_batch_size"] == 32
    assert check_unchanged(then, record(training__local_batch_size=16, degree=2), [], "step-5") == []
    accumulated = record(training__local_batch_size=8, training__global_batch_size=32, degree=1)
    assert check_unchanged(then, accumulated, [], "step-5") == []
    assert "training.global_batch_size: then 32, now 16" in refusal(then, record(degree=2))


def test_the_micro_batch_is_compared_where_it_holds_the_negatives() -> None:
    def run(degree: int, **values: Any) -> dict[str, Any]:
        return record(
            training__global_batch_size=32, future_encoder__enable=True, degree=degree,
            **{f"future_encoder__{name}": value for name, value in values.items()},
        )  # fmt: skip

    assert check_unchanged(run(4), run(2), [], "step-5") == []
    assert check_unchanged(run(4, negatives="local"), run(2, negatives="local"), [], "step-5") == []
    text = refusal(run(4, summary_method="mean"), run(2, summary_method="mean"))
    assert "future_encoder.sequences_compared: then 32, now 16" in text


def test_fields_of_other_versions_need_an_allowance_too() -> None:
    now = record()
    then = {**now, "optimizer.momentum": 0.9}
    del then["optimizer.eps"]
    text = refusal(then, now)
    assert "optimizer.eps: then absent, now 1e-08" in text and "optimizer.momentum: then 0.9, now absent" in text
    assert len(check_unchanged(then, now, ["optimizer.eps", "optimizer.momentum"], "step-5")) == 2
    assert check_unchanged({**now, "metrics.gone": 1}, now, [], "step-5") == []


def test_a_users_own_section_matters() -> None:
    @dataclass
    class Mine:
        place: Path = Path("a")

    @dataclass
    class Config(CONFIG_CLASS):
        mine: Mine = field(default_factory=Mine)

    assert config_record(Config(), data_parallel_degree=1, assets={})["mine.place"] == "a"


def test_a_record_survives_a_manifest() -> None:
    then = record(training__max_norm=1)
    assert check_unchanged(json.loads(json.dumps(then)), then, [], "step-5") == []
    assert config_digest(then) == config_digest(record(training__max_norm=1.0))


def test_model_and_tokenizer_are_compared_by_content(tmp_path: Path) -> None:
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        (tmp_path / name).write_bytes((TINY_OLMO / name).read_bytes())
    assert asset_digests(tmp_path) == asset_digests(TINY_OLMO)
    assert sorted(asset_digests(tmp_path)) == ["config.json", "tokenizer.json", "tokenizer_config.json"]
    for name in (
        more := (
            "added_tokens.json",
            "merges.txt",
            "special_tokens_map.json",
            "spiece.model",
            "tekken.json",
            "q.tiktoken",
        )
    ):
        (tmp_path / name).touch()
    assert {*asset_digests(tmp_path)} - {*asset_digests(TINY_OLMO)} == {*more}
    then = record(assets=asset_digests(tmp_path))
    (tmp_path / "tokenizer.json").write_text("{}")
    (tmp_path / "modelling.py").touch()
    text = refusal(then, record(assets=asset_digests(tmp_path, code=True)))
    assert "model.hf_assets_path/tokenizer.json: then SHA-256 " in text
    assert "model.hf_assets_path/modelling.py: then absent, now SHA-256 e3b0c44298fc…" in text
    assert "config.json" not in text


def test_the_options_are_read_from_the_command_line() -> None:
    allowed = "--checkpoint.allow_config_change=optimizer.lr,optimizer.eps"
    config = parse([f"--job.config_file={DEBUG_TOML}", allowed, "--checkpoint.max_nonfinite_steps=3"])
    assert config.checkpoint.allow_config_change == ["optimizer.lr", "optimizer.eps"]
    assert config.checkpoint.max_nonfinite_steps == 3 and config.checkpoint.interval == 20


def test_another_list_of_sources_is_another_run() -> None:
    def of(*sources: DataSource) -> dict[str, Any]:
        config = CONFIG_CLASS()
        config.data.sources = list(sources)
        return config_record(config, data_parallel_degree=1, assets={})

    then = of(DataSource("a"), DataSource("b", weight=2.0))
    assert check_unchanged(then, of(DataSource("a", label="other"), DataSource("b", weight=2.0)), [], "step-1") == []
    for changed, name in (
        (of(DataSource("a"), DataSource("c", weight=2.0)), 'data.sources.1.path: then "b", now "c"'),
        (of(DataSource("a"), DataSource("b")), "data.sources.1.weight: then 2.0, now 1.0"),
        (of(DataSource("b", weight=2.0), DataSource("a")), 'data.sources.0.path: then "a", now "b"'),
        (of(DataSource("a")), 'data.sources.1.path: then "b", now absent'),
        (of(), 'data.sources.0.path: then "a", now absent'),
    ):
        with pytest.raises(ConfigError, match=re.escape(name)):
            check_unchanged(then, changed, [], "step-1")


def test_a_step_of_the_first_version_goes_on() -> None:
    """It did not record every file of a tokenizer, and a source's tokens had a type by default."""
    now = record() | {"model.hf_assets_path/added_tokens.json": "a" * 64, "data.sources.0.tokens_dtype": None}
    then = {
        name: value
        for name, value in now.items()
        if name not in ("record.version", "model.hf_assets_path/added_tokens.json")
    }
    then["data.sources.0.tokens_dtype"] = "uint16"
    assert check_unchanged(then, now, [], "step-1") == []
    for changed in ({"data.sources.0.tokens_dtype": "int32"}, {"model.hf_assets_path/merges.txt": "b" * 64}):
        with pytest.raises(ConfigError, match=next(iter(changed))):
            check_unchanged(then, now | changed, [], "step-1")
    with pytest.raises(ConfigError, match=r"added_tokens\.json"):
        check_unchanged(then | {"record.version": 2}, now, [], "step-1")


def test_a_step_from_before_mixtures_goes_on() -> None:
    now = record()
    then = {name: value for name, value in now.items() if not name.startswith("moe.")}
    assert check_unchanged(then, now, [], "step-1") == []
    assert check_unchanged(then, now | {"moe.aux_loss_coef": 0.1}, [], "step-1") == []
    with pytest.raises(ConfigError, match=r"moe\.aux_loss_coef: then null, now 0\.1"):
        check_unchanged(now, now | {"moe.aux_loss_coef": 0.1}, [], "step-1")
    assert "moe.experts_implementation" not in now, "rounding only"


def test_a_step_from_before_an_option_goes_on_with_what_was_done() -> None:
    now = record()
    defaults = dict(flat(job_config_class()()))
    assert {name: defaults[name] for name in ADDED} == ADDED
    then = {name: value for name, value in now.items() if name not in ADDED}
    assert check_unchanged(then, dict(now) | ADDED, [], "step-1") == []
    assert "loss.ce_weight: then 1.0, now 0.5" in refusal(then, dict(now) | ADDED | {"loss.ce_weight": 0.5})
    then = {name: value for name, value in now.items() if not name.endswith(".freeze")}
    assert len(now) - len(then) > 2 and check_unchanged(then, now, [], "step-1") == []


def test_a_step_from_before_a_head_goes_on_without_it() -> None:
    rest = {"token_order__enable": False}
    now = record(**rest)
    then = {name: value for name, value in now.items() if not name.startswith("token_order.")}
    then["seed.new_parameters"] = [p for p in then["seed.new_parameters"] if p != "token_order.*"]
    assert check_unchanged(then, now, [], "step-1") == []
    assert check_unchanged(now, record("token_order.window", **rest), [], "step-1") == []
    added = refusal(then, record())
    assert "token_order.enable: then absent, now true" in added and "seed.new_parameters: then" in added
    assert "token_order.enable: then true, now false" in refusal(record(), now)
