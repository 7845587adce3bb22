"""Held-out loss and bits per byte of each source.

B rows of a batch, T sequence length, S sources.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from stablelm_jax.model.config import ModelConfig
from stablelm_jax.model.loss import batch_loss, source_sums
from stablelm_jax.model.parameters import parameter_table
from stablelm_jax.parallel import sharding
from stablelm_jax.parallel.mesh import BATCH_AXES, sum_over

EvalStep = Callable[[Any, Mapping[str, jax.Array]], dict[str, jax.Array]]


def make_eval_step(
    model: ModelConfig, mesh: Mesh, *, num_sources: int, dtype: Any, **forward: Any
) -> EvalStep:
    """Jitted f(params, batch) -> {"nll", "tokens"}: float32 [S] sums over the whole batch.

    `forward`: arguments of `batch_loss`: attention, cross_entropy, num_valid_ids.
    """
    places = sharding.named(mesh, sharding.parameter_specs(parameter_table(model)))

    def local_sums(params, batch):
        _, nll_BT = batch_loss(model, params, batch, dtype=dtype, remat="none", **forward)
        return sum_over(source_sums(nll_BT, batch, num_sources))

    def eval_step(params, batch):
        return jax.shard_map(
            local_sums,
            mesh=mesh,
            in_specs=(PartitionSpec(), sharding.mesh_axes(["batch"])),
            out_specs=PartitionSpec(),
            axis_names=set(BATCH_AXES),
            check_vma=False,
        )(sharding.gathered(params, dtype, places), batch)

    return jax.jit(eval_step, out_shardings=sharding.replicated(mesh))


def evaluate_held_out(
    eval_step: EvalStep,
    params: Any,
    batches: Mapping[str, Iterable[Mapping[str, np.ndarray]]],
    tokens_per_byte: Mapping[str, float],
    mesh: Mesh,
    stopped: Callable[[], bool] = lambda: False,
) -> dict[str, float | None] | None:
    """Means over held-out text, under the metrics keys `eval/...`.

    Args:
      batches: for each source, in the order of its `source_ids`, this process's batches.
      tokens_per_byte: tokens (end-of-text counted) a byte of each source's held-out text.
      stopped: asked before each batch, on every process alike; whether to leave it.

    Returns:
      "eval/loss" and "eval/loss/<source>" in nats a token, "eval/bits_per_byte/<source>"; None
      where it was left.
    """
    names = list(batches)
    nll, tokens = np.zeros(len(names)), np.zeros(len(names))
    for source_batches in batches.values():
        for batch in source_batches:
            if stopped():
                return None
            sums = jax.device_get(eval_step(params, sharding.put_batch(batch, mesh)))
            nll += sums["nll"]
            tokens += sums["tokens"]
    line = mean_losses("eval/loss", names, nll, tokens)
    for name in names:
        loss = line.get(f"eval/loss/{name}")
        if loss is not None:
            line[f"eval/bits_per_byte/{name}"] = loss / math.log(2) * tokens_per_byte[name]
    return line


def mean_losses(
    prefix: str, sources: Sequence[str], nll: np.ndarray, tokens: np.ndarray
) -> dict[str, float | None]:
    """Token-weighted means in nats: over all, and of each source that has tokens."""
    line = {prefix: float(nll.sum() / tokens.sum()) if tokens.sum() else None}
    for name, source_nll, source_tokens in zip(sources, nll, tokens):
        if source_tokens:
            line[f"{prefix}/{name}"] = float(source_nll / source_tokens)
    return line
