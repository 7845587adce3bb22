"""How a forward pass is computed, as opposed to what it computes."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class Compute:
    """Choices that change speed and memory, and results only by rounding. Hashable."""

    # of matrix products and activations; norm statistics, softmax and rotary are always float32
    dtype: Any = jnp.float32
    # what the backward pass computes again: 'none', 'dots' (all but matrix products and attention),
    # 'attention' (all but attention: one more width a token and layer is kept), 'full' (everything)
    remat: str = "none"
    attention: str = "auto"  # name of an implementation in kernels/attention.py
    norms: str = "xla"  # of a layer's two norms; name of an implementation in kernels/norms.py
    cross_entropy: str = "auto"  # name of an implementation in kernels/cross_entropy.py
    num_valid_ids: int | None = None  # rows of the vocabulary that may be predicted; None: all
    unroll: int = 1  # layers compiled one after the other in each turn of the loop over layers

    def forward_only(self) -> Compute:
        """The same without what only a backward pass needs."""
        return dataclasses.replace(self, remat="none", unroll=1)
