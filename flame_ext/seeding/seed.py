"""Step 0, from the folder's headers to the proof. Knows tensors by name, not the trainer."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from torchtitan.tools.logging import logger
from transformers import PreTrainedConfig

from flame_ext.config.sections import Seed
from flame_ext.distributed import failing_together, is_main_rank
from flame_ext.errors import SeedError
from flame_ext.heads.initialisation import ParameterInit
from flame_ext.seeding.accounting import account
from flame_ext.seeding.new_parameters import initialise
from flame_ext.seeding.read import read_weights
from flame_ext.seeding.report import REPORT_NAME, SeedReport
from flame_ext.seeding.same_function import require_same_function
from flame_ext.seeding.source import open_source
from flame_ext.seeding.verify import Probe, Verification, verify


@dataclass(frozen=True)
class SeedTarget:
    """The state to be seeded."""

    state: Mapping[str, Tensor]
    """Key to parameter or persistent buffer, DTensor or plain, each tied parameter once. Written in place."""
    tied: Mapping[str, str]
    """Other name of a tied parameter to its key in ``state``."""
    computed_buffers: list[str]
    """Names of buffers outside ``state``."""
    inits: Mapping[str, ParameterInit]
    """The initialisation of those keys that have one."""
    config: PreTrainedConfig
    """The configuration that the model was built from."""


def seed(target: SeedTarget, path: str, options: Seed, probe: Probe, report_folder: Path) -> SeedReport:
    """Put the weights at ``path`` and the initial values of new parameters into ``target``, prove it and record it.

    Collective. Everything is checked from headers before a weight is read, and nothing is written before the proof.

    Raises:
        SeedError: on every rank with the same message.
    """
    begin = time.perf_counter()
    with failing_together(SeedError):
        source = open_source(path)
        require_same_function(source, target.config, options.trust_remote_code)
        shapes = {key: tuple(tensor.shape) for key, tensor in target.state.items()}
        keys = account(
            shapes,
            target.tied,
            target.computed_buffers,
            target.inits.keys(),
            source,
            options.new_parameters,
            options.ignore_source_keys,
        )
    _require_same_source(source.digest)
    if source.passed_over:
        logger.info(f"Passed over, not in the index of {path}: {', '.join(source.passed_over)}")
    _log_casts(target, {source.entries[key].dtype for key in keys.loaded if key in source.entries})
    with failing_together(SeedError):
        nbytes = read_weights(source, target.state, target.tied, check_finite=options.verify != "none")
        initialise({key: target.state[key] for key in keys.initialised}, target.inits, options.rng_seed)
    seconds, total_bytes = _slowest_and_sum(time.perf_counter() - begin, nbytes, probe.device)
    elements = sum(target.state[key].numel() for key in keys.loaded)
    logger.info(
        f"Seeded from {path} ({source.layout}): {len(keys.loaded)} tensors ({elements:,} elements) loaded, "
        f"{len(keys.initialised)} initialised from rng_seed {options.rng_seed}, {len(keys.tied)} tied, "
        f"{len(keys.buffers)} buffers computed, {len(keys.ignored)} source keys ignored; "
        f"{total_bytes / 2**20:,.1f} MiB in {seconds:.2f} s"
    )
    verification = verify(options.verify, probe, source.path, options.trust_remote_code)
    world_size = dist.get_world_size() if dist.is_initialized() else 1
    report = SeedReport(path, source.layout, keys, total_bytes, seconds, world_size, source.digest, verification)
    with failing_together(SeedError):
        if is_main_rank():
            report.write(report_folder)
    verified = "Did not verify" if options.verify == "none" else "Verified"
    logger.info(f"{verified} the seeded model ({_spelled(verification)}); recorded in {report_folder / REPORT_NAME}")
    return report


def _spelled(verification: Verification) -> str:
    words = [f"mode {verification.mode}"]
    if verification.loss is not None:
        words.append(f"loss on the probe text {verification.loss:.4f}")
    if verification.reference_loss is not None:
        words.append(f"from_pretrained {verification.reference_loss:.4f}")
        words.append(f"logits differ by at most {verification.max_abs_diff:.3g}")
    return ", ".join(words)


def _require_same_source(digest: str) -> None:
    """Raise on all ranks if nodes see different files under the same path."""
    if not dist.is_initialized():
        return
    digests: list[str] = [""] * dist.get_world_size()
    dist.all_gather_object(digests, digest)
    for rank, other in enumerate(digests):
        if other != digests[0]:
            raise SeedError(
                f"rank {rank} sees other files at checkpoint.initial_load_path than rank 0 (digest {other[:12]} against "
                f"{digests[0][:12]}); give all nodes the same copy"
            )


def _log_casts(target: SeedTarget, source_dtypes: set[torch.dtype]) -> None:
    model_dtypes = {tensor.dtype for tensor in target.state.values()}
    if source_dtypes != model_dtypes:
        logger.info(f"Casting while reading: {_names(source_dtypes)} in the files, {_names(model_dtypes)} in the model")


def _names(dtypes: set[torch.dtype]) -> str:
    return ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in dtypes))


def _slowest_and_sum(seconds: float, nbytes: int, device: torch.device) -> tuple[float, int]:
    if not dist.is_initialized():
        return seconds, nbytes
    slowest = torch.tensor(seconds, dtype=torch.float64, device=device)
    total = torch.tensor(nbytes, dtype=torch.int64, device=device)
    dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
    dist.all_reduce(total, op=dist.ReduceOp.SUM)
    return slowest.item(), total.item()
