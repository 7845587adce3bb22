"""Which files there are to read, in which order, and of what kind each of them is."""

from __future__ import annotations

import glob
import hashlib
import json
import os
import stat
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from stablelm_jax.preparation import readers
from stablelm_jax.storage.remote import filesystem, is_url

FORMATS = ("auto", "jsonl", "parquet", "text")
_KINDS = {".jsonl": "jsonl", ".ndjson": "jsonl", ".parquet": "parquet"}
_COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}


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


def find_files(inputs: Sequence[str], file_format: str = "auto") -> list[InputFile]:
    """All files that `inputs` (files, folders, patterns; local or any fsspec URL) stand for.

    In a folder every file counts except hidden ones and those in `__pycache__`.

    Raises:
      InputError: nothing is found under a name, or a file is reached twice.
    """
    files: dict[str, InputFile] = {}
    for written in inputs:
        found = list(_remote_files(written) if is_url(written) else _local_files(written))
        if not found:
            raise InputError(f"--input {written}: nothing there; check the path")
        for file in found:
            if file.path in files:
                raise InputError(f"--input: {file.name} is reached twice; name it once")
            files[file.path] = _classified(file, file_format)
    return list(files.values())


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
    except ValueError as error:
        raise InputError(f"--input {error}") from error
    for found in sorted(fs.glob(path)) if glob.has_magic(path) else [path]:
        for name in _walk_remote(fs, found):
            full, info = fs.unstrip_protocol(name), fs.info(name)
            version = info.get("ETag") or info.get("Last-Modified") or fs.ukey(name)
            file = InputFile(full, full, info.get("size"), str(version))
            yield file._replace(divisible=_gives_ranges(fs, name))


def _walk_remote(fs, path: str) -> list[str]:
    try:
        # Not `isdir`: over http that fetches the file to look for links in it.
        is_folder = fs.info(path)["type"] == "directory"
    except FileNotFoundError:
        return []
    if not is_folder:
        return [path]
    within = len(path.rstrip("/")) + 1
    return [
        name for name in sorted(fs.find(path)) if all(map(_is_wanted, name[within:].split("/")))
    ]


def _gives_ranges(fs, path: str) -> bool:
    """Whether parts of a file can be read: every store can do that, but not every http server."""
    if not path.startswith(("http://", "https://")):
        return True
    try:
        with fs.open(path, block_size=1) as file:
            file.seek(1)
            file.read(1)
    except ValueError:
        return False
    return True


def _classified(file: InputFile, file_format: str) -> InputFile:
    stem, suffix = os.path.splitext(file.name.lower())
    compression = _COMPRESSIONS.get(suffix)
    suffix = os.path.splitext(stem)[1] if compression else suffix
    kind = _KINDS.get(suffix, "text") if file_format == "auto" else file_format
    # `.json` names both dumps with a document a line and files with a single value.
    if file_format == "auto" and suffix == ".json":
        if compression or _begins_with_a_json_line(file.path):
            kind = "jsonl"
    if kind == "parquet" and compression:
        raise InputError(f"{file.name}: a compressed parquet file; decompress it first")
    return file._replace(kind=kind, compression=compression)


def _begins_with_a_json_line(path: str) -> bool:
    with readers.open_input(path) as file:
        line, newline, rest = file.read(1 << 20).partition(b"\n")
    try:
        return bool(newline) and isinstance(json.loads(line), dict) and rest[:1] == b"{"
    except ValueError:
        return False


def fingerprint(files: Sequence[InputFile]) -> str:
    """A hash that changes when a file is added, taken away, renamed, moved in order or changed.

    The folder that all files share is left out: moving it as a whole keeps the hash.
    """
    shared = len(os.path.commonprefix([os.path.dirname(file.path) + "/" for file in files]))
    rows = [[f.path[shared:], f.size, f.version, f.kind, f.compression] for f in files]
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()
