"""AdamW as Stable LM 2 was trained with it, from optax's parts."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from stablelm_jax.model.parameters import ParameterSpec, nest


def adamw(
    schedule: optax.Schedule,
    mask: Any,
    *,
    b1: float,
    b2: float,
    epsilon: float,
    weight_decay: float,
    clip_norm: float,
) -> optax.GradientTransformation:
    """Clip the gradient's global norm, Adam with bias correction, decoupled decay, learning rate.

        g <- g * min(1, clip_norm / |g|)
        p <- p - schedule(count) * (m^ / (sqrt(v^) + epsilon) + weight_decay * mask * p)

    Numbers are the fields of a config's group `optimizer`; `mask` is a tree of bools like the
    parameters, as `decay_mask` gives it. Parameters and both moments are float32. The
    state holds one `mu`, `nu` and `count` (updates so far), which also drives the schedule, so a
    checkpoint of the three is all of it.

    Source: Stable LM 2's published configs (betas, epsilon, clip, decay) and GPT-NeoX, which
    decays all but norms and biases.
    """
    direction = optax.chain(
        optax.clip_by_global_norm(clip_norm),
        optax.scale_by_adam(b1, b2, epsilon),
        optax.add_decayed_weights(weight_decay, mask),
    )

    def init(params: Any) -> Any:
        _check_float32(params)
        return direction.init(params)

    def update(gradients: Any, state: Any, params: Any) -> tuple[Any, Any]:
        # optax.scale_by_schedule would keep a second count
        learning_rate = schedule(optax.tree_utils.tree_get(state, "count"))
        updates, state = direction.update(gradients, state, params)
        return jax.tree.map(lambda u: -learning_rate * u, updates), state

    return optax.GradientTransformation(init, update)


def decay_mask(table: Iterable[ParameterSpec]) -> dict[str, Any]:
    """Nested dict like the parameters: True where weight decay applies (`ParameterSpec.decay`)."""
    return nest({spec.name: spec.decay for spec in table})


def _check_float32(params: Any) -> None:
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        if leaf.dtype != jnp.float32:
            name = jax.tree_util.keystr(path, simple=True, separator="/")
            raise ValueError(
                f"parameter {name} is {leaf.dtype}: the optimizer keeps float32 weights; "
                "cast for the forward pass only"
            )
