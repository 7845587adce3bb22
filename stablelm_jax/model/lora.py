"""Low-rank adapters (LoRA; Hu et al. 2021, arXiv 2106.09685): W + alpha / rank * A B for some W.

Adapters have a table of their own, so all that goes by a table of parameters (shardings, weight
decay, checkpoints) goes for them too. The model knows nothing of them: it is given the sums.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from stablelm_jax.model.config import ModelConfig
from stablelm_jax.model.parameters import (
    LAYERS,
    RANK,
    ParameterSpec,
    initial_value,
    nest,
    parameter_table,
)

A, B = "lora_a", "lora_b"  # beside the 'kernel' that they are added to


@dataclasses.dataclass(frozen=True)
class Lora:
    """Which matrices have adapters, and how large these are; fields of the config's group `lora`.

    Attributes:
      rank: columns of A, rows of B.
      alpha: what is added is A B times alpha / rank.
      targets: some of the names that `target_names` gives.
    """

    rank: int
    alpha: float
    targets: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return dataclasses.asdict(self) | {"targets": list(self.targets)}

    @classmethod
    def from_json(cls, values: Any) -> Lora:
        """The inverse, of a config's group too; other keys are left alone."""
        return cls(values["rank"], values["alpha"], tuple(values["targets"]))

    @property
    def scale(self) -> float:
        """What the product A B is multiplied by."""
        return self.alpha / self.rank

    def table(self, model: ModelConfig) -> tuple[ParameterSpec, ...]:
        """A, [L, inputs..., rank], and B, [L, rank, outputs...], of each target.

        A begins as PEFT's does, with the variance 1 / (3 inputs), B with zeros: at first nothing
        is added. Both decay, as other matrices do.
        """
        found = []
        for target, row in _kernels(model).items():
            if target not in self.targets:
                continue
            split, name = 1 + row.num_input_dims, row.name.removesuffix("kernel")
            shape_a, axes_a = (*row.shape[:split], self.rank), (*row.axes[:split], RANK)
            shape_b = (row.shape[0], self.rank, *row.shape[split:])
            axes_b = (LAYERS, RANK, *row.axes[split:])
            std = 1 / math.sqrt(3 * math.prod(row.shape[1:split]))
            found += [
                ParameterSpec(name + A, shape_a, std, True, axes_a, row.num_input_dims),
                ParameterSpec(name + B, shape_b, "zeros", True, axes_b, 1),
            ]
        return tuple(found)

    def init(self, model: ModelConfig, key: jax.Array) -> dict[str, Any]:
        """Fresh float32 adapters as a plain nested dict; the same bits on any mesh."""
        keys = jax.random.split(key, model.num_layers)
        first = lambda row: jax.vmap(functools.partial(initial_value, row))(keys)  # noqa: E731
        return nest({row.name: first(row) for row in self.table(model)})

    def merge_layer(self, layer: Any, adapters: Any) -> Any:
        """The parameters of one layer (no axis of layers), with its adapters added to them.

        The sum is made in float32 and has the type of the kernel. Backward makes it again rather
        than keep it, whatever else is kept.
        """
        if A in adapters:
            return layer | {"kernel": self._add(layer["kernel"], adapters[A], adapters[B])}
        merged = {name: self.merge_layer(layer[name], part) for name, part in adapters.items()}
        return layer | merged

    def merge(self, params: Any, adapters: Any) -> Any:
        """All parameters with their adapters added, one layer after the other."""
        pairs = params["layers"], adapters["layers"]
        return params | {"layers": jax.lax.map(lambda pair: self.merge_layer(*pair), pairs)}

    @functools.partial(jax.checkpoint, static_argnums=0)
    def _add(self, kernel: jax.Array, a: jax.Array, b: jax.Array) -> jax.Array:
        with jax.named_scope("lora"):
            a, b = a.reshape(-1, self.rank), b.reshape(self.rank, -1)
            product = jnp.matmul(a, b, precision="highest").reshape(kernel.shape)
            return (kernel.astype(jnp.float32) + self.scale * product).astype(kernel.dtype)

    def merged_leaf(self, kernel: np.ndarray, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        """A whole stacked kernel with its adapters added, float32, on the host."""
        layers = len(kernel)
        product = a.reshape(layers, -1, self.rank) @ b.reshape(layers, self.rank, -1)
        return kernel + np.float32(self.scale) * product.reshape(kernel.shape)


def target_names(model: ModelConfig) -> tuple[str, ...]:
    """The matrices of a layer, as `Lora.targets` names them: 'query', 'key', ..., 'down'."""
    return tuple(_kernels(model))


def _kernels(model: ModelConfig) -> dict[str, ParameterSpec]:
    """{'query': the row of 'layers/attention/query/kernel'} of all matrices of a layer."""
    rows = [row for row in parameter_table(model) if row.stacked and row.num_input_dims]
    return {row.name.split("/")[-2]: row for row in rows}
