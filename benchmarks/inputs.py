"""What several benchmarks are fed: rows of random documents, changes to a config."""

from __future__ import annotations

import ast
from typing import Any

import numpy as np


def random_segments(rows: int, length: int, mean: float | None, seed: int = 0) -> np.ndarray:
    """Segment ids of documents of exponentially distributed length: int32 [rows, length].

    The mean is that before a row's end cuts its last document. None: one document a row.
    """
    if mean is None:
        return np.ones((rows, length), np.int32)
    begins = np.random.default_rng(seed).random((rows, length)) < 1 / mean
    begins[:, 0] = True
    return np.cumsum(begins, 1, dtype=np.int32)


def typical_segments(rows: int, length: int, mean: float | None) -> np.ndarray:
    """The one of 31 draws of `random_segments` with the median number of visible pairs."""
    draws = [random_segments(rows, length, mean, seed) for seed in range(31)]
    return sorted(draws, key=lambda segments: positions_of(segments).sum())[15]


def positions_of(segments_BT: np.ndarray) -> np.ndarray:
    """Each token's position in its document, int32 [B, T]."""
    index_T = np.arange(segments_BT.shape[1], dtype=np.int32)
    begins_BT = np.diff(segments_BT, axis=1, prepend=segments_BT[:, :1] - 1) != 0
    return index_T - np.maximum.accumulate(np.where(begins_BT, index_T, 0), axis=1)


def fields(text: str) -> dict[str, Any]:
    """'a.b=1,c.d=dots' as {"a.b": 1, "c.d": "dots"}."""
    found = {}
    for part in text.split(","):
        key, _, value = part.partition("=")
        try:
            found[key] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            found[key] = value
    return found
