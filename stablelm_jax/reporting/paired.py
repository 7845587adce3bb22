"""Intervals of paired differences: over documents, and over blocks of steps.

Both are ratios of sums, nats over tokens, of parts that are taken as drawn at random: documents
are, and blocks of steps so long that one hardly depends on the one before.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import numpy as np
from scipy.special import stdtrit

from stablelm_jax.training.held_out import count_and_variance

LEVEL = 0.95  # of all intervals here
_MIN_BLOCKS = 8
_BIAS = 0.1  # share of the variance that too short blocks may hide


@dataclasses.dataclass(frozen=True)
class Interval:
    """A mean and its interval; `low` and `high` are None where too little is known of its error."""

    mean: float
    low: float | None = None
    high: float | None = None

    @property
    def is_zero_within(self) -> bool | None:
        """Whether the interval holds 0; None where there is none."""
        return None if self.low is None else self.low <= 0 <= self.high


def of_documents(parts: Sequence[np.ndarray]) -> Interval:
    """The nats a token of documents, those of several strata (sources) together.

    Args:
      parts: of each stratum nats (of two runs: their differences) and tokens of each document,
        [2, D].

    The standard error is the linearised one of a ratio of sums (Cochran, Sampling Techniques, 1977,
    chapter 6), the quantile Student's with the degrees of freedom of Welch and Satterthwaite. A
    stratum of one document shows no error of its own: it is joined to the next smallest one.
    """
    parts = sorted((part[:, part[1] > 0] for part in parts), key=lambda part: part.shape[1])
    while len(parts) > 1 and parts[0].shape[1] < 2:
        parts[:2] = [np.concatenate(parts[:2], axis=1)]
    nats, tokens = np.concatenate(parts, axis=1).sum(axis=1)
    counts, variances = np.array([count_and_variance(part) for part in parts]).T
    mean, variance = float(nats / tokens), variances.sum()
    if not math.isfinite(variance):
        return Interval(mean)
    if variance == 0:
        return Interval(mean, mean, mean)
    freedom = variance**2 / (variances**2 / (counts - 1)).sum()
    half = float(stdtrit(freedom, (1 + LEVEL) / 2) * math.sqrt(variance) / tokens)
    return Interval(mean, mean - half, mean + half)


def of_steps(nats_T: np.ndarray, tokens_T: np.ndarray) -> tuple[Interval, int]:
    """The nats a token of consecutive steps, and how many of them make a block.

    Batch means (Law, Simulation Modeling and Analysis, chapter 9): whole blocks are treated as
    documents are. Steps left over at the beginning go into the first block.
    """
    residual_T = nats_T - nats_T.sum() / tokens_T.sum() * tokens_T
    length = block_length(residual_T)
    edges = np.arange(len(nats_T) % length, len(nats_T), length)
    edges[0] = 0
    blocks = np.stack([np.add.reduceat(values, edges) for values in (nats_T, tokens_T)])
    if len(edges) < _MIN_BLOCKS:
        return Interval(float(nats_T.sum() / tokens_T.sum())), length
    return of_documents([blocks]), length


def block_length(residual_T: np.ndarray) -> int:
    """Steps of a block, chosen from the series itself.

    Of an AR(1) series with coefficient r, blocks of b steps hide 2 r / (1 - r^2) / b of the
    variance of its mean (Carlstein, Annals of Statistics 14, 1986): b is where that is a tenth.
    A slow drift below much noise shows in no r of neighbours, so the length is doubled while
    neighbouring blocks are still alike (Fishman, Management Science 24, 1978). At least
    `_MIN_BLOCKS` blocks are left where there are as many steps.
    """
    steps = len(residual_T)
    most = max(1, steps // _MIN_BLOCKS)
    near = _correlation(residual_T)
    near = min(near + (1 + 3 * near) / steps, 0.99)  # its bias (Kendall, Biometrika 41, 1954)
    length = 1 if near <= 0 else math.ceil(2 * near / (1 - near**2) / _BIAS)
    while (length := min(length, most)) < most:
        blocks = residual_T[steps % length :].reshape(-1, length).sum(axis=1)
        if _correlation(blocks) <= 1 / math.sqrt(len(blocks)):
            break
        length *= 2
    return length


def _correlation(series: np.ndarray) -> float:
    """Of neighbours."""
    series = series - series.mean()
    square = float(series @ series)
    return float(series[1:] @ series[:-1]) / square if square else 0.0
