"""What attention's forward pass keeps for its backward pass: every kernel gives it these names."""

from __future__ import annotations

import jax
from jax.ad_checkpoint import checkpoint_name

# If a rematerialisation policy saves these, backward does not compute attention again.
SAVED_NAMES = ("attention_output", "attention_logsumexp")


def named(output: jax.Array, logsumexp: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Both under their SAVED_NAMES, for the policies of `jax.checkpoint`."""
    return checkpoint_name(output, SAVED_NAMES[0]), checkpoint_name(logsumexp, SAVED_NAMES[1])
