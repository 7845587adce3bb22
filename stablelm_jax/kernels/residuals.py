"""What attention's forward pass keeps for its backward pass, by name: every kernel tags these."""

from __future__ import annotations

import jax
from jax.ad_checkpoint import checkpoint_name

# What a rematerialisation policy saves, by name, to spare backward the attention itself.
SAVED_NAMES = ("attention_output", "attention_logsumexp")


def named(output: jax.Array, logsumexp: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Both under their SAVED_NAMES, for the policies of `jax.checkpoint`."""
    return checkpoint_name(output, SAVED_NAMES[0]), checkpoint_name(logsumexp, SAVED_NAMES[1])
