"""``hf://org/name[@revision]``: a model on the Hugging Face Hub, through huggingface_hub and its cache."""

from __future__ import annotations

import glob
import logging
import os
import re
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist
from huggingface_hub import constants, snapshot_download, try_to_load_from_cache
from huggingface_hub.errors import HfHubHTTPError

from flame_ext.distributed import failing_together, is_main_rank
from flame_ext.errors import SeedError
from flame_ext.seeding.sources.hf_bin import BIN_INDEX_NAME, BIN_NAME
from flame_ext.seeding.sources.hf_safetensors import INDEX_NAME, SINGLE_NAME
from flame_ext.seeding.sources.safe_files import read_weight_map
from flame_ext.seeding.sources.source import HEADS_FOLDER

logger = logging.getLogger()  # which is the host's: importing that for it would take seconds

HUB_PREFIX = "hf://"

# How long ranks wait for the one that downloads. The process group's own timeout is made for steps.
_DOWNLOAD_TIMEOUT = timedelta(days=1)


# Small, and all that is needed to know which large files are.
_SMALL_FILES = ["config.json", "generation_config.json", "*.py"]


def locate(path: str, allow_pickle: bool = False) -> tuple[Path, str | None]:
    """The local folder of ``checkpoint.initial_load_path`` and, from the Hub, its commit. Collective for a path on the Hub.

    On each node the first process downloads what the cache lacks while the others wait. ``HF_HOME``, ``HF_HUB_OFFLINE`` and
    ``HF_TOKEN`` mean what they always mean.

    Raises:
        SeedError: on all ranks: not such a path, no such repository or revision, or offline and not in the cache.
    """
    if not path.startswith(HUB_PREFIX):
        return Path(path), None
    match = re.fullmatch(r"hf://([\w.-]+/[\w.-]+?)(?:@([^@\s]+))?", path)
    if match is None:
        raise SeedError(f"checkpoint.initial_load_path {path!r}: expected hf://org/name or hf://org/name@revision")
    # One rank resolves the revision, so that a branch that moves meanwhile is the same commit on all nodes.
    commit = [""]
    with failing_together(SeedError):
        if is_main_rank():
            commit = [_fetch(path, match[1], match[2], _SMALL_FILES).name]
    distributed = dist.is_initialized() and dist.get_world_size() > 1
    if distributed:
        dist.broadcast_object_list(commit, src=0)
    group = dist.new_group(backend="gloo", timeout=_DOWNLOAD_TIMEOUT) if distributed else None
    with failing_together(SeedError, group):
        if int(os.environ.get("LOCAL_RANK", "0")) == 0:
            download(path, match[1], commit[0], allow_pickle)
    if group is not None:
        dist.destroy_process_group(group)
    with failing_together(SeedError):
        config = try_to_load_from_cache(match[1], "config.json", revision=commit[0])
        if not isinstance(config, str):
            raise SeedError(f"{path}: no config.json at revision {commit[0]}, so this is not a model's repository")
    logger.info(f"{path} is revision {commit[0]}, in {Path(config).parent}")
    return Path(config).parent, commit[0]


def download(path: str, repository: str, commit: str, allow_pickle: bool) -> None:
    """Bring what a source consists of into the cache, and nothing else of the repository.

    Raises:
        SeedError: it can not be had, or holds no weights that may be read.
    """
    kinds = [(INDEX_NAME, SINGLE_NAME, [f"{HEADS_FOLDER}/*"])]
    if allow_pickle:
        kinds.append((BIN_INDEX_NAME, BIN_NAME, []))
    for index_name, single_name, beside in kinds:
        folder = _fetch(path, repository, commit, [*_SMALL_FILES, index_name])
        index = folder / index_name
        names = sorted(set(read_weight_map(index).values())) if index.exists() else [single_name]
        _fetch(path, repository, commit, [*_SMALL_FILES, index_name, *map(glob.escape, names), *beside])
        if any((folder / name).exists() for name in (index_name, single_name)):
            return
    hint = (
        ""
        if allow_pickle
        else "; if it has .bin files only, which are pickles, trust them with seed.allow_pickle = true"
    )
    raise SeedError(f"{path}: revision {commit} has neither {SINGLE_NAME} nor {INDEX_NAME}{hint}")


def _fetch(path: str, repository: str, revision: str | None, patterns: list[str]) -> Path:
    try:
        # Said here as well: for a commit, some versions of huggingface_hub ask the Hub even when they are offline.
        offline = constants.HF_HUB_OFFLINE
        return Path(snapshot_download(repository, revision=revision, allow_patterns=patterns, local_files_only=offline))
    except (OSError, ValueError, HfHubHTTPError) as e:
        reason = " ".join(str(e).split())[:300]
        raise SeedError(
            f"{path}: can not be had from the Hugging Face Hub or its cache: {reason} (check the name and revision, HF_TOKEN "
            "for a private or gated model, HF_HOME and HF_HUB_OFFLINE for the cache)"
        ) from e
