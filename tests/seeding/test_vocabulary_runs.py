"""Jobs whose vocabulary grows: the proof, a step, exports, a resumed run; the same bits under every layout."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from flame_ext.tools.main import main
from tests.layouts import LAYOUTS, NO_HEADS
from tests.ranks import TINY_OLMO, TrainRun, train
from tests.seeding.test_vocabulary import OLD, grown_folder
from tests.tiny_models import load_stock, save_tiny

GROW = ["--seed.resize_vocabulary", "--seed.pad_vocabulary_to_multiple_of=4"]
STEP = [
    "--checkpoint.interval=1",
    "--optimizer.lr=0",
    "--checkpoint.export_dtype=float32",
    "--training.local_batch_size=2",
]
STEP += ["--checkpoint.allow_config_change=training.steps", "--training.seq_len=64"]
TOKENS = torch.arange(40, 100)[None]


def run(source: Path, folder: Path, dump_folder: Path, *options: str, **more: Any) -> TrainRun:
    paths = [f"--model.hf_assets_path={folder}", f"--checkpoint.initial_load_path={source}"]
    return train(dump_folder, *paths, "--seed.verify=parity", *options, **more)


def assert_grown(export: Path, tokenizer: Path) -> None:
    """An export of the tiny OLMo with four more rows, its learning rate having been 0."""
    assert json.loads((export / "config.json").read_text())["vocab_size"] == 268
    assert (export / "tokenizer.json").read_bytes() == (tokenizer / "tokenizer.json").read_bytes()
    exported, stock = load_stock(export), load_stock(TINY_OLMO)
    with torch.no_grad():
        logits = exported(TOKENS).logits
        assert torch.equal(logits[..., :OLD], stock(TOKENS).logits)
    assert logits.shape[-1] == 268 and (logits.argmax(-1) < OLD).all()
    rows = stock.get_input_embeddings().weight.detach().double()
    assert torch.equal(exported.get_input_embeddings().weight[OLD:], rows.mean(0).float().expand(4, -1))


def test_a_tied_model_grows_and_is_exported_and_resumed(tmp_path: Path, dump_folder: Path) -> None:
    folder = grown_folder(TINY_OLMO, tmp_path / "new")
    options = [*GROW, *STEP, *NO_HEADS]
    first = run(TINY_OLMO, folder, dump_folder, *options, "--training.steps=1")
    assert "264 rows loaded, 4 initialised in each of model.embed_tokens.weight" in first.ranks[0].output
    report = json.loads((dump_folder / "seed_report.json").read_text())
    assert report["vocabulary"] == {
        "rows_loaded": 264,
        "rows_initialised": 4,
        "of_which_padding": 2,
        "new_rows": "mean",
        "keys": ["model.embed_tokens.weight"],
    }
    assert report["verification"]["max_abs_diff"] == 0.0
    assert_grown(dump_folder / "hf" / "step-1", folder)

    shutil.rmtree(dump_folder / "hf")
    second = run(tmp_path / "gone", folder, dump_folder, *options, "--training.steps=2")
    assert "Resuming from" in second.ranks[0].output
    assert_grown(dump_folder / "hf" / "step-2", folder)
    # The model's folder says 264 rows, the step 268.
    for layout, place in (("hf", tmp_path / "hf"), ("dcp", tmp_path / "dcp")):
        step = str(dump_folder / "checkpoint" / "step-2")
        assert main(["convert", step, str(place), f"--to={layout}", f"--assets={folder}"]) == 0
        assert json.loads((place / "config.json").read_text())["vocab_size"] == 268
    assert_grown(tmp_path / "hf", folder)


@pytest.mark.matrix
def test_heads_that_score_tokens_grow_with_it_and_exports_are_made_in_the_background(
    tmp_path: Path, dump_folder: Path
) -> None:
    folder = grown_folder(TINY_OLMO, tmp_path / "new")
    options = [*GROW, *STEP, "--token_order.enable", "--future_bag.enable"]
    run(TINY_OLMO, folder, dump_folder, *options, "--training.steps=2", "--export.interval=1")
    for step in (1, 2):
        export = dump_folder / "hf" / f"step-{step}"
        heads = load_file(export / "future_heads" / "model.safetensors")
        assert heads["token_order.proj.weight"].shape == (268, 128) and heads["future_bag.proj.bias"].shape == (268,)
        assert_grown(export, folder)
    longer = grown_folder(export, tmp_path / "longer", ["if ", "in ", "or ", "not "])
    options += ["--training.steps=1", "--seed.new_rows=subwords", "--seed.dry_run"]
    grown = run(export, longer, tmp_path / "grown", *options)
    assert "268 rows loaded, 4 initialised in each of future_bag.proj.bias, future_bag.proj" in grown.ranks[0].output
    report = json.loads((tmp_path / "grown" / "seed_report.json").read_text())
    assert len(report["vocabulary"]["keys"]) == 4 and report["vocabulary"]["of_which_without_pieces"] == 0


def test_a_longer_tokenizer_is_no_growth_without_the_option(tmp_path: Path, dump_folder: Path) -> None:
    folder = grown_folder(TINY_OLMO, tmp_path / "new")
    fields = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(fields | {"eos_token": "ab"}))
    failed = run(TINY_OLMO, folder, dump_folder, "--seed.dry_run", check=False)
    assert failed.exit_codes == [1] and not (dump_folder / "seed_report.json").exists()
    assert "the tokenizer's EOS, id 265, is beyond the model's vocab_size 264" in failed.ranks[0].output
    assert "set seed.resize_vocabulary = true" in failed.ranks[0].output
    run(TINY_OLMO, folder, dump_folder, "--seed.dry_run", *GROW)


def test_what_would_grow_is_said_without_a_run(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    folder = grown_folder(TINY_OLMO, tmp_path / "new")
    job = tmp_path / "job.toml"
    text = Path("configs/debug.toml").read_text().replace('"tests/assets/tiny_olmo"', f'"{folder}"', 1)
    job.write_text(text.replace("[seed]", "[seed]\nresize_vocabulary = true"))
    assert main(["inspect", str(TINY_OLMO), f"--job.config_file={job}"]) == 0
    assert "its vocabulary would grow: 264 rows loaded, 2 initialised" in capsys.readouterr().out


PP2 = ["--parallelism.pipeline_parallel_degree=2"]
MATRIX = {name: LAYOUTS[name] for name in ("tp2", "fsdp2", "ddp2", "fsdp2-tp2")} | {
    "pp2": (2, ["--training.local_batch_size=4", *PP2]),
    "fsdp4": (4, ["--training.local_batch_size=1"]),
}


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Path]]:
    folder = tmp_path_factory.mktemp("sources")
    names = ("olmo2", "olmo-tied", "phi-biases-partial-rope")
    saved = {name: save_tiny(name, folder / name / "source", max_shard_size="20KB") for name in names}
    words = [f"word {i}" for i in range(46)]
    return {name: (path, grown_folder(path, path.parent / "new", words)) for name, path in saved.items()}


def digest_of(source: Path, folder: Path, dump_folder: Path, layout: tuple[int, list[str]], new_rows: str) -> str:
    world_size, options = layout
    options = [*options, *NO_HEADS, "--seed.dry_run", "--training.seq_len=64", f"--seed.new_rows={new_rows}"]
    options += ["--seed.resize_vocabulary", "--seed.pad_vocabulary_to_multiple_of=64"]
    run(source, folder, dump_folder, *options, world_size=world_size)
    report = json.loads((dump_folder / "seed_report.json").read_text())
    assert report["vocabulary"]["rows_initialised"] == 56 and report["vocabulary"]["of_which_padding"] == 16
    return report["weights_digest"]


def test_two_ranks_have_the_bits_of_one(sources: dict[str, tuple[Path, Path]], tmp_path: Path) -> None:
    one, two = (
        digest_of(*sources["phi-biases-partial-rope"], tmp_path / name, LAYOUTS[name], "subwords")
        for name in ("single", "fsdp2")
    )
    assert one == two


@pytest.mark.matrix
@pytest.mark.parametrize("new_rows", ["mean", "subwords", "random"])
@pytest.mark.parametrize("name", ["olmo2", "olmo-tied", "phi-biases-partial-rope"])
def test_every_layout_has_the_bits_of_one_process(
    sources: dict[str, tuple[Path, Path]], tmp_path: Path, name: str, new_rows: str
) -> None:
    one = digest_of(*sources[name], tmp_path / "single", LAYOUTS["single"], new_rows)
    for layout, launched in MATRIX.items():
        found = digest_of(*sources[name], tmp_path / layout, launched, new_rows)
        assert found == one, layout
