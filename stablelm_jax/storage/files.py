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
    """A path beside `path` to write a file at; it becomes `path` when the block ends well.

    Where the block raises, `path` stays as it was and what was written aside is removed.
    """
    aside = path.with_name(path.name + PARTIAL)
    try:
        yield aside
        os.replace(aside, path)
    except BaseException:
        with contextlib.suppress(OSError):
            aside.unlink()
        raise


def write_text(path: Path, text: str) -> None:
    """Writes a text file in UTF-8; nobody ever sees half of it, after a power cut either."""
    with replacing(path) as aside, open(aside, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


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
        if os.path.lexists(out):  # moved and not removed: removing may take long and be interrupted
            os.replace(out, folder / ".replaced")
        os.replace(folder / out.name, out)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
