"""``hf://``: what is downloaded, by whom, and what is said when it cannot be had. The Hub is a server on this machine."""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from safetensors.torch import save_file

from flame_ext.errors import SeedError
from flame_ext.seeding.sources.hub import locate
from flame_ext.seeding.sources.open import open_source
from tests.ranks import REPOSITORY, run_ranks
from tests.seeding.test_vocabulary import grown_folder
from tests.sources import HUB_REPOSITORY, HUB_REVISION, save_hub_cache
from tests.tiny_models import save_tiny


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[tuple[str, Path, Counter[str]]]:
    """Address of a Hub with one model, the folder of its files, and how often each was downloaded."""
    folder = save_tiny("olmo2", tmp_path / "model", max_shard_size="50KB")
    save_file({}, folder / "stray.safetensors")
    (folder / "README.md").write_text("not needed")
    downloads: Counter[str] = Counter()

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *args: object) -> None:
            pass

        def do_HEAD(self) -> None:
            self.do_GET()

        def do_GET(self) -> None:
            path = self.path.split("?")[0]
            files = sorted(p.name for p in folder.iterdir())
            if path == f"/api/models/{HUB_REPOSITORY}/revision/main":
                self.answer(json.dumps({"id": HUB_REPOSITORY, "sha": HUB_REVISION, "siblings": []}).encode())
            elif path == f"/api/models/{HUB_REPOSITORY}/tree/{HUB_REVISION}":
                tree = [{"type": "file", "path": f, "size": (folder / f).stat().st_size, "oid": oid(f)} for f in files]
                self.answer(json.dumps(tree).encode())
            elif (match := re.fullmatch(f"/{HUB_REPOSITORY}/resolve/{HUB_REVISION}/(.+)", path)) and match[1] in files:
                if self.command == "GET":
                    downloads[match[1]] += 1
                self.answer((folder / match[1]).read_bytes(), oid(match[1]))
            else:
                self.send_response(404)
                self.send_header("X-Error-Code", "RevisionNotFound" if "revision" in path else "EntryNotFound")
                self.send_header("Content-Length", "0")
                self.end_headers()

        def answer(self, body: bytes, etag: str = "") -> None:
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.send_header("Content-Type", "application/json")
            self.send_header("X-Repo-Commit", HUB_REVISION)
            self.send_header("ETag", f'"{etag}"')
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", folder, downloads
    server.shutdown()


def oid(name: str) -> str:
    return hashlib.sha1(name.encode()).hexdigest()


LOCATE = """
import os, sys, flame_ext, torch.distributed as dist
from flame_ext.errors import SeedError
from flame_ext.seeding.sources.hub import locate
dist.init_process_group("gloo")
try:
    folder, revision = locate(sys.argv[1], with_tokenizer="TOKENIZER" in os.environ)
    print("located", folder, revision)
except SeedError as e:
    print("refused", e)
dist.destroy_process_group()
"""


def of_hub(endpoint: str, home: Path) -> dict[str, str]:
    """The environment of a process that finds the Hub at ``endpoint``."""
    env = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING")) and "proxy" not in k.lower()}
    return env | {
        "HF_ENDPOINT": endpoint,
        "HF_HOME": str(home),
        "HF_HUB_DISABLE_XET": "1",
        "PYTHONPATH": str(REPOSITORY),
    }


