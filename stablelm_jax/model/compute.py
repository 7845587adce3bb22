"""How a forward pass is computed, as opposed to what it computes."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class Compute:
    """Choices that change speed and memory, and results only by rounding. Hashable.

    Attributes:
      dtype: type of matrix products and activations. Norm statistics, softmax and rotary are
        float32 whatever it is.
      remat: what the backward pass computes again: 'none', 'dots' (all but matrix products and
        attention), 'attention' (all but attention: one more width a token and layer is kept),
        'full' (everything).
      attention: name of an implementation in kernels/attention.py.
      cross_entropy: name of an implementation in kernels/cross_entropy.py.
      num_valid_ids: rows of the vocabulary that may be predicted; None: all, padding too.
      unroll: layers compiled one after the other in each turn of the loop over layers.
    """

    dtype: Any = jnp.float32
    remat: str = "none"
    attention: str = "auto"
    cross_entropy: str = "auto"
    num_valid_ids: int | None = None
    unroll: int = 1

    def forward_only(self) -> Compute:
        """The same without what only a backward pass needs."""
        return dataclasses.replace(self, remat="none", unroll=1)
