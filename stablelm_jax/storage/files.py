"""Files and folders written aside and renamed: nothing partial is ever taken for whole."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

PARTIAL = ".partial"  # ends the name of a file that is being written


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A path beside `path` to write a file at; it becomes `path` only if the block ends well."""
    aside = path.with_name(path.name + PARTIAL)
    try:
        yield aside
        flush_to_disk(aside)
        os.replace(aside, path)
    except BaseException:
        with contextlib.suppress(OSError):
            aside.unlink()
        raise
    _flush(path.parent)


def flush_to_disk(path: Path) -> None:
    """Returns when a loss of power takes nothing of a file, or of a folder and all below it."""
    for part in (*path.rglob("*"), path):
        _flush(part)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError:
        if not path.is_dir():  # some file systems have this for files only
            raise
    finally:
        os.close(descriptor)


def what_is(path: str | os.PathLike[str]) -> str:
    """'a folder', 'a file', 'a link to ..., which is not there', or '' where nothing is."""
    if os.path.islink(path) and not os.path.exists(path):
        return f"a link to {os.readlink(path)}, which is not there"
    return "a folder" if os.path.isdir(path) else "a file" if os.path.exists(path) else ""


def check_writable(path: Path) -> None:
    """Raises ValueError where no file can be written to `path`: before hours of work, not after."""
    if os.path.exists(path) and not os.path.isfile(path):
        what = "a folder" if os.path.isdir(path) else "no ordinary file"
        raise ValueError(f"{path} is {what}; name another")
    aside = path.with_name(path.name + PARTIAL)
    try:
        aside.touch()
        aside.unlink()
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}; make its folder, or name another") from error


def free_name(path: Any, ending: str) -> Any:
    """`path` with an ending, and a number if need be, that nothing has as yet; no link either."""
    found, number = path.with_name(path.name + ending), 1
    while found.exists() or os.path.islink(found):
        number += 1
        found = path.with_name(f"{path.name}{ending}{number}")
    return found


def write_text(path: Path, text: str) -> None:
    """Writes a text file in UTF-8; nobody ever sees half of it."""
    with replacing(path) as aside:
        aside.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Writes a JSON file; nobody ever sees half of it. NaN is a ValueError: JSON has none."""
    write_text(path, json.dumps(value, indent=1, allow_nan=False) + "\n")


@contextlib.contextmanager
def new_result(out: Path, *, force: bool = False, source: Path | None = None) -> Iterator[Path]:
    """A path to write a file or a folder at; it becomes `out` when the block ends well.

    Raises ValueError where `out` holds `source`, what is converted, or is there already. With
    `force` it is replaced, once there is something to replace it with.
    """
    if source is not None and source.resolve().is_relative_to(out.resolve()):
        raise ValueError(f"{out} holds what is converted, {source}; choose another name")
    is_empty_folder = out.is_dir() and not any(out.iterdir())
    if not force and out.exists() and not is_empty_folder:
        raise ValueError(f"{out} is there already; choose another name, or --force to replace it")
    folder = out.parent / f".{out.name}{PARTIAL}"
    shutil.rmtree(folder, ignore_errors=True)  # of a conversion that was killed
    folder.mkdir(parents=True)
    try:
        yield folder / out.name
        flush_to_disk(folder / out.name)
        if os.path.lexists(out):  # moved and not removed: removing may take long and be interrupted
            os.replace(out, folder / ".replaced")
        os.replace(folder / out.name, out)
        _flush(out.parent)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
