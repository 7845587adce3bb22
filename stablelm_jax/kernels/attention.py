"""Causal attention inside documents: one function and a registry of ways to compute it.

B batch, T queries, S keys, N query heads, K key/value heads, G = N / K, H head size.
"""

from __future__ import annotations

import importlib
import math

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from stablelm_jax.kernels.device import compilers_axes, traced_device
from stablelm_jax.kernels.residuals import named

# Queries at a time: their scores against a short row's keys stay in the cache. 128 beat 256 and 512
# by 10 and 35 % (CPU, 8 x 512 tokens, 8 heads of 64).
QUERIES = 128
# Groups of queries of a row; each is compiled apart with its own span of keys.
GROUPS = 8


@jax.named_scope("attention_kernel")
def attention(
    q_BTNH: jax.Array,
    k_BTKH: jax.Array,
    v_BTKH: jax.Array,
    segment_ids_BT: jax.Array,
    *,
    implementation: str = "auto",
) -> jax.Array:
    """softmax(q k / sqrt(H)) v over earlier tokens of the same segment id, in the dtype of q.

    Query head n reads key head n // G. Scores and softmax are float32. Equal ids of a row must
    stand next to each other: where one comes again, `reference` and `chunked` see one document, the
    kernels see two.

    Args:
      implementation: a name in IMPLEMENTATIONS, or `auto`: what `choose` gives for the device that
        the trace is for.

    Raises:
      ValueError: for an unknown implementation, or query heads that key heads cannot share.
    """
    if implementation == "auto":
        implementation, _ = choose(traced_device(), q_BTNH, k_BTKH)
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(
            f"attention implementation {implementation!r} is unknown: "
            f"choose one of auto, {', '.join(IMPLEMENTATIONS)}"
        )
    if q_BTNH.shape[2] % k_BTKH.shape[2]:
        raise ValueError(
            f"{q_BTNH.shape[2]} query heads cannot share {k_BTKH.shape[2]} key heads: "
            "the first must be a multiple of the second"
        )
    return IMPLEMENTATIONS[implementation](q_BTNH, k_BTKH, v_BTKH, segment_ids_BT)


def choose(device, q_BTNH, k_BTKH) -> tuple[str, str]:
    """The name of the implementation for a device, and the reason as text.

    Args:
      device: with `platform` and `device_kind`, as jax's devices have them.
      q_BTNH, k_BTKH: arrays, or their shapes and dtypes.
    """
    kind = device.device_kind
    if device.platform == "tpu":
        from stablelm_jax.kernels import attention_tpu  # loads Pallas, which takes a second

        if reason := attention_tpu.why_unsupported(kind, q_BTNH):
            return "splash", f"jax's kernel, which skips no documents: {reason}"
        return "pallas_tpu", f"flash attention that skips other documents, on {kind}"
    if device.platform in ("gpu", "cuda"):
        from stablelm_jax.kernels import attention_gpu

        if attention_gpu.generation_of(kind) is None:
            return "chunked", f"the kernel has no tiles for {kind}, only for A100 and Hopper"
        if reason := attention_gpu.why_unsupported(q_BTNH, k_BTKH):
            return "chunked", reason
        return "pallas_gpu", f"flash attention that skips other documents, on {kind}"
    return "chunked", f"no kernel for {kind}"


def reference(q_BTNH, k_BTKH, v_BTKH, segment_ids_BT):
    """Dense and plain, what the others are compared with: T * T scores, gradients by autodiff."""
    batch, length, _, head_size = q_BTNH.shape
    q_BTKGH = q_BTNH.reshape(batch, length, k_BTKH.shape[2], -1, head_size)
    scores_BKGTS = jnp.einsum(
        "btkgh,bskh->bkgts", q_BTKGH, k_BTKH, preferred_element_type=jnp.float32
    ) / math.sqrt(head_size)
    allowed_B11TS = _allowed(_as_queries(segment_ids_BT), segment_ids_BT, first_query=0)
    scores_BKGTS = jnp.where(allowed_B11TS, scores_BKGTS, -jnp.inf)
    weights_BKGTS = jax.nn.softmax(scores_BKGTS, axis=-1).astype(v_BTKH.dtype)
    return jnp.einsum("bkgts,bskh->btkgh", weights_BKGTS, v_BTKH).reshape(q_BTNH.shape)


