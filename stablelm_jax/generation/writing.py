"""One batch of prompts that is being continued, from the host's side.

B rows, N tokens of a chunk.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import numpy as np

from stablelm_jax.generation.programs import NOTHING, Programs, Prompts, State


class Writing:
    """The tokens of a batch, a chunk at a time.

    Args:
      first, following: the two programs, with the weights.
      settings: numbers and stop_ids, as the programs take them.
    """

    def __init__(
        self,
        programs: Programs,
        first: Callable[..., tuple[State, jax.Array]],
        following: Callable[..., tuple[State, jax.Array]],
        batch: Prompts,
        settings: tuple[Any, ...],
        max_new_tokens: int,
    ):
        self._programs, self._first, self._following = programs, first, following
        self._max_new_tokens = max_new_tokens
        self._batch = jax.device_put(batch, programs.rows_place())
        self._settings = jax.device_put(settings, programs.whole_place())
        self._active_B = batch.active_B

    def warm_up(self) -> None:
        """Runs both programs, the second for no token."""
        state, _ = self._first(self._batch, *self._settings)
        jax.block_until_ready(self._followed(state, 0))

    def chunks(self) -> Iterator[np.ndarray]:
        """Tokens of all rows, int32 [B, up to N]; NOTHING from the end of a row on.

        The first chunk has one token a row, which is known when the prompts are read.
        """
        self._state, first_B = self._first(self._batch, *self._settings)
        yield self._seen(jax.device_get(first_B)[:, None])
        written = 1
        while written < self._max_new_tokens and self._active_B.any():
            limit = min(self._programs.chunk, self._max_new_tokens - written)
            self._state, tokens_BN = self._followed(self._state, limit)
            yield self._seen(jax.device_get(tokens_BN)[:, :limit])
            written += limit

    def going_on(self) -> Iterator[int]:
        """The rows that have not ended."""
        yield from np.flatnonzero(self._active_B).tolist()

    def end(self, rows: Iterable[int]) -> None:
        """Ends rows that would go on."""
        rows = list(rows)
        if rows:
            self._active_B[rows] = False
            active_B = jax.device_put(self._active_B, self._programs.rows_place())
            self._state = dataclasses.replace(self._state, active_B=active_B)

    def _followed(self, state: State, limit: int) -> tuple[State, jax.Array]:
        limit = jax.device_put(np.int32(limit), self._programs.whole_place())
        return self._following(state, *self._settings, limit)

    def _seen(self, tokens_BN: np.ndarray) -> np.ndarray:
        self._active_B = tokens_BN[:, -1] != NOTHING
        return tokens_BN
