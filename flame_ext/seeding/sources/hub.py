"""Finds a source: a folder, a URL of an object store, or ``hf://org/name[@revision]``, by way of huggingface_hub and its cache."""

import glob
import logging
import os
import re
from pathlib import Path

from huggingface_hub import constants, snapshot_download, try_to_load_from_cache

from flame_ext.distributed import failing_together, gathered, is_main_rank
from flame_ext.errors import SeedError
from flame_ext.object_stores import is_url
from flame_ext.seeding.sources.hf_bin import BIN_INDEX_NAME, BIN_NAME
from flame_ext.seeding.sources.hf_safetensors import INDEX_NAME, SINGLE_NAME
from flame_ext.seeding.sources.remote import located
from flame_ext.seeding.sources.safe_files import TOKENIZER_FILES, as_seed_error, read_weight_map
from flame_ext.seeding.sources.source import HEADS_FOLDER

logger = logging.getLogger()  # torchtitan's: importing torchtitan for it would take seconds

HUB_PREFIX = "hf://"

_BESIDE_TOKENIZER = ["tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "merges.txt"]
_SMALL_FILES = ["config.json", "generation_config.json", "*.py"]


def locate(path: str, allow_pickle: bool = False, with_tokenizer: bool = False) -> tuple[Path, str | None]:
    """Return the local folder of ``checkpoint.initial_load_path`` and its Hub commit, if any. Collective for a Hub path and a URL.

    On each node the first process downloads what the cache lacks, ``with_tokenizer`` the files of the tokenizer too. Raises
    SeedError on all ranks if the path is malformed, or the repository or revision does not exist, or is not in the cache when
    offline.
    """
    if is_url(path):
        return located(path, with_tokenizer), None
    if not path.startswith(HUB_PREFIX):
        return Path(path), None
    match = re.fullmatch(r"hf://([\w.-]+/[\w.-]+?)(?:@([^@\s]+))?", path)
    if match is None:
        raise SeedError(f"checkpoint.initial_load_path {path!r}: expected hf://org/name or hf://org/name@revision")
    # One rank resolves the revision, so that a branch that moves meanwhile is the same commit on all nodes.
    with failing_together(SeedError):
        found = _fetch(path, match[1], match[2], _SMALL_FILES).name if is_main_rank() else ""
    commit = gathered(found)[0]
    with failing_together(SeedError):
        if int(os.environ.get("LOCAL_RANK", "0")) == 0:
            download(path, match[1], commit, allow_pickle)
            if with_tokenizer:
                _fetch(path, match[1], commit, [*TOKENIZER_FILES, *_BESIDE_TOKENIZER])
    with failing_together(SeedError):
        config = try_to_load_from_cache(match[1], "config.json", revision=commit)
        if not isinstance(config, str):
            raise SeedError(f"{path}: no config.json at revision {commit}, so this is not a model's repository")
    logger.info(f"{path} is revision {commit}, in {Path(config).parent}")
    return Path(config).parent, commit


def download(path: str, repository: str, commit: str, allow_pickle: bool) -> None:
    """Download only a source's files; raise SeedError if it fails, or if there are no weights that may be read."""
    kinds = [(INDEX_NAME, SINGLE_NAME, [f"{HEADS_FOLDER}/*"])]
    if allow_pickle:
        kinds.append((BIN_INDEX_NAME, BIN_NAME, []))
    for index_name, single_name, beside in kinds:
        folder = _fetch(path, repository, commit, [*_SMALL_FILES, single_name, *beside])
        if (folder / single_name).exists():  # it comes before an index, as in from_pretrained
            return
        index = _fetch(path, repository, commit, [*_SMALL_FILES, index_name]) / index_name
        if index.exists():
            names = sorted(set(read_weight_map(index).values()))
            _fetch(path, repository, commit, [*_SMALL_FILES, index_name, *map(glob.escape, names), *beside])
            return
    hint = (
        ""
        if allow_pickle
        else "; if it has .bin files only, which are pickles, trust them with seed.allow_pickle = true"
    )
    raise SeedError(f"{path}: revision {commit} has neither {SINGLE_NAME} nor {INDEX_NAME}{hint}")


def _fetch(path: str, repository: str, revision: str | None, patterns: list[str]) -> Path:
    offline = constants.HF_HUB_OFFLINE  # for a commit, some versions of huggingface_hub ask the Hub all the same
    check = "; check name and revision, HF_TOKEN for a private or gated model, HF_HOME and HF_HUB_OFFLINE for the cache"
    with as_seed_error(f"{path}: cannot be had from the Hugging Face Hub or its cache", check):
        return Path(snapshot_download(repository, revision=revision, allow_patterns=patterns, local_files_only=offline))
