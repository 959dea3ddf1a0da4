"""One tiny model in every layout that people have on disk, each beside the tensors that it holds, read by other code."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file
from torch import Tensor
from torch.distributed.checkpoint import FileSystemWriter
from transformers import AutoModelForCausalLM

from tests.ranks import train
from tests.tiny_models import save_tiny

HUB_REPOSITORY = "tiny-org/tiny-model"
HUB_REVISION = "0123456789abcdef0123456789abcdef01234567"


def random_heads() -> dict[str, Tensor]:
    """Values for the head of the debug job (an MLP) on the tiny model: what an earlier run has left."""
    generator = torch.Generator().manual_seed(5)
    shapes = {"norm.weight": (32,), "norm.bias": (32,), "proj.0.weight": (64, 32), "proj.0.bias": (64,)}
    shapes |= {"proj.2.weight": (32, 64), "proj.2.bias": (32,)}
    return {f"future_predictor.{name}": torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def save_dcp(state: dict[str, Any], folder: Path) -> Path:
    """As the offline converters saved: eight writer threads, no process group."""
    dcp.save(state, storage_writer=FileSystemWriter(folder, thread_count=8), no_dist=True)
    return folder


def load_dcp(folder: Path, like: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of the names and shapes of ``like`` by torch's own reader."""
    state = {key: torch.full_like(tensor, float("nan")) for key, tensor in like.items()}
    dcp.load(state, checkpoint_id=folder, no_dist=True)
    return state


def save_hub_cache(model: Path) -> str:
    """A model as huggingface_hub's cache (``HF_HOME``) has it, links and all; returns its ``hf://`` path."""
    repository = Path(os.environ["HF_HOME"]) / "hub" / f"models--{HUB_REPOSITORY.replace('/', '--')}"
    snapshot = repository / "snapshots" / HUB_REVISION
    shutil.rmtree(repository, ignore_errors=True)
    snapshot.mkdir(parents=True)
    (repository / "blobs").mkdir()
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(HUB_REVISION)
    for number, file in enumerate(sorted(model.iterdir())):
        shutil.copyfile(file, repository / "blobs" / f"{number:040x}")
        (snapshot / file.name).symlink_to(Path("../../blobs") / f"{number:040x}")
    return f"hf://{HUB_REPOSITORY}"


def save_all_sources(folder: Path, dtype: torch.dtype = torch.bfloat16) -> dict[str, tuple[str, dict[str, Tensor]]]:
    """Name of a kind of source to its path and to all that it holds of the model and its heads."""
    assets = save_tiny("olmo2", folder / "hf", dtype=dtype)
    backbone = load_file(assets / "model.safetensors")
    heads = random_heads()
    sources: dict[str, tuple[str, dict[str, Tensor]]] = {"hf-single": (str(assets), backbone)}

    def add(name: str, path: Path | str, held: dict[str, Tensor]) -> None:
        sources[name] = (str(path), held)

    add("hf-sharded", save_tiny("olmo2", folder / "hf-sharded", dtype, max_shard_size="30KB"), backbone)
    stock = AutoModelForCausalLM.from_pretrained(assets, dtype=dtype)
    bin_folder = folder / "hf-bin"
    stock.config.save_pretrained(bin_folder)
    torch.save(stock.state_dict(), bin_folder / "pytorch_model.bin")
    add("hf-bin", bin_folder, backbone)
    add("hub", save_hub_cache(assets), backbone)

    add("dcp-flat", save_dcp(backbone, folder / "dcp-flat"), backbone)
    add("dcp-nested", save_dcp({"model": backbone}, folder / "dcp-nested"), backbone)
    both = {**backbone, **heads}
    add("dcp-flat-heads", save_dcp(both, folder / "dcp-flat-heads"), both)
    add("dcp-nested-heads", save_dcp({"model": both}, folder / "dcp-nested-heads"), both)

    # A real run's step, written by two ranks, and its export; and the same step as trainers before wrote it, nested.
    options = [f"--model.hf_assets_path={assets}", f"--checkpoint.initial_load_path={assets}", "--training.steps=1"]
    run = train(folder / "run", *options, "--training.local_batch_size=2", world_size=2)
    like = {key: tensor.float() for key, tensor in both.items()}
    step = run.dump_folder / "checkpoint" / "step-1"
    trained = load_dcp(step, like)
    add("step", step, trained)
    optimizer = {"state": {"model.norm.weight.exp_avg": torch.ones(32)}, "param_groups": {"model.norm.weight.lr": 0.1}}
    beside = {"optimizer": optimizer, "lr_scheduler": {"last_epoch": 1}, "train_state": {"step": torch.tensor(1)}}
    add("step-nested", save_dcp({"model": trained, **beside}, folder / "step-nested"), trained)
    add("export", run.dump_folder / "hf" / "step-1", trained)
    return sources
