"""The two small modules everything is made of: a projection and a norm.

`make(name)` gives the parameter of that name as an nnx.Param, or None when the table of
parameters has none: the table alone decides which biases exist.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from stablelm_jax.kernels import norms
from stablelm_jax.kernels.device import traced_device
from stablelm_jax.model.config import ModelConfig
from stablelm_jax.model.lora import Adapted

Make = Callable[[str], "nnx.Param | None"]


class Projection(nnx.Module):
    """A matrix product over the last `num_in` dims of x, with a bias where the table has one."""

    def __init__(self, make: Make, name: str, num_in: int = 1):
        self.kernel = make(f"{name}/kernel")
        self.bias = make(f"{name}/bias")
        self.num_in = num_in

    def __call__(self, x: jax.Array) -> jax.Array:
        kernel = self.kernel.get_value()
        if traced_device().platform == "tpu" and not isinstance(kernel, Adapted):
            # Dims as they are: joined, XLA:TPU lays out every operand and result anew.
            y = jnp.tensordot(x, kernel.astype(x.dtype), self.num_in)
        else:
            in_shape, out_shape = kernel.shape[: self.num_in], kernel.shape[self.num_in :]
            # One matrix by one: with more dims XLA:CPU copies operands of the backward products.
            y = product(x.reshape(-1, math.prod(in_shape)), kernel)
            y = y.reshape(*x.shape[: x.ndim - self.num_in], *out_shape)
        return y if self.bias is None else y + self.bias[...].astype(x.dtype)


def product(x: jax.Array, kernel: jax.Array | Adapted, dtype: jnp.dtype | None = None) -> jax.Array:
    """x [..., inputs] by a kernel [inputs..., outputs...], in x's dtype; `dtype`: the result's."""
    if isinstance(kernel, Adapted):
        return kernel.times(x)
    kernel = kernel.astype(x.dtype).reshape(x.shape[-1], -1)
    return jnp.matmul(x, kernel, preferred_element_type=dtype)


class Norm(nnx.Module):
    """Normalises the last dim, as kernels/norms.py says, by the kind that `config.norm` names."""

    def __init__(self, make: Make, name: str, config: ModelConfig):
        self.scale = make(f"{name}/scale")
        self.bias = make(f"{name}/bias")
        self.kind = norms.Kind(config.norm, config.norm_epsilon)

    @jax.named_scope("norm")
    def __call__(self, x: jax.Array) -> jax.Array:
        return norms.norm(x, *self._weights())

    @jax.named_scope("norm")
    def branch(self, x: jax.Array, readers: int, implementation: str):
        """x, and its norm once for each product that reads it, as kernels/norms.py has it."""
        return norms.IMPLEMENTATIONS[implementation](x, *self._weights(), readers)

    def _weights(self) -> tuple[jax.Array, jax.Array | None, norms.Kind]:
        return self.scale[...], None if self.bias is None else self.bias[...], self.kind
