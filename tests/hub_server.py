"""A Hugging Face Hub on this machine that models can be pushed to: repositories with commits, branches, tags and large files."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote

TOKEN = "hf_token_of_tests"


@dataclass
class Commit:
    """A state of a repository."""

    message: str
    files: dict[str, bytes]


@dataclass
class Repository:
    """Of a model; a branch or tag has a name and the number of a commit."""

    private: bool
    commits: list[Commit] = field(default_factory=lambda: [Commit("initial commit", {".gitattributes": b""})])
    branches: dict[str, int] = field(default_factory=lambda: {"main": 0})
    tags: dict[str, int] = field(default_factory=dict)

    def number(self, revision: str) -> int | None:
        """The number of the commit at a revision, which may be a commit's id."""
        ids = {oid(number): number for number in range(len(self.commits))}
        return self.branches.get(revision, self.tags.get(revision, ids.get(revision)))

    def at(self, revision: str) -> dict[str, bytes]:
        number = self.number(revision)
        assert number is not None
        return self.commits[number].files


def oid(number: int) -> str:
    return f"{number:040x}"


@dataclass
class Hub:
    """What the server has, and what it was asked for."""

    endpoint: str = ""
    repositories: dict[str, Repository] = field(default_factory=dict)
    large: dict[str, bytes] = field(default_factory=dict)
    """Large files by their SHA-256, of whatever repository, committed or not."""
    asked: list[tuple[str, str]] = field(default_factory=list)
    """Method and path of each request."""
    sent: list[str] = field(default_factory=list)
    """SHA-256 of each large file that was received."""
    refuse: Callable[[str, str], int | None] = lambda method, path: None
    """Returns the status with which a request is answered in place of the server's answer, or None."""

    def answer(self, method: str, path: str, body: bytes) -> tuple[int, Any]:
        """Returns status and content of the answer to a request."""
        if path == "/api/whoami-v2":
            return 200, {"name": "somebody"}
        if path == "/api/validate-yaml":
            return 200, {"errors": [], "warnings": []}
        if path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked.get('organization') or 'somebody'}/{asked['name']}"
            if name in self.repositories:
                return 409, {"error": "there already", "url": f"{self.endpoint}/{name}"}
            self.repositories[name] = Repository(
                asked.get("visibility", "private" if asked.get("private") else "public") == "private"
            )
            return 200, {"url": f"{self.endpoint}/{name}"}
        if path.startswith("/large/"):
            digest = hashlib.sha256(body).hexdigest()
            assert path == f"/large/{digest}"
            self.large[digest] = body
            self.sent.append(digest)
            return 200, {}
        path = path.removeprefix("/api/models").removeprefix("/").replace(".git/info/lfs/", "/", 1)
        organisation, model, action, rest = [*path.split("/", 3), "", ""][:4]
        name = f"{organisation}/{model}"
        if name not in self.repositories:
            return 404, "RepoNotFound"
        repository = self.repositories[name]
        if not action:
            return 200, {"id": name, "private": repository.private}
        return getattr(self, f"_{action}")(repository, method, rest, body)

    def _preupload(self, repository: Repository, method: str, revision: str, body: bytes) -> tuple[int, Any]:
        files = json.loads(body)["files"]
        modes = {f["path"]: "lfs" if f["path"].endswith(".safetensors") else "regular" for f in files}
        return 200, {"files": [{"path": p, "uploadMode": m, "shouldIgnore": False} for p, m in modes.items()]}

    def _objects(self, repository: Repository, method: str, rest: str, body: bytes) -> tuple[int, Any]:
        objects = json.loads(body)["objects"]
        for item in objects:
            if item["oid"] not in self.large:
                item["actions"] = {"upload": {"href": f"{self.endpoint}/large/{item['oid']}"}}
        return 200, {"transfer": "basic", "objects": objects}

    def _commit(self, repository: Repository, method: str, revision: str, body: bytes) -> tuple[int, Any]:
        lines = [json.loads(line) for line in body.splitlines()]
        files = dict(repository.at(revision))
        message = ""
        for line in lines:
            value = line["value"]
            if line["key"] == "header":
                message = value["summary"]
            elif line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.large[value["oid"]]
            elif line["key"] == "deletedFile" and files.pop(value["path"], None) is None:
                return 400, {"error": f"{value['path']} is not there"}
        repository.commits.append(Commit(message, files))
        repository.branches[revision] = number = len(repository.commits) - 1
        return 200, {"commitUrl": f"{self.endpoint}/org/name/commit/{oid(number)}", "commitOid": oid(number)}

    def _tag(self, repository: Repository, method: str, name: str, body: bytes) -> tuple[int, Any]:
        if method == "DELETE":
            return (200, {}) if repository.tags.pop(name, None) is not None else (404, {})
        number = repository.number(name)
        assert number is not None
        repository.tags[json.loads(body)["tag"]] = number
        return 200, {}

    def _refs(self, repository: Repository, method: str, rest: str, body: bytes) -> tuple[int, Any]:
        of = {"branches": ("heads", repository.branches), "tags": ("tags", repository.tags)}
        return 200, {
            kind: [{"name": name, "ref": f"refs/{refs}/{name}", "targetCommit": oid(n)} for name, n in found.items()]
            for kind, (refs, found) in of.items()
        } | {"converts": []}

    def _tree(self, repository: Repository, method: str, revision: str, body: bytes) -> tuple[int, Any]:
        files = repository.at(revision)
        return 200, [{"type": "file", "path": p, "size": len(c), "oid": oid(0)} for p, c in files.items()]

    def _branch(self, repository: Repository, method: str, name: str, body: bytes) -> tuple[int, Any]:
        if method == "DELETE":
            return (200, {}) if repository.branches.pop(name, None) is not None else (404, {})
        if name in repository.branches:
            return 409, {}
        repository.branches[name] = repository.branches["main"]
        return 200, {}

    def _resolve(self, repository: Repository, method: str, rest: str, body: bytes) -> tuple[int, Any]:
        revision, _, name = rest.partition("/")
        if (number := repository.number(revision)) is None:
            return 404, "RevisionNotFound"
        content = repository.commits[number].files.get(name)
        return (404, "EntryNotFound") if content is None else (200, content)


@contextmanager
def served() -> Iterator[Hub]:
    """A Hub without repositories, which knows one token."""
    hub = Hub()

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *args: object) -> None:
            pass

        def handle_any(self) -> None:
            path = unquote(self.path.split("?")[0])
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            if "chunked" in self.headers.get("Transfer-Encoding", ""):
                while size := int(self.rfile.readline(), 16):
                    body += self.rfile.read(size)
                    self.rfile.readline()
                self.rfile.readline()
            hub.asked.append((self.command, path))
            status = hub.refuse(self.command, path)
            content: Any = {"error": "refused"}
            if (
                status is None
                and not path.startswith("/large/")
                and self.headers.get("Authorization") != f"Bearer {TOKEN}"
            ):
                status, content = 401, {"error": "Invalid credentials"}
            elif status is None:
                status, content = hub.answer(self.command, path, body)
            self.send_response(status)
            if status == 404 and isinstance(content, str):
                self.send_header("X-Error-Code", content)
            data = content if isinstance(content, bytes) else json.dumps(content).encode()
            self.send_header("Content-Length", str(len(data)))
            self.send_header("Content-Type", "application/json")
            self.send_header("ETag", f'"{hashlib.sha1(data).hexdigest()}"')
            self.send_header("X-Repo-Commit", hashlib.sha1(path.encode()).hexdigest())
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(data)

        do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = handle_any

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.endpoint = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    try:
        yield hub
    finally:
        server.shutdown()
