"""Which files there are to read, in which order, and of what kind each of them is."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence

from stablelm_jax.preparation import readers
from stablelm_jax.preparation.finding import InputError, InputFile, LeftOut, files_of

FORMATS = ("auto", "jsonl", "parquet", "text")
_KINDS = {".jsonl": "jsonl", ".ndjson": "jsonl", ".parquet": "parquet"}
_COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}


def find_files(
    inputs: Sequence[str], file_format: str = "auto", left_out: list[LeftOut] | None = None
) -> list[InputFile]:
    """All files to read under `inputs` (files, folders, patterns; local or any fsspec URL).

    In a folder every file counts except hidden ones, those in `__pycache__`, and what `prepare`
    wrote. A file is read once, whatever links lead to it.

    Args:
      left_out: gets what is found and not read.

    Raises:
      InputError: nothing is found under a name, or a file is named twice.
    """
    left_out = [] if left_out is None else left_out
    files: dict[str, InputFile] = {}
    identities: dict[tuple[int, int], str] = {}
    for written in inputs:
        for file in files_of(written, left_out, identities):
            if file.path in files:
                raise InputError(f"--input: {file.name} is reached twice; name it once")
            files[file.path] = _classified(file, file_format)
    return list(files.values())


def _classified(file: InputFile, file_format: str) -> InputFile:
    stem, suffix = os.path.splitext(file.last_name.lower())
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
