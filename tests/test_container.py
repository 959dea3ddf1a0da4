"""The Dockerfile as far as a machine without Docker can tell, and what names its user, its folder and its arguments."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.ranks import REPOSITORY

DOCKERFILE = REPOSITORY / "Dockerfile"


def instructions() -> list[tuple[str, str]]:
    """Each instruction and its argument, continued lines joined."""
    lines = [line for line in DOCKERFILE.read_text().splitlines() if not line.startswith("#")]
    text = re.sub(r"\\\n\s*", " ", "\n".join(lines))
    return [(name, argument) for name, _, argument in (line.partition(" ") for line in text.splitlines() if line)]


def arguments_of(name: str) -> list[str]:
    return [argument for instruction, argument in instructions() if instruction == name]


def test_it_is_sound() -> None:
    hadolint = Path(sys.executable).with_name("hadolint")
    checked = subprocess.run([hadolint, DOCKERFILE], capture_output=True, text=True)
    assert checked.returncode == 0, checked.stdout


@pytest.mark.parametrize(("device", "index"), [("cuda", "unset"), ("cpu", "https://download.pytorch.org/whl/cpu")])
def test_one_argument_chooses_the_build_of_torch(tmp_path: Path, device: str, index: str) -> None:
    run = installs_torch(tmp_path, device)
    assert run.stdout.split() == ["install", "--no-cache-dir", "--constraint", ".ci/constraints.txt", "torch", index]


def test_another_device_is_an_error(tmp_path: Path) -> None:
    run = installs_torch(tmp_path, "gpu")
    assert run.returncode == 1 and run.stderr == "DEVICE must be cuda or cpu, got 'gpu'\n" and run.stdout == ""


def installs_torch(folder: Path, device: str) -> subprocess.CompletedProcess[str]:
    """The instruction that installs torch, with a pip that says how it is called."""
    (command,) = [run for run in arguments_of("RUN") if run.endswith(" torch")]
    pip = folder / "pip"
    pip.write_text('#!/bin/sh\necho "$@" "${PIP_INDEX_URL-unset}"\n')
    pip.chmod(0o755)
    env = {"PATH": f"{folder}:{os.environ['PATH']}", "DEVICE": device}
    return subprocess.run(["sh", "-c", command], env=env, capture_output=True, text=True)


def test_nothing_runs_as_root_and_all_places_are_the_same() -> None:
    (user,), (folder,) = arguments_of("USER"), arguments_of("WORKDIR")
    defaults = dict(argument.split("=", 1) for argument in arguments_of("ARG"))
    assert user == "${USER_ID}" and defaults["USER_ID"] == "1000" and defaults["DEVICE"] == "cuda"
    names = [name for name, _ in instructions()]
    assert not {"COPY", "CMD", "ENV"} & set(names[: names.index("USER")]), "as root only packages are installed"
    job = yaml.safe_load((REPOSITORY / "configs" / "kubernetes" / "pytorchjob.yaml").read_text())
    for replica in job["spec"]["pytorchReplicaSpecs"].values():
        pod = replica["template"]["spec"]
        assert pod["securityContext"] == {"runAsNonRoot": True, "runAsUser": 1000, "fsGroup": 1000}
        assert pod["containers"][0]["workingDir"] == folder
    editor = json.loads((REPOSITORY / ".devcontainer" / "devcontainer.json").read_text())
    build = editor["build"]
    assert (REPOSITORY / ".devcontainer" / build["dockerfile"]).resolve() == DOCKERFILE
    assert set(build["args"]) <= set(defaults) and editor["workspaceFolder"] == folder
    assert f'useradd --create-home --uid "$USER_ID" {editor["remoteUser"]} ' in DOCKERFILE.read_text()
    assert f"target={folder}," in editor["workspaceMount"]


def test_what_it_copies_and_starts_is_there() -> None:
    assert json.loads(arguments_of("CMD")[0]) == ["./train.sh"]
    for copied in arguments_of("COPY"):
        *sources, _ = copied.split()[1:]
        assert all((REPOSITORY / source).exists() for source in sources)
    ignored = (REPOSITORY / ".dockerignore").read_text().split()
    assert {".git", "outputs", "assets", ".venv"} <= set(ignored), "neither weights nor results are sent to the builder"
    needed = ("flame_ext", "configs", "tests", ".ci", "train.sh", "pyproject.toml", "README.md", "docs")
    assert not set(needed) & set(ignored)
