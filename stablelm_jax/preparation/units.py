"""What there is to read, and how it is cut into pieces of work.

The cut depends on the inputs alone, never on how many workers there are. A unit is a byte range
of one jsonl file, some row groups of one parquet file, one compressed file, or a run of small
files. Units in order, and records in order within them, are the order of the documents.
"""

from __future__ import annotations

import glob
import hashlib
import json
import os
import pathlib
import stat
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import fsspec
import pyarrow.parquet as pq

from stablelm_jax.preparation import readers

FORMATS = ("auto", "jsonl", "parquet", "text")
COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}

# A unit takes a worker seconds, so that little is lost with it, and there are enough of them to
# keep many workers busy on a small source.
_MAX_UNIT_BYTES = 32 << 20
_MIN_UNIT_BYTES = 8 << 20
_UNITS_PER_SOURCE = 64
_FOOTER_THREADS = 16


class InputError(ValueError):
    """An input that is not there or cannot be taken; the message says which and what to do."""


class InputFile(NamedTuple):
    """A file to read.

    path: what is opened, absolute or a URL. name: as the user wrote it, for messages.
    version: changes when the file does. kind: 'jsonl', 'parquet' or 'text'.
    divisible: whether parts of it can be read.
    """

    path: str
    name: str
    size: int | None
    version: str
    kind: str
    compression: str | None
    divisible: bool = True


class Unit(NamedTuple):
    """Files to be read whole, or a range (bytes or row groups) of one.

    size: in bytes, for progress. first: rows of the file that lie before the range.
    """

    files: tuple[InputFile, ...]
    size: int
    start: int = 0
    end: int | None = None
    first: int = 0


class Record(NamedTuple):
    """A record of a unit: where it lies, and its text or why there is none.

    line: from 1; in a byte range of a file it counts from the start of the range.
    consumed: bytes of the unit's files read so far.
    """

    file: InputFile
    line: int
    content: str | readers.Rejected
    consumed: int


def find_files(inputs: Sequence[str], file_format: str = "auto") -> list[InputFile]:
    """All files that `inputs` (files, folders, patterns; local or any fsspec URL) stand for.

    In a folder everything counts but what is hidden and `__pycache__`.

    Raises:
      InputError: nothing is found under a name, or a file is reached twice.
    """
    files = []
    for written in inputs:
        found = list(_remote(written) if "://" in written else _local(written))
        if not found:
            raise InputError(f"--input {written}: nothing there; check the path")
        files += [_classified(file, file_format) for file in found]
    seen = set()
    for file in files:
        if file.path in seen:
            raise InputError(f"--input: {file.name} is reached twice; name it once")
        seen.add(file.path)
    return files


def _local(written: str) -> Iterator[InputFile]:
    paths = [written] if os.path.exists(written) else sorted(glob.glob(written, recursive=True))
    for path in paths:
        for name in _walk(path) if os.path.isdir(path) else [path]:
            status = os.stat(name)
            if stat.S_ISREG(status.st_mode):
                version = str(status.st_mtime_ns)
                yield InputFile(os.path.abspath(name), name, status.st_size, version, "", None)


def _walk(folder: str) -> Iterator[str]:
    for parent, folders, names in os.walk(folder, onerror=_refuse):
        folders[:] = sorted(name for name in folders if _is_wanted(name))
        for name in sorted(filter(_is_wanted, names)):
            if os.path.exists(os.path.join(parent, name)):  # not a link to nowhere
                yield os.path.join(parent, name)


def _refuse(error: OSError):
    raise InputError(f"--input: {error.filename} cannot be listed: {error.strerror}") from error


def _is_wanted(name: str) -> bool:
    return not name.startswith(".") and name != "__pycache__"


def _remote(url: str) -> Iterator[InputFile]:
    try:
        filesystem, path = fsspec.core.url_to_fs(url)
    except (ImportError, ValueError) as error:
        raise InputError(f"--input {url}: {error}") from error
    for found in sorted(filesystem.glob(path)) if glob.has_magic(path) else [path]:
        for name in _walk_remote(filesystem, found):
            full = filesystem.unstrip_protocol(name)
            info = filesystem.info(name)
            version = info.get("ETag") or info.get("Last-Modified") or filesystem.ukey(name)
            divisible = _gives_ranges(filesystem, name)
            yield InputFile(full, full, info.get("size"), str(version), "", None, divisible)


def _gives_ranges(filesystem, path: str) -> bool:
    """Whether parts of a file can be read: every store can, but not every http server."""
    if not path.startswith(("http://", "https://")):
        return True
    try:
        with filesystem.open(path, block_size=1) as file:
            file.seek(1)
            file.read(1)
    except ValueError:
        return False
    return True


def _walk_remote(filesystem, path: str) -> list[str]:
    try:
        # Not isdir: over http that fetches the file to look for links in it.
        is_folder = filesystem.info(path)["type"] == "directory"
    except FileNotFoundError:
        return []
    if not is_folder:
        return [path]
    within = len(path.rstrip("/")) + 1
    names = sorted(filesystem.find(path))
    return [name for name in names if all(map(_is_wanted, name[within:].split("/")))]


