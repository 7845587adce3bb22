"""The bodies of `attention_mosaic`'s kernels: who loads, who computes, who waits for whom.

The last warpgroup of a program is its producer, the others are consumers: each makes ROWS rows of
an output. The producer streams tiles through rings of slots in shared memory. All consumers of a
program wait for and release every tile that any of them needs: a slot is filled again once all have
released it, and nobody waits for a tile that does not come.

Q queries and S keys of a tile or a consumer, H head size.
"""

from __future__ import annotations

import dataclasses
import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

CONSUMERS = 2
# Rows of one consumer: what a warpgroup's matrix instruction has.
ROWS = 64
# Of a thread of each: what the producer does without, consumers have besides their 168.
_PRODUCER_REGISTERS, _CONSUMER_REGISTERS = 40, 232
# Below any score, and finite: the maximum of a row that has seen no key yet.
_LOWEST = -1e30
_LOG2_E = math.log2(math.e)
_BY_ROW, _BY_COLUMN = plgpu.Layout.WGMMA.reduce(1), plgpu.Layout.WGMMA.reduce(0)


@dataclasses.dataclass(frozen=True)
class Ring:
    """Slots of shared memory: tile i of a stream lies in slot i % stages.

    Attributes:
      arrays: [stages, tile, ...], filled and released together.
      full: a barrier a slot, where each array's copy arrives. free: one where consumers do.
    """

    arrays: tuple[Any, ...]
    full: Any
    free: Any

    @property
    def tile(self) -> int:
        return self.arrays[0].shape[1]

    def load(self, i, *sources) -> None:
        """The producer copies tile i, once every consumer has released the tile before it."""

        @pl.when(i >= self.arrays[0].shape[0])
        def _():
            plgpu.barrier_wait(self.free.at[self._slot(i)])

        for source, array in zip(sources, self.arrays):
            slot = self._slot(i)
            plgpu.copy_gmem_to_smem(source, array.at[slot], self.full.at[slot])

    def wait(self, i) -> list:
        """A consumer waits for tile i."""
        plgpu.barrier_wait(self.full.at[self._slot(i)])
        return [array.at[self._slot(i)] for array in self.arrays]

    def release(self, i) -> None:
        """A consumer has read tile i."""
        plgpu.barrier_arrive(self.free.at[self._slot(i)])

    def _slot(self, i):
        return jax.lax.rem(i, jnp.int32(self.arrays[0].shape[0]))


@dataclasses.dataclass(frozen=True)
class Part:
    """What one consumer works on.

    Attributes:
      role: which consumer of its program. first: of its ROWS rows. head: of the output.
      begin, end: tiles that any consumer of the program needs. borders: its own, see `documents`.
      turns: a barrier for each of two consumers that start their products by turns, or None.
    """

    role: Any
    row: Any
    head: Any
    first: Any
    begin: Any
    end: Any
    borders: list
    turns: Any

    def of(self, x_BTNH):
        return x_BTNH.at[self.row, pl.ds(self.first, ROWS), self.head]

    def numbers_of(self, x_BNT):
        return x_BNT.at[self.row, self.head, pl.ds(self.first, ROWS)]

    def start(self, products) -> None:
        """products(), in this consumer's turn: then one multiplies while the other exponentiates.

        Each has one turn for each tile of the program, also for those that it skips.
        """
        if self.turns is not None:
            plgpu.barrier_wait(self.turns.at[self.role])
        products()
        if self.turns is not None:
            plgpu.barrier_arrive(self.turns.at[1 - self.role])

    def skip(self, begin, end, offset, *rings) -> None:
        """Lets tiles pass that only other consumers of the program need."""

        def step(j, _):
            self.start(lambda: None)
            for ring in rings:
                ring.wait(j - offset)
                ring.release(j - offset)

        jax.lax.fori_loop(begin, end, step, None)

    def visit(self, begin, step, carry=None):
        """step(masked, tile, carry) for the tiles from `begin` to the last border, in order."""
        for border, masked in zip(self.borders[1:], (True, False, True)):
            end = jnp.maximum(begin, border)
            carry = jax.lax.fori_loop(begin, end, partial(step, masked), carry)
            begin = end
        return carry

    def visible(self, edge_BT, tile, of_keys=False):
        """j -> which pairs of the consumer's rows and tile j see each other.

        Rows are queries and the edge their document's start, or keys and its end.
        """
        edge = _load(edge_BT.at[self.row, pl.ds(self.first, ROWS)], _BY_ROW)

        def visible(j):
            shape, layout = (ROWS, tile), plgpu.Layout.WGMMA
            rows = self.first + plgpu.broadcasted_iota(jnp.int32, shape, 0, layout=layout)
            columns = j * tile + plgpu.broadcasted_iota(jnp.int32, shape, 1, layout=layout)
            edges = _along(edge, rows, 0)
            distance, most = rows - columns, rows - edges
            if of_keys:
                distance, most = columns - rows, edges - 1 - rows
            # As unsigned numbers, negative distances are the largest.
            return distance.astype(jnp.uint32) <= most.astype(jnp.uint32)

        return visible


