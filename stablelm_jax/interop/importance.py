"""Importance matrices: the mean square of each input of each matrix, which K-quants round by.

A column that large numbers are multiplied by must be exact. The file is llama.cpp's own: for each
matrix of a layer `NAME.in_sum2`, sums of squares, and `NAME.counts`, over how many tokens; the head
and the embedding have none, as by default there.

B rows, T tokens of a row, N of all rows, I inputs of a matrix, L layers.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import gguf
import jax
import jax.numpy as jnp
import numpy as np

from stablelm_jax.checkpoint.saved_model import SavedModel
from stablelm_jax.data.batches import BatchSpec, held_out_batches
from stablelm_jax.data.manifest import MANIFEST_NAME, open_sources
from stablelm_jax.interop.gguf_export import Stored, stored_tensors
from stablelm_jax.model.config import ModelConfig
from stablelm_jax.model.lora import Adapted
from stablelm_jax.model.transformer import hidden_states

ROW_TOKENS = 512  # as llama-imatrix has it
_SUMS, _COUNTS = ".in_sum2", ".counts"


def of_data(
    checkpoint: SavedModel,
    params: Any,
    root: Path,
    rows: int,
    on_rows: Callable[[int], None] = lambda count: None,
) -> dict[str, np.ndarray]:
    """The importance matrix, float32 [I] by the matrix' name in a GGUF file, of held-out text.

    Args:
      params: the checkpoint's. root: folder of prepared sources, which all have the same share.
      rows: how many to take, of ROW_TOKENS tokens each. on_rows: called with how many were read.

    Raises:
      ValueError: nothing prepared is there, or it was prepared with another tokenizer.
    """
    names = sorted(path.parent.name for path in root.glob(f"*/{MANIFEST_NAME}"))
    if not names:
        raise ValueError(f"{root} is neither a folder of prepared sources nor an imatrix file")
    sources = open_sources(root, names, tokenizer=checkpoint.tokenizer)
    length = min(ROW_TOKENS, checkpoint.max_positions)
    spec, totals, count = BatchSpec(length, 1, 0, checkpoint.tokenizer.eod), {}, 0.0
    share = math.ceil(rows / len(names))
    for name in names:
        for batch in held_out_batches(sources, name, spec, max_rows=share):
            inputs = (batch[key] for key in ("tokens", "segment_ids", "positions", "loss_mask"))
            sums = jax.device_get(_sums(checkpoint.model, params, *inputs))
            totals = {key: totals.get(key, 0) + np.float64(sums[key]) for key in sums}
            count += batch["loss_mask"].sum()
            on_rows(1)
    return {
        one.name: np.float32(totals[one.tensor.ours][one.tensor.index] / count)
        for one in _matrices(checkpoint.model)
    }


def _matrices(model: ModelConfig) -> Iterator[Stored]:
    for one in stored_tensors(model, "f32"):
        if one.tensor.ours.startswith("layers/") and one.tensor.num_input_dims:
            yield one


@functools.partial(jax.jit, static_argnums=0)
def _sums(model: ModelConfig, params: Any, tokens_BT, segment_ids_BT, positions_BT, counted_BT):
    """{name of a kernel: [L, I]}: sums over the counted tokens."""
    seen: dict[str, jax.Array] = {}

    def note(name, x_NI):
        seen[name] = jnp.square(x_NI.astype(jnp.float32)).T @ counted_BT.reshape(-1)

    def watched(path, leaf):
        name = "/".join(key.key for key in path)
        if not name.endswith("/kernel"):
            return leaf
        return _Watched(leaf, None, None, 1.0, functools.partial(note, f"layers/{name}"))

    def fetch(name, group):
        return group if name != "layers" else jax.tree.map_with_path(watched, group)

    inputs = tokens_BT, segment_ids_BT, positions_BT
    with jax.default_matmul_precision("float32"):
        _, sums = hidden_states(model, params, *inputs, fetch=fetch, watch=lambda _: dict(seen))
    return sums


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Watched(Adapted):
    """A kernel that tells what it is multiplied with."""

    note: Callable[[jax.Array], None] = dataclasses.field(metadata={"static": True})

    def times(self, x_NI: jax.Array) -> jax.Array:
        self.note(x_NI)
        return x_NI @ self.kernel.astype(x_NI.dtype).reshape(x_NI.shape[-1], -1)


def write_file(path: Path, importance: Mapping[str, np.ndarray], source: str) -> None:
    """An imatrix file of llama.cpp's; `source`: what text it is of."""
    writer = gguf.GGUFWriter(path, "")
    writer.add_type("imatrix")
    writer.add_array("imatrix.datasets", [source])
    writer.add_uint32("imatrix.chunk_count", 1)
    writer.add_uint32("imatrix.chunk_size", ROW_TOKENS)
    for name, mean_I in importance.items():
        writer.add_tensor(name + _SUMS, mean_I[None])
        writer.add_tensor(name + _COUNTS, np.ones((1, 1), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def read_file(path: Path, model: ModelConfig) -> dict[str, np.ndarray]:
    """The same again, of whatever program wrote it.

    Raises:
      ValueError: it is no imatrix file, or of another model.
    """
    try:
        found = {tensor.name: tensor.data for tensor in gguf.GGUFReader(path).tensors}
    except (ValueError, IndexError) as error:
        raise ValueError(f"{path} is no imatrix file of llama.cpp's in GGUF: {error}") from error
    importance = {}
    for one in _matrices(model):
        (columns,) = one.tensor.shape[-1:]
        sums, counts = (found.get(one.name + ending, np.empty(0)) for ending in (_SUMS, _COUNTS))
        right = sums.size == columns and counts.size == 1 and np.isfinite(sums).all()
        if not (right and counts.item() >= 1 and sums.min() >= 0 and sums.max() > 0):
            raise ValueError(
                f"{path} has no {columns} sums of squares for {one.name}: it is damaged, or of "
                "another model"
            )
        importance[one.name] = np.float32(sums / counts.item()).ravel()
    return importance