def locate_in_ranks(path: str, endpoint: str, home: Path, world_size: int) -> list[str]:
    """What :func:`locate` gives in fresh processes: huggingface_hub reads its variables once, on import."""
    env = of_hub(endpoint, home) | {"WORLD_SIZE": str(world_size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29631"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", LOCATE, path],
            env={**env, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(world_size)
    ]
    return [process.communicate(timeout=120)[0] for process in processes]


def test_one_process_downloads_what_is_needed(
    tmp_path: Path, hub: tuple[str, Path, Counter[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    endpoint, folder, downloads = hub
    outputs = locate_in_ranks(f"hf://{HUB_REPOSITORY}", endpoint, tmp_path / "home", 2)
    snapshot = tmp_path / "home" / "hub" / f"models--{HUB_REPOSITORY.replace('/', '--')}" / "snapshots" / HUB_REVISION
    assert all(f"located {snapshot} {HUB_REVISION}" in output for output in outputs), outputs
    shards = {p.name for p in folder.glob("model-*.safetensors")}
    assert len(shards) > 2
    needed = {*shards, "model.safetensors.index.json", "config.json", "generation_config.json"}
    assert downloads == Counter(needed), "each once, and nothing else"
    assert set(open_source(snapshot).entries) == set(open_source(folder).entries)
    monkeypatch.setenv("TOKENIZER", "1")
    locate_in_ranks(f"hf://{HUB_REPOSITORY}", endpoint, tmp_path / "home", 1)
    assert downloads == Counter({*needed, "tokenizer.json", "tokenizer_config.json"})
    (refused,) = locate_in_ranks(f"hf://{HUB_REPOSITORY}@no-such-branch", endpoint, tmp_path / "home", 1)
    assert f"refused hf://{HUB_REPOSITORY}@no-such-branch: cannot be had from the Hugging Face Hub" in refused


@pytest.mark.matrix
def test_inspect_has_the_tokenizer_that_pieces_of_new_tokens_need(
    tmp_path: Path, hub: tuple[str, Path, Counter[str]]
) -> None:
    endpoint, folder, _ = hub
    grown = grown_folder(folder, tmp_path / "grown")
    job, source = tmp_path / "job.toml", f"hf://{HUB_REPOSITORY}"
    job.write_text(
        f'[model]\nname = "hf_causal_lm"\nflavor = "auto"\nhf_assets_path = "{grown}"\n'
        f'[checkpoint]\nenable = true\ninitial_load_path = "{source}"\n[training]\nseq_len = 64\n'
        '[seed]\nresize_vocabulary = true\nnew_rows = "subwords"\n'
    )
    command = [sys.executable, "-m", "flame_ext.tools.main", "inspect", source, f"--job.config_file={job}", "--json"]
    done = subprocess.run(command, env=of_hub(endpoint, tmp_path / "home"), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr + done.stdout
    facts = json.loads(done.stdout)
    assert "tokenizer.json" in facts["tokenizer"]
    assert "2 of new tokens by seed.new_rows = 'subwords' (1 of them special" in facts["grown_vocabulary"]


def located(path: str) -> str:
    """In a rank: the folder and revision, or the error."""
    import torch.distributed as dist

    dist.init_process_group("gloo")
    try:
        return str(locate(path))
    except SeedError as e:
        return str(e)
    finally:
        dist.destroy_process_group()


def test_offline_the_cache_is_all_there_is(tmp_path: Path) -> None:
    path = save_hub_cache(save_tiny("olmo2", tmp_path / "model"))
    for wanted in (path, f"{path}@{HUB_REVISION}", f"{path}@main"):
        for rank in run_ranks(located, 2, wanted, folder=tmp_path / "ranks"):
            assert HUB_REVISION in rank.value and rank.value.endswith(f"'{HUB_REVISION}')"), rank.value
    for rank in run_ranks(located, 2, "hf://tiny-org/absent", folder=tmp_path / "ranks"):
        assert "hf://tiny-org/absent: cannot be had from the Hugging Face Hub or its cache" in rank.value
        assert "HF_HUB_OFFLINE" in rank.value


@pytest.mark.parametrize("path", ["hf://name-alone", "hf://a/b/c", "hf://a/b@", "hf://a/b@x y", "hf://"])
def test_other_spellings_are_refused(path: str) -> None:
    with pytest.raises(SeedError, match="expected hf://org/name or hf://org/name@revision"):
        locate(path)


def test_links_of_the_cache_are_fine_and_others_are_not(tmp_path: Path) -> None:
    save_hub_cache(save_tiny("olmo2", tmp_path / "model"))
    folder, _ = locate(f"hf://{HUB_REPOSITORY}")
    assert (folder / "model.safetensors").is_symlink() and open_source(folder).entries
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").symlink_to(tmp_path / "model" / "model.safetensors")
    with pytest.raises(SeedError, match="is a link to .*, outside the source"):
        open_source(folder)
    alias = tmp_path / "alias"
    alias.symlink_to(tmp_path / "model")
    assert open_source(alias).entries, "the folder itself may be a link"
