"""Which token comes next: repetition penalty, temperature, top-k, top-p, in this order.

The order and each rule are those of transformers' processors of logits.

B rows, V vocabulary.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

_LEAST_TEMPERATURE = 1e-6  # below it the likeliest token is certain, and float32 may overflow
_MOST = 1e30  # of a temperature, and of a penalty and its inverse: float32 holds it, products too


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How the next token is chosen; a ValueError where a number is out of its range."""

    temperature: float = 0.0  # 0 takes the likeliest token each time: top_p and top_k do nothing
    top_p: float = 1.0  # the smallest set of tokens whose probability reaches it is sampled from
    top_k: int = 0  # so many of the likeliest tokens are sampled from; 0: all
    # Positive scores of tokens that stand in the prompt or in what was generated are divided by it,
    # negative ones multiplied (Keskar et al. 2019, arXiv 1909.05858).
    repetition_penalty: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature <= _MOST:
            raise ValueError(
                f"temperature is {self.temperature}; give 0 (the likeliest) to {_MOST}"
            )
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p is {self.top_p}; it must be above 0 and at most 1")
        if self.top_k < 0:
            raise ValueError(f"top_k is {self.top_k}; it must be 0 (all) or more")
        if not 1 / _MOST <= self.repetition_penalty <= _MOST:
            raise ValueError(f"repetition_penalty is {self.repetition_penalty}; give 1 or more")

    @property
    def stages(self) -> tuple[str, ...]:
        """What a program must hold for these settings; their numbers it takes as arguments."""
        stages = ["penalty"] if self.repetition_penalty != 1 else []
        if self.temperature >= _LEAST_TEMPERATURE:
            stages += ["draw"]
            stages += ["top_k"] if self.top_k > 0 else []
            stages += ["top_p"] if self.top_p < 1 else []
        return tuple(stages)

    def numbers(self) -> dict[str, np.ndarray]:
        """What a program takes, as scalars."""
        return {
            "temperature": np.float32(self.temperature),
            "top_p": np.float32(self.top_p),
            "top_k": np.int32(min(self.top_k, 2**31 - 1)),
            "repetition_penalty": np.float32(self.repetition_penalty),
            "seed": np.uint32(self.seed % 2**32),
        }


@jax.named_scope("sampling")
def choose(stages, numbers, logits_BV, seen_BV, row_B, position_B) -> jax.Array:
    """The next token of each row, int32 [B].

    Args:
      stages, numbers: those of `Sampling`.
      logits_BV: float32.
      seen_BV: which tokens stand in each row; read by the stage 'penalty' alone.
      row_B, position_B: the random numbers belong to a row and the position that is drawn: nothing
        else in the batch changes them.
    """
    if "penalty" in stages:
        logits_BV = penalised(logits_BV, seen_BV, numbers["repetition_penalty"])
    if "draw" not in stages:
        return jnp.argmax(logits_BV, -1).astype(jnp.int32)
    logits_BV = logits_BV / numbers["temperature"]
    if "top_k" in stages or "top_p" in stages:
        top_k = numbers["top_k"] if "top_k" in stages else logits_BV.shape[-1]
        top_p = numbers["top_p"] if "top_p" in stages else 1.0
        logits_BV = truncated(logits_BV, top_k, top_p)
    key = jax.random.key(numbers["seed"])

    def draw(logits_V, row, position):
        own_key = jax.random.fold_in(jax.random.fold_in(key, row), position)
        return jax.random.categorical(own_key, logits_V)

    return jax.vmap(draw)(logits_BV, row_B, position_B).astype(jnp.int32)


def penalised(logits_BV: jax.Array, seen_BV: jax.Array, penalty: jax.Array) -> jax.Array:
    """The logits with those of tokens that were seen made less likely (for a penalty above 1)."""
    lowered_BV = jnp.where(logits_BV > 0, logits_BV / penalty, logits_BV * penalty)
    return jnp.where(seen_BV, lowered_BV, logits_BV)


def truncated(logits_BV: jax.Array, top_k: jax.Array | int, top_p: jax.Array | float) -> jax.Array:
    """The logits with -inf outside the `top_k` likeliest and the nucleus of `top_p` among those.

    The likeliest token always stays. Tokens that tie with the last one of the set stay too.
    """
    sorted_BV = jnp.sort(logits_BV, axis=-1, descending=True)
    rank_V = jnp.arange(sorted_BV.shape[-1])
    sorted_BV = jnp.where(rank_V < jnp.maximum(top_k, 1), sorted_BV, -jnp.inf)
    probability_BV = jax.nn.softmax(sorted_BV, axis=-1)
    # Summed from the unlikely end, where float32 still sees the smallest of them.
    from_here_BV = jax.lax.cumsum(probability_BV, axis=1, reverse=True)
    is_kept_BV = (from_here_BV > 1 - top_p) | (rank_V == 0)
    least_B1 = jnp.min(jnp.where(is_kept_BV, sorted_BV, jnp.inf), axis=-1, keepdims=True)
    return jnp.where(logits_BV >= least_B1, logits_BV, -jnp.inf)
