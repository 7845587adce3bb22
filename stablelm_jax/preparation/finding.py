"""Which files there are under an input: a file, a folder, a pattern, or any fsspec URL of these."""

from __future__ import annotations

import glob
import os
import posixpath
import stat
from collections.abc import Iterator
from typing import NamedTuple
from urllib.parse import unquote, urlsplit

from stablelm_jax.storage.remote import described, filesystem, is_http, is_url, why_not_there


class InputError(ValueError):
    """An input that is not there or cannot be taken; the message says which and what to do."""


class InputFile(NamedTuple):
    """A file to read."""

    path: str  # what is opened, an absolute path or a URL
    name: str  # the file as the user wrote it, for messages
    size: int | None  # in bytes; None where a server does not tell
    version: str  # changes when the file does
    kind: str = ""  # 'jsonl', 'parquet' or 'text'
    compression: str | None = None  # 'gzip' or 'zstd'
    divisible: bool = True  # whether parts of it can be read

    @property
    def last_name(self) -> str:
        """What tells its kind: the last part of its path, of a URL without query and fragment."""
        path = unquote(urlsplit(self.path).path) if is_http(self.path) else self.path
        return posixpath.basename(path)


def files_of(written: str) -> Iterator[InputFile]:
    """All files that one `--input` stands for; what kind they are of is not known yet.

    Raises:
      InputError: there is nothing, or it cannot be listed.
    """
    found = list(_remote_files(written) if is_url(written) else _local_files(written))
    if not found:
        raise InputError(f"--input {written}: nothing there; check the path")
    yield from found


def _local_files(written: str) -> Iterator[InputFile]:
    paths = [written] if os.path.exists(written) else sorted(glob.glob(written, recursive=True))
    for path in paths:
        for name in _walk(path) if os.path.isdir(path) else [path]:
            status = os.stat(name)
            if stat.S_ISREG(status.st_mode):
                version = str(status.st_mtime_ns)
                yield InputFile(os.path.abspath(name), name, status.st_size, version)


def _walk(folder: str) -> Iterator[str]:
    def refuse(error: OSError):
        raise InputError(f"--input: {error.filename} cannot be listed: {error.strerror}") from error

    for parent, folders, names in os.walk(folder, onerror=refuse):
        folders[:] = sorted(filter(_is_wanted, folders))
        for name in sorted(filter(_is_wanted, names)):
            path = os.path.join(parent, name)
            if os.path.exists(path):  # a link may lead nowhere
                yield path


def _is_wanted(name: str) -> bool:
    return not name.startswith(".") and name != "__pycache__"


def _remote_files(url: str) -> Iterator[InputFile]:
    try:
        fs, path = filesystem(url)
        for found in _matches(fs, path):
            for name in _walk_remote(fs, found):
                full, info = fs.unstrip_protocol(name), fs.info(name)
                version = info.get("ETag") or info.get("Last-Modified") or fs.ukey(name)
                file = InputFile(full, full, info.get("size"), str(version))
                yield file._replace(divisible=_gives_ranges(fs, name))
    except FileNotFoundError as error:
        raise InputError(f"--input {url}: {why_not_there(error)}") from error
    except ValueError as error:
        raise InputError(f"--input {error}") from error
    except Exception as error:  # of a driver: each raises its own
        raise InputError(f"--input {url}: cannot be listed, {described(error)}") from error


def _matches(fs, path: str) -> list[str]:
    """What a pattern stands for; the path itself where it is none, or nothing fits it."""
    if not glob.has_magic(path):
        return [path]
    try:
        fs.info(path)  # the characters of patterns are allowed in names and URLs
    except FileNotFoundError:
        return sorted(fs.glob(path)) or [path]
    return [path]


def _walk_remote(fs, path: str) -> list[str]:
    # Not `isdir`: over http that fetches the file to look for links in it.
    if fs.info(path)["type"] != "directory":
        return [path]
    within = len(path.rstrip("/")) + 1
    return [
        name for name in sorted(fs.find(path)) if all(map(_is_wanted, name[within:].split("/")))
    ]


def _gives_ranges(fs, path: str) -> bool:
    """Whether parts of a file can be read: every store can do that, but not every http server."""
    if not is_http(path):
        return True
    try:
        with fs.open(path, block_size=1) as file:
            file.seek(1)
            file.read(1)
    except ValueError:
        return False
    return True
