"""Reading and writing the safetensors files of a Hugging Face directory."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

ONE_FILE = "model.safetensors"
INDEX = "model.safetensors.index.json"
DTYPES = {
    "float32": ("F32", jnp.dtype(jnp.float32)),
    "bfloat16": ("BF16", jnp.dtype(jnp.bfloat16)),
    "float16": ("F16", jnp.dtype(jnp.float16)),
}
_READABLE = [code for code, _ in DTYPES.values()]

Shape = tuple[int, ...]


class TensorFiles:
    """The tensors of a directory, in one file or in several with an index."""

    def __init__(self, folder: Path):
        """Maps all files; reads their headers only.

        Raises:
          ValueError: none there, one is missing, damaged, or of a type that is not read.
        """
        self.shapes: dict[str, Shape] = {}  # of every tensor, by name
        self._files: dict[str, Any] = {}  # by the name of the file
        self._file_names: dict[str, str] = {}  # where each tensor is
        index = _read_index(folder)
        for file_name in [ONE_FILE] if index is None else sorted(set(index.values())):
            self._read_header(folder / file_name)
        listed = index or {}
        elsewhere = [name for name in listed if self._file_names.get(name) != listed[name]]
        if elsewhere:
            raise ValueError(
                f"{folder / INDEX}: {len(elsewhere)} tensors, such as {elsewhere[0]}, are not in "
                "the file that it names; the files are not of one export: fetch them again"
            )

    def _read_header(self, path: Path) -> None:
        try:
            file = self._files[path.name] = safe_open(path, "numpy")
        except (SafetensorError, OSError) as error:
            raise ValueError(
                f"{path} is missing, cut short or no safetensors file ({error}); fetch it again"
            ) from error
        for name in file.keys():
            part = file.get_slice(name)
            if part.get_dtype() not in _READABLE and not name.endswith("inv_freq"):
                raise ValueError(
                    f"{path.name}: {name} is of type {part.get_dtype()}; "
                    f"only {', '.join(_READABLE)} are read"
                )
            self.shapes[name], self._file_names[name] = tuple(part.get_shape()), path.name

    def read(self, name: str) -> np.ndarray:
        """A tensor in float32; a ValueError where a value is not finite."""
        file_name = self._file_names[name]
        values = np.asarray(self._files[file_name].get_tensor(name), np.float32)
        if not np.isfinite(values).all():
            raise ValueError(
                f"{file_name}: {name} holds values that are not finite; "
                "the file is damaged, or the training that it is from went wrong"
            )
        return values


def _read_index(folder: Path) -> dict[str, str] | None:
    """{tensor: name of its file} of a directory with several files, None of one with one."""
    path = folder / INDEX
    if path.is_file():
        try:
            listed = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
            return {str(name): Path(file).name for name, file in listed.items()}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path} is damaged ({error!r}); fetch it again") from error
    if (folder / ONE_FILE).is_file():
        return None
    others = [path.name for path in folder.iterdir() if path.suffix in (".bin", ".pt", ".gguf")]
    hint = f"; {', '.join(others[:3])} cannot be read, save it as safetensors" if others else ""
    raise ValueError(f"{folder} holds neither {ONE_FILE} nor {INDEX}{hint}")


def write_tensors(
    folder: Path,
    shapes: Mapping[str, Shape],
    values: Iterator[np.ndarray],
    dtype: str,
    max_bytes: int,
) -> None:
    """Writes the files of a directory; the host holds the tensors of one file at a time.

    Args:
      shapes: {name: shape} in the order of the files.
      values: of each tensor in that order, of the type `dtype`, a key of DTYPES.
      max_bytes: how large the tensors of a file are together, if it holds more than one.
    """
    size = DTYPES[dtype][1].itemsize
    sizes = {name: math.prod(shape) * size for name, shape in shapes.items()}
    groups, names = _groups(sizes, max_bytes), [ONE_FILE]
    if len(groups) > 1:
        count = len(groups)
        names = [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]
        files = {name: file for file, group in zip(names, groups) for name in group}
        index = {"metadata": {"total_size": sum(sizes.values())}}
        index["weight_map"] = dict(sorted(files.items()))
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    for file_name, group in zip(names, groups):
        save_file(dict(zip(group, values)), folder / file_name, metadata={"format": "pt"})


def _groups(sizes: Mapping[str, int], max_bytes: int) -> list[list[str]]:
    """The tensors of each file, in order."""
    groups: list[list[str]] = [[]]
    total = 0
    for name, size in sizes.items():
        if groups[-1] and total + size > max_bytes:
            groups.append([])
            total = 0
        groups[-1].append(name)
        total += size
    return groups