def forward(bounds, start, q, k, v, o, logsumexp, *, own, ready, first, second, turns=None):
    """The output, and the log-sum-exp of each query's scaled scores in base 2."""
    keys, values = Ring(*first), Ring(*second)

    def consume(part):
        q_QH, sums_Q = (array.at[part.role] for array in own)
        _load_own(part, ready, (q, q_QH))
        exponent = _LOG2_E / math.sqrt(q.shape[3])
        weigh = partial(_weigh, exponent, part.visible(start, keys.tile))
        part.skip(part.begin, part.borders[0], part.begin, keys, values)
        attend = partial(_attend, part, q_QH, keys, values, weigh)
        o_QH, maximum_Q, total_Q = _with_sums(attend, q.shape[3])
        part.skip(part.borders[3], part.end, part.begin, keys, values)
        q_QH[...] = (o_QH / _along(total_Q, o_QH, 0)).astype(q.dtype)
        sums_Q[...] = maximum_Q + jnp.log2(total_Q)
        _store((q_QH, part.of(o)), (sums_Q, part.numbers_of(logsumexp)))

    _run(bounds, partial(_produce_keys, q, (k, v), (keys, values)), consume, turns)


def _attend(part, q_QH, keys, values, weigh, o_QH):
    """Sums up in o_QH; returns it with the rows' maximum and total.

    While the weights of tile j are computed, the matrix unit multiplies those of j - 1 by their
    values (Shah et al. 2024, arXiv 2407.08608, algorithm 2).
    """
    first, last = part.borders[0], part.borders[3] - 1

    def begin(scores_QS):
        part.start(lambda: plgpu.wgmma(scores_QS, q_QH, keys.wait(first - part.begin)[0].T))
        zeros_Q = plgpu.layout_cast(jnp.zeros(ROWS, jnp.float32), _BY_ROW)
        weights_QS, _, *state = weigh(True, first, scores_QS[...], zeros_Q + _LOWEST, zeros_Q)
        return weights_QS.astype(q_QH.dtype), *state

    def step(masked, j, carry):
        def overlapped(scores_QS):
            weights_QS, *state = carry

            def products():
                plgpu.wgmma(scores_QS, q_QH, keys.wait(j - part.begin)[0].T)
                plgpu.wgmma(o_QH, weights_QS, values.wait(j - 1 - part.begin)[0])

            part.start(products)
            scores = plgpu.wgmma_accumulator_load(scores_QS, wait_n=1)
            keys.release(j - part.begin)
            weights_QS, shrink_Q, *state = weigh(masked, j, scores, *state)
            total_QH = o_QH[...]
            values.release(j - 1 - part.begin)
            o_QH[...] = total_QH * _along(shrink_Q, total_QH, 0)
            # Not earlier: until now the matrix unit has read the registers of the last weights.
            return weights_QS.astype(q_QH.dtype), *state

        return _with_sums(overlapped, keys.tile)

    carry = _with_sums(begin, keys.tile)
    keys.release(first - part.begin)
    weights_QS, *state = part.visit(first + 1, step, carry)
    plgpu.wgmma(o_QH, weights_QS, values.wait(last - part.begin)[0])
    total_QH = o_QH[...]
    values.release(last - part.begin)
    return total_QH, *state


