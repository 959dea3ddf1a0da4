"""Step 0, from the folder's headers to the proof. Knows tensors by name, not the trainer."""

from __future__ import annotations

import time
from collections import Counter
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from torchtitan.tools.logging import logger

from flame_ext.config.sections import Seed
from flame_ext.distributed import failing_together, is_main_rank
from flame_ext.errors import SeedError
from flame_ext.seeding.accounting import Account, ModelKey, account
from flame_ext.seeding.key_map import parse_key_map, renamed
from flame_ext.seeding.key_names import in_model_names
from flame_ext.seeding.new_parameters import initialise
from flame_ext.seeding.progress import ReadProgress
from flame_ext.seeding.proof.parity import Probe, Verification, verify
from flame_ext.seeding.proof.reference_model import load_stock_model
from flame_ext.seeding.proof.replicas import compare_replicas, weights_digest
from flame_ext.seeding.read import read_weights
from flame_ext.seeding.report import REPORT_NAME, SeedReport
from flame_ext.seeding.same_function import require_same_function
from flame_ext.seeding.sources.dcp import DcpSource
from flame_ext.seeding.sources.hub import locate
from flame_ext.seeding.sources.open import open_source
from flame_ext.seeding.sources.source import Source
from flame_ext.seeding.target import SeedTarget


def seed(target: SeedTarget, path: str, options: Seed, probe: Probe, report_folder: Path) -> SeedReport:
    """Put the weights at ``path`` and the initial values of new parameters into ``target``, prove it and record it.

    Collective. Everything is checked from headers before a weight is read, and nothing is written before the proof.

    Raises:
        SeedError: on every rank with the same message.
    """
    folder, revision = locate(path, options.allow_pickle)
    begin = time.perf_counter()
    with failing_together(SeedError):
        source, keys = match(target, folder, options)
    _require_same_source(source.digest)
    for line in source.passed_over:
        logger.info(f"Passed over in {folder}: {line}")
    _log_casts(target, source, keys)
    with failing_together(SeedError):
        check_finite = options.verify != "none"
        nbytes = read_weights(source, target.state, target.tied, check_finite, ReadProgress())
        new = {key: target.state[key] for key in keys.initialised if key in target.state}
        initialise(new, target.inits, options.rng_seed)
    seconds, slowest, total_bytes = _slowest_and_sum(time.perf_counter() - begin, nbytes)
    elements = sum(target.whole[key].numel() for key in keys.loaded)
    logger.info(
        f"Seeded from {path} ({source.layout}): {len(keys.loaded)} tensors ({elements:,} elements) loaded, "
        f"{len(keys.initialised)} initialised from rng_seed {options.rng_seed}, {len(keys.tied)} tied, "
        f"{len(keys.buffers)} buffers computed, {len(keys.ignored)} source keys ignored; "
        f"{total_bytes / 2**20:,.1f} MiB in {seconds:.2f} s ({total_bytes / 2**20 / seconds:,.0f} MiB/s, slowest: rank {slowest})"
    )
    digest = weights_digest(compare_replicas(target.state, target.whole, target.part), target.whole, keys.loaded)
    backbone = {key for key in (*target.whole, *target.tied) if key not in target.inits}
    load_stock = partial(
        load_stock_model,
        source,
        target.config,
        backbone,
        probe.dtype,
        options.trust_remote_code,
        parse_key_map(options.key_map),
    )
    verification = verify(options.verify, probe, load_stock, folder)
    world_size = dist.get_world_size() if dist.is_initialized() else 1
    report = SeedReport(
        path, source.layout, keys, total_bytes, seconds, world_size, source.digest, verification, revision, digest
    )
    with failing_together(SeedError):
        if is_main_rank():
            report.write(report_folder)
    verified = "Did not verify" if options.verify == "none" else "Verified"
    logger.info(f"{verified} the seeded model ({_spelled(verification)}); recorded in {report_folder / REPORT_NAME}")
    return report


def match(target: SeedTarget, folder: Path, options: Seed) -> tuple[Source, Account]:
    """The source under the model's names, and the account of every key; from headers alone.

    Raises:
        SeedError: the source does not fit.
    """
    source = renamed(open_source(folder, options.allow_pickle), parse_key_map(options.key_map))
    source = in_model_names(source, target.names)
    # A DCP checkpoint has no configuration, unless somebody put it there.
    if not isinstance(source, DcpSource) or (folder / "config.json").exists():
        require_same_function(source, target.config, options.trust_remote_code)
    model = {
        key: ModelKey(tuple(tensor.shape), tensor.dtype, key in target.vocabulary)
        for key, tensor in target.whole.items()
    }
    return source, account(
        model,
        target.tied,
        target.computed_buffers,
        target.inits.keys(),
        source,
        options.new_parameters,
        options.ignore_source_keys,
    )


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


def _log_casts(target: SeedTarget, source: Source, keys: Account) -> None:
    loaded = set(keys.loaded)
    casts: Counter[tuple[torch.dtype, torch.dtype]] = Counter()
    for name, entry in source.entries.items():
        key = target.tied.get(name, name)
        if key in loaded and entry.dtype != target.whole[key].dtype:
            casts[entry.dtype, target.whole[key].dtype] += 1
    for (found, needed), n in sorted(casts.items(), key=str):
        logger.info(f"Casting {n} tensors while reading: {_name(found)} in the files, {_name(needed)} in the model")


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _slowest_and_sum(seconds: float, nbytes: int) -> tuple[float, int, int]:
    """Seconds of the slowest rank, which rank that is, bytes of all."""
    figures = [(seconds, nbytes)]
    if dist.is_initialized() and dist.get_world_size() > 1:
        figures = [(0.0, 0)] * dist.get_world_size()
        dist.all_gather_object(figures, (seconds, nbytes))
    slowest = max(range(len(figures)), key=lambda rank: figures[rank][0])
    return figures[slowest][0], slowest, sum(n for _, n in figures)
