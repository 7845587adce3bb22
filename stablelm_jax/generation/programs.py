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
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from stablelm_jax.generation.cache import LayerCache, visible_slots
from stablelm_jax.generation.forward import read_prompts, read_token
from stablelm_jax.generation.sampling import Sampling, choose
from stablelm_jax.kernels.device import traced_device
from stablelm_jax.model.config import ModelConfig
from stablelm_jax.parallel import sharding
from stablelm_jax.parallel.mesh import BATCH_AXES, sum_over

# Stands for no token in what the programs give.
NOTHING = -1


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class State:
    """Where a batch stands.

    Attributes:
      cache: of each layer. seen_BV: tokens that stand in a row, where a penalty asks for them.
      token_B: the newest token, which is not in the cache yet. length_B: tokens of the prompt.
      row_B: numbers of the rows, for their random numbers. active_B: rows that go on.
      start, slot: the slot of the first new token, and of the newest.
    """

    cache: list[LayerCache]
    seen_BV: jax.Array | None
    token_B: jax.Array
    length_B: jax.Array
    row_B: jax.Array
    active_B: jax.Array
    start: jax.Array
    slot: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Prompts:
    """A batch of prompts: tokens_BT padded behind, length_B of each, row_B their numbers."""

    tokens_BT: Any
    length_B: Any
    row_B: Any
    active_B: Any


@dataclasses.dataclass(frozen=True)
class Programs:
    """Makes the programs of one model on one mesh; compiles nothing by itself.

    Attributes:
      dtype: of matrix products, activations and cache. chunk: N.
      num_valid_ids: rows of the vocabulary that may be chosen; None: all, padding too.
    """

    model: ModelConfig
    mesh: Mesh
    dtype: Any
    chunk: int
    num_valid_ids: int | None = None

    def first_token(self, slots: int, stages: tuple[str, ...]) -> Callable:
        """f(weights, prompts, numbers, stop_ids) -> State, [B] first tokens (NOTHING: stopped)."""
        step = partial(_first_token, self.model, slots=slots, stages=stages, dtype=self.dtype)
        step = partial(step, num_valid=self.num_valid_ids)
        return self._jitted(step, (self._rows(), None, None), donate=())

    def next_tokens(self, stages: tuple[str, ...]) -> Callable:
        """f(weights, state, numbers, stop_ids, limit) -> State, [B, N] tokens.

        `limit` tokens a row, N at most, are meant: those behind are of no use. The state's buffers
        are reused.
        """
        step = partial(_next_tokens, self.model, self.chunk, stages=stages, dtype=self.dtype)
        step = partial(step, num_valid=self.num_valid_ids)
        return self._jitted(step, (self.state_spec(), None, None, None), donate=(1,))

    def state_spec(self) -> State:
        """How a state lies on the batch axes of the mesh."""
        rows = self._rows()
        return State(rows, rows, rows, rows, rows, rows, PartitionSpec(), PartitionSpec())

    def state_places(self) -> State:
        """How a state lies on the whole mesh: the heads of the cache over `model` too."""
        heads = PartitionSpec(BATCH_AXES, "model")
        spec = dataclasses.replace(self.state_spec(), cache=heads)
        return sharding.named(self.mesh, spec)

    def rows_place(self) -> NamedSharding:
        """Of arrays with a row of the batch each."""
        return NamedSharding(self.mesh, self._rows())

    def whole_place(self) -> NamedSharding:
        """Of arrays that every device has whole."""
        return sharding.replicated(self.mesh)

    def abstract_prompts(self, batch_size: int, length: int) -> Prompts:
        """Shapes and places of `Prompts`."""
        place = self.rows_place()

        def rows(dtype, *more):
            return jax.ShapeDtypeStruct((batch_size, *more), dtype, sharding=place)

        return Prompts(rows(jnp.int32, length), rows(jnp.int32), rows(jnp.int32), rows(jnp.bool_))

    def abstract_settings(self, stop_ids: int) -> tuple[Any, ...]:
        """Shapes and places of numbers, stop_ids and limit."""
        values = Sampling().numbers(), np.zeros(stop_ids, np.int32), np.int32(0)
        place = self.whole_place()
        return jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), values
        )

    def _rows(self) -> PartitionSpec:
        return sharding.mesh_axes(["batch"])

    def _jitted(self, step: Callable, specs: tuple, donate: tuple[int, ...]) -> Callable:
        whole = PartitionSpec()
        inner = jax.shard_map(
            step,
            mesh=self.mesh,
            in_specs=(whole, *(whole if spec is None else spec for spec in specs)),
            out_specs=(self.state_spec(), self._rows()),
            axis_names=set(BATCH_AXES),
            check_vma=False,
        )
        places = self.state_places(), self.whole_place()
        return jax.jit(inner, out_shardings=places, donate_argnums=donate)


