"""Every kind of source on 1, 2 and 4 processes under FSDP, DDP and more: full tensors, bit for bit those in the files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from flame_ext.seeding.report import REPORT_NAME
from tests.ranks import DEBUG_TOML, run_ranks
from tests.sources import HUB_REVISION, save_all_sources

DDP = "--parallelism.data_parallel_replicate_degree={}"
PLACEMENTS: dict[tuple[str, int], list[str]] = {
    ("fsdp", 1): [],
    ("ddp", 1): [DDP.format(1)],
    ("fsdp", 2): [],
    ("ddp", 2): [DDP.format(2)],
    ("fsdp", 4): [],
    ("ddp", 4): [DDP.format(4)],
    ("hsdp", 4): [DDP.format(2)],
    ("fsdp-cpu-offload", 2): ["--training.enable_cpu_offload"],
}
SOURCES = {
    "hf-single": "hf-safetensors",
    "hf-sharded": "hf-safetensors",
    "hf-bin": "hf-bin",
    "hub": "hf-safetensors",
    "dcp-flat": "dcp-flat",
    "dcp-nested": "dcp-nested",
    "dcp-flat-heads": "dcp-flat",
    "dcp-nested-heads": "dcp-nested",
    "step": "dcp-flat",
    "step-nested": "dcp-nested",
    "export": "hf-safetensors",
}


def seed_all(assets: str, paths: dict[str, str], folder: str, options: list[str]) -> dict[str, dict[str, Tensor]]:
    """In a rank: a trainer seeded from each path, one after the other; all its tensors in full."""
    import torch.distributed as dist
    from torch.distributed.fsdp import FSDPModule
    from torch.distributed.tensor import DTensor
    from torchtitan.components.checkpoint import MODEL

    from flame_ext.train import parse
    from flame_ext.trainer import FutureTrainer

    seeded = {}
    arguments = [f"--job.config_file={DEBUG_TOML}", f"--model.hf_assets_path={assets}", "--training.seq_len=64"]
    arguments += ["--metrics.no-enable-tensorboard", "--seed.allow_pickle", "--seed.verify=parity", *options]
    trainer = FutureTrainer(parse([*arguments, f"--job.dump_folder={folder}"]))
    for name, path in paths.items():
        state = trainer.checkpointer.states[MODEL].state_dict()
        for tensor in state.values():
            tensor.detach().fill_(float("nan"))
        for module in trainer.model_parts[0].modules():
            if isinstance(module, FSDPModule):  # which keeps what it has gathered for the last proof
                module.reshard()
        trainer.checkpointer.initial_load_path = path
        trainer.checkpointer.load()
        # Copied, since the next source is read into the same memory.
        seeded[name] = {
            k: (v.full_tensor() if isinstance(v, DTensor) else v).detach().clone() for k, v in state.items()
        }
        if dist.get_rank() == 0:
            Path(folder, name).mkdir()
            Path(folder, REPORT_NAME).rename(Path(folder, name, REPORT_NAME))
    trainer.close()
    dist.destroy_process_group()
    return seeded


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[str, dict[str, Tensor]]]:
    sources = save_all_sources(tmp_path_factory.mktemp("sources"))
    assert list(sources) == list(SOURCES)
    return sources


@pytest.fixture(scope="module")
def seeded(
    sources: dict[str, tuple[str, dict[str, Tensor]]], tmp_path_factory: pytest.TempPathFactory
) -> dict[tuple[str, int], Any]:
    """Placement to the folder of its reports and, for each rank, the tensors of every source."""
    assets, results = sources["hf-single"][0], {}
    paths = {name: path for name, (path, _) in sources.items()}
    for (kind, world_size), options in PLACEMENTS.items():
        folder = tmp_path_factory.mktemp(f"{kind}-{world_size}")
        ranks = run_ranks(
            seed_all, world_size, assets, paths, str(folder), options, folder=folder / "ranks", timeout=240
        )
        assert all(rank.exit_code == 0 for rank in ranks), ranks[0].output[-3000:]
        results[kind, world_size] = (folder, [rank.value for rank in ranks])
    return results


@pytest.mark.parametrize("placement", PLACEMENTS, ids=lambda p: f"{p[0]}-{p[1]}")
@pytest.mark.parametrize("name", SOURCES)
def test_the_model_is_the_source(
    sources: dict[str, tuple[str, dict[str, Tensor]]], seeded: dict[tuple[str, int], Any], name: str, placement: tuple
) -> None:
    folder, ranks = seeded[placement]
    held = sources[name][1]
    reference = seeded["fsdp", 1][1][0]["hf-single"]
    new = {key for key in reference if key.startswith("future_predictor.")}
    for tensors in (rank[name] for rank in ranks):
        assert set(tensors) == set(held) | new
        for key, tensor in tensors.items():
            # What the source does not hold is initialised, the same everywhere.
            expected = held[key].float() if key in held else reference[key]
            assert tensor.dtype == torch.float32 and torch.equal(tensor, expected), key
    report = json.loads((folder / name / "seed_report.json").read_text())
    assert report["layout"] == SOURCES[name] and report["world_size"] == placement[1]
    assert report["revision"] == (HUB_REVISION if name == "hub" else None)
    assert set(report["keys"]["loaded"]) == set(held) and set(report["keys"]["initialised"]) == new - set(held)
    assert report["keys"]["ignored"] == [], "the rest of a training step is not the model's, and needs no declaration"
    assert report["verification"]["max_abs_diff"] == 0.0
    assert report["verification"]["loss"] == report["verification"]["reference_loss"]


@pytest.mark.parametrize("name", SOURCES)
def test_the_digest_of_the_weights_is_of_the_values_alone(seeded: dict[tuple[str, int], Any], name: str) -> None:
    digests = {
        json.loads((folder / name / "seed_report.json").read_text())["weights_digest"] for folder, _ in seeded.values()
    }
    assert len(digests) == 1, "the same under every placement"
    folder = seeded["fsdp", 1][0]
    of_first = json.loads((folder / "hf-single" / "seed_report.json").read_text())["weights_digest"]
    same_values = {"hf-single", "hf-sharded", "hf-bin", "hub", "dcp-flat", "dcp-nested"}
    assert (digests == {of_first}) == (name in same_values)
