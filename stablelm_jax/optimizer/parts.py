"""What all optimizers share: the form of their state, clipping, weight decay, the learning rate."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from stablelm_jax.model.parameters import ParameterSpec, nest

# A field of a state of optax, by the name that a checkpoint has for it where that is another one.
_STORED_AS = {"mu": "m", "nu": "v", "m1": "m", "m2": "m_slow", "count_m2": "count"}


class Optimizer(NamedTuple):
    """How weights change.

    Its state is a plain dict, stored in checkpoints as it is: trees of float32 under the names of
    the parameters, all of them or some, and scalars, one of them "count", the updates so far.

    Attributes:
      init: f(params) -> state.
      update: f(gradients, state, params) -> (what is to be added to the params, state).
      gradient_at: f(params, state) -> the weights at which the gradient is taken.
      in_place: None, or the same update as a CPU does it fastest: f(gradients, their norm, state,
        params, good) -> (params, state), both as they were unless `good`.
    """

    init: Callable[[Any], dict[str, Any]]
    update: Callable[[Any, dict[str, Any], Any], tuple[Any, dict[str, Any]]]
    gradient_at: Callable[[Any, dict[str, Any]], Any] = lambda params, state: params
    in_place: Callable[..., tuple[Any, dict[str, Any]]] | None = None


def decoupled(
    direction: optax.GradientTransformation,
    schedule: optax.Schedule,
    mask: Any,
    *,
    weight_decay: float,
    clip_norm: float,
) -> Optimizer:
    """Clip the gradient's global norm, a direction, decoupled decay, learning rate.

        g <- g * min(1, clip_norm / |g|)
        p <- p - schedule(count) * (direction(g) + weight_decay * mask * p)

    `direction`: has a dict for its state, as `with_named_state` gives it. `mask`: a tree of bools
    like the parameters, as `decay_mask` gives it. The one count drives the schedule too.
    """
    clip = optax.clip_by_global_norm(clip_norm)
    decay = optax.add_decayed_weights(weight_decay, mask)

    def init(params: Any) -> dict[str, Any]:
        _check_float32(params)
        return direction.init(params)

    def update(gradients: Any, state: dict[str, Any], params: Any) -> tuple[Any, dict[str, Any]]:
        # optax.scale_by_schedule would keep a second count
        learning_rate = schedule(state["count"])
        clipped, _ = clip.update(gradients, clip.init(params))
        updates, state = direction.update(clipped, state, params)
        updates, _ = decay.update(updates, decay.init(params), params)
        return jax.tree.map(lambda u: -learning_rate * u, updates), state

    return Optimizer(init, update)


def with_named_state(inner: optax.GradientTransformation) -> optax.GradientTransformation:
    """`inner` of optax, its state a dict under the names of checkpoints; others there are ignored.

    Fields of one name have one value: optax counts twice for AdEMAMix.
    """
    empty = inner.init({})
    names = {field: _STORED_AS.get(field, field) for field in empty._fields}

    def named(state: Any) -> dict[str, Any]:
        return {name: getattr(state, field) for field, name in names.items()}

    def update(gradients: Any, state: dict[str, Any], params: Any = None) -> tuple[Any, Any]:
        fields = {field: state[name] for field, name in names.items()}
        updates, new = inner.update(gradients, type(empty)(**fields), params)
        return updates, named(new)

    return optax.GradientTransformation(lambda params: named(inner.init(params)), update)


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