def _weigh(exponent, visible, masked, j, scores_QS, maximum_Q, total_Q):
    """Weights of tile j, by what older sums shrink, and the rows' new maximum and total."""
    if masked:
        scores_QS = jnp.where(visible(j), scores_QS, -jnp.inf)
    new_maximum_Q = jnp.maximum(maximum_Q, exponent * jnp.max(scores_QS, 1))
    weights_QS = jnp.exp2(exponent * scores_QS - _along(new_maximum_Q, scores_QS, 0))
    shrink_Q = jnp.exp2(maximum_Q - new_maximum_Q)
    return weights_QS, shrink_Q, new_maximum_Q, total_Q * shrink_Q + jnp.sum(weights_QS, 1)


def query_gradient(bounds, start, q, k, v, do, logsumexp, delta, dq, *, own, ready, first, second):
    keys, values = Ring(*first), Ring(*second)
    scale = 1 / math.sqrt(q.shape[3])

    def consume(part):
        q_QH, do_QH = (array.at[part.role] for array in own)
        _load_own(part, ready, (q, q_QH), (do, do_QH))
        logsumexp_Q, delta_Q = (_load(part.numbers_of(x), _BY_ROW) for x in (logsumexp, delta))
        visible = part.visible(start, keys.tile)

        def step(dq_QH, masked, j, _):
            (k_SH,), (v_SH,) = keys.wait(j - part.begin), values.wait(j - part.begin)

            def gradient(scores_QS, dweights_QS):
                plgpu.wgmma(scores_QS, q_QH, k_SH.T)
                plgpu.wgmma(dweights_QS, do_QH, v_SH.T)
                scores = plgpu.wgmma_accumulator_load(scores_QS, wait_n=1)
                weights = jnp.exp2(scale * _LOG2_E * scores - _along(logsumexp_Q, scores, 0))
                if masked:
                    weights = jnp.where(visible(j), weights, 0.0)
                dweights = dweights_QS[...]
                values.release(j - part.begin)
                return (weights * (dweights - _along(delta_Q, dweights, 0))).astype(q.dtype)

            plgpu.wgmma(dq_QH, _with_sums(gradient, keys.tile, keys.tile), k_SH)
            plgpu.wgmma_wait(0)
            keys.release(j - part.begin)

        def gather(dq_QH):
            part.visit(part.borders[0], partial(step, dq_QH))
            return dq_QH[...]

        part.skip(part.begin, part.borders[0], part.begin, keys, values)
        q_QH[...] = (scale * _with_sums(gather, q.shape[3])).astype(q.dtype)
        part.skip(part.borders[3], part.end, part.begin, keys, values)
        _store((q_QH, part.of(dq)))

    _run(bounds, partial(_produce_keys, q, (k, v), (keys, values)), consume)


def key_gradients(
    bounds, stop, q, k, v, do, logsumexp, delta, dk, dv, *, own, ready, first, second
):
    """Scores stand as [S, Q] here: as they come out they go into the next product."""
    rings = Ring(*first), Ring(*second)
    group, scale, tile = q.shape[2] // k.shape[2], 1 / math.sqrt(q.shape[3]), rings[0].tile

    def produce(row, head, begin, end):
        @pl.loop(0, group * (end - begin))
        def _(i):
            of_group = jax.lax.div(i, end - begin)
            span = pl.ds((begin + i - of_group * (end - begin)) * tile, tile)
            query_head = head * group + of_group
            for ring, x, numbers in zip(rings, (q, do), (logsumexp, delta)):
                ring.load(i, x.at[row, span, query_head], numbers.at[row, query_head, span])

    def consume(part):
        k_SH, v_SH = (array.at[part.role] for array in own)
        _load_own(part, ready, (k, k_SH), (v, v_SH))
        visible = part.visible(stop, tile, of_keys=True)
        step = partial(_add_key_gradients, rings, k_SH, v_SH, scale, visible)

        def gather(dk_SH, dv_SH):
            @pl.loop(0, group)
            def _(of_group):
                offset = part.begin - of_group * (part.end - part.begin)
                part.skip(part.begin, part.borders[0], offset, *rings)
                part.visit(part.borders[0], partial(step, dk_SH, dv_SH, offset))
                part.skip(part.borders[3], part.end, offset, *rings)

            return dk_SH[...], dv_SH[...]

        total_dk_SH, total_dv_SH = _with_sums(gather, q.shape[3], q.shape[3])
        k_SH[...] = (scale * total_dk_SH).astype(k.dtype)
        v_SH[...] = total_dv_SH.astype(v.dtype)
        _store((k_SH, part.of(dk)), (v_SH, part.of(dv)))

    _run(bounds, produce, consume, last_first=False)


