"""Docs that are true: generated where they can be, commands that run, links that lead somewhere, options that exist."""

from __future__ import annotations

import dataclasses
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from flame_ext.config.reference import reference
from flame_ext.config.sections import FlameJobConfig
from tests.ranks import REPOSITORY

DOCS = sorted([*REPOSITORY.glob("*.md"), *REPOSITORY.glob("docs/*.md")])
# A comment before a fence says what the reader's machine would need: then it is not run.
FENCE = re.compile(r"(?P<mark><!-- needs: [^\n]* -->\n)?^```(?P<language>bash|python)\n(?P<code>.*?)^```", re.M | re.S)


def test_the_configuration_reference_is_that_of_the_code() -> None:
    found = (REPOSITORY / "docs" / "configuration.md").read_text()
    assert found == reference(), "run: python -m flame_ext.config.reference > docs/configuration.md"


def fences(language: str) -> Iterator[tuple[str, str]]:
    for doc in DOCS:
        for match in FENCE.finditer(doc.read_text()):
            if match["language"] == language and not match["mark"]:
                yield doc.name, match["code"]


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy, in which commands may write; with a run, which some of them look at."""
    folder = tmp_path_factory.mktemp("docs") / "checkout"
    ignored = shutil.ignore_patterns(".git", "outputs", "__pycache__", ".*_cache")
    shutil.copytree(REPOSITORY, folder, ignore=ignored)
    (folder / "outputs" / "debug").mkdir(parents=True)
    (folder / "outputs" / "debug" / "metrics.jsonl").write_text(
        '{"step": 1, "loss_ce": 1.5}\n{"step": 2, "loss_ce": 1.4}\n'
    )
    return folder


@pytest.mark.parametrize(("doc", "code"), [pytest.param(*f, id=f"{f[0]}-{n}") for n, f in enumerate(fences("bash"))])
def test_commands_run(checkout: Path, doc: str, code: str) -> None:
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": str(checkout),
    }
    run = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", code],
        cwd=checkout,
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert run.returncode == 0, f"{doc}:\n{code}\n{run.stdout[-2000:]}{run.stderr[-2000:]}"


@pytest.mark.parametrize("doc", DOCS, ids=lambda p: p.name)
def test_links_lead_to_files(doc: Path) -> None:
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", doc.read_text()):
        if "://" not in target:
            assert (doc.parent / target).exists(), f"{doc.name} links to {target}"


@pytest.mark.parametrize("doc", DOCS, ids=lambda p: p.name)
def test_files_that_are_named_exist(doc: Path) -> None:
    for name in re.findall(r"`((?:flame_ext|configs|docs|tests)/[\w./-]+)`", doc.read_text()):
        assert (REPOSITORY / name).exists(), f"{doc.name} names {name}"


def test_options_that_are_named_exist() -> None:
    config = FlameJobConfig()
    sections = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    names = {f"{section}.{field.name}" for section, value in sections.items() for field in dataclasses.fields(value)}
    found = 0
    for doc in DOCS:
        for section, key in re.findall(
            r"`(?:--)?([a-z_]+)\.(?:no-)?([a-z_]+)(?: = [^`]*|=[^`]*| [^`]*)?`", doc.read_text()
        ):
            if section in sections and key not in ("py", "md", "toml", "jsonl", "safetensors", "bin"):
                found += 1
                assert f"{section}.{key}" in names, f"{doc.name}: {section}.{key}"
    assert found > 100
