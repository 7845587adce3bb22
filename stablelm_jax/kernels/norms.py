"""Norms over the last dim, and a registry of ways to compute those of a layer.

D width; arrays are [..., D].
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Kind(NamedTuple):
    """'layer': LayerNorm. 'rms': RMSNorm (Zhang and Sennrich 2019, arXiv 1910.07467, equation 4),
    which takes no mean off. `epsilon` is added to the variance."""

    name: str
    epsilon: float


def norm(x: jax.Array, scale_D: jax.Array, bias_D: jax.Array | None, kind: Kind) -> jax.Array:
    """The plain form. Statistics, scale and bias in float32, the result in x's dtype."""
    y = x.astype(jnp.float32)
    if kind.name == "layer":
        y = y - jnp.mean(y, -1, keepdims=True)
    variance = jnp.mean(jnp.square(y), -1, keepdims=True)
    y = y * jax.lax.rsqrt(variance + kind.epsilon) * scale_D
    if bias_D is not None:
        y = y + bias_D
    return y.astype(x.dtype)


def xla(x, scale_D, bias_D, kind, readers):
    """x, which goes on beside its norm, and the norm, once for each product that reads it.

    Each of these has a gradient of its own: a kernel adds them up as it reads them.
    """
    return x, readers * (norm(x, scale_D, bias_D, kind),)


def pallas_gpu(*arguments):
    """As `xla`, in one kernel forward and one backward, for GPUs alone (norms_gpu.py)."""
    from stablelm_jax.kernels import norms_gpu  # loads Pallas, which takes a second

    return norms_gpu.pallas_gpu(*arguments)


IMPLEMENTATIONS = {"xla": xla, "pallas_gpu": pallas_gpu}