def _add_key_gradients(rings, k_SH, v_SH, scale, visible, dk_SH, dv_SH, offset, masked, j, _):
    (q_QH, logsumexp_Q), (do_QH, delta_Q) = (ring.wait(j - offset) for ring in rings)

    def add(scores_SQ, dweights_SQ):
        plgpu.wgmma(scores_SQ, k_SH, q_QH.T)
        plgpu.wgmma(dweights_SQ, v_SH, do_QH.T)
        scores = plgpu.wgmma_accumulator_load(scores_SQ, wait_n=1)
        sums = _along(_load(logsumexp_Q, _BY_COLUMN), scores, 1)
        weights = jnp.exp2(scale * _LOG2_E * scores - sums)
        if masked:
            weights = jnp.where(visible(j), weights, 0.0)
        plgpu.wgmma(dv_SH, weights.astype(do_QH.dtype), do_QH)
        dweights = plgpu.wgmma_accumulator_load(dweights_SQ, wait_n=1)
        dscores = weights * (dweights - _along(_load(delta_Q, _BY_COLUMN), dweights, 1))
        plgpu.wgmma(dk_SH, dscores.astype(q_QH.dtype), q_QH)
        plgpu.wgmma_wait(0)

    _with_sums(add, rings[0].tile, rings[0].tile)
    for ring in rings:
        ring.release(j - offset)


def _run(bounds, produce, consume, turns=None, last_first=True) -> None:
    """produce(row, head, begin, end) in the last warpgroup, consume(part) in the others."""
    role, block, head, row = map(jax.lax.axis_index, ("warpgroup", "block", "head", "row"))
    if last_first:  # the last queries see the most keys: the longest work is begun first
        block = bounds.shape[1] // CONSUMERS - 1 - block
    begin = bounds[row, block * CONSUMERS, 0]
    end = bounds[row, block * CONSUMERS + CONSUMERS - 1, 3]

    @pl.when(role == CONSUMERS)
    def _():
        plgpu.set_max_registers(_PRODUCER_REGISTERS, action="decrease")
        produce(row, head, begin, end)

    @pl.when(role < CONSUMERS)
    def _():
        plgpu.set_max_registers(_CONSUMER_REGISTERS, action="increase")
        mine = block * CONSUMERS + role
        borders = [bounds[row, mine, i] for i in range(4)]
        if turns is not None:
            pl.when(role == 1)(lambda: plgpu.barrier_arrive(turns.at[0]))  # the first turn
        consume(Part(role, row, head, mine * ROWS, begin, end, borders, turns))


def _produce_keys(q, sources, rings, row, head, begin, end) -> None:
    key_head = jax.lax.div(head, jnp.int32(q.shape[2] // sources[0].shape[2]))

    @pl.loop(begin, end)
    def _(j):
        for source, ring in zip(sources, rings):
            ring.load(j - begin, source.at[row, pl.ds(j * ring.tile, ring.tile), key_head])


def _load_own(part, ready, *copies) -> None:
    for source, own in copies:
        plgpu.copy_gmem_to_smem(part.of(source), own, ready.at[part.role])
    plgpu.barrier_wait(ready.at[part.role])


def _store(*copies) -> None:
    plgpu.commit_smem()
    for own, target in copies:
        plgpu.copy_smem_to_gmem(own, target)
    plgpu.wait_smem_to_gmem(0)


def _load(ref, layout):
    whole = ((),) if jax.__version_info__ < (0, 11) else ()  # jax 0.10 asks for an index
    return plgpu.load(ref, *whole, layout=layout, optimized=False)


def _along(x, like, dim):
    """x, which runs along one dim, spread to the shape of `like`."""
    return jax.lax.broadcast_in_dim(x, like.shape, [dim])


def _with_sums(body, *columns):
    """body(sums...), [ROWS, columns] each, in which the matrix unit adds up products from zero."""
    return pl.run_scoped(body, *(plgpu.ACC((ROWS, n), jnp.float32) for n in columns))
