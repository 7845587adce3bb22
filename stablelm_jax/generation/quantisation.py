"""Weights as small integers, for decoding: half or a quarter of bfloat16's bytes are read a token.

A matrix of I inputs and O outputs (several dims each, as the model has them) is held as whole
numbers [groups, I / groups, O] with a float32 scale for each group and output: symmetric, rounded
to nearest. int8 has one group of all inputs, int4 groups of 128.

R rows of x, g groups, I inputs of a group, O outputs.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

# name: (type, largest number, inputs of a group; 0: all)
METHODS = {"int8": (jnp.int8, 127, 0), "int4": (jnp.int4, 7, 128)}

# Rows of x that are multiplied group by group.
MOST_ROWS = 256


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Quantised:
    """A matrix that takes an array's place in a projection: it is one again in `astype`."""

    values_gIO: jax.Array
    scale_g1O: jax.Array
    shape: tuple[int, ...] = dataclasses.field(metadata={"static": True})

    def __getitem__(self, index: Any) -> Quantised:
        assert index is ..., "a projection reads the whole matrix"
        return self

    def product(self, x: jax.Array, dtype: jnp.dtype) -> jax.Array:
        """x [..., inputs] by the matrix, [..., O] in `dtype`: whole numbers are multiplied, sums
        scaled.

        Scaled first, the matrix would be written to memory before it is multiplied (XLA for GPUs);
        which is right for many rows, whose sums of each group would take more.
        """
        groups, size = self.values_gIO.shape[:2]
        x_RgI = x.reshape(-1, groups, size)
        if groups > 1 and len(x_RgI) > MOST_ROWS:
            kernel_IO = self.matrix().astype(x.dtype).reshape(groups * size, -1)
            return jnp.matmul(x, kernel_IO, preferred_element_type=dtype)
        values_gIO = self.values_gIO.reshape(groups, size, -1).astype(x.dtype)
        sums_gRO = jnp.einsum("rgi,gio->gro", x_RgI, values_gIO, preferred_element_type=jnp.float32)
        y_RO = jnp.sum(sums_gRO * self.scale_g1O.reshape(groups, 1, -1), axis=0)
        return y_RO.astype(dtype).reshape(*x.shape[:-1], -1)

    def matrix(self) -> jax.Array:
        """What it stands for, float32."""
        return (self.values_gIO.astype(jnp.float32) * self.scale_g1O).reshape(self.shape)


def quantised(kernel: jax.Array, method: str, num_in: int = 1, parts: int = 1) -> Quantised:
    """A kernel whose first `num_in` dims are its inputs, as whole numbers.

    Args:
      parts: into which the inputs may be split over devices; no group lies across two.
    """
    dtype, largest, group = METHODS[method]
    inputs = math.prod(kernel.shape[:num_in])
    size = math.gcd(inputs // parts, group) if group else inputs
    kernel_gIO = kernel.reshape(inputs // size, size, *kernel.shape[num_in:]).astype(jnp.float32)
    scale_g1O = jnp.max(jnp.abs(kernel_gIO), axis=1, keepdims=True) / largest
    values_gIO = jnp.round(kernel_gIO / jnp.where(scale_g1O == 0, 1, scale_g1O))
    return Quantised(values_gIO.astype(dtype), scale_g1O, kernel.shape)


def quantised_spec(spec: PartitionSpec, method: str, num_in: int = 1) -> tuple[PartitionSpec, ...]:
    """How values and scales lie on the mesh where the kernel would lie as `spec`."""
    axis, outputs = spec[0], spec[num_in:]
    is_one_group = METHODS[method][2] == 0
    values = (None, axis) if is_one_group else (axis, None)
    scale = (None, None) if is_one_group else (axis, None)
    return PartitionSpec(*values, *outputs), PartitionSpec(*scale, *outputs)