def chunked(q_BTNH, k_BTKH, v_BTKH, segment_ids_BT):
    """A chunk of queries at a time with the keys up to its group's end (`_chunked`)."""
    batch, length, num_heads, head_size = q_BTNH.shape
    padding = (0, -length % min(length, QUERIES))
    q_BTNH, k_BTKH, v_BTKH = (
        jnp.pad(x, ((0, 0), padding, (0, 0), (0, 0))) for x in (q_BTNH, k_BTKH, v_BTKH)
    )
    segment_ids_BT = jnp.pad(segment_ids_BT, ((0, 0), padding), constant_values=-1)
    q_BTKGH = q_BTNH.reshape(batch, -1, k_BTKH.shape[2], num_heads // k_BTKH.shape[2], head_size)
    k_BKSH, v_BKSH = jnp.swapaxes(k_BTKH, 1, 2), jnp.swapaxes(v_BTKH, 1, 2)
    o_BKGTH = _chunked(jnp.moveaxis(q_BTKGH, 1, 3), k_BKSH, v_BKSH, segment_ids_BT)
    return jnp.moveaxis(o_BKGTH, 3, 1).reshape(q_BTNH.shape)[:, :length]


def _kernel(module: str, name: str):
    """A kernel of its own module, which is loaded at the first call: Pallas takes a second."""

    def implementation(*arrays):
        kernels = importlib.import_module(f"stablelm_jax.kernels.{module}")
        return _on_own_heads(getattr(kernels, name), *arrays)

    return implementation


IMPLEMENTATIONS = {
    "reference": reference,
    "chunked": chunked,
    "pallas_gpu": _kernel("attention_gpu", "pallas_gpu"),  # ours, for A100 and Hopper
    "pallas_mosaic": _kernel("attention_mosaic", "pallas_mosaic"),  # ours, for Hopper, untried
    "pallas_tpu": _kernel("attention_tpu", "pallas_tpu"),  # ours, for TPU v4, v5e, v5p and v6e
    "splash": _kernel("attention_splash", "splash"),  # jax's, for any TPU
}


def _on_own_heads(kernel, q_BTNH, k_BTKH, v_BTKH, segment_ids_BT):
    """Runs the kernel on each device's own heads, where the compiler splits them.

    The compiler cannot split a kernel: left to itself it would gather all heads on every device.
    """
    axes = tuple(compilers_axes())
    if not axes:
        return kernel(q_BTNH, k_BTKH, v_BTKH, segment_ids_BT)
    heads = PartitionSpec(None, None, axes)
    return jax.shard_map(
        kernel,
        in_specs=(heads, heads, heads, PartitionSpec()),
        out_specs=heads,
        axis_names=set(axes),
        check_vma=False,
    )(q_BTNH, k_BTKH, v_BTKH, segment_ids_BT)


@jax.custom_vjp
def _chunked(q_BKGTH, k_BKSH, v_BKSH, segment_ids_BT):
    """Attention whose memory grows with T, not T * T, forward and backward.

    Backward computes each chunk's weights again from the saved log-sum-exp of its rows (Dao et al.
    2022, arXiv 2205.14135, algorithm 4). Keys after a group are never touched, which saves nearly
    half of the work of a long row.
    """
    return _forward(q_BKGTH, k_BKSH, v_BKSH, segment_ids_BT)[0]


def _forward(q_BKGTH, k_BKSH, v_BKSH, segment_ids_BT):
    ids_B11T1 = _as_queries(segment_ids_BT)
    parts = []
    for group in _groups(q_BKGTH.shape[3]):
        k, v = k_BKSH[:, :, : group.stop], v_BKSH[:, :, : group.stop]
        key_ids = segment_ids_BT[:, : group.stop]

        def attend(carry, first_query, q, ids, k=k, v=v, key_ids=key_ids):
            scores = jnp.where(_allowed(ids, key_ids, first_query), _scores(q, k), -jnp.inf)
            maximum = jnp.max(scores, -1, keepdims=True)
            exponentials = jnp.exp(scores - maximum)
            total = jnp.sum(exponentials, -1, keepdims=True)
            return carry, (_mix(exponentials, v) / total, maximum + jnp.log(total))

        parts.append(_in_turn(attend, None, group, q_BKGTH, ids_B11T1)[1])
    o_BKGTH, logsumexp_BKGT1 = (jnp.concatenate(part, 3) for part in zip(*parts))
    o_BKGTH, logsumexp_BKGT1 = named(o_BKGTH.astype(q_BKGTH.dtype), logsumexp_BKGT1)
    return o_BKGTH, (q_BKGTH, k_BKSH, v_BKSH, segment_ids_BT, o_BKGTH, logsumexp_BKGT1)


def _backward(saved, do_BKGTH):
    q_BKGTH, k_BKSH, v_BKSH, segment_ids_BT, o_BKGTH, logsumexp_BKGT1 = saved
    scale = 1 / math.sqrt(q_BKGTH.shape[-1])
    # The row sums of weights * dweights, without the weights.
    products = do_BKGTH.astype(jnp.float32) * o_BKGTH.astype(jnp.float32)
    delta_BKGT1 = jnp.sum(products, -1, keepdims=True)
    rows = (q_BKGTH, do_BKGTH, logsumexp_BKGT1, delta_BKGT1, _as_queries(segment_ids_BT))
    dq, dk, dv = [], 0.0, 0.0
    for group in _groups(q_BKGTH.shape[3]):
        k, v = k_BKSH[:, :, : group.stop], v_BKSH[:, :, : group.stop]
        key_ids = segment_ids_BT[:, : group.stop]

        def step(sums, first_query, q, do, logsumexp, delta, ids, k=k, v=v, key_ids=key_ids):
            weights = jnp.exp(_scores(q, k) - logsumexp)
            weights = jnp.where(_allowed(ids, key_ids, first_query), weights, 0.0)
            dscores = scale * weights * (_dot(do, v, (4, 3)) - delta)
            sums = sums[0] + _gather(dscores, q), sums[1] + _gather(weights, do)
            return sums, _mix(dscores, k)

        zeros = jnp.zeros(k.shape, jnp.float32)
        sums, dq_group = _in_turn(step, (zeros, zeros), group, *rows)
        dq.append(dq_group)
        unseen = ((0, 0), (0, 0), (0, k_BKSH.shape[2] - group.stop), (0, 0))
        dk, dv = dk + jnp.pad(sums[0], unseen), dv + jnp.pad(sums[1], unseen)
    dq_BKGTH = jnp.concatenate(dq, 3).astype(q_BKGTH.dtype)
    return dq_BKGTH, dk.astype(k_BKSH.dtype), dv.astype(v_BKSH.dtype), None


_chunked.defvjp(_forward, _backward)


def _groups(length: int) -> list[slice]:
    """At most GROUPS spans of queries, each a whole number of chunks."""
    chunk = min(length, QUERIES)
    span = chunk * -(-length // (chunk * GROUPS))
    return [slice(start, min(start + span, length)) for start in range(0, length, span)]


def _in_turn(step, carry, group: slice, *rows_T_):
    """Scans step(carry, first_query, *chunks) over the chunks of a group; axis 3 is T.

    It is a loop of the program: left to itself, the compiler would hold the scores of all chunks.
    """
    rows = [x[..., group, :] for x in rows_T_]
    count = -(-(group.stop - group.start) // QUERIES)
    if count == 1:
        return step(carry, group.start, *rows)
    split = [jnp.moveaxis(x.reshape(*x.shape[:3], count, -1, x.shape[4]), 3, 0) for x in rows]
    first_queries = group.start + QUERIES * jnp.arange(count)
    carry, out = jax.lax.scan(lambda c, x: step(c, *x), carry, (first_queries, *split))
    join = lambda x: jnp.moveaxis(x, 0, 3).reshape(*x.shape[1:4], -1, x.shape[5])  # noqa: E731
    return carry, jax.tree.map(join, out)


def _as_queries(segment_ids_BT):
    return segment_ids_BT[:, None, None, :, None]


def _allowed(query_ids_B11T1, key_ids_BS, first_query):
    """[B, 1, 1, T, S]: which keys the queries first_query, first_query + 1, ... may see."""
    queries_T1 = first_query + jnp.arange(query_ids_B11T1.shape[3])[:, None]
    causal_TS = queries_T1 >= jnp.arange(key_ids_BS.shape[1])
    return causal_TS & (query_ids_B11T1 == key_ids_BS[:, None, None, None])


def _scores(q_BKGTH, k_BKSH):
    return _dot(q_BKGTH, k_BKSH, (4, 3)) / math.sqrt(q_BKGTH.shape[-1])


def _mix(weights_BKGTS, v_BKSH):
    return _dot(weights_BKGTS.astype(v_BKSH.dtype), v_BKSH, (4, 2))


def _gather(weights_BKGTS, x_BKGTH):
    """Sum over the queries of all heads that share a key: [B, K, S, H]."""
    dims = (((2, 3), (2, 3)), ((0, 1), (0, 1)))
    weights_BKGTS = weights_BKGTS.astype(x_BKGTH.dtype)
    return jax.lax.dot_general(weights_BKGTS, x_BKGTH, dims, preferred_element_type=jnp.float32)


def _dot(a, b, contracted: tuple[int, int]):
    dims = (((contracted[0],), (contracted[1],)), ((0, 1), (0, 1)))
    return jax.lax.dot_general(a, b, dims, preferred_element_type=jnp.float32)
