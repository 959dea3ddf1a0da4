"""Every layout to every layout, against the readers of others: from_pretrained, torch's DCP, torchtitan's loader."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from torchtitan.components.checkpoint import CheckpointManager
from torchtitan.config import Checkpoint
from transformers import AutoModelForCausalLM

from flame_ext.analysis import load_future_heads
from flame_ext.checkpoint import export
from flame_ext.heads.future_predictor import FuturePredictor
from flame_ext.seeding.sources.source import same_bits
from flame_ext.tools import conversion
from flame_ext.tools.main import main
from tests.ranks import train
from tests.sources import load_dcp, save_dcp
from tests.tiny_models import load_stock, save_tiny

LAYOUTS = ("hf", "dcp", "dcp-nested")
HEADS = {
    "future_encoder": {
        "summary_method": "anticausal", "future_k": 0, "hidden_size": 32, "num_heads": 4, "windows": None
    },
    "future_predictor": {"hidden_size": 32, "head_type": "linear", "dropout": 0.0},
}  # fmt: skip


def convert(capsys: pytest.CaptureFixture, *arguments: object, code: int = 0) -> str:
    """The command; returns what it printed, which is one line if it fails."""
    capsys.readouterr()
    assert main(["convert", *map(str, arguments)]) == code
    printed = capsys.readouterr()
    if code:
        assert printed.err.startswith("error: ") and "Traceback" not in printed.err
    return printed.err if code else printed.out


def test_a_step_of_adapters_alone_is_refused_before_anything_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    source = tmp_path / "checkpoint" / "step-2"
    state = {f"model.layers.0.self_attn.q_proj.lora_{x}.default.weight": torch.ones(2, 2) for x in "AB"}
    save_dcp(state, source)
    for to in ("dcp", "dcp-nested"):
        said = convert(capsys, source, tmp_path / "out", "--to", to, code=2)
        assert (
            "does not hold a whole model: 2 of these tensors are adapters of a run with model.converters 'lora'" in said
        )
        assert "take the run's export" in said and [*tmp_path.iterdir()] == [tmp_path / "checkpoint"]


def equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> bool:
    return found.keys() == expected.keys() and all(same_bits(found[key], tensor) for key, tensor in expected.items())


def held(folder: Path, layout: str, like: dict[str, Tensor]) -> dict[str, Tensor]:
    """What a folder holds, by the readers of others; NaN where DCP has nothing to give."""
    if layout == "hf":
        heads = folder / "future_heads" / "model.safetensors"
        return load_file(folder / "model.safetensors") | (load_file(heads) if heads.exists() else {})
    prefix = "model." if layout == "dcp-nested" else ""
    loaded = load_dcp(folder, {prefix + key: tensor for key, tensor in like.items()})
    return {key.removeprefix(prefix): tensor for key, tensor in loaded.items()}


def add_heads(folder: Path) -> dict[str, Tensor]:
    """Beside a model, as an export has them."""
    torch.manual_seed(3)
    head = FuturePredictor(**HEADS["future_predictor"])
    tensors = {f"future_predictor.{name}": torch.randn_like(tensor) for name, tensor in head.state_dict().items()}
    (folder / "future_heads").mkdir()
    (folder / "future_heads" / "config.json").write_text(json.dumps(HEADS))
    save_file(tensors, folder / "future_heads" / "model.safetensors")
    return tensors


@pytest.mark.parametrize("heads", [False, True], ids=["alone", "heads"])
@pytest.mark.parametrize("model", ["olmo-tied", "olmo-untied"])
def test_every_pair_there_and_back(tmp_path: Path, capsys: pytest.CaptureFixture, model: str, heads: bool) -> None:
    original = save_tiny(model, tmp_path / "original", dtype=torch.bfloat16)
    files = load_file(original / "model.safetensors") | (add_heads(original) if heads else {})
    # A strict load of a state dict wants a tied weight under each of its names.
    state = {"lm_head.weight": files["model.embed_tokens.weight"], **files}
    expected = {"hf": files, "dcp": state, "dcp-nested": state}
    folders = {"hf": original}
    for layout in ("dcp", "dcp-nested"):
        folders[layout] = tmp_path / layout
        convert(capsys, original, folders[layout], "--to", layout)
        assert equal(held(folders[layout], layout, state), state)
    for first in LAYOUTS:
        for second in LAYOUTS:
            folder = tmp_path / f"{first}-{second}"
            printed = convert(capsys, folders[first], folder, "--to", second, "--assets", original)
            assert f"Wrote {len(expected[second])} tensors" in printed
            assert equal(held(folder, second, expected[second]), expected[second]), (first, second)
            if second == "hf":
                loaded, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
                assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
                assert ("lm_head.weight" in load_file(folder / "model.safetensors")) == (model == "olmo-untied")
                assert loaded.dtype == torch.bfloat16
                with safe_open(folder / "model.safetensors", "pt") as file:
                    assert file.metadata() == {"format": "pt"}
                assert (folder / "tokenizer.json").read_bytes() == (original / "tokenizer.json").read_bytes()
                if heads:
                    head = load_future_heads(folder)["future_predictor"].state_dict()
                    assert all(same_bits(head[key], files[f"future_predictor.{key}"]) for key in head)
    assert not list(tmp_path.glob(".incomplete-*"))


@pytest.mark.parametrize("model", ["olmo-tied", "olmo-untied", "gpt-neox-renamed-keys"])
def test_what_other_programs_make_of_dcp(tmp_path: Path, capsys: pytest.CaptureFixture, model: str) -> None:
    """Flat: torchtitan's own manager, which flame's is a copy of. Nested: flame's way back to Hugging Face."""
    original = save_tiny(model, tmp_path / "original", dtype=torch.bfloat16)
    stock = AutoModelForCausalLM.from_pretrained(original, dtype=torch.bfloat16)
    weights = {key: tensor.clone() for key, tensor in stock.state_dict().items()}
    for layout in ("dcp", "dcp-nested"):
        convert(capsys, original, tmp_path / layout, "--to", layout)

    for tensor in stock.parameters():
        torch.nn.init.constant_(tensor, torch.nan)
    config = Checkpoint(enable=True, initial_load_path=str(tmp_path / "dcp"))
    manager = CheckpointManager(None, [stock], None, None, {}, config, None, str(tmp_path))
    assert manager.load()
    assert equal(stock.state_dict(), weights)

    dcp_to_torch_save(tmp_path / "dcp-nested", tmp_path / "nested.pt")
    state = torch.load(tmp_path / "nested.pt", weights_only=True)["model"]
    other = AutoModelForCausalLM.from_config(stock.config, dtype=torch.bfloat16)
    other.load_state_dict(state, strict=True)
    assert equal(other.state_dict(), weights)


