"""Nothing partial is ever taken for whole: results are written aside, then renamed."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

_REPLACED = ".replaced"  # no name of a result


@contextlib.contextmanager
def aside(out: Path, *, force: bool = False, source: Path | None = None) -> Iterator[Path]:
    """A path to write a file or a folder at; it becomes `out` when the block ends well.

    Args:
      force: what stands at `out` is replaced, once there is something to replace it with.
      source: what is converted: `out` may not hold it.

    Raises:
      ValueError: `out` is there already, or holds `source`.
    """
    if source is not None and source.resolve().is_relative_to(out.resolve()):
        raise ValueError(f"{out} holds what is converted, {source}; choose another name")
    if not force and out.exists() and not _is_empty_folder(out):
        raise ValueError(f"{out} is there already; choose another name, or --force to replace it")
    folder = out.parent / f".{out.name}.partial"
    shutil.rmtree(folder, ignore_errors=True)  # of a conversion that was killed
    folder.mkdir(parents=True)
    try:
        yield folder / out.name
        if os.path.lexists(out):  # moved, not removed: that may take long and be interrupted
            os.replace(out, folder / _REPLACED)
        os.replace(folder / out.name, out)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _is_empty_folder(path: Path) -> bool:
    return path.is_dir() and not any(path.iterdir())