def _classified(file: InputFile, file_format: str) -> InputFile:
    stem, suffix = os.path.splitext(file.name.lower())
    compression = COMPRESSIONS.get(suffix)
    suffix = os.path.splitext(stem)[1] if compression else suffix
    kind = file_format
    if file_format == "auto":
        kind = {".jsonl": "jsonl", ".ndjson": "jsonl", ".parquet": "parquet"}.get(suffix, "text")
        # `.json` names both: dumps with a document a line, and a tree's single values.
        if suffix == ".json" and (compression or _begins_with_a_json_line(file.path)):
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

    The folder that all files share is left out: moving the whole keeps the hash.
    """
    parents = [os.path.dirname(file.path) for file in files]
    shared = len(os.path.commonprefix([parent + "/" for parent in parents]))
    rows = [
        [file.path[shared:], file.size, file.version, file.kind, file.compression] for file in files
    ]
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()


def cut(files: Sequence[InputFile]) -> list[Unit]:
    """Cuts files into units, in order."""
    total = sum(file.size or 0 for file in files)
    size = min(_MAX_UNIT_BYTES, max(_MIN_UNIT_BYTES, total // _UNITS_PER_SOURCE))
    large = [file for file in files if file.kind == "parquet" and (file.size or size) >= size]
    with ThreadPoolExecutor(_FOOTER_THREADS) as pool:
        footers = dict(zip([file.path for file in large], pool.map(_footer, large), strict=True))
    units: list[Unit] = []
    group: list[InputFile] = []
    held = 0
    for file in files:
        ranges = list(_ranges(file, size, footers))
        alone = len(ranges) > 1 or file.size is None
        if group and (alone or held + file.size > size):
            units.append(Unit(tuple(group), held))
            group, held = [], 0
        if alone:
            units += ranges
        else:
            group.append(file)
            held += file.size
    return units + ([Unit(tuple(group), held)] if group else [])


def _ranges(file: InputFile, size: int, footers: dict) -> Iterator[Unit]:
    divisible = file.divisible and file.size is not None and not file.compression
    if file.kind == "jsonl" and divisible:
        for start in range(0, max(file.size, 1), size):
            end = min(start + size, file.size)
            yield Unit((file,), end - start, start, end)
    elif footers.get(file.path):
        yield from _row_group_ranges(file, size, footers[file.path])
    else:
        yield Unit((file,), file.size or 0)


def _row_group_ranges(file: InputFile, size: int, footer: list[tuple[int, int]]) -> Iterator[Unit]:
    start = first = held = rows = 0
    for group, (group_bytes, group_rows) in enumerate(footer):
        if held and held + group_bytes > size:
            yield Unit((file,), held, start, group, first)
            start, first, held, rows = group, first + rows, 0, 0
        held += group_bytes
        rows += group_rows
    yield Unit((file,), held, start, len(footer), first)


def _footer(file: InputFile) -> list[tuple[int, int]] | None:
    """Bytes and rows of each row group; None of a damaged file: its reader says so."""
    with readers.open_input(file.path, seekable=True) as opened:
        try:
            footer = pq.ParquetFile(opened).metadata
        except readers.PARQUET_ERRORS:
            return None
        groups = [footer.row_group(index) for index in range(footer.num_row_groups)]
    return [(group.total_byte_size, group.num_rows) for group in groups]


def read_unit(unit: Unit, text_key: str, skip: int = 0) -> Iterator[Record]:
    """Every record of a unit, in order, but for the first `skip`."""
    meter = readers.Meter()
    for file in unit.files:
        for line, content in enumerate(_read_file(unit, file, text_key, meter), unit.first + 1):
            if skip:
                skip -= 1
            else:
                yield Record(file, line, content, meter.consumed)


def _read_file(unit: Unit, file: InputFile, text_key: str, meter: readers.Meter):
    if file.kind == "jsonl":
        return readers.read_jsonl(
            file.path, text_key, file.compression, unit.start, unit.end, meter
        )
    if file.kind == "parquet":
        return readers.read_parquet(file.path, text_key, unit.start, unit.end, meter)
    return readers.read_text(file.path, file.compression, meter)


def save(path: pathlib.Path, units: Sequence[Unit]) -> None:
    """Writes units to a file, each input file named once."""
    files = list(dict.fromkeys(file for unit in units for file in unit.files))
    index = {file: number for number, file in enumerate(files)}
    rows = [[[index[file] for file in unit.files], *unit[1:]] for unit in units]
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps({"files": files, "units": rows}))
    os.replace(partial, path)


def load(path: pathlib.Path) -> list[Unit]:
    """Reads what `save` wrote."""
    saved = json.loads(path.read_text())
    files = [InputFile(*row) for row in saved["files"]]
    return [Unit(tuple(files[i] for i in row), *rest) for row, *rest in saved["units"]]
