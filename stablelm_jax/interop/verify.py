"""Are two programs' logits of the same weights the same?

T positions, V vocabulary.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from stablelm_jax.model.config import ModelConfig
from stablelm_jax.model.transformer import logits

# Prose of several languages, numbers, code: whatever the tokenizer, a few dozen different tokens.
PROMPT = (
    "The tower was finished in 1889, 324 metres high. La tour a été achevée en 1889; der Turm wurde"
    " zwei Jahre später gestrichen. ¿Cuánto pesa? Circa 7.300 tonnellate, dizem os guias.\n\n"
    "def area(radius):\n    return 3.14159 * radius ** 2  # in square metres\n"
)
MAX_TOKENS = 128


class Mismatch(ValueError):
    """What was written does not compute what it was written from."""


@dataclasses.dataclass(frozen=True)
class Difference:
    """How two programs' logits over the same tokens differ."""

    largest: float  # absolute, over all positions and tokens
    spread: float  # standard deviation of the first program's logits: the scale of `largest`
    top1: float  # share of positions at which both find the same token the likeliest
    kl: float  # Kullback-Leibler divergence of the second from the first, nats, mean over positions
    positions: int

    def __str__(self) -> str:
        return (
            f"largest difference of a logit {self.largest:.2g} (they spread by {self.spread:.2g}), "
            f"likeliest token equal {self.top1:.1%}, KL {self.kl:.2g} nats, "
            f"over {self.positions} tokens"
        )


# How far a type may be off: the largest difference in units of the logits' spread, and KL in nats.
# float32's is for the same values in two programs; the others for what a type costs: several times
# what random models showed, which are worse off than trained ones (docs/interop.md). llama.cpp
# rounds activations too: to the type of the matrix, or to eight bits.
LIMITS = {
    "F32": (1e-3, 1e-6),
    "F16": (0.06, 1e-4),
    "BF16": (0.6, 5e-3),
    "Q8_0": (1.5, 0.04),
    "Q6_K": (3.0, 0.15),
    "Q5_K": (5.0, 0.6),
    "Q4_K": (8.0, 2.0),
    "IQ4_XS": (8.0, 2.0),
    "IQ4_NL": (8.0, 2.0),
    "Q4_0": (8.0, 2.0),
    # Random weights keep little of what they compute in so few bits: these find a broken file, a
    # wrong one hardly.
    "Q3_K": (12.0, 4.0),
    "Q2_K": (14.0, 8.0),
}


def prompt_ids(tokenizer: Any) -> list[int]:
    """The fixed prompt as ids of a tokenizer, at most MAX_TOKENS."""
    return tokenizer.encode(PROMPT)[:MAX_TOKENS]


def our_logits(model: ModelConfig, params: Any, ids: Sequence[int]) -> np.ndarray:
    """Our forward pass in float32: [T, V]."""
    tokens_BT = jnp.asarray([ids], jnp.int32)
    positions_BT = jnp.arange(len(ids), dtype=jnp.int32)[None]
    forward = jax.jit(logits, static_argnums=0)
    with jax.default_matmul_precision("float32"):
        out_BTV = forward(model, params, tokens_BT, jnp.ones_like(tokens_BT), positions_BT)
    return np.asarray(out_BTV[0])


def compare(ours_TV: np.ndarray, theirs_TV: np.ndarray) -> Difference:
    """How far the second are from the first; a Mismatch where they cannot be compared."""
    if ours_TV.shape != theirs_TV.shape:
        raise Mismatch(f"logits of the shapes {ours_TV.shape} and {theirs_TV.shape}")
    if not (np.isfinite(ours_TV).all() and np.isfinite(theirs_TV).all()):
        raise Mismatch("some logits are not finite: look at the weights' values")
    ours, theirs = (log_softmax(x.astype(np.float64)) for x in (ours_TV, theirs_TV))
    return Difference(
        largest=float(np.abs(ours_TV - theirs_TV).max()),
        spread=float(ours_TV.std()),
        top1=float((ours_TV.argmax(-1) == theirs_TV.argmax(-1)).mean()),
        kl=max(float((np.exp(ours) * (ours - theirs)).sum(-1).mean()), 0.0),
        positions=len(ours_TV),
    )


def check(who: str, ours_TV: np.ndarray, theirs_TV: np.ndarray, type_code: str = "F32") -> str:
    """What to tell a person of a conversion that `who` has read.

    Raises:
      Mismatch: the second are further from the first than the type's limit in LIMITS.
    """
    difference, (largest, kl) = compare(ours_TV, theirs_TV), LIMITS[type_code]
    told = f"{who}: {difference}; the limit is {largest:g} of their spread, KL {kl:g}"
    if difference.largest > largest * difference.spread or difference.kl > kl:
        raise Mismatch(f"{told}. What was written is wrong and was removed")
    return told


def log_softmax(x_TV: np.ndarray) -> np.ndarray:
    """Log probabilities, in nats."""
    shifted_TV = x_TV - x_TV.max(-1, keepdims=True)
    return shifted_TV - np.log(np.exp(shifted_TV).sum(-1, keepdims=True))
