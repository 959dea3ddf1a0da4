"""Pushes exports to a model's repository on the Hugging Face Hub: one commit and one revision, ``step-N``, for each."""

import json
import tempfile
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, get_token
from huggingface_hub.errors import HfHubHTTPError, RemoteEntryNotFoundError, RevisionNotFoundError
from huggingface_hub.utils import get_session  # type: ignore[attr-defined]
from torchtitan.tools.logging import logger

from flame_ext.checkpoint.export_folder import RECORD_NAME, recorded
from flame_ext.errors import CheckpointError, UserError

_OF_NEW_REPOSITORIES = {".gitattributes", ".gitignore", "LICENSE", "README.md"}
_SILENCE, _SILENCE_AT_START = (
    300.0,
    30.0,
)  # seconds after which a Hub that does not answer is down; the library waits without end


def push(export: Path, repository: str, private: bool) -> str:
    """Commits all files of an export at once and returns what was done; what an earlier attempt has sent is not sent again.

    An export that comes after a later one's, since it was made up for, is on a branch ``step-N``; any other on ``main``, with a tag of that
    name. ``upload_folder`` would do for neither: it commits large folders in parts, between which ``main`` is no model.

    Raises:
        CheckpointError: it is no export of a step, the Hub refuses or cannot be reached, or the repository holds something else.
    """
    record = recorded(export)
    try:
        return _push(_api(_SILENCE), export, record, repository, private)
    except UserError:
        raise
    except Exception as e:  # of the Hub, the network or the files
        remedy = "check the network, and that HF_TOKEN may write there"
        raise CheckpointError(f"hf://{repository}: {_one_line(e)}; {remedy}") from e


def _push(api: HfApi, export: Path, record: dict[str, Any], repository: str, private: bool) -> str:
    name, place = export.name, f"hf://{repository}@{export.name}"
    api.create_repo(repository, private=private, exist_ok=True)
    if private and not api.model_info(repository).private:
        raise CheckpointError(
            f"hf://{repository} is public, and export.hub_private = true; make it private, or set export.hub_private = false"
        )
    if (held := _record_in(api, repository, name)) == record:
        return f"{place} was there"
    latest = _record_in(api, repository, "main")
    if latest is not None and latest.get("run") != record["run"]:
        raise CheckpointError(f"hf://{repository} holds the exports of another run; choose another export.push_to_hub")
    if latest is None and (others := {*api.list_repo_files(repository)} - _OF_NEW_REPOSITORIES):
        raise CheckpointError(
            f"hf://{repository} holds files that are no export ({', '.join(sorted(others)[:3])}); choose another export.push_to_hub"
        )
    if held is not None:  # the run has gone back, and this step is another one; or a push to a branch was broken off
        if any(branch.name == name for branch in api.list_repo_refs(repository).branches):
            api.delete_branch(repository, branch=name)
        else:
            api.delete_tag(repository, tag=name)
    is_late = latest is not None and latest["step"] > record["step"]
    if is_late:
        api.create_branch(repository, branch=name)
    names = [RECORD_NAME, *record["files"]]
    stale = {} if latest is None else {old for old in latest["files"] if old not in names}
    operations: list[Any] = [CommitOperationDelete(old) for old in stale]
    operations += [CommitOperationAdd(new, export / new) for new in names]
    commit = api.create_commit(
        repository, operations, commit_message=f"step {record['step']}", revision=name if is_late else "main"
    )
    if not is_late:
        api.create_tag(repository, tag=name, revision=commit.oid)
    return f"Pushed {len(names)} files to {place}"


def _api(silence: float) -> HfApi:
    get_session().timeout = silence
    return HfApi()


def _record_in(api: HfApi, repository: str, revision: str) -> dict[str, Any] | None:
    """Returns the record of the export at a revision; None if the revision, or a record there, does not exist."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            file = api.hf_hub_download(repository, RECORD_NAME, revision=revision, local_dir=folder)
        except (RemoteEntryNotFoundError, RevisionNotFoundError):
            return None
        return json.loads(Path(file).read_text())


def check_token(repository: str) -> None:
    """Raises a CheckpointError if there is no token or the Hub refuses it; warns if the Hub cannot be reached now."""
    if not get_token():
        raise CheckpointError(f"export.push_to_hub = {repository!r} needs a token that may write there: set HF_TOKEN")
    try:
        _api(_SILENCE_AT_START).whoami()
    except HfHubHTTPError as e:
        if e.response is not None and e.response.status_code in (401, 403):
            raise CheckpointError(f"export.push_to_hub = {repository!r}: the Hub refuses the token in HF_TOKEN") from e
        logger.warning(f"export.push_to_hub: the token was not checked ({_one_line(e)}); training begins all the same")
    except Exception as e:
        logger.warning(f"export.push_to_hub: the Hub cannot be reached ({_one_line(e)}); training begins all the same")


def _one_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
