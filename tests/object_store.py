"""An S3 server on this machine (moto's), which records what it is asked for and can be made to fail: the fixture ``object_store``."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from threading import Thread
from typing import Any

import boto3
from moto.moto_server.werkzeug_app import DomainDispatcherApplication, MotoRequestHandler, create_backend_app
from werkzeug.serving import make_server
from werkzeug.wrappers import Request, Response

ACCESS_KEY, SECRET_KEY = "key-of-tests", "secret-of-tests"
_DENIED = "<Error><Code>InvalidAccessKeyId</Code><Message>The key does not exist in our records.</Message></Error>"
_SLOW = "<Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>"


@dataclass(frozen=True)
class Asked:
    """One request that the server has had."""

    method: str
    path: str
    """``/bucket/key``."""
    query: str
    range: str | None
    """``bytes=0-7``, if a part of the object was asked for."""
    status: int
    sent: int
    """Bytes of the answer's body."""
    received: int
    """Bytes of the request's body."""


@dataclass
class ObjectStore:
    """A bucket of its own for each test, on a server that the whole session has."""

    endpoint: str
    bucket: str = ""
    asked: list[Asked] = field(default_factory=list)
    refuse: Callable[[Request], int | None] = lambda request: None
    """Returns the status with which a request is answered in place of the server's answer, or None; called for each request."""
    after: Callable[[Request], None] = lambda request: None
    """Called when a request has been answered, and before the answer is sent."""

    @property
    def url(self) -> str:
        return f"s3://{self.bucket}"

    @property
    def environment(self) -> dict[str, str]:
        """What boto and s3fs need to find and use the server."""
        keys = {"AWS_ACCESS_KEY_ID": ACCESS_KEY, "AWS_SECRET_ACCESS_KEY": SECRET_KEY}
        return {"AWS_ENDPOINT_URL": self.endpoint, "AWS_DEFAULT_REGION": "us-east-1", **keys}

    @property
    def client(self) -> Any:
        keys = {"aws_access_key_id": ACCESS_KEY, "aws_secret_access_key": SECRET_KEY}
        return boto3.client("s3", endpoint_url=self.endpoint, region_name="us-east-1", **keys)

    def put(self, path: Path, name: str = "") -> str:
        """Upload a file or a folder, under its own name unless another is given; returns its URL."""
        name = name or path.name
        client = self.client
        for file in [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file()):
            key = name if file == path else f"{name}/{file.relative_to(path).as_posix()}"
            client.put_object(Bucket=self.bucket, Key=key, Body=file.read_bytes())
        return f"{self.url}/{name}"

    def get(self, name: str) -> bytes:
        return self.client.get_object(Bucket=self.bucket, Key=name)["Body"].read()

    @property
    def names(self) -> list[str]:
        """The keys of the bucket's objects, sorted."""
        pages = self.client.get_paginator("list_objects_v2").paginate(Bucket=self.bucket)
        return sorted(item["Key"] for page in pages for item in page.get("Contents", ()))

    def fail(self, times: int, method: str = "GET", name: str = "", status: int = 503) -> None:
        """Answer the next requests of a method, whose path ends in ``name``, with an error of the server."""
        left = count(times, -1)
        self.refuse = lambda r: status if r.method == method and r.path.endswith(name) and next(left) > 0 else None

    def read(self, ending: str = "") -> int:
        """Bytes of objects that were read, of those whose name has this ending."""
        return sum(a.sent for a in self.asked if a.method == "GET" and not a.query and a.path.endswith(ending))

    def __call__(self, environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        """The WSGI application: moto's, behind the check of the key and what the test asks for."""
        request = Request(environ)
        status = self.refuse(request)
        if status is not None:
            response = Response(_SLOW, status, content_type="application/xml")
        elif f"{ACCESS_KEY}/" not in request.headers.get("Authorization", ""):
            response = Response(_DENIED, 403, content_type="application/xml")
        else:
            response = Response.from_app(_moto, environ, buffered=True)
        body = 0 if request.method == "HEAD" else len(response.get_data())
        received = int(request.headers.get("Content-Length") or 0)
        query = request.query_string.decode()
        of = request.method, request.path, query, request.headers.get("Range"), response.status_code, body, received
        self.asked.append(Asked(*of))
        self.after(request)
        return response(environ, start_response)


class _Quiet(MotoRequestHandler):  # type: ignore[misc]
    def log(self, *_: Any, **__: Any) -> None:
        """The requests are in ``asked``."""


_moto: Any = DomainDispatcherApplication(create_backend_app)


@contextmanager
def served() -> Iterator[ObjectStore]:
    """An object store without a bucket."""
    store = ObjectStore("")
    server = make_server("127.0.0.1", 0, store, threaded=True, request_handler=_Quiet)
    store.endpoint = f"http://127.0.0.1:{server.server_port}"
    thread = Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield store
    finally:
        server.shutdown()
        thread.join()


_number = count(1)


def with_new_bucket(store: ObjectStore) -> ObjectStore:
    """The store with an empty bucket, no requests and no failures."""
    store.refuse, store.after = ObjectStore.refuse, ObjectStore.after
    store.bucket = f"bucket-{next(_number)}"
    store.client.create_bucket(Bucket=store.bucket)
    store.asked.clear()
    return store
