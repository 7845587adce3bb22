"""Log-likelihoods of continuations, batched by length on the mesh.

Only what is scored goes through the head: of N tokens in a batch the logits of a few exist, and
those a chunk at a time.

B rows, T their length, S scored places of a row, R scored places in one line, D width,
V vocabulary.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from stablelm_jax.generation.generator import padded_length
from stablelm_jax.model.compute import Compute
from stablelm_jax.model.config import ModelConfig
from stablelm_jax.model.parameters import parameter_table
from stablelm_jax.model.transformer import head_kernel, hidden_states
from stablelm_jax.parallel import sharding

# Places whose float32 logits are held at a time: 0.2 GB of a vocabulary of 100,352.
_CHUNK = 512

# (input, continuation): the last len(continuation) places of the input predict it.
Request = tuple[Sequence[int], Sequence[int]]
Answer = tuple[float, bool]


# One input, and what is to be scored on it: (number of the request, its continuation).
_Row = tuple[tuple[int, ...], list[tuple[int, Sequence[int]]]]


@dataclasses.dataclass(frozen=True)
class Scorer:
    """Scores continuations with one model on one mesh; its programs are compiled when first met.

    Rows are split over `replica` and `data`, the model over `model`. Several processes call it
    with the same requests, and each gets all answers.

    Attributes:
      max_length: tokens of the longest input.
      compute: of the model; logits and softmax are float32.
      batch_tokens: tokens of a batch on each device, padding included; at least one row.
    """

    model: ModelConfig
    mesh: Mesh
    max_length: int
    compute: Compute
    batch_tokens: int

    def compute_copy(self, params: Any) -> Any:
        """`params` in the compute type, whole but for the axis `model`; themselves if they are."""
        specs = sharding.parameter_specs(parameter_table(self.model))
        dtype, places = self.compute.dtype, sharding.named(self.mesh, specs)
        if all(
            leaf.dtype == dtype and leaf.sharding.is_equivalent_to(place, leaf.ndim)
            for leaf, place in zip(jax.tree.leaves(params), jax.tree.leaves(places))
        ):
            return params
        return jax.jit(lambda p: sharding.gathered(p, dtype, places))(params)

    @functools.cached_property
    def _score(self):
        """Jitted f(params, arrays) -> log-probability and whether it is the greatest, [B, S]."""
        model, compute = self.model, self.compute.forward_only()
        num_valid = compute.num_valid_ids or model.vocab_size

        def score_place(kernel_DV, x_D, target):
            logits_V = jnp.matmul(x_D, kernel_DV, preferred_element_type=jnp.float32)
            if num_valid < model.vocab_size:
                logits_V = jnp.where(jnp.arange(model.vocab_size) < num_valid, logits_V, -jnp.inf)
            return logits_V[target] - jax.nn.logsumexp(logits_V), jnp.argmax(logits_V) == target

        def score(params, arrays):
            tokens_BT, targets_BS = arrays["tokens"], arrays["targets"]
            positions_BT = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1]), tokens_BT.shape)
            inputs_BT = tokens_BT, jnp.ones_like(tokens_BT), positions_BT
            x_BTD = hidden_states(model, params, *inputs_BT, compute)
            x_BSD = jnp.take_along_axis(x_BTD, arrays["places"][:, :, None], axis=1)
            x_RD = x_BSD.reshape(-1, x_BSD.shape[-1])
            kernel_DV = head_kernel(params).astype(x_RD.dtype)
            found = jax.lax.map(
                lambda place: score_place(kernel_DV, *place),
                (x_RD, targets_BS.reshape(-1)),
                batch_size=_CHUNK,
            )
            return tuple(value_R.reshape(targets_BS.shape) for value_R in found)

        score = sharding.map_rows(score, self.mesh, out_specs=sharding.mesh_axes(["batch"]))
        return jax.jit(score, out_shardings=sharding.replicated(self.mesh))

    def score(
        self, params: Any, requests: Sequence[Request], on_answers: Callable[[int], None]
    ) -> list[Answer]:
        """For each request: its log-likelihood in nats, and whether greedy choice would say it.

        Args:
          params: as `compute_copy` gives them.
          requests: continuations no longer than their inputs, inputs of `max_length` at most.
          on_answers: called after each batch with the number of requests answered so far.
        """
        # One row for all requests of one input, as the four letters of a question with choices.
        spans = collections.defaultdict(list)
        for number, (tokens, targets) in enumerate(requests):
            if targets:
                spans[tuple(tokens)].append((number, targets))
        groups = collections.defaultdict(list)
        for row in spans.items():
            groups[self._padded_shape(row)].append(row)
        answers: dict[int, Answer] = {}
        # The largest shapes first: what needs most memory fails first.
        for (length, scored), rows in sorted(groups.items(), reverse=True):
            size = self._batch_size(length, len(rows))
            index, count = sharding.process_share(self.mesh, size)
            share = size // count
            for start in range(0, len(rows), size):
                batch = rows[start : start + size]
                mine = batch[index * share : (index + 1) * share]
                arrays = sharding.put_batch(_arrays(mine, share, length, scored), self.mesh)
                for row, *scores in zip(batch, *jax.device_get(self._score(params, arrays))):
                    answers |= _answers(row, *scores)
                on_answers(len(answers))
        # A continuation of no tokens is certain.
        return [answers.get(number, (0.0, True)) for number in range(len(requests))]

    def _padded_shape(self, row: _Row) -> tuple[int, int]:
        """T and S, of few sizes: a program is compiled for each. S is a power of 4."""
        tokens, spans = row
        count, scored = sum(len(targets) for _, targets in spans), 4
        while scored < count:
            scored *= 4
        return min(padded_length(len(tokens)), self.max_length), scored

    def _batch_size(self, length: int, wanted: int) -> int:
        """Rows on the whole mesh; a power of two on each part where fewer are left than fit."""
        parts = sharding.batch_parts(self.mesh)
        most = max(1, self.batch_tokens // length)
        needed = -(-wanted // parts)
        return min(most, 1 << (needed - 1).bit_length()) * parts


def _arrays(rows: Sequence[_Row], size: int, length: int, scored: int) -> dict[str, np.ndarray]:
    """Padded to [size, length] and [size, scored]; the padding lies behind, unseen."""
    tokens_BT = np.zeros((size, length), np.int32)
    places_BS, targets_BS = np.zeros((2, size, scored), np.int32)
    for b, (tokens, spans) in enumerate(rows):
        end = len(tokens)
        tokens_BT[b, :end] = tokens
        places = np.concatenate([np.arange(end - len(targets), end) for _, targets in spans])
        places_BS[b, : len(places)] = places
        targets_BS[b, : len(places)] = np.concatenate([targets for _, targets in spans])
    return {"tokens": tokens_BT, "places": places_BS, "targets": targets_BS}


def _answers(row: _Row, logprobs_S: np.ndarray, greedy_S: np.ndarray) -> dict[int, Answer]:
    """{number of the request: its answer}, from the scores of a row's places."""
    found, start = {}, 0
    for number, targets in row[1]:
        span = slice(start, start + len(targets))
        logprob = logprobs_S[span].sum(dtype=np.float64)
        found[number] = float(logprob), bool(greedy_S[span].all())
        start = span.stop
    return found
