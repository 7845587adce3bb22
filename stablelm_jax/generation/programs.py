"""The compiled programs of generation: copying the weights, reading prompts, writing many tokens.

They run `model/`'s own modules. The layers are unrolled: a loop over them would copy each layer's
weights and cache out of their stacks for every token.

Writing is one `while_loop`: no token goes through the host. On a GPU it turns a fixed number of
times, because XLA reads the condition of any other loop on the host before each turn; elsewhere it
ends with the last row. Rows are split over the batch axes of the mesh, heads and vocabulary over
its axis `model`.

All rows of a batch write to the same slot of the cache: a prompt lies in slots 0 .. its length, new
tokens lie in the slots from the longest prompt's padded end on, and a mask leaves out what is
between. Rotary has turned the keys by then, so a token's slot need not be its position. One slot
for all rows is a slice; a slot for each row would be a scatter.

A text that goes on turn by turn is read by another program. All rows hold this one text, so nothing
lies between the prompt and the new tokens: a token lies in the slot of its position, and what a
padded piece wrote behind its end is written over before anything looks there.

B rows, T tokens of the longest prompt, N tokens of a chunk, D width, V vocabulary, S slots, N query
heads, K key/value heads, G = N / K query heads for each key head, H head size.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from functools import cached_property, partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from stablelm_jax.generation.sampling import choose
from stablelm_jax.kernels.attention import attention
from stablelm_jax.kernels.device import traced_device
from stablelm_jax.model.attention import rotary_angles
from stablelm_jax.model.config import ModelConfig
from stablelm_jax.model.parameters import parameter_table
from stablelm_jax.model.transformer import head_logits, part
from stablelm_jax.parallel import sharding
from stablelm_jax.parallel.mesh import BATCH_AXES, sum_over

# Keys and values of one layer, each [B, K, S, H]: the slots next to the head's dims, so that
# scores, softmax and the sum over values are two kernels on a GPU; with [B, S, K, H] they are six.
LayerCache = tuple[jax.Array, jax.Array]

# A step on a GPU has this many rows at least: a product with one row is compiled as an elementwise
# product that goes to memory and a sum, a norm of one row as three kernels.
GPU_ROWS = 8

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

    def read_on(self, stages: tuple[str, ...]) -> Callable:
        """f(weights, cache, piece, settings) -> State, [B] next tokens (NOTHING: stopped).

        The cache, whose buffers are reused, holds what stands before the piece of a text. The piece
        is tokens_BT, the same in all rows and padded behind, the position of its first token, how
        many tokens it has, and seen_BV of the whole text (None without a penalty).
        """
        step = partial(self._read_on, stages=stages)
        piece = _ROWS, _WHOLE, _WHOLE, _ROWS
        return self._jitted(step, (_WHOLE, _ROWS, piece, _WHOLE), donate_argnums=1)

    def enlarged(self, cache: list[LayerCache] | None, rows: int, slots: int) -> list[LayerCache]:
        """The cache with so many slots; None stands for an empty one, of so many rows."""
        if cache is None:
            shape = rows, self.model.num_kv_heads, 0, self.model.head_size
            cache = [(jnp.zeros(shape, self.dtype),) * 2] * self.model.num_layers
        return self._enlarge(cache, slots - cache[0][0].shape[2])

    @cached_property
    def _enlarge(self) -> Callable:
        def enlarge(cache: list[LayerCache], more: int) -> list[LayerCache]:
            return jax.tree.map(lambda x: jnp.pad(x, ((0, 0), (0, 0), (0, more), (0, 0))), cache)

        places = sharding.named(self.mesh, _STATE_ON_MESH.cache)
        return jax.jit(enlarge, static_argnums=1, out_shardings=places)

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
        position_T = jnp.arange(tokens_BT.shape[1], dtype=jnp.int32)
        position_BT = jnp.broadcast_to(position_T, tokens_BT.shape)
        is_token_BT = position_BT < length_B[:, None]
        cache: list[LayerCache] = []

        def cached(x_BTKH):
            x_BKTH = jnp.swapaxes(x_BTKH, 1, 2)
            return jnp.pad(x_BKTH, ((0, 0), (0, 0), (0, slots - x_BKTH.shape[2]), (0, 0)))

        def attend(q_BTNH, k_BTKH, v_BTKH):
            cache.append((cached(k_BTKH), cached(v_BTKH)))
            return attention(q_BTNH, k_BTKH, v_BTKH, is_token_BT.astype(jnp.int32))

        x_BTD = self._blocks(weights, tokens_BT, position_BT, attend)
        x_B1D = jnp.take_along_axis(x_BTD, length_B[:, None, None] - 1, axis=1)
        logits_BV, seen_BV = self._logits(weights, x_B1D), None
        if "penalty" in stages:
            row_B1 = jnp.arange(tokens_BT.shape[0])[:, None]
            seen_BV = jnp.zeros(logits_BV.shape, bool).at[row_B1, tokens_BT].max(is_token_BT)
        start = jnp.int32(tokens_BT.shape[1])
        none_B = jnp.zeros_like(length_B)  # no token yet: the next line chooses the first
        state = State(cache, seen_BV, none_B, length_B, row_B, active_B, start, start)
        state = self._chosen(state, logits_BV, length_B, settings, stages)
        return state, jnp.where(state.active_B, state.token_B, NOTHING)

    def _read_on(self, weights, cache, piece, settings, *, stages):
        tokens_BT, begin, count, seen_BV = piece
        rows, length = tokens_BT.shape
        position_T = begin + jnp.arange(length, dtype=jnp.int32)
        visible_TS = jnp.arange(cache[0][0].shape[2]) <= position_T[:, None]
        visible_BTS = jnp.broadcast_to(visible_TS, (rows, *visible_TS.shape))
        written: list[LayerCache] = []

        def attend(q_BTNH, k_BTKH, v_BTKH):
            k_BKSH, v_BKSH = cache[len(written)]
            written.append((_put(k_BKSH, k_BTKH, begin), _put(v_BKSH, v_BTKH, begin)))
            return _attend(q_BTNH, *written[-1], visible_BTS)

        position_BT = jnp.broadcast_to(position_T, tokens_BT.shape)
        x_BTD = self._blocks(weights, tokens_BT, position_BT, attend)
        logits_BV = self._logits(weights, jax.lax.dynamic_slice_in_dim(x_BTD, count - 1, 1, axis=1))
        end, none_B = begin + count, jnp.zeros(rows, jnp.int32)
        end_B, active_B = jnp.full(rows, end), jnp.full(rows, True)
        state = State(written, seen_BV, none_B, end_B, none_B, active_B, end, end)
        state = self._chosen(state, logits_BV, end_B, settings, stages)
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
        rows, slot = state.token_B.shape[0], state.slot
        position_B = state.length_B + (slot - state.start)
        index_S = jnp.arange(state.cache[0][0].shape[2])
        is_written_S = (index_S >= state.start) & (index_S <= slot)
        visible_BS = (index_S < state.length_B[:, None]) | is_written_S
        more = max(0, GPU_ROWS - rows) if traced_device().platform in ("gpu", "cuda") else 0
        written: list[LayerCache] = []

        def attend(q_B1NH, k_B1KH, v_B1KH):
            k_BKSH, v_BKSH = state.cache[len(written)]
            kept = _put(k_BKSH, k_B1KH[:rows], slot), _put(v_BKSH, v_B1KH[:rows], slot)
            written.append(kept)
            o_B1NH = _attend(q_B1NH[:rows], *kept, visible_BS[:, None])
            if rows == 1:  # a copy of the row is read as it is needed, zeros would be written first
                return jnp.broadcast_to(o_B1NH, (1 + more, *o_B1NH.shape[1:]))
            return jnp.pad(o_B1NH, ((0, more), (0, 0), (0, 0), (0, 0)))

        token_B1, position_B1 = (
            jnp.pad(x_B, (0, more))[:, None] for x_B in (state.token_B, position_B)
        )
        x_B1D = self._blocks(weights, token_B1, position_B1, attend)
        logits_BV = self._logits(weights, x_B1D)[:rows]
        state = dataclasses.replace(state, cache=written, slot=slot + 1)
        return self._chosen(state, logits_BV, position_B + 1, settings, stages)

    def _blocks(self, weights, tokens_BT, position_BT, attend) -> jax.Array:
        """The embedding and all layers: x_BTD before the final norm."""
        rotary = rotary_angles(position_BT, self.model.rotary_size, self.model.rotary_theta)
        x_BTD = part(self.model, "embed", weights["embed"])(tokens_BT, self.dtype)
        for layer in weights["layers"]:
            x_BTD = part(self.model, "layers", layer)(x_BTD, rotary, attend)
        return x_BTD

    def _logits(self, weights, x_B1D) -> jax.Array:
        x_B1D = part(self.model, "final_norm", weights["final_norm"])(x_B1D)
        return head_logits(weights, x_B1D[:, 0])

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


def _put(cache_BKSH: jax.Array, x_BTKH: jax.Array, slot: jax.Array) -> jax.Array:
    """The cache with keys or values from this slot on."""
    x_BKTH = jnp.swapaxes(x_BTKH, 1, 2)
    return jax.lax.dynamic_update_slice(cache_BKSH, x_BKTH, (0, 0, slot, 0))


@jax.named_scope("attention_kernel")
def _attend(q_BTNH, k_BKSH, v_BKSH, visible_BTS):
    """softmax(q k / sqrt(H)) v over the visible slots, [B, T, N, H]; scores and softmax float32."""
    batch, length, _, head_size = q_BTNH.shape
    q_BTKGH = q_BTNH.reshape(batch, length, k_BKSH.shape[1], -1, head_size)
    scores_BKGTS = jnp.einsum(
        "btkgh,bksh->bkgts", q_BTKGH, k_BKSH, preferred_element_type=jnp.float32
    ) / math.sqrt(head_size)
    scores_BKGTS = jnp.where(visible_BTS[:, None, None], scores_BKGTS, -jnp.inf)
    weights_BKGTS = jax.nn.softmax(scores_BKGTS, axis=-1).astype(v_BKSH.dtype)
    return jnp.einsum("bkgts,bksh->btkgh", weights_BKGTS, v_BKSH).reshape(q_BTNH.shape)


def decode_weights(
    model: ModelConfig, mesh: Mesh, dtype: jnp.dtype
) -> tuple[Callable[[Any], Any], Any]:
    """Jitted f(params) -> weights, and their shardings.

    The weights are the parameters in `dtype`, with a list of trees, one a layer, in the place of
    the stacked layers; they are split over `model` of the mesh alone.

    Raises:
      ValueError: key heads that `model` of the mesh does not divide.
    """
    check_split(model.num_kv_heads, mesh.shape["model"])
    specs = sharding.parameter_specs(parameter_table(model))
    one_layer = jax.tree.map(
        lambda spec: PartitionSpec(*spec[1:]),
        specs["layers"],
        is_leaf=lambda x: isinstance(x, PartitionSpec),
    )
    numbers = range(model.num_layers)
    places = sharding.named(mesh, specs | {"layers": [one_layer for _ in numbers]})

    def copy(params):
        layers = [jax.tree.map(lambda x, i=i: x[i], params["layers"]) for i in numbers]
        return sharding.gathered(params | {"layers": layers}, dtype, places)

    return jax.jit(copy, out_shardings=places), places


def check_split(num_kv_heads: int, devices: int) -> None:
    """Raises ValueError where so many devices cannot each have whole key heads."""
    if num_kv_heads % devices:
        raise ValueError(
            f"{num_kv_heads} key heads cannot be split over {devices} devices: "
            "let as many share the model as divide them"
        )
