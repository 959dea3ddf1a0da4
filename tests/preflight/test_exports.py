"""Refusals of the options of exports and of what follows them."""

from __future__ import annotations

from pathlib import Path

import pytest

from flame_ext.run.followers import followers_of
from flame_ext.train import parse
from tests.preflight.refusals import refusal
from tests.ranks import DEBUG_TOML


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--export.upload=bucket/prefix"], "export.upload 'bucket/prefix': expected a URL such as s3://bucket/prefix"),
        (["--export.upload=hf://org/name"], "for the Hub, set export.push_to_hub"),
        (["--export.upload=s4://bucket"], "s4:// is no protocol that fsspec knows"),
        (["--export.upload=s3://b", "--checkpoint.no-last_save_in_hf"], "export.upload has no export to follow: set export.interval"),
        (["--export.push_to_hub=name"], "export.push_to_hub 'name': expected org/name (the organisation or user is missing)"),
        (["--export.push_to_hub=https://huggingface.co/org/name"], "expected org/name (Repo id must be in the form"),
        (["--export.push=last"], "export.push has no effect without export.push_to_hub"),
        (["--export.no-hub_private"], "export.hub_private has no effect without export.push_to_hub"),
        (
            ["--export.push_to_hub=org/name", "--export.push=last", "--checkpoint.no-last_save_in_hf", "--export.interval=20"],
            "export.push = 'last' needs an export of the last step",
        ),
    ],
)  # fmt: skip
def test_what_follows_exports(options: list[str], message: str) -> None:
    assert message in refusal(*options)


def test_a_missing_package_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(protocol: str) -> None:
        raise ImportError("Install gcsfs to access Google Storage")

    monkeypatch.setattr("fsspec.get_filesystem_class", absent)
    assert "pip install 'flame_ext[gcs]'" in refusal("--export.upload=gs://bucket/prefix")


def test_credentials_in_a_url_are_refused_and_not_repeated() -> None:
    message = refusal("--export.upload=s3://key:password@bucket/prefix")
    assert "export.upload: s3://…: has credentials in it" in message and "password" not in message


@pytest.mark.parametrize(
    ("push", "last", "due"), [("every", False, True), ("last", False, False), ("last", True, True)]
)
def test_the_commands_are_those_of_the_options(push: str, last: bool, due: bool) -> None:
    options = ["--export.upload=s3://bucket/x", "--export.push_to_hub=org/name", f"--export.push={push}"]
    upload, pushing = followers_of(parse([f"--job.config_file={DEBUG_TOML}", *options]))
    folder = Path("hf/step-4")
    assert upload.command(4, folder) == ["upload", str(folder), "s3://bucket/x"] and upload.due(4, last)
    assert pushing.command(4, folder) == ["upload", str(folder), "hf://org/name"] and pushing.due(4, last) is due
