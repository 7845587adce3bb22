"""The loss of every token of a batch: contract 1's arrays in, nats out.

B rows, T sequence length, D width, V vocabulary, S sources.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from stablelm_jax.kernels.cross_entropy import cross_entropy
from stablelm_jax.model.config import ModelConfig
from stablelm_jax.model.transformer import Fetch, hidden_states

Batch = dict[str, jax.Array]


def token_losses(
    model: ModelConfig,
    params: Any,
    batch: Batch,
    *,
    dtype,
    remat: str,
    attention: str,
    unroll: int = 1,
    fetch: Fetch | None = None,
) -> jax.Array:
    """Negative log likelihood of each target in nats, float32 [B, T], 0 where masked.

    The other arguments are those of `hidden_states`; `fetch` is asked for the group 'head' too.
    """
    x_BTD = hidden_states(
        model,
        params,
        batch["tokens"],
        batch["segment_ids"],
        batch["positions"],
        dtype=dtype,
        remat=remat,
        attention=attention,
        unroll=unroll,
        fetch=fetch,
    )
    head = params["head"] if fetch is None else fetch("head", params["head"])
    kernel_DV = head["kernel"].astype(dtype)
    return cross_entropy(x_BTD, kernel_DV, batch["targets"]) * batch["loss_mask"]


def sums_by_source(values_BT: jax.Array, source_ids_B: jax.Array, num_sources: int) -> jax.Array:
    """Sums over rows and positions for each source, [S]."""
    return jax.ops.segment_sum(jnp.sum(values_BT, axis=1), source_ids_B, num_sources)
