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

# Seconds before each new try, 15 in all: the drivers of the large stores try for longer themselves.
_WAITS = (1.0, 2.0, 4.0, 8.0)
# What another try will not change. Everything else may be the network: each driver raises its own.
_LASTING = (
    FileNotFoundError,
    PermissionError,
    IsADirectoryError,
    NotADirectoryError,
    ImportError,
    NotImplementedError,
    ValueError,
    TypeError,
)
_EXTRAS = {"gs": "gcs", "gcs": "gcs", "s3": "s3", "s3a": "s3"}

Result = TypeVar("Result")


def is_url(path: Any) -> bool:
    """Whether `path` is a URL and not a path of this machine."""
    return "://" in str(path)


def filesystem(url: str) -> tuple[fsspec.AbstractFileSystem, str]:
    """The driver of a URL and the path it knows the place by.

    Raises:
      ValueError: no driver of that name, it is not installed, or it found no credentials.
    """
    try:
        fs, path = fsspec.core.url_to_fs(url)
    except ImportError as error:
        extra = _EXTRAS.get(url.split("://")[0])
        remedy = f"; pip install 'stablelm_jax[{extra}]'" if extra else ""
        raise ValueError(f"{url}: {error}{remedy}") from error
    except Exception as error:  # the driver's own, as it starts
        raise ValueError(f"{url}: cannot be opened ({described(error)})") from error
    return fs, path.rstrip("/")


def retried(what: str, action: Callable[[], Result]) -> Result:
    """`action()`, tried again after a while, and longer each time, where the error may pass.

    Raises:
      FileNotFoundError: as raised.
      OSError: any other error that lasted; the message starts with `what`.
    """
    for wait in (*_WAITS, None):
        try:
            return action()
        except FileNotFoundError:
            raise
        except Exception as error:
            if wait is None or isinstance(error, _LASTING):
                tries = f" {len(_WAITS) + 1} times" if wait is None else ""
                raise OSError(f"{what} failed{tries}, {described(error)}") from error
        time.sleep(wait * random.uniform(0.5, 1.0))  # a pod's hosts must not come back as one
    raise AssertionError("unreachable")


def described(error: Exception) -> str:
    """One line about an error of a driver, whose text may be empty or a page."""
    lines = str(error).strip().splitlines()
    if not lines:
        return type(error).__name__
    text = lines[0] if len(lines[0]) <= 300 else f"{lines[0][:100]} ... {lines[0][-200:]}"
    return f"{type(error).__name__}: {text}"  # the cause is often the last that is said


class RemotePath:
    """A folder or file behind a URL: as much of `pathlib.Path` as reading data needs."""

    def __init__(self, url: str, cache: Any = None, parent: RemotePath | None = None):
        """`cache`: the `ShardCache` that the shards below this path are fetched into."""
        self.url = url.rstrip("/")
        self.cache = cache
        self.fs, self.path = filesystem(self.url)
        self._parent = parent

    def __truediv__(self, name: str) -> RemotePath:
        return RemotePath(f"{self.url}/{name}", self.cache, self)

    def __str__(self) -> str:
        return self.url

    def __repr__(self) -> str:
        return f"RemotePath({self.url!r})"

    @property
    def name(self) -> str:
        return posixpath.basename(self.path)

    @property
    def parent(self) -> RemotePath:
        """The folder; the same object for all that was made from it, and so its listing."""
        return self._parent or RemotePath(self.url.rsplit("/", 1)[0], self.cache)

    @functools.cached_property
    def sizes(self) -> dict[str, int | None]:
        """{name: bytes} of what lies in this folder, listed once; None where a store has no size.

        Raises:
          OSError: the folder cannot be listed.
        """

        def listed():
            self.fs.invalidate_cache(self.path)
            return self.fs.ls(self.path, detail=True)

        entries = retried("listing", listed)
        return {posixpath.basename(entry["name"]): entry.get("size") for entry in entries}

    def read_text(self, encoding: str = "utf-8") -> str:
        """The whole file.

        Raises:
          FileNotFoundError: there is none.
          OSError: it cannot be read.
        """
        return retried("reading", lambda: self.fs.cat_file(self.path)).decode(encoding)

    def read_range(self, start: int, stop: int) -> bytes:
        """Bytes [start, stop), fewer at the end of the file; errors as `read_text`."""
        action = functools.partial(self.fs.cat_file, self.path, start=start, end=stop)
        return retried(f"reading bytes {start} to {stop}", action)

    def fetch(self, target: Path) -> None:
        """Copies the file to this machine, over `target`; errors as `read_text`."""
        action = functools.partial(self.fs.get_file, self.path, str(target))
        retried(f"fetching to {target}", action)


def as_path(path: Any, cache: Any = None) -> Path | RemotePath:
    """A `RemotePath` for a URL, a `Path` for anything else."""
    if isinstance(path, RemotePath):
        return path
    return RemotePath(str(path), cache) if is_url(path) else Path(path)
