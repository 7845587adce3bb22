"""Reading and writing the safetensors files of a Hugging Face directory, one tensor at a time.

Reading is the library's. It writes only what is in memory as a whole, so files of many gigabytes
are written here: eight bytes of length, a JSON header, the tensors (huggingface/safetensors,
README). The library reads every file back before it counts.
"""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

ONE_FILE = "model.safetensors"
INDEX = "model.safetensors.index.json"
DTYPES = {
    "float32": ("F32", np.dtype(np.float32)),
    "bfloat16": ("BF16", np.dtype(ml_dtypes.bfloat16)),
    "float16": ("F16", np.dtype(np.float16)),
}
_READABLE = {code: dtype for code, dtype in DTYPES.values()}
_ALIGNMENT = 64  # bytes; where the first tensor begins


class TensorFiles:
    """The tensors of a directory, in one file or in several with an index; use it in a `with`.

    Attributes:
      shapes: {name: shape} of every tensor.
    """

    def __init__(self, folder: Path):
        """Opens all files; reads their headers only.

        Raises:
          ValueError: none there, one is missing, damaged, or of a type that is not read.
        """
        self._opened = contextlib.ExitStack()
        try:
            self._files = {path.name: self._open(path) for path in _paths(folder)}
            self._file_of = self._located(folder)
            self.shapes = {name: self._checked_shape(name) for name in self._file_of}
        except BaseException:
            self._opened.close()
            raise

    def __enter__(self) -> TensorFiles:
        return self

    def __exit__(self, kind: type | None, error: Any, trace: TracebackType | None) -> None:
        self._opened.close()

    def _open(self, path: Path) -> Any:
        try:
            return self._opened.enter_context(safe_open(path, "numpy"))
        except (SafetensorError, OSError) as error:
            raise ValueError(
                f"{path} is missing, cut short or no safetensors file ({error}); fetch it again"
            ) from error

    def _located(self, folder: Path) -> dict[str, str]:
        found = {name: file for file, opened in self._files.items() for name in opened.keys()}
        if (folder / INDEX).is_file():
            listed = _read_index(folder / INDEX)
            absent = [f"{n} (in {f})" for n, f in listed.items() if found.get(n) != f]
            if absent:
                raise ValueError(
                    f"{folder / INDEX} lists tensors that are not where it says: "
                    f"{', '.join(absent[:5])}{' ...' if len(absent) > 5 else ''}; "
                    "the files are not of one export: fetch them again"
                )
        return found

    def _checked_shape(self, name: str) -> tuple[int, ...]:
        part = self._files[self._file_of[name]].get_slice(name)
        if part.get_dtype() not in _READABLE and not name.endswith("inv_freq"):
            raise ValueError(
                f"{self._file_of[name]}: {name} is of type {part.get_dtype()}; "
                f"only {', '.join(_READABLE)} are read"
            )
        return tuple(part.get_shape())

    def read(self, name: str, index: tuple[slice, ...] = ()) -> np.ndarray:
        """A tensor, or the part of it at `index`, in float32.

        Raises:
          ValueError: it holds a value that is not finite.
        """
        part = self._files[self._file_of[name]].get_slice(name)
        values = np.asarray(part[index or ...], np.float32)
        if not np.isfinite(values).all():
            raise ValueError(
                f"{self._file_of[name]}: {name} holds values that are not finite; "
                "the file is damaged, or the training that it is from went wrong"
            )
        return values


def _paths(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise ValueError(f"{folder}: there is no such directory")
    if (folder / INDEX).is_file():
        return [folder / name for name in sorted(set(_read_index(folder / INDEX).values()))]
    if (folder / ONE_FILE).is_file():
        return [folder / ONE_FILE]
    others = [path.name for path in folder.iterdir() if path.suffix in (".bin", ".pt", ".gguf")]
    hint = f"; {', '.join(others[:3])} cannot be read, save it as safetensors" if others else ""
    raise ValueError(f"{folder} holds neither {ONE_FILE} nor {INDEX}{hint}")


def _read_index(path: Path) -> dict[str, str]:
    try:
        listed = json.loads(path.read_text())["weight_map"]
        return {str(name): Path(file).name for name, file in listed.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is damaged ({error!r}); fetch it again") from error


class TensorWriter:
    """Writes tensors in any order into files whose layout is known before; use it in a `with`.

    Attributes:
      missing: names that were not written yet.
    """

    def __init__(
        self, folder: Path, shapes: Mapping[str, tuple[int, ...]], dtype: str, max_bytes: int
    ):
        """Makes the files, and the index where there are several.

        Args:
          shapes: {name: shape} in the order of the files.
          dtype: key of DTYPES; of every tensor.
          max_bytes: of the tensors in a file, if it holds more than one.
        """
        self._code, self._dtype = DTYPES[dtype]
        self._shapes = dict(shapes)
        self._places: dict[str, tuple[BinaryIO, int]] = {}
        self._opened = contextlib.ExitStack()
        self.missing = set(shapes)
        groups = list(_groups(shapes, self._dtype.itemsize, max_bytes))
        names = [ONE_FILE] if len(groups) == 1 else _file_names(len(groups))
        for name, group in zip(names, groups):
            self._make(self._opened.enter_context((folder / name).open("wb")), group)
        if len(groups) > 1:
            self._write_index(folder / INDEX, dict(zip(names, groups)))

    def __enter__(self) -> TensorWriter:
        return self

    def __exit__(self, kind: type | None, error: Any, trace: TracebackType | None) -> None:
        self._opened.close()

    def write(self, name: str, values: np.ndarray) -> None:
        """One tensor, rounded to the type of the files."""
        assert values.shape == self._shapes[name], (name, values.shape, self._shapes[name])
        file, start = self._places[name]
        file.seek(start)
        file.write(np.ascontiguousarray(values, self._dtype).view(np.uint8).data)
        self.missing.remove(name)

    def _make(self, file: BinaryIO, group: Mapping[str, tuple[int, ...]]) -> None:
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        offset = 0
        for name, shape in group.items():
            end = offset + math.prod(shape) * self._dtype.itemsize
            header[name] = {"dtype": self._code, "shape": shape, "data_offsets": [offset, end]}
            offset = end
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-(8 + len(text)) % _ALIGNMENT)
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + offset)
        for name in group:
            self._places[name] = file, 8 + len(text) + header[name]["data_offsets"][0]

    def _write_index(self, path: Path, files: Mapping[str, Mapping[str, tuple]]) -> None:
        shapes = [shape for group in files.values() for shape in group.values()]
        total = sum(math.prod(shape) for shape in shapes) * self._dtype.itemsize
        weight_map = {name: file for file, group in files.items() for name in group}
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        path.write_text(json.dumps(index, indent=2) + "\n")


def _groups(
    shapes: Mapping[str, tuple[int, ...]], itemsize: int, max_bytes: int
) -> Iterable[dict[str, tuple[int, ...]]]:
    """The tensors of each file, in order."""
    group: dict[str, tuple[int, ...]] = {}
    size = 0
    for name, shape in shapes.items():
        more = math.prod(shape) * itemsize
        if group and size + more > max_bytes:
            yield group
            group, size = {}, 0
        group[name] = shape
        size += more
    yield group


def _file_names(count: int) -> list[str]:
    return [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
