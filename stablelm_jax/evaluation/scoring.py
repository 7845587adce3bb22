"""Log-likelihoods of continuations, batched by length on the mesh.

Only what is scored goes through the head: of N tokens in a batch the logits of a few exist, and
those a chunk at a time.

B rows, T their length, S scored places of a row, R scored places in one line, D width,
V vocabulary.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from stablelm_jax.model.config import ModelConfig
from stablelm_jax.model.parameters import parameter_table
from stablelm_jax.model.transformer import hidden_states
from stablelm_jax.parallel import sharding
from stablelm_jax.parallel.mesh import BATCH_AXES

# Places whose float32 logits are held at a time: 0.2 GB of a vocabulary of 100,352.
_CHUNK = 512
_SHORTEST = 64  # of the lengths that are compiled
BATCH_TOKENS = 16_384  # of a device, by default

# (input, continuation): the last len(continuation) places of the input predict it.
Request = tuple[Sequence[int], Sequence[int]]


@dataclasses.dataclass
class _Row:
    """One input, and what is to be scored on it: (number of the request, its continuation)."""

    tokens: tuple[int, ...]
    spans: list[tuple[int, Sequence[int]]]

    @property
    def scored(self) -> int:
        return sum(len(targets) for _, targets in self.spans)


class Scorer:
    """Scores continuations with one model on one mesh; its programs are compiled when first met.

    Rows are split over `replica` and `data`, the model over `model`. Several processes call it
    with the same requests, and each gets all answers.
    """

    def __init__(
        self,
        model: ModelConfig,
        mesh: Mesh,
        *,
        max_length: int,
        dtype: Any = jnp.float32,
        attention: str = "auto",
        num_valid_ids: int | None = None,
        batch_tokens: int = BATCH_TOKENS,
    ):
        """Args:
        max_length: tokens of the longest input.
        dtype: of matrix products; logits and softmax are float32.
        attention: name of an implementation in kernels/attention.py.
        num_valid_ids: rows of the vocabulary that may be predicted; None: all, padding too.
        batch_tokens: of a batch on each device, padding included; at least one row.
        """
        self.mesh, self.max_length, self.dtype = mesh, max_length, jnp.dtype(dtype)
        self._batch_tokens, self._parts = batch_tokens, sharding.batch_parts(mesh)
        self._places = sharding.named(mesh, sharding.parameter_specs(parameter_table(model)))
        self.num_valid_ids = num_valid_ids
        options = {"attention": attention, "num_valid_ids": num_valid_ids}
        self._score = _make_score(model, mesh, self.dtype, **options)

    def compute_copy(self, params: Any) -> Any:
        """`params` in the compute type, whole but for the axis `model`; themselves if they are."""
        pairs = zip(jax.tree.leaves(params), jax.tree.leaves(self._places))
        if all(
            leaf.dtype == self.dtype and leaf.sharding.is_equivalent_to(place, leaf.ndim)
            for leaf, place in pairs
        ):
            return params
        return jax.jit(lambda p: sharding.gathered(p, self.dtype, self._places))(params)

    def score(
        self,
        params: Any,
        requests: Sequence[Request],
        on_answers: Callable[[int], None] = lambda count: None,
    ) -> list[tuple[float, bool]]:
        """Of each request: its log-likelihood in nats, and whether greedy choice would say it.

        Args:
          params: as `compute_copy` gives them.
          on_answers: called after each batch with the number of requests that it answered.

        Raises:
          ValueError: a continuation longer than its input, or an input that is too long.
        """
        answers: list[tuple[float, bool]] = [(0.0, True)] * len(requests)
        rows = _rows(requests, self.max_length)
        for (length, scored), alike in self._groups(rows):
            for batch in _batches(alike, self._rows_of_batch(length, len(alike))):
                arrays = _arrays(batch, self._rows_of_batch(length, len(alike)), length, scored)
                logprobs_BS, greedy_BS = self._run(params, arrays)
                for row, logprobs_S, greedy_S in zip(batch, logprobs_BS, greedy_BS):
                    _answer(answers, row, logprobs_S, greedy_S)
                on_answers(sum(len(row.spans) for row in batch))
        return answers

    def _groups(self, rows: Sequence[_Row]) -> list[tuple[tuple[int, int], list[_Row]]]:
        """Rows by the shape they are padded to, the largest first: what needs most fails first."""
        groups = collections.defaultdict(list)
        for row in rows:
            length = padded_length(len(row.tokens), self.max_length)
            groups[length, _padded_scored(row.scored, length)].append(row)
        return sorted(groups.items(), reverse=True)

    def _rows_of_batch(self, length: int, wanted: int) -> int:
        """Of the whole mesh; a power of two on each part where fewer rows are left than fit."""
        most = max(1, self._batch_tokens // length)
        needed = -(-wanted // self._parts)
        return min(most, 1 << (needed - 1).bit_length()) * self._parts

    def _run(self, params: Any, arrays: Mapping[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        index, count = sharding.process_share(self.mesh, len(arrays["tokens"]))
        share = len(arrays["tokens"]) // count
        part = {k: v[index * share : (index + 1) * share] for k, v in arrays.items()}
        return jax.device_get(self._score(params, sharding.put_batch(part, self.mesh)))


def padded_length(length: int, most: int) -> int:
    """The next of 64, 128, 192, 256, 384, 512, 768, 1024, ...; `most` at most."""
    power = max(_SHORTEST, 1 << (length - 1).bit_length())
    between = 3 * power // 4
    fits = length <= between and between % _SHORTEST == 0
    return min(between if fits else power, most)


def _padded_scored(scored: int, length: int) -> int:
    """The next power of 4, the row's length at most."""
    size = 4
    while size < scored:
        size *= 4
    return max(scored, min(size, length))


