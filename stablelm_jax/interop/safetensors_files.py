"""Reading and writing the safetensors files of a Hugging Face directory, one tensor at a time.

Reading is the library's. It writes only what is in memory as a whole, so files of many gigabytes
are written here: eight bytes of length, a JSON header, the tensors (huggingface/safetensors,
README). The library reads every file back before it counts.
"""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open

ONE_FILE = "model.safetensors"
INDEX = "model.safetensors.index.json"
DTYPES = {
    "float32": ("F32", jnp.dtype(jnp.float32)),
    "bfloat16": ("BF16", jnp.dtype(jnp.bfloat16)),
    "float16": ("F16", jnp.dtype(jnp.float16)),
}
_READABLE = [code for code, _ in DTYPES.values()]
_ALIGNMENT = 64  # bytes; where the first tensor begins

Shape = tuple[int, ...]


class TensorFiles:
    """The tensors of a directory, in one file or in several with an index.

    Attributes:
      shapes: {name: shape} of every tensor.
    """

    def __init__(self, folder: Path):
        """Maps all files; reads their headers only.

        Raises:
          ValueError: none there, one is missing, damaged, or of a type that is not read.
        """
        self.shapes: dict[str, Shape] = {}
        self._places: dict[str, tuple[str, Any]] = {}  # of each tensor: name of its file, the file
        for path in _paths(folder):
            self._read_header(path)
        if (folder / INDEX).is_file():
            self._check_index(folder / INDEX)

    def _read_header(self, path: Path) -> None:
        try:
            file = safe_open(path, "numpy")
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
            self.shapes[name], self._places[name] = tuple(part.get_shape()), (path.name, file)

    def _check_index(self, path: Path) -> None:
        elsewhere = [
            f"{name} (in {file})"
            for name, file in _read_index(path).items()
            if self._places.get(name, ("",))[0] != file
        ]
        if elsewhere:
            raise ValueError(
                f"{path} lists tensors that are not where it says: "
                f"{', '.join(elsewhere[:5])}{' ...' if len(elsewhere) > 5 else ''}; "
                "the files are not of one export: fetch them again"
            )

    def read(self, name: str) -> np.ndarray:
        """A tensor in float32.

        Raises:
          ValueError: it holds a value that is not finite.
        """
        file_name, file = self._places[name]
        values = np.asarray(file.get_tensor(name), np.float32)
        if not np.isfinite(values).all():
            raise ValueError(
                f"{file_name}: {name} holds values that are not finite; "
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


@contextlib.contextmanager
def tensor_writer(
    folder: Path, shapes: Mapping[str, Shape], dtype: str, max_bytes: int
) -> Iterator[Callable[[str, np.ndarray], None]]:
    """Makes the files of tensors that are given one by one, in any order.

    Gives f(name, values), which writes a tensor, rounded to the type; each is to be written once.

    Args:
      shapes: {name: shape} in the order of the files.
      dtype: the type of every tensor, a key of DTYPES.
      max_bytes: how large the tensors of a file are together, if it holds more than one.
    """
    code, numbers = DTYPES[dtype]
    groups = list(_groups(shapes, numbers.itemsize, max_bytes))
    count, missing = len(groups), dict(shapes)
    names = [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
    places: dict[str, tuple[BinaryIO, int]] = {}
    if count == 1:
        names = [ONE_FILE]
    else:
        total = sum(map(math.prod, shapes.values())) * numbers.itemsize
        files = {name: file for file, group in zip(names, groups) for name in group}
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(files.items()))}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")

    def write(name: str, values: np.ndarray) -> None:
        shape, (file, start) = missing.pop(name), places[name]
        assert values.shape == shape, (name, values.shape, shape)
        file.seek(start)
        file.write(np.ascontiguousarray(values, numbers).view(np.uint8).data)

    with contextlib.ExitStack() as opened:
        for name, group in zip(names, groups):
            file = opened.enter_context((folder / name).open("wb"))
            places |= _laid_out(file, group, code, numbers.itemsize)
        yield write
        assert not missing, missing


def _laid_out(
    file: BinaryIO, group: Mapping[str, Shape], code: str, itemsize: int
) -> dict[str, tuple[BinaryIO, int]]:
    """Writes the header of a file and gives it its size; the place of each tensor."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, shape in group.items():
        end = offset + math.prod(shape) * itemsize
        header[name] = {"dtype": code, "shape": shape, "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % _ALIGNMENT)
    start = 8 + len(text)
    file.write(len(text).to_bytes(8, "little") + text)
    file.truncate(start + offset)
    return {name: (file, start + header[name]["data_offsets"][0]) for name in group}


def _groups(
    shapes: Mapping[str, Shape], itemsize: int, max_bytes: int
) -> Iterator[dict[str, Shape]]:
    """The tensors of each file, in order."""
    group: dict[str, Shape] = {}
    size = 0
    for name, shape in shapes.items():
        more = math.prod(shape) * itemsize
        if group and size + more > max_bytes:
            yield group
            group, size = {}, 0
        group[name] = shape
        size += more
    yield group
