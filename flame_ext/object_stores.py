"""Object stores, and what else fsspec can reach by a URL: which paths are meant, how they are opened, and when it is tried again."""

import io
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import datetime
from pathlib import Path
from typing import Any, TypeVar

import fsspec
from fsspec.core import url_to_fs

from flame_ext.errors import UserError

T = TypeVar("T")

_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://(.*)", re.DOTALL)
_EXTRAS = {"s3": "s3", "s3a": "s3", "gs": "gcs", "gcs": "gcs"}  # protocol to the extra of pyproject.toml that brings it
_WAITS = (0.5, 1.0, 2.0)  # seconds before each further attempt; s3fs and gcsfs try again by themselves as well
_once = ContextVar("_once", default=False)
_FINAL = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError, ImportError, NotImplementedError)
# What stores call the mark that changes with an object's content, the strongest first.
_MARKS = (
    *("ETag", "etag", "generation", "md5Hash", "LastModified", "last_modified", "mtime", "created", "updated"),
    *("modify", "modificationTime", "last_write_time"),  # of FTP, WebHDFS and SMB
)
_CREDENTIALS = (
    "check credentials: AWS_PROFILE, or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, for s3:// (FSSPEC_S3_ANON=true for a public "
    "bucket), GOOGLE_APPLICATION_CREDENTIALS for gs://"
)


def is_url(path: str) -> bool:
    """Whether fsspec is to read a path; ``hf://`` names the Hub."""
    match = _URL.match(path)
    return match is not None and match[1] != "hf"


def problem_of(url: str) -> str | None:
    """Return in one line why a URL can be read on no account, as far as can be said without asking the store; else None."""
    match = _URL.match(url)
    assert match is not None
    protocol, rest = match.groups()
    # Not printed, since it may be a password.
    if re.match(r"[^/:]*:(?!\d*/)[^@]*@", rest) or (protocol.startswith("http") and "?" in rest):
        return f"{protocol}://…: has credentials in it, which logs and reports would repeat; take them out, and {_CREDENTIALS}"
    try:
        fsspec.get_filesystem_class(protocol)
    except ImportError as e:
        extra = _EXTRAS.get(protocol)
        remedy = f"pip install 'flame_ext[{extra}]'" if extra else "install the package that it names"
        return f"{url}: {protocol}:// needs a package that is not installed ({_first_line(e)}); {remedy}"
    except ValueError:
        return f"{url}: {protocol}:// is no protocol that fsspec knows; use s3://, gs:// or another of its own, or a local path"
    return None


def filesystem(url: str, error: type[UserError]) -> tuple[Any, str]:
    """Return fsspec's file system of a URL, which remembers no listing, and the path in it; raise ``error`` if there is none."""
    if problem := problem_of(url):
        raise error(problem)
    if _EXTRAS.get(url.partition(":")[0]) == "s3":
        # s3fs tries again by itself; with botocore's attempts for each of its own, a server that is down takes half an hour.
        os.environ.setdefault("AWS_MAX_ATTEMPTS", "1")
    return patiently(url, lambda: url_to_fs(url, use_listings_cache=False), error)


def patiently(url: str, ask: Callable[[], T], error: type[UserError], doing: str = "read") -> T:
    """Return what ``ask`` returns, tried up to four times in some seconds unless the answer is final; raise ``error`` in one line."""
    for wait in (*(() if _once.get() else _WAITS), None):
        try:
            return ask()
        except UserError:
            raise
        except Exception as e:  # each store has its own
            found = f"({type(e).__name__}: {_first_line(e)})"
            if isinstance(e, FileNotFoundError):
                raise error(f"{url}: nothing is there {found}; check bucket and path") from e
            if isinstance(e, PermissionError) or "Credential" in type(e).__name__:
                raise error(f"{url}: access is refused {found}; {_CREDENTIALS}") from e
            if wait is None or isinstance(e, _FINAL):
                remedy = "check the network and, if it is set, AWS_ENDPOINT_URL, and start again"
                raise error(f"{url}: cannot be {doing} {found}; {remedy}") from e
            time.sleep(wait)
    raise AssertionError


@contextmanager
def once() -> Iterator[None]:
    """While this is entered, this thread asks a store once: other ranks wait for what can be done without."""
    token = _once.set(True)
    try:
        yield
    finally:
        _once.reset(token)


def opened(file: str, error: type[UserError]) -> Any:
    """Open a file, or the object that a URL names, to be read as bytes; raise ``error`` for an object that cannot be had, now or as
    it is read.
    """
    if not is_url(file):
        return Path(file).open("rb")
    store, name = filesystem(file, error)
    return io.BufferedReader(_Object(file, patiently(file, lambda: store.open(name, "rb"), error), error), 2**20)


class _Object(io.RawIOBase):
    """The stream of an object, of which a part that does not come is asked for again."""

    def __init__(self, url: str, stream: Any, error: type[UserError]) -> None:
        self._url, self._stream, self._error = url, stream, error

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return bool(self._stream.seekable())

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._stream.seek(offset, whence)  # of some stores it returns nothing
        return self.tell()

    def tell(self) -> int:
        return int(self._stream.tell())

    def readinto(self, buffer: Any) -> int:
        position = self._stream.tell()

        def read() -> bytes:
            if self._stream.tell() != position:
                self._stream.seek(position)
            return self._stream.read(len(buffer))

        raw = patiently(self._url, read, self._error)
        buffer[: len(raw)] = raw
        return len(raw)

    def close(self) -> None:
        self._stream.close()
        super().close()


def mark_of(info: Mapping[str, Any]) -> str:
    """Return what changes with the content of an object, of what its store says of it; "" if it does not tell."""
    mark = next((info[name] for name in _MARKS if info.get(name)), "")
    return str(mark.timestamp() if isinstance(mark, datetime) else mark)  # of memory:// one or the other


def _first_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300]