def _rows(requests: Sequence[Request], max_length: int) -> list[_Row]:
    """One row for all requests of the same input, as the four letters of a question with choices.

    A row takes no more places than its input has tokens; then another one begins.
    """
    rows: list[_Row] = []
    open_rows: dict[tuple[int, ...], _Row] = {}
    for number, (tokens, targets) in enumerate(requests):
        if not targets:
            continue  # nothing is certain to follow
        if not len(targets) <= len(tokens) <= max_length:
            raise ValueError(
                f"request {number}: {len(targets)} tokens to score on an input of {len(tokens)}, "
                f"where 1 to {max_length} fit; cut it first"
            )
        key = tuple(tokens)
        row = open_rows.get(key)
        if row is None or row.scored + len(targets) > len(key):
            row = open_rows[key] = _Row(key, [])
            rows.append(row)
        row.spans.append((number, targets))
    return rows


def _batches(rows: Sequence[_Row], size: int) -> Iterator[Sequence[_Row]]:
    for start in range(0, len(rows), size):
        yield rows[start : start + size]


def _arrays(rows: Sequence[_Row], size: int, length: int, scored: int) -> dict[str, np.ndarray]:
    """Padded to [size, length] and [size, scored]; the padding lies behind, unseen."""
    tokens_BT = np.zeros((size, length), np.int32)
    places_BS, targets_BS = (np.zeros((size, scored), np.int32) for _ in range(2))
    for b, row in enumerate(rows):
        end = len(row.tokens)
        tokens_BT[b, :end] = row.tokens
        places = np.concatenate([np.arange(end - len(t), end) for _, t in row.spans])
        places_BS[b, : row.scored] = places
        targets_BS[b, : row.scored] = np.concatenate([t for _, t in row.spans])
    return {"tokens": tokens_BT, "places": places_BS, "targets": targets_BS}


def _answer(answers, row: _Row, logprobs_S: np.ndarray, greedy_S: np.ndarray) -> None:
    start = 0
    for number, targets in row.spans:
        span = slice(start, start + len(targets))
        total = float(logprobs_S[span].sum(dtype=np.float64))
        answers[number] = total, bool(greedy_S[span].all())
        start = span.stop


def _make_score(model: ModelConfig, mesh: Mesh, dtype: Any, *, attention, num_valid_ids):
    """Jitted f(params, arrays) -> log-probability and whether it is the greatest, [B, S] each."""
    num_valid = model.vocab_size if num_valid_ids is None else num_valid_ids

    def local(params, arrays):
        tokens_BT = arrays["tokens"]
        positions_BT = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1]), tokens_BT.shape)
        x_BTD = hidden_states(
            model,
            params,
            tokens_BT,
            jnp.ones_like(tokens_BT),
            positions_BT,
            dtype=dtype,
            attention=attention,
        )
        x_BSD = jnp.take_along_axis(x_BTD, arrays["places"][:, :, None], axis=1)
        kernel_DV = params["head"]["kernel"].astype(dtype)
        x_RD, targets_R = x_BSD.reshape(-1, x_BSD.shape[-1]), arrays["targets"].reshape(-1)
        found = _target_scores(x_RD, kernel_DV, targets_R, num_valid)
        return tuple(value_R.reshape(arrays["targets"].shape) for value_R in found)

    def score(params, arrays):
        rows = sharding.mesh_axes(["batch"])
        return jax.shard_map(
            local,
            mesh=mesh,
            in_specs=(jax.sharding.PartitionSpec(), rows),
            out_specs=rows,
            axis_names=set(BATCH_AXES),
            check_vma=False,
        )(params, arrays)

    return jax.jit(score, out_shardings=sharding.replicated(mesh))


def _target_scores(x_RD, kernel_DV, targets_R, num_valid: int):
    """log softmax(x kernel)[target], float32 [R], and whether no other logit is greater."""

    def of_chunk(chunk):
        x_RD, targets_R = chunk
        logits_RV = jnp.matmul(x_RD, kernel_DV, preferred_element_type=jnp.float32)
        if num_valid < kernel_DV.shape[1]:
            logits_RV = jnp.where(jnp.arange(kernel_DV.shape[1]) < num_valid, logits_RV, -jnp.inf)
        target_R = jnp.take_along_axis(logits_RV, targets_R[:, None], 1)[:, 0]
        greedy_R = jnp.argmax(logits_RV, axis=-1) == targets_R
        return target_R - jax.nn.logsumexp(logits_RV, axis=-1), greedy_R

    count = len(targets_R)
    size = min(count, _CHUNK)
    padded = [jnp.pad(x, ((0, -count % size), *[(0, 0)] * (x.ndim - 1))) for x in (x_RD, targets_R)]
    chunks = [x.reshape(-1, size, *x.shape[1:]) for x in padded]
    return [value.reshape(-1)[:count] for value in jax.lax.map(of_chunk, chunks)]