def test_files_are_cut_to_size_and_cast_when_asked(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    original = save_tiny("olmo2", tmp_path / "original")
    convert(capsys, original, tmp_path / "small", "--to", "hf", "--max-shard-size", "30KB", "--dtype", "bfloat16")
    index = json.loads((tmp_path / "small" / "model.safetensors.index.json").read_text())
    files = sorted({*index["weight_map"].values()})
    assert len(files) > 2 and all((tmp_path / "small" / name).stat().st_mode & 0o044 for name in files)
    expected = {key: tensor.to(torch.bfloat16) for key, tensor in load_file(original / "model.safetensors").items()}
    found = {key: load_file(tmp_path / "small" / name)[key] for key, name in index["weight_map"].items()}
    assert equal(found, expected)
    assert json.loads((tmp_path / "small" / "config.json").read_text())["dtype"] == "bfloat16"


def test_names_of_an_architecture_whose_files_have_others(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    original = save_tiny("gpt-neox-renamed-keys", tmp_path / "original")
    stock = AutoModelForCausalLM.from_pretrained(original)
    flat = save_dcp(dict(stock.state_dict()), tmp_path / "flat")  # the model's names, as a training step has them
    convert(capsys, flat, tmp_path / "hf", "--to", "hf", "--assets", original)
    assert equal(load_file(tmp_path / "hf" / "model.safetensors"), load_file(original / "model.safetensors"))


@pytest.mark.parametrize("layout", ["dcp", "dcp-nested"])
@pytest.mark.parametrize("name", ["olmoe", "gpt-oss"])
def test_experts_there_and_back(tmp_path: Path, capsys: pytest.CaptureFixture, name: str, layout: str) -> None:
    """Files have a tensor for each expert (gpt-oss: the stack, transposed), and DCP may have their keys or the model's."""
    original = save_tiny(name, tmp_path / "original")
    files, weights = load_file(original / "model.safetensors"), dict(load_stock(original).state_dict())
    convert(capsys, original, tmp_path / "dcp", "--to", layout)
    assert equal(held(tmp_path / "dcp", layout, weights), weights)
    prefix = "model." if layout == "dcp-nested" else ""
    spelt = save_dcp({prefix + key: tensor for key, tensor in files.items()}, tmp_path / "spelt-as-files")
    for number, folder in enumerate((tmp_path / "dcp", spelt)):
        convert(capsys, folder, tmp_path / f"hf-{number}", "--to", "hf", "--assets", original)
        assert equal(held(tmp_path / f"hf-{number}", "hf", {}), files)
        shutil.copy(original / "config.json", folder)
        assert main(["inspect", str(folder), "--against", str(original), "--values"]) == 0


@pytest.mark.parametrize("nested", [False, True])
def test_what_the_old_scripts_wrote(tmp_path: Path, capsys: pytest.CaptureFixture, nested: bool) -> None:
    """With heads under bare names, tied weights twice: a seed for the trainer, and convertible."""
    original = save_tiny("olmo-tied", tmp_path / "original")
    backbone = load_file(original / "model.safetensors")
    torch.manual_seed(4)
    head = {"norm.weight": torch.randn(32), "norm.bias": torch.randn(32)}
    head |= {"proj.weight": torch.randn(32, 32), "proj.bias": torch.randn(32)}
    old = {key.replace("norm.", "ln."): tensor for key, tensor in head.items()}
    state = {**backbone, "lm_head.weight": backbone["model.embed_tokens.weight"].clone(), **old}
    folder = save_dcp({"model": state} if nested else state, tmp_path / "old")
    rules = ["ln.=future_predictor.norm.", "proj.=future_predictor.proj."]
    ours = {f"future_predictor.{key}": tensor for key, tensor in head.items()}

    error = convert(capsys, folder, tmp_path / "hf", "--to", "hf", "--assets", original, code=2)
    assert "ln.weight' [32] in" in error and "is not in the model" in error
    toml = tmp_path / "run.toml"
    toml.write_text(
        f'[model]\nname = "hf_causal_lm"\nflavor = "auto"\nhf_assets_path = "{original}"\n'
        'converters = ["future_prediction"]\n'
        f'[checkpoint]\nenable = true\ninitial_load_path = "{folder}"\n[training]\ndataset = "python_stdlib"\nseq_len = 64\n'
        '[future_encoder]\nenable = true\n[future_predictor]\nenable = true\nhead_type = "linear"\n'
    )
    convert(capsys, folder, tmp_path / "hf", "--to", "hf", "--job.config_file", toml, "--key-map", *rules)
    assert equal(load_file(tmp_path / "hf" / "model.safetensors"), backbone)
    assert equal(load_file(tmp_path / "hf" / "future_heads" / "model.safetensors"), ours)
    convert(capsys, folder, tmp_path / "flat", "--to", "dcp", "--key-map", *rules)
    every = {**backbone, "lm_head.weight": state["lm_head.weight"], **ours}
    assert equal(load_dcp(tmp_path / "flat", every), every)
    convert(capsys, folder, tmp_path / "nested", "--to", "dcp-nested", "--key-map", *rules)
    for written in ("hf", "flat", "nested"):
        assert main(["inspect", str(tmp_path / written), "--job.config_file", str(toml)]) == 0, (
            "by the trainer's account"
        )

    options = [f"--model.hf_assets_path={original}", f"--checkpoint.initial_load_path={folder}", "--seed.verify=parity"]
    options += ["--seed.dry_run", "--future_predictor.head_type=linear", f"--seed.key_map={','.join(rules)}"]
    run = train(tmp_path / "run", *options)
    report = json.loads((run.dump_folder / "seed_report.json").read_text())
    assert report["keys"]["initialised"] == [] and set(ours) <= set(report["keys"]["loaded"])
    assert report["verification"]["passed"] and report["verification"]["max_abs_diff"] <= 1e-5


def test_a_training_step_and_back(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    run = train(tmp_path / "run", "--training.steps=1", "--training.seq_len=32", "--training.local_batch_size=2",
                "--seed.verify=none", world_size=2)  # fmt: skip
    exported = run.dump_folder / "hf" / "step-1"
    step = run.dump_folder / "checkpoint" / "step-1"
    printed = convert(capsys, step, tmp_path / "hf", "--to", "hf", "--assets", "tests/assets/tiny_olmo")
    assert "passed over: optimizer" in printed
    for part in ("model.safetensors", "future_heads/model.safetensors"):
        assert equal(load_file(tmp_path / "hf" / part), load_file(exported / part)), part
    heads = json.loads((tmp_path / "hf" / "future_heads" / "config.json").read_text())
    assert heads == json.loads((exported / "future_heads" / "config.json").read_text()), "as the manifest has them"


def test_nothing_is_overwritten_and_nothing_half_written_stays(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = save_tiny("olmo-tied", tmp_path / "original")
    plain = save_dcp(load_file(original / "model.safetensors"), tmp_path / "plain")
    there = tmp_path / "there"
    there.mkdir()
    assert "is not overwritten" in convert(capsys, original, there, "--to", "dcp", code=2)
    assert "inside the source" in convert(capsys, original, original / "dcp", "--to", "dcp", code=2)

    write_hf, write_dcp = export.save_file, conversion.write_dcp

    def damaging_hf(tensors: dict[str, Tensor], file: Path, **kwargs: object) -> None:
        write_hf(tensors, file, **kwargs)
        content = bytearray(file.read_bytes())
        content[-5] ^= 1
        file.write_bytes(content)

    def damaging_dcp(described: dict[str, Tensor], read: Callable[[str], Tensor], folder: Path, nested: bool) -> None:
        names = list(described)[1:] if nested else described
        write_dcp({name: described[name] for name in names}, lambda name: read(name) + 1, folder, nested)

    def forgetting(tensors: dict[str, Tensor], file: Path, **kwargs: object) -> None:
        write_hf(dict(list(tensors.items())[1:]), file, **kwargs)

    def full(*_args: object, **_kwargs: object) -> None:
        raise OSError(28, "No space left on device")

    for layout, writer, message in (
        ("hf", damaging_hf, "is not what was written"),
        ("hf", forgetting, "with other keys"),
        ("hf", full, "No space left"),
        ("dcp", damaging_dcp, "is not what was written"),
        ("dcp-nested", damaging_dcp, "with other keys"),
        ("dcp", full, "No space left"),
    ):
        monkeypatch.setattr(*((export, "save_file") if layout == "hf" else (conversion, "write_dcp")), writer)
        assert message in convert(capsys, plain, tmp_path / "out", "--to", layout, "--assets", original, code=2)
        assert sorted(p.name for p in tmp_path.iterdir()) == ["original", "plain", "there"]


def test_a_pickle_is_read_where_it_is_allowed(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    original = save_tiny("olmo-untied", tmp_path / "original")
    weights = load_file(original / "model.safetensors")
    (original / "model.safetensors").unlink()
    torch.save(weights, original / "pytorch_model.bin")
    error = convert(capsys, original, tmp_path / "hf", "--to", "hf", code=2)
    assert "--allow-pickle" in error or "allow_pickle" in error
    convert(capsys, original, tmp_path / "hf", "--to", "hf", "--allow-pickle")
    assert equal(load_file(tmp_path / "hf" / "model.safetensors"), weights)


def test_code_of_a_folder_runs_only_where_it_is_trusted(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """The check alone: what trusted code then does is tested with the trainer, in a process of its own."""
    original = save_tiny("olmo-tied", tmp_path / "original")
    config = json.loads((original / "config.json").read_text()) | {
        "model_type": "brings_its_code",
        "auto_map": {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"},
    }
    (original / "config.json").write_text(json.dumps(config))
    (original / "code.py").write_text("raise ValueError('it ran')")
    error = convert(capsys, original, tmp_path / "hf", "--to", "hf", code=2)
    assert "asks for modelling code" in error
    error = convert(capsys, original, tmp_path / "hf", "--to", "hf", "--trust-remote-code", code=2)
    assert "it ran" in error


def test_integers_stay_integers(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    count = torch.tensor([2**40 + 1, 3])
    folder = save_dcp({"count": count, "weight": torch.randn(3)}, tmp_path / "flat")
    convert(capsys, folder, tmp_path / "cast", "--to", "dcp", "--dtype", "bfloat16")
    found = load_dcp(tmp_path / "cast", {"weight": torch.empty(3, dtype=torch.bfloat16)})
    assert found["weight"].isfinite().all()
    state = {"count": torch.zeros_like(count)}
    dcp.load(state, checkpoint_id=tmp_path / "cast", no_dist=True)
    assert torch.equal(state["count"], count)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere", "out", "--to", "dcp"], "does not exist"),
        (["flat", "out", "--to", "hf"], "--assets"),
        (["flat", "out", "--to", "hf", "--assets", "other"], "is not the model of other/config.json"),
        (["original", "out", "--to", "hf", "--max-shard-size", "5 apples"], "--max-shard-size '5 apples'"),
        (["original", "out", "--to", "dcp", "--key-map", "ln=norm", "nothing.=x."], "no key begins with 'ln'"),
        (["original", "out", "--to", "dcp", "--key-map", "model."], "is not 'old=new'"),
        (["damaged", "out", "--to", "dcp"], "truncated"),
        (["objects", "out", "--to", "dcp"], "holds what is not a tensor ('note')"),
        (["optimizer", "out", "--to", "dcp"], "holds no tensor of a model"),
        (["mistyped", "out", "--to", "dcp"], "Field 'hidden_size' expected int, got NoneType"),
        (["original", "dangling", "--to", "dcp"], "is not overwritten"),
        (
            ["original", "out", "--to", "dcp", "--import", "no_such_module"],
            "--import: No module named 'no_such_module'",
        ),
        (["heads", "out", "--to", "hf", "--assets", "original"], "--job.config_file"),
        (
            ["untied", "out", "--to", "hf", "--assets", "original"],
            "'lm_head.weight' differs from 'model.embed_tokens.weight'",
        ),
        (["untied", "out", "--to", "dcp", "--assets", "original"], "'lm_head.weight' differs"),
        (["original", "out", "--to", "dcp", "--assets", "other"], "is not the model of other/config.json"),
        (["export", "out", "--to", "hf"], "shape [16, 32] in future_heads/model.safetensors, the model has [32, 32]"),
    ],
)
def test_bad_input_gets_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch, arguments: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    original = save_tiny("olmo-tied", Path("original"))
    save_tiny("olmo2", Path("other"))
    tensors = load_file(original / "model.safetensors")
    save_dcp(dict(tensors), Path("flat"))
    save_dcp({**tensors, "future_predictor.norm.weight": torch.ones(32)}, Path("heads"))
    save_dcp({**tensors, "lm_head.weight": -tensors["model.embed_tokens.weight"]}, Path("untied"))
    heads = add_heads(save_tiny("olmo-tied", Path("export")))
    heads["future_predictor.proj.weight"] = torch.ones(16, 32)
    save_file(heads, "export/future_heads/model.safetensors")
    save_dcp({**tensors, "note": "text"}, Path("objects"))
    save_dcp({"optimizer": {"state": {"model.norm.weight.exp_avg": torch.ones(32)}}}, Path("optimizer"))
    mistyped = save_tiny("olmo-tied", Path("mistyped")) / "config.json"
    mistyped.write_text(json.dumps(json.loads(mistyped.read_text()) | {"hidden_size": None}))
    Path("dangling").symlink_to("nowhere")
    damaged = save_tiny("olmo-tied", Path("damaged")) / "model.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-100])
    before = sorted(p.name for p in tmp_path.iterdir())
    assert message in convert(capsys, *arguments, code=2)
    assert sorted(p.name for p in tmp_path.iterdir()) == before


def test_home_in_paths_is_expanded_where_a_shell_does_not(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    save_tiny("olmo2", tmp_path / "source")
    convert(capsys, "~/source", "~/out", "--to=hf", "--assets=~/source")
    AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    said = convert(capsys, "~/source", "~/other", "--to=hf", "--assets=~nobody-here/x", code=2)
    assert "--assets = '~nobody-here/x': no such user or variable" in said
