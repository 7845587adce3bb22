"""The loss of a batch and of every token: contract 1's arrays in, nats out.

B rows, T sequence length, D width, V vocabulary, S sources.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from stablelm_jax.kernels.cross_entropy import cross_entropy as cross_entropy_kernel
from stablelm_jax.model.compute import Compute
from stablelm_jax.model.config import ModelConfig
from stablelm_jax.model.transformer import Fetch, head_kernel, hidden_states

Batch = dict[str, jax.Array]


def batch_loss(
    model: ModelConfig,
    params: Any,
    batch: Batch,
    scale: jax.Array | float = 1.0,
    *,
    compute: Compute,
    fetch: Fetch | None = None,
) -> tuple[jax.Array, jax.Array]:
    """scale * sum(nll), and nll: each target's negative log likelihood in nats, 0 where masked.

    Both are float32, nll [B, T]. The gradient comes from the first alone. `fetch` is that of
    `hidden_states`, and is asked for the group of the head too.
    """
    inputs, mask_BT = head_inputs(model, params, batch, compute, fetch), batch["loss_mask"]
    loss, nll_BT = head_loss(*inputs, batch, scale * mask_BT, compute)
    return loss, nll_BT * mask_BT


def head_inputs(
    model: ModelConfig, params: Any, batch: Batch, compute: Compute, fetch: Fetch | None = None
) -> tuple[jax.Array, jax.Array]:
    """What `head_loss` begins with: hidden states [B, T, D] and the head's kernel [D, V]."""
    inputs_BT = batch["tokens"], batch["segment_ids"], batch["positions"]
    x_BTD = hidden_states(model, params, *inputs_BT, compute, fetch)
    return x_BTD, head_kernel(params, fetch).astype(compute.dtype)


def head_loss(
    x_BTD: jax.Array, kernel_DV: jax.Array, batch: Batch, weights_BT: jax.Array, compute: Compute
) -> tuple[jax.Array, jax.Array]:
    """sum(weights * nll), which has a gradient, and nll [B, T], which has none."""
    choices = {"implementation": compute.cross_entropy, "num_valid": compute.num_valid_ids}
    return cross_entropy_kernel(x_BTD, kernel_DV, batch["targets"], weights_BT, **choices)


def source_sums(nll_BT: jax.Array, batch: Batch, num_sources: int) -> dict[str, jax.Array]:
    """{"nll", "tokens"}: losses and counted tokens of a batch by source, float32 [S]."""
    by_token = {"nll": nll_BT, "tokens": batch["loss_mask"]}
    return by_source(by_token, batch, num_sources)


def by_source(values: dict[str, jax.Array], batch: Batch, num_sources: int) -> dict[str, jax.Array]:
    """Sums over the rows of each source, float32 [S], of values [B, ...]."""
    return {
        name: jax.ops.segment_sum(jnp.sum(values_B_, axis=1), batch["source_ids"], num_sources)
        for name, values_B_ in values.items()
    }
