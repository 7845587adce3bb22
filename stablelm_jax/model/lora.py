"""Low-rank adapters (LoRA; Hu et al. 2021, arXiv 2106.09685): W + alpha / rank * A B for some W.

Adapters have a table of their own, so all that goes by a table of parameters (shardings, weight
decay, checkpoints) goes for them too. The model meets them in one place, the product by a kernel.

N rows of x, I inputs, O outputs, R rank.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

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
PRODUCT = "lora_product"  # of an adapted kernel, by name for the policies of remat


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

    def join(self, params: Any, adapters: Any) -> Any:
        """The parameters with `Adapted` kernels where there are adapters; nothing is computed."""
        if A in adapters:
            kernel = Adapted(params["kernel"], adapters[A], adapters[B], self.scale)
            return params | {"kernel": kernel}
        return params | {name: self.join(params[name], part) for name, part in adapters.items()}

    def merge(self, params: Any, adapters: Any) -> Any:
        """All parameters with their adapters added, on the device, one layer after the other."""
        add = lambda x: jax.lax.map(Adapted.sum, x) if is_adapted(x) else x  # noqa: E731
        return jax.tree.map(add, self.join(params, adapters), is_leaf=is_adapted)

    def merged_leaf(self, kernel: np.ndarray, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        """A whole stacked kernel with its adapters added, float32, on the host, in its own memory
        where it may be written to: beside it is one layer of them."""
        kernel = np.require(kernel, requirements="W")
        for layer, a_IR, b_RO in zip(kernel, a, b):
            product = a_IR.reshape(-1, self.rank) @ b_RO.reshape(self.rank, -1)
            layer += np.float32(self.scale) * product.reshape(layer.shape)
        return kernel


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Adapted:
    """A frozen kernel [inputs..., outputs...] and what is added to it, A [inputs..., rank] and
    B [rank, outputs...] times `scale`; a stack of them has the axis of layers in front."""

    kernel: Any
    a: Any
    b: Any
    scale: float = dataclasses.field(metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        return self.kernel.shape

    @jax.named_scope("lora")
    def times(self, x_NI: jax.Array) -> jax.Array:
        """x by this kernel, in x's dtype: x W + (x A) B, added in float32.

        W + A B itself would lose A B: in bfloat16 a sum moves from W in steps of 2^-8 of it.
        """
        inputs, rank = x_NI.shape[-1], len(self.b)
        kernel_IO = self.kernel.astype(x_NI.dtype).reshape(inputs, -1)
        a_IR, b_RO = self.a.reshape(inputs, -1), self.scale * self.b.reshape(rank, -1)
        return checkpoint_name(_product(x_NI, kernel_IO, a_IR, b_RO), PRODUCT)

    @jax.named_scope("lora")
    def sum(self) -> jax.Array:
        """W + A B, made in float32, in the type of W."""
        a, b = self.a.reshape(-1, len(self.b)), self.b.reshape(len(self.b), -1)
        product = jnp.matmul(a, b, precision="highest").reshape(self.shape)
        return (self.kernel.astype(jnp.float32) + self.scale * product).astype(self.kernel.dtype)


def is_adapted(x: Any) -> bool:
    return isinstance(x, Adapted)


def map_kernels(function: Callable, params: Any, others: Any) -> Any:
    """`jax.tree.map` of parameters with another tree; adapters beside a kernel stay as they are."""

    def one(x, other):
        if is_adapted(x):
            return dataclasses.replace(x, kernel=function(x.kernel, other))
        return function(x, other)

    return jax.tree.map(one, params, others, is_leaf=is_adapted)


@jax.custom_vjp
def _product(x_NI, kernel_IO, a_IR, b_RO):
    low_a, low_b = a_IR.astype(x_NI.dtype), b_RO.astype(x_NI.dtype)
    return (_float32(x_NI, kernel_IO) + _float32(x_NI @ low_a, low_b)).astype(x_NI.dtype)


def _product_forward(*operands):
    return _product(*operands), operands


def _product_backward(operands, g_NO):
    """Operands in the type of x, as everywhere; gradients of A and B in float32, none of W."""
    x_NI, kernel_IO, a_IR, b_RO = operands
    low_a, low_b = a_IR.astype(x_NI.dtype), b_RO.astype(x_NI.dtype)
    g_NR = g_NO @ low_b.T
    g_NI = _float32(g_NO, kernel_IO.T) + _float32(g_NR, low_a.T)
    return (
        g_NI.astype(x_NI.dtype),
        None,
        _float32(x_NI.T, g_NR).astype(a_IR.dtype),
        _float32((x_NI @ low_a).T, g_NO).astype(b_RO.dtype),
    )


_product.defvjp(_product_forward, _product_backward)


def _float32(x: jax.Array, y: jax.Array) -> jax.Array:
    """The product in float32. As a batch of one, which no policy of remat keeps: it is the sum, in
    x's dtype, that is worth its memory (PRODUCT)."""
    return jnp.matmul(x[None], y[None], preferred_element_type=jnp.float32)[0]


def target_names(model: ModelConfig) -> tuple[str, ...]:
    """The matrices of a layer, as `Lora.targets` names them: 'query', 'key', ..., 'down'."""
    return tuple(_kernels(model))


def _kernels(model: ModelConfig) -> dict[str, ParameterSpec]:
    """{'query': the row of 'layers/attention/query/kernel'} of all matrices of a layer."""
    rows = [row for row in parameter_table(model) if row.stacked and row.num_input_dims]
    return {row.name.split("/")[-2]: row for row in rows}
