"""The two compiled programs of generation: reading the prompts, and writing many tokens.

The second is one `while_loop`: no token goes through the host. On a GPU it turns a fixed number of
times, because XLA reads the condition of any other loop on the host before each turn; elsewhere it
ends with the last row. Rows are split over the batch axes of the mesh, heads and vocabulary over
its axis `model`.

B rows, T tokens of the longest prompt, N tokens of a chunk, V vocabulary, S slots.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from stablelm_jax.generation.forward import LayerCache, read_prompts, read_token
from stablelm_jax.generation.sampling import choose
from stablelm_jax.kernels.device import traced_device
from stablelm_jax.model.config import ModelConfig
from stablelm_jax.parallel import sharding
from stablelm_jax.parallel.mesh import BATCH_AXES, sum_over

# Stands for no token in what the programs give.
NOTHING = -1


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class State:
    """Where a batch stands."""

    cache: list[LayerCache]
    seen_BV: jax.Array | None  # which tokens stand in a row, where a penalty asks for them
    token_B: jax.Array  # the newest token, which is not in the cache yet
    length_B: jax.Array  # tokens of the prompt
    row_B: jax.Array  # the number of each row, for its random numbers
    active_B: jax.Array  # whether a row goes on
    start: jax.Array  # the slot of the first new token
    slot: jax.Array  # the slot of the newest


# A device has its rows of a state, and of the cache its heads.
_ROWS, _WHOLE = PartitionSpec(BATCH_AXES), PartitionSpec()
_STATE = State(_ROWS, _ROWS, _ROWS, _ROWS, _ROWS, _ROWS, _WHOLE, _WHOLE)
_STATE_ON_MESH = dataclasses.replace(_STATE, cache=PartitionSpec(BATCH_AXES, "model"))


@dataclasses.dataclass(frozen=True)
class Programs:
    """Makes the programs of one model on one mesh; compiles nothing by itself.

    `settings` below are `Sampling.numbers` and `stop_ids`, the tokens that end a row.
    """

    model: ModelConfig
    mesh: Mesh
    dtype: Any  # the type of matrix products, activations and cache
    chunk: int  # N
    num_valid_ids: int | None  # rows of the vocabulary that may be chosen; None: all, padding too

    def first_token(self, slots: int, stages: tuple[str, ...]) -> Callable:
        """f(weights, prompts, settings) -> State, [B] first tokens (NOTHING: stopped).

        The prompts are tokens_BT, padded behind, length_B, row_B and active_B.
        """
        step = partial(self._first_token, slots=slots, stages=stages)
        return self._jitted(step, (_WHOLE, _ROWS, _WHOLE))

    def next_tokens(self, stages: tuple[str, ...]) -> Callable:
        """f(weights, state, settings, limit) -> State, [B, N] tokens.

        Only the first `limit` tokens of a row mean something. The state's buffers are reused.
        """
        step = partial(self._next_tokens, stages=stages)
        return self._jitted(step, (_WHOLE, _STATE, _WHOLE, _WHOLE), donate_argnums=1)

    def _jitted(self, step: Callable, in_specs: tuple, **options: Any) -> Callable:
        inner = jax.shard_map(
            step,
            mesh=self.mesh,
            in_specs=in_specs,
            out_specs=(_STATE, _ROWS),
            axis_names=set(BATCH_AXES),
            check_vma=False,
        )
        places = sharding.named(self.mesh, (_STATE_ON_MESH, _WHOLE))
        return jax.jit(inner, out_shardings=places, **options)

    def _first_token(self, weights, prompts, settings, *, slots, stages):
        tokens_BT, length_B, row_B, active_B = prompts
        logits_BV, cache = read_prompts(
            self.model, weights, tokens_BT, length_B, slots=slots, dtype=self.dtype
        )
        seen_BV = None
        if "penalty" in stages:
            is_token_BT = jnp.arange(tokens_BT.shape[1]) < length_B[:, None]
            row_B1 = jnp.arange(tokens_BT.shape[0])[:, None]
            seen_BV = jnp.zeros(logits_BV.shape, bool).at[row_B1, tokens_BT].max(is_token_BT)
        start = jnp.int32(tokens_BT.shape[1])
        none_B = jnp.zeros_like(length_B)  # no token yet: the next line chooses the first
        state = State(cache, seen_BV, none_B, length_B, row_B, active_B, start, start)
        state = self._chosen(state, logits_BV, length_B, settings, stages)
        return state, jnp.where(state.active_B, state.token_B, NOTHING)

    def _next_tokens(self, weights, state, settings, limit, *, stages):
        is_counted = traced_device().platform in ("gpu", "cuda")

        def is_running(active_B):
            """Whether a row goes on on any device: all of them turn the loop equally often."""
            return is_counted or sum_over(jnp.any(active_B).astype(jnp.int32)) > 0

        def go_on(carry):
            index, running, *_ = carry
            return index < self.chunk if is_counted else running & (index < limit)

        def step(carry):
            index, _, state, tokens_BN = carry
            state = self._one_more(weights, state, settings, stages)
            newest_B = jnp.where(state.active_B, state.token_B, NOTHING)
            tokens_BN = tokens_BN.at[:, index].set(newest_B)
            return index + 1, is_running(state.active_B), state, tokens_BN

        tokens_BN = jnp.full((state.token_B.shape[0], self.chunk), NOTHING, jnp.int32)
        begin = jnp.int32(0), is_running(state.active_B), state, tokens_BN
        return jax.lax.while_loop(go_on, step, begin)[2:]

    def _one_more(self, weights, state: State, settings, stages) -> State:
        """The state with one more token in each row."""
        position_B = state.length_B + (state.slot - state.start)
        index_S = jnp.arange(state.cache[0][0].shape[2])
        is_prompt_BS = index_S < state.length_B[:, None]
        is_written_S = (index_S >= state.start) & (index_S <= state.slot)
        new = state.token_B, position_B, state.slot, is_prompt_BS | is_written_S
        logits_BV, cache = read_token(self.model, weights, state.cache, *new, dtype=self.dtype)
        state = dataclasses.replace(state, cache=cache, slot=state.slot + 1)
        return self._chosen(state, logits_BV, position_B + 1, settings, stages)

    def _chosen(self, state: State, logits_BV, position_B, settings, stages) -> State:
        """The state with the token of each row that the logits and the settings choose."""
        if self.num_valid_ids is not None:  # rows of the vocabulary behind were never trained
            is_valid_V = jnp.arange(logits_BV.shape[1]) < self.num_valid_ids
            logits_BV = jnp.where(is_valid_V, logits_BV, -jnp.inf)
        seen_BV = state.seen_BV
        token_B = choose(stages, settings, logits_BV, seen_BV, state.row_B, position_B)
        if seen_BV is not None:
            seen_BV = seen_BV.at[jnp.arange(token_B.shape[0]), token_B].set(True)
        active_B = state.active_B & ~jnp.isin(token_B, settings["stop_ids"])
        return dataclasses.replace(state, seen_BV=seen_BV, token_B=token_B, active_B=active_B)