def _first_token(model, weights, prompts, numbers, stop_ids, *, slots, stages, dtype, num_valid):
    tokens_BT, length_B = prompts.tokens_BT, prompts.length_B
    logits_BV, cache = read_prompts(model, weights, tokens_BT, length_B, slots=slots, dtype=dtype)
    seen_BV = _seen(tokens_BT, length_B, model.vocab_size) if "penalty" in stages else None
    logits_BV = _of_valid(logits_BV, num_valid)
    token_B = choose(stages, numbers, logits_BV, seen_BV, prompts.row_B, length_B)
    active_B = prompts.active_B & ~jnp.isin(token_B, stop_ids)
    start = jnp.int32(tokens_BT.shape[1])
    seen_BV = _with(seen_BV, token_B)
    state = State(cache, seen_BV, token_B, length_B, prompts.row_B, active_B, start, start)
    return state, jnp.where(active_B, token_B, NOTHING)


def _next_tokens(
    model, chunk, weights, state, numbers, stop_ids, limit, *, stages, dtype, num_valid
):
    is_counted = traced_device().platform in ("gpu", "cuda")
    one_more = partial(_one_more, model, weights, numbers, stop_ids, stages, dtype, num_valid)

    def go_on(carry):
        index, is_running, *_ = carry
        return index < chunk if is_counted else is_running & (index < limit)

    def step(carry):
        index, _, state, tokens_BN = carry
        state = one_more(state)
        newest_B = jnp.where(state.active_B, state.token_B, NOTHING)
        is_running = is_counted or _any(state.active_B)
        return index + 1, is_running, state, tokens_BN.at[:, index].set(newest_B)

    tokens_BN = jnp.full((state.token_B.shape[0], chunk), NOTHING, jnp.int32)
    begin = jnp.int32(0), is_counted or _any(state.active_B), state, tokens_BN
    _, _, state, tokens_BN = jax.lax.while_loop(go_on, step, begin)
    return state, tokens_BN


def _one_more(model, weights, numbers, stop_ids, stages, dtype, num_valid, state: State) -> State:
    """The state with one more token in each row."""
    slots = state.cache[0][0].shape[2]
    position_B = state.length_B + (state.slot - state.start)
    visible_BS = visible_slots(state.length_B, state.start, state.slot, slots)
    new = state.token_B, position_B, state.slot, visible_BS
    logits_BV, cache = read_token(model, weights, state.cache, *new, dtype=dtype)
    logits_BV = _of_valid(logits_BV, num_valid)
    token_B = choose(stages, numbers, logits_BV, state.seen_BV, state.row_B, position_B + 1)
    return dataclasses.replace(
        state,
        cache=cache,
        seen_BV=_with(state.seen_BV, token_B),
        token_B=token_B,
        active_B=state.active_B & ~jnp.isin(token_B, stop_ids),
        slot=state.slot + 1,
    )


def _of_valid(logits_BV, num_valid: int | None):
    """The logits with -inf for rows of the vocabulary that were never trained."""
    if num_valid is None:
        return logits_BV
    return jnp.where(jnp.arange(logits_BV.shape[1]) < num_valid, logits_BV, -jnp.inf)


def _any(active_B: jax.Array) -> jax.Array:
    """Whether a row goes on on any device: all of them turn the loop equally often."""
    return sum_over(jnp.any(active_B).astype(jnp.int32)) > 0


def _seen(tokens_BT, length_B, vocab_size: int):
    """Which tokens stand in each prompt, bool [B, V]."""
    is_token_BT = jnp.arange(tokens_BT.shape[1]) < length_B[:, None]
    row_B1 = jnp.arange(tokens_BT.shape[0])[:, None]
    seen_BV = jnp.zeros((tokens_BT.shape[0], vocab_size), bool)
    return seen_BV.at[row_B1, tokens_BT].max(is_token_BT)


def _with(seen_BV, token_B):
    if seen_BV is None:
        return None
    return seen_BV.at[jnp.arange(token_B.shape[0]), token_B].set(True)
