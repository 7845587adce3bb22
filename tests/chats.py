"""Conversations and preference pairs as packed batches, and a plain model to hold losses against.

The model is Stable LM 2 written down again in float64: one document at a time, no segments, no
kernels, and gradients by autodiff.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from stablelm_jax.model.config import ModelConfig
from stablelm_jax.model.parameters import nest, parameter_table

MODEL = ModelConfig(
    vocab_size=96,
    num_layers=2,
    width=32,
    num_heads=4,
    num_kv_heads=4,
    feed_forward_width=48,
    rotary_fraction=0.5,
    block_norm_bias=True,
)
LENGTH, LONGEST = 56, 24  # of a row; of a document, in places


@dataclasses.dataclass
class Document:
    """A conversation or one side of a pair: `ids` int32 [N], `trained` bool [N - 1] of its targets.

    It lies in `row` of the batch as `segment`.
    """

    ids: np.ndarray
    trained: np.ndarray
    row: int = 0
    segment: int = 0


def random_params(rng, scale=0.2):
    """float32, with biases that are not 0 and norms that are not 1."""
    flat = {
        row.name: rng.normal(row.init_std == "ones", scale, row.shape).astype(np.float32)
        for row in parameter_table(MODEL)
    }
    return nest(flat)


def random_document(rng, prompt=None, longest=LONGEST) -> Document:
    """A prompt and an answer to it, whose tokens are trained."""
    if prompt is None:
        prompt = rng.integers(0, MODEL.vocab_size, rng.integers(2, 8))
    answer = rng.integers(0, MODEL.vocab_size, rng.integers(2, longest + 2 - len(prompt)))
    ids = np.concatenate([prompt, answer]).astype(np.int32)
    return Document(ids, np.arange(1, len(ids)) >= len(prompt))


def random_pair(rng, longest=LONGEST) -> tuple[Document, Document]:
    prompt = rng.integers(0, MODEL.vocab_size, rng.integers(2, 8))
    return random_document(rng, prompt, longest), random_document(rng, prompt, longest)


def packed(rows: list[list[Document]], source_ids, length=LENGTH) -> dict[str, np.ndarray]:
    """The batch of these documents; what is left of a row is a segment of its own."""
    shape = len(rows), length
    batch = {name: np.zeros(shape, np.int32) for name in ("tokens", "targets", "positions")}
    batch["segment_ids"] = np.zeros(shape, np.int32)
    batch["loss_mask"] = np.zeros(shape, np.float32)
    batch["source_ids"] = np.asarray(source_ids, np.int32)
    for row, documents in enumerate(rows):
        start = 0
        for segment, document in enumerate(documents, 1):
            document.row, document.segment = row, segment
            place = np.s_[row, start : start + len(document.ids) - 1]
            batch["tokens"][place] = document.ids[:-1]
            batch["targets"][place] = document.ids[1:]
            batch["positions"][place] = np.arange(len(document.ids) - 1)
            batch["segment_ids"][place] = segment
            batch["loss_mask"][place] = document.trained
            start += len(document.ids) - 1
        batch["segment_ids"][row, start:] = len(documents) + 1
        batch["positions"][row, start:] = np.arange(length - start)
    return batch


def random_pairs(rng, rows=8, most=2):
    """Documents [pairs, 2] and the batch that holds them, of 1 to `most` pairs a row, numbered."""
    longest = LENGTH // (2 * most) if most > 1 else LONGEST
    counts = 1 + np.arange(rows) % most  # the same in every batch: nothing is compiled again
    pairs = [[random_pair(rng, longest) for _ in range(count)] for count in counts]
    batch = packed([[side for pair in row for side in pair] for row in pairs], np.arange(rows) % 2)
    batch["pair_ids"] = np.full((rows, most), -1, np.int32)
    numbers = iter(range(counts.sum()))
    for row, count in enumerate(counts):
        batch["pair_ids"][row, :count] = [next(numbers) for _ in range(count)]
    return [pair for row in pairs for pair in row], batch


def as_float64(params):
    return jax.tree.map(lambda x: jnp.asarray(np.asarray(x), jnp.float64), params)


@functools.partial(jax.jit, static_argnums=3)
def plain_nll(params, ids_NT, targets_NT, model=MODEL):
    """Negative log-likelihood of each target, [N, T], each row a document of its own."""

    def norm(x, p):
        x = x - x.mean(-1, keepdims=True)
        x = x / jnp.sqrt((x**2).mean(-1, keepdims=True) + model.norm_epsilon) * p["scale"]
        return x + p["bias"] if "bias" in p else x

    def heads(x, p):
        return jnp.einsum("ntd,dhk->nthk", x, p["kernel"]) + p.get("bias", 0.0)

    half = model.rotary_size // 2
    position = jnp.arange(ids_NT.shape[1])[:, None]
    angle = position * model.rotary_theta ** (-jnp.arange(half) / half)
    cos, sin = jnp.cos(angle)[:, None], jnp.sin(angle)[:, None]

    def turn(x):
        a, b, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
        return jnp.concatenate([a * cos - b * sin, b * cos + a * sin, rest], -1)

    x = params["embed"]["embedding"][ids_NT]
    seen = jnp.tril(jnp.ones((ids_NT.shape[1],) * 2, bool))
    for n in range(model.num_layers):
        p = jax.tree.map(lambda w, n=n: w[n], params["layers"])
        y, own = norm(x, p["attention_norm"]), p["attention"]
        q, k, v = turn(heads(y, own["query"])), turn(heads(y, own["key"])), heads(y, own["value"])
        scores = jnp.einsum("nqhk,nshk->nhqs", q, k) / jnp.sqrt(q.shape[-1])
        shares = jax.nn.softmax(jnp.where(seen, scores, -jnp.inf))
        mixed = jnp.einsum("nhqs,nshk->nqhk", shares, v)
        x = x + jnp.einsum("nqhk,hkd->nqd", mixed, own["out"]["kernel"])
        y, own = norm(x, p["mlp_norm"]), p["mlp"]
        gated = jax.nn.silu(y @ own["gate"]["kernel"]) * (y @ own["up"]["kernel"])
        x = x + gated @ own["down"]["kernel"]
    scores = norm(x, params["final_norm"]) @ params["head"]["kernel"]
    return -jnp.take_along_axis(jax.nn.log_softmax(scores), targets_NT[..., None], -1)[..., 0]


def padded(documents: list[Document]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Inputs, targets and which targets are trained, [N, LONGEST]; the padding lies behind."""
    ids, targets = np.zeros((2, len(documents), LONGEST), np.int32)
    trained = np.zeros((len(documents), LONGEST))
    for n, document in enumerate(documents):
        size = len(document.ids) - 1
        ids[n, :size], targets[n, :size] = document.ids[:-1], document.ids[1:]
        trained[n, :size] = document.trained
    return ids, targets, trained
