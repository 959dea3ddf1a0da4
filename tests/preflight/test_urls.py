"""Refusals of URLs where a file system is needed, and of those that nothing can read."""

from __future__ import annotations

import pytest

from flame_ext.object_stores import problem_of
from tests.preflight.refusals import refusal


@pytest.mark.parametrize(
    ("option", "message"),
    [
        (
            "--job.dump_folder=s3://bucket/run",
            "job.dump_folder is a URL (s3://…): steps and exports are renamed when they are complete",
        ),
        (
            "--checkpoint.folder=gs://bucket/steps",
            "checkpoint.folder is a URL (gs://…): steps are renamed when they are complete",
        ),
        ("--model.hf_assets_path=s3://bucket/model", "copy config.json and the tokenizer's files to a folder"),
        (
            "--checkpoint.initial_load_path=nonsense://a/b",
            "initial_load_path nonsense://a/b: nonsense:// is no protocol",
        ),
        ("--checkpoint.initial_load_path=s3://user:secret@a/b", "initial_load_path s3://…: has credentials in it"),
        ("--checkpoint.initial_load_path=s3://user:a/secret@a/b", "initial_load_path s3://…: has credentials in it"),
    ],
)
def test_urls_are_refused_by_option_in_one_line(option: str, message: str) -> None:
    found = refusal(option)
    assert message in found and "\n" not in found and "secret" not in found


@pytest.mark.parametrize("url", ["memory://host:8020/a@b", "memory://bucket/a:b@c", "memory://name@host/a"])
def test_what_is_no_password_is_taken(url: str) -> None:
    assert problem_of(url) is None
