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
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from stablelm_jax.generation.generator import padded_length
from stablelm_jax.model.compute import Compute
from stablelm_jax.model.config import ModelConfig
from stablelm_jax.model.parameters import parameter_table
from stablelm_jax.model.transformer import hidden_states
from stablelm_jax.parallel import sharding

# Places whose float32 logits are held at a time: 0.2 GB of a vocabulary of 100,352.
_CHUNK = 512

# (input, continuation): the last len(continuation) places of the input predict it.
Request = tuple[Sequence[int], Sequence[int]]
Answer = tuple[float, bool]


@dataclasses.dataclass
class _Row:
    """One input, and what is to be scored on it: (number of the request, its continuation)."""

    tokens: tuple[int, ...]
    spans: list[tuple[int, Sequence[int]]]

    @property
    def scored(self) -> int:
        return sum(len(targets) for _, targets in self.spans)

    def padded_shape(self, max_length: int) -> tuple[int, int]:
        """T and S, of few sizes: a program is compiled for each. S is a power of 4, T at most."""
        length, scored = min(padded_length(len(self.tokens)), max_length), 4
        while scored < self.scored:
            scored *= 4
        return length, min(scored, length)

    def answers(self, logprobs_S: np.ndarray, greedy_S: np.ndarray) -> Iterator[tuple[int, Answer]]:
        """(number of the request, its answer), from the scores of this row's places."""
        start = 0
        for number, targets in self.spans:
            span = slice(start, start + len(targets))
            logprob = float(logprobs_S[span].sum(dtype=np.float64))
            yield number, (logprob, bool(greedy_S[span].all()))
            start = span.stop


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
            kernel_DV = params["head"]["kernel"].astype(x_RD.dtype)
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
        # The largest shapes first: what needs most memory fails first.
        groups = collections.defaultdict(list)
        for row in _rows(requests):
            groups[row.padded_shape(self.max_length)].append(row)
        answers: dict[int, Answer] = {}
        for (length, scored), rows in sorted(groups.items(), reverse=True):
            size = self._batch_size(length, len(rows))
            index, count = sharding.process_share(self.mesh, size)
            share = size // count
            for start in range(0, len(rows), size):
                batch = rows[start : start + size]
                mine = batch[index * share : (index + 1) * share]
                arrays = sharding.put_batch(_arrays(mine, share, length, scored), self.mesh)
                scores = jax.device_get(self._score(params, arrays))
                for row, logprobs_S, greedy_S in zip(batch, *scores):
                    answers.update(row.answers(logprobs_S, greedy_S))
                on_answers(len(answers))
        # A continuation of no tokens is certain.
        return [answers.get(number, (0.0, True)) for number in range(len(requests))]

    def _batch_size(self, length: int, wanted: int) -> int:
        """Rows on the whole mesh; a power of two on each part where fewer are left than fit."""
        parts = sharding.batch_parts(self.mesh)
        most = max(1, self.batch_tokens // length)
        needed = -(-wanted // parts)
        return min(most, 1 << (needed - 1).bit_length()) * parts


def _rows(requests: Sequence[Request]) -> list[_Row]:
    """One row for all requests of the same input, as the four letters of a question with choices.

    A row takes no more places than its input has tokens; then another one begins. Requests for
    nothing have no row.
    """
    rows: list[_Row] = []
    open_rows: dict[tuple[int, ...], _Row] = {}
    for number, (tokens, targets) in enumerate(requests):
        if not targets:
            continue
        key = tuple(tokens)
        assert len(targets) <= len(key), "CheckpointLM cuts what is too long"
        row = open_rows.get(key)
        if row is None or row.scored + len(targets) > len(key):
            row = open_rows[key] = _Row(key, [])
            rows.append(row)
        row.spans.append((number, targets))
    return rows


def _arrays(rows: Sequence[_Row], size: int, length: int, scored: int) -> dict[str, np.ndarray]:
    """Padded to [size, length] and [size, scored]; the padding lies behind, unseen."""
    tokens_BT = np.zeros((size, length), np.int32)
    places_BS, targets_BS = np.zeros((2, size, scored), np.int32)
    for b, row in enumerate(rows):
        end = len(row.tokens)
        tokens_BT[b, :end] = row.tokens
        places = [np.arange(end - len(targets), end) for _, targets in row.spans]
        places_BS[b, : row.scored] = np.concatenate(places)
        targets_BS[b, : row.scored] = np.concatenate([targets for _, targets in row.spans])
    return {"tokens": tokens_BT, "places": places_BS, "targets": targets_BS}
