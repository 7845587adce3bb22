"""Held-out loss, perplexity and bits per byte of each source and language.

B rows of a batch, T sequence length, S sources.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from stablelm_jax.model.compute import Compute
from stablelm_jax.model.config import ModelConfig
from stablelm_jax.model.loss import batch_loss, source_sums
from stablelm_jax.model.parameters import parameter_table
from stablelm_jax.parallel import distributed, sharding
from stablelm_jax.parallel.mesh import BATCH_AXES, sum_over

EvalStep = Callable[[Any, Mapping[str, jax.Array]], dict[str, jax.Array]]
Batch = Mapping[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class HeldOut:
    """The held-out text of one source.

    Attributes:
      batches: this process's part of each batch.
      tokens_per_byte: tokens (end-of-text counted) a UTF-8 byte of it.
      language: the one it is in, ISO 639-1; None where it is in several, or in none.
    """

    batches: Iterable[Batch]
    tokens_per_byte: float
    language: str | None = None


def make_eval_step(
    model: ModelConfig, mesh: Mesh, *, num_sources: int, compute: Compute
) -> EvalStep:
    """Jitted f(params, batch) -> {"nll", "tokens"}: float32 [S] sums over the whole batch."""
    compute = compute.forward_only()
    places = sharding.named(mesh, sharding.parameter_specs(parameter_table(model)))

    def local_sums(params, batch):
        _, nll_BT = batch_loss(model, params, batch, compute=compute)
        return sum_over(source_sums(nll_BT, batch, num_sources))

    def eval_step(params, batch):
        return jax.shard_map(
            local_sums,
            mesh=mesh,
            in_specs=(PartitionSpec(), sharding.mesh_axes(["batch"])),
            out_specs=PartitionSpec(),
            axis_names=set(BATCH_AXES),
            check_vma=False,
        )(sharding.gathered(params, compute.dtype, places), batch)

    return jax.jit(eval_step, out_shardings=sharding.replicated(mesh))


class HeldOutError(ValueError):
    """Held-out text cannot be read, here or on another host."""


def evaluate_held_out(
    eval_step: EvalStep,
    params: Any,
    sources: Mapping[str, HeldOut],
    mesh: Mesh,
    stopped: Callable[[], bool] = lambda: False,
) -> dict[str, float | None] | None:
    """Means over held-out text, under the metrics keys `eval/...`.

    Every token counts once: what fills the last row and the last batch has a loss mask of 0.

    Args:
      sources: by name, in the order of their `source_ids`.
      stopped: asked before each batch, on every process alike; whether to leave it.

    Returns:
      See `held_out_line`; None where it was left.

    Raises:
      HeldOutError: on every process, where one of them cannot read.
    """
    nll, tokens = np.zeros(len(sources)), np.zeros(len(sources))
    for source in sources.values():
        for batch in _agreed_batches(source.batches):
            if stopped():
                return None
            sums = jax.device_get(eval_step(params, sharding.put_batch(batch, mesh)))
            nll += sums["nll"]
            tokens += sums["tokens"]
    return held_out_line(sources, nll, tokens)


def _agreed_batches(batches: Iterable[Batch]) -> Iterator[Batch]:
    """Each batch once every process has its part of it, so that none waits for one that failed."""
    iterator = iter(batches)
    while True:
        batch, error = None, None
        try:
            batch = next(iterator, None)
        except (OSError, ValueError) as caught:
            error = caught
        if distributed.anywhere(error is not None):
            text = str(error) if error else "on another host; see its output"
            raise HeldOutError(f"held-out text cannot be read: {text}") from error
        if batch is None:
            return
        yield batch


def held_out_line(
    sources: Mapping[str, HeldOut], nll: np.ndarray, tokens: np.ndarray
) -> dict[str, float | None]:
    """The metrics of sums by source.

    Args:
      nll: nats over the counted tokens of each source, float64 [S].
      tokens: how many these are, [S].

    Returns:
      "eval/loss" (nats a token) and "eval/perplexity" over everything; both and
      "eval/bits_per_byte" again as ".../<source>", and as ".../language/<code>" over the sources of
      one language, tokens and bytes added up. What has no token has no key.
    """
    bytes_ = tokens / np.array([source.tokens_per_byte for source in sources.values()])
    line: dict[str, float | None] = {"eval/loss": None, "eval/perplexity": None}
    if tokens.sum():
        line |= _means("", nll.sum(), tokens.sum())
    for name, *sums in zip(sources, nll, tokens, bytes_):
        line |= _means(f"/{name}", *sums)
    by_language: dict[str, np.ndarray] = {}
    for source, sums in zip(sources.values(), np.stack([nll, tokens, bytes_], axis=1)):
        if source.language is not None:
            by_language[source.language] = by_language.get(source.language, 0.0) + sums
    for language, sums in sorted(by_language.items()):
        line |= _means(f"/language/{language}", *sums)
    return line


def _means(
    suffix: str, nll: float, tokens: float, bytes_: float | None = None
) -> dict[str, float | None]:
    if not tokens:
        return {}
    loss = float(nll / tokens)
    line = {f"eval/loss{suffix}": loss, f"eval/perplexity{suffix}": _exp(loss)}
    if bytes_ is not None:
        line[f"eval/bits_per_byte{suffix}"] = float(nll / math.log(2) / bytes_)
    return line


def _exp(loss: float) -> float | None:
    """None where it is too large for a float: JSON has no infinity."""
    return math.exp(loss) if loss < 709 else None


def mean_losses(
    prefix: str, sources: Sequence[str], nll: np.ndarray, tokens: np.ndarray
) -> dict[str, float | None]:
    """Token-weighted means in nats: over all, and of each source that has tokens."""
    line = {prefix: float(nll.sum() / tokens.sum()) if tokens.sum() else None}
    for name, source_nll, source_tokens in zip(sources, nll, tokens):
        if source_tokens:
            line[f"{prefix}/{name}"] = float(source_nll / source_tokens)
    return line
