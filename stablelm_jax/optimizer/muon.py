"""Muon for the matrices of the layers, Adam for all else."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from stablelm_jax.model.parameters import ParameterSpec, flatten, nest

# AdamW's updates have a root mean square of 0.2 to 0.4: so Moonlight, section 2.2.
_ROOT_MEAN_SQUARE = 0.2


def call_here(function: Callable, matrices: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """On one device, where all matrices are whole."""
    return function(matrices)


def scale_by_muon(
    table: Iterable[ParameterSpec],
    *,
    momentum: float,
    steps: int,
    scale: str,
    b1: float,
    b2: float,
    epsilon: float,
    on_whole_layers: Callable = call_here,
) -> optax.GradientTransformation:
    """The direction of Muon: the momentum of a matrix with all its singular values near 1.

        m <- momentum * m + g
        u <- NewtonSchulz(g + momentum * m) * factor

    A matrix is a layer's kernel, inputs x outputs: the layers are a batch, and the heads of a
    projection are one matrix together, query, key and value each its own. Embedding, head, norms
    and biases have Adam's direction, with `b1`, `b2` and `epsilon`.

    Args:
      table: of what is trained.
      momentum, steps: of the above, and the number of Newton-Schulz iterations.
      scale: "moonlight": the factor is 0.2 sqrt(max(inputs, outputs)), with which AdamW's learning
        rate and weight decay carry over; "jordan": sqrt(max(1, outputs / inputs)).
      on_whole_layers: calls f({name: matrices}) where each matrix lies whole on a device.

    The state: "count"; "m", the momentum of matrices and Adam's first moment of all else; "v",
    Adam's second moment.

    Source: K. Jordan et al. 2024, "Muon: an optimizer for hidden layers in neural networks" (the
    iteration and its coefficients, Nesterov's momentum, which parameters, query, key and value
    apart); Liu et al. 2025, "Muon is scalable for LLM training", arXiv 2502.16982 (Moonlight:
    weight decay, the factor, one learning rate for both).
    """
    matrices = {row.name: row for row in table if row.layer_matrix}
    factors = {name: _factor(row, scale) for name, row in matrices.items()}
    # Momentum is kept here, undivided: optax would correct its bias as Adam's.
    newton_schulz = optax.contrib.scale_by_muon(
        ns_steps=steps,
        beta=0.0,
        nesterov=False,
        weight_dimension_numbers={name: _dims(row) for name, row in matrices.items()},
    )
    adam = optax.scale_by_adam(b1, b2, epsilon)

    def others(tree: Any) -> dict[str, jax.Array]:
        return {name: leaf for name, leaf in flatten(tree).items() if name not in matrices}

    def orthogonal(ahead: dict[str, jax.Array]) -> dict[str, jax.Array]:
        found, _ = newton_schulz.update(ahead, newton_schulz.init(ahead))
        return {name: factors[name] * matrix for name, matrix in found.items()}

    def init(params: Any) -> dict[str, Any]:
        zeros = jax.tree.map(jnp.zeros_like, params)
        return {"count": jnp.zeros((), jnp.int32), "m": zeros, "v": nest(others(zeros))}

    def update(gradients: Any, state: dict[str, Any], params: Any = None) -> tuple[Any, Any]:
        g, m = flatten(gradients), flatten(state["m"])
        m = {name: momentum * m[name] + g[name] for name in matrices}
        ahead = {name: g[name] + momentum * m[name] for name in matrices}
        ours = on_whole_layers(orthogonal, ahead)
        moments = optax.ScaleByAdamState(state["count"], others(state["m"]), others(state["v"]))
        theirs, moments = adam.update(others(gradients), moments)
        new = {"count": moments.count, "m": nest(moments.mu | m), "v": nest(moments.nu)}
        return nest(theirs | ours), new

    return optax.GradientTransformation(init, update)


def newton_schulz_flops(table: Iterable[ParameterSpec], steps: int) -> int:
    """FLOPs of one update of all layers: a turn is X X^T, its square, and the product with X."""
    sizes = [(row.shape[0], *sorted(row.layer_matrix)) for row in table if row.layer_matrix]
    return steps * sum(layers * (4 * m * m * n + 2 * m**3) for layers, m, n in sizes)


def _dims(row: ParameterSpec) -> optax.contrib.MuonDimensionNumbers:
    split = 1 + row.num_input_dims
    dims = tuple(range(len(row.shape)))
    return optax.contrib.MuonDimensionNumbers(dims[1:split], dims[split:])


def _factor(row: ParameterSpec, scale: str) -> float:
    inputs, outputs = row.layer_matrix
    if scale == "jordan":
        return math.sqrt(max(1, outputs / inputs))
    return _ROOT_MEAN_SQUARE * math.sqrt(max(inputs, outputs))
