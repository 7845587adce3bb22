"""Files behind a URL, through fsspec: `gs://`, `s3://`, `memory://`, whatever has a driver."""

from __future__ import annotations

import functools
import posixpath
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import fsspec

# Seconds before each new try, 15 in all: drivers and network mounts have already tried for longer.
_WAITS = (1.0, 2.0, 4.0, 8.0)
# What another try will not change. Everything else may be the network: each driver raises its own.
_LASTING = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError)
_LASTING += (ImportError, NotImplementedError, ValueError, TypeError)
_EXTRAS = {"gs": "gcs", "gcs": "gcs", "s3": "s3", "s3a": "s3", "http": "http", "https": "http"}
# Seconds that a web server may be silent, to begin with and while it sends.
_SILENCE = 60.0

Result = TypeVar("Result")


def is_url(path: Any) -> bool:
    """Whether `path` is a URL and not a path of this machine."""
    return "://" in str(path)


def is_http(path: Any) -> bool:
    """Whether `path` is the address of a web server."""
    return str(path).startswith(("http://", "https://"))


def driver_options(url: str) -> dict[str, Any]:
    """What the driver of a URL is to be given, wherever it is opened."""
    if not is_http(url):
        return {}
    try:
        import aiohttp
    except ImportError:
        return {}  # the driver, which cannot do without it, says so
    # Its own limit is five minutes for the whole of a file, however large.
    limits = aiohttp.ClientTimeout(total=None, sock_connect=_SILENCE, sock_read=_SILENCE)
    return {"client_kwargs": {"timeout": limits}}


def filesystem(url: str) -> tuple[fsspec.AbstractFileSystem, str]:
    """The driver of a URL and the path it knows the place by.

    Raises ValueError where there is no such driver, it is not installed, or has no credentials.
    """
    try:
        fs, path = fsspec.core.url_to_fs(url, **driver_options(url))
    except ImportError as error:
        extra = _EXTRAS.get(url.split("://")[0])
        remedy = f"; pip install -e '.[{extra}]'" if extra else ""
        raise ValueError(f"{url}: {error}{remedy}") from error
    except Exception as error:  # the driver's own, as it starts
        raise ValueError(f"{url}: cannot be opened ({described(error)})") from error
    return fs, path.rstrip("/")


def why_not_there(error: FileNotFoundError) -> str:
    """What is wrong and what to do, in one line.

    fsspec's driver of http raises FileNotFoundError for whatever a server did; its cause tells.
    """
    cause = error.__cause__
    answer = getattr(cause, "response", cause)
    status = getattr(answer, "status", None) or getattr(answer, "status_code", None)
    if isinstance(cause, FileNotFoundError | KeyError | None) or status in (404, 410):
        return "nothing there; check the path"
    if status in (401, 403, 407):
        return f"the server refuses with {status}; log in, give a signed URL, or download the file"
    if type(cause).__name__ == "TooManyRedirects":
        return "the server sends from one address to the next without end; check the URL"
    if status:
        return f"the server fails with {status}; try again later"
    return f"the server cannot be reached, {described(cause)}; check the address, try again later"


def may_pass(error: Exception) -> bool:
    """Whether the same call may succeed later."""
    return not isinstance(error, _LASTING)


def retry(action: Callable[[], Result], warn: Callable[[Exception], None] | None = None) -> Result:
    """`action()`, tried again after a while, and longer each time, while its error may pass.

    `warn` gets the first such error, before the first wait. The last error is raised as it came.
    """
    for wait in _WAITS:
        try:
            return action()
        except Exception as error:
            if not may_pass(error):
                raise
            if warn is not None:
                warn(error)
            warn = None
        time.sleep(wait * random.uniform(0.5, 1.0))  # those who failed at once must not return so
    return action()


def retried(what: str, action: Callable[[], Result]) -> Result:
    """`action()` of a driver, with `retry`.

    FileNotFoundError comes as it is, any other error as an OSError that begins with `what`.
    """
    try:
        return retry(action)
    except FileNotFoundError:
        raise
    except Exception as error:
        tries = f" {len(_WAITS) + 1} times" if may_pass(error) else ""
        raise OSError(f"{what} failed{tries}, {described(error)}") from error


def described(error: Exception) -> str:
    """One line about an error of a driver, whose text may be empty or a page."""
    name, line = type(error).__name__, str(error).strip().partition("\n")[0].rstrip()
    if len(line) > 300:
        line = f"{line[:100]} ... {line[-200:]}"  # the cause is often the last that is said
    return f"{name}: {line}" if line else name


class RemotePath:
    """A folder or file behind a URL: as much of `pathlib.Path` as reading data needs."""

    def __init__(self, url: str, cache: Any = None, parent: RemotePath | None = None):
        """`cache`: the `ShardCache` that the shards below this path are fetched into."""
        self.url, self.cache, self._parent = url.rstrip("/"), cache, parent
        self.fs, self.path = filesystem(self.url)
        self.name = posixpath.basename(self.path)

    def __truediv__(self, name: str) -> RemotePath:
        return RemotePath(f"{self.url}/{name}", self.cache, self)

    def __str__(self) -> str:
        return self.url

    @property
    def parent(self) -> RemotePath:
        """The folder. What was made from one folder shares it, and so its listing."""
        return self._parent or RemotePath(self.url.rsplit("/", 1)[0], self.cache)

    @functools.cached_property
    def sizes(self) -> dict[str, int | None]:
        """{name: bytes} of what lies in this folder, listed once; None where a store has no size.

        OSError where the folder cannot be listed.
        """
        self.fs.invalidate_cache(self.path)
        entries = retried("listing", lambda: self.fs.ls(self.path, detail=True))
        return {posixpath.basename(entry["name"]): entry.get("size") for entry in entries}

    def read_bytes(self) -> bytes:
        """The whole file; FileNotFoundError or another OSError where it cannot be read."""
        return retried("reading", lambda: self.fs.cat_file(self.path))

    def read_range(self, start: int, stop: int) -> bytes:
        """Bytes [start, stop), fewer at the end of the file; errors as `read_bytes`."""
        action = functools.partial(self.fs.cat_file, self.path, start=start, end=stop)
        return retried(f"reading bytes {start} to {stop}", action)

    def fetch(self, target: Path) -> None:
        """Copies the file over `target`, a file of this machine; errors as `read_bytes`."""
        retried(f"fetching to {target}", lambda: self.fs.get_file(self.path, str(target)))


def as_path(path: Any, cache: Any = None) -> Path | RemotePath:
    """A `RemotePath` for a URL, a `Path` for anything else."""
    if isinstance(path, RemotePath):
        return path
    return RemotePath(str(path), cache) if is_url(path) else Path(path)
