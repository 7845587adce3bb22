"""Head and cross-entropy in one: hidden states in, the loss out; a registry of ways to do it.

B batch, T sequence, R rows (all tokens of a batch), C chunks of rows, D width, V vocabulary.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from stablelm_jax.kernels.device import traced_device

# Rows whose float32 logits are held at a time: 1.6 GB with 100,352 ids. With fewer rows the float32
# sum of the kernel's gradient would be read and written more often, once for each chunk.
ROWS = 4096


@jax.named_scope("head")
def cross_entropy(
    x_BTD: jax.Array,
    kernel_DV: jax.Array,
    targets_BT: jax.Array,
    weights_BT: jax.Array,
    *,
    implementation: str = "auto",
    num_valid: int | None = None,
) -> tuple[jax.Array, jax.Array]:
    """The loss sum(weights * nll), and nll = -log softmax(x kernel)[target] in nats, [B, T].

    Both are float32. Only the loss has a gradient, for x and the kernel; nll is for counting. So
    'tiled' can compute the gradient beside the loss: all that comes back later is one number to
    scale it with. Matrix products run in the dtype of x, logits and softmax in float32.

    Args:
      targets_BT: int32 ids below num_valid. Any other, such as -1 or padding of the vocabulary, has
        no probability: with a weight the loss is infinite, and training leaves the update out
        (training/update_guard.py); with a weight of 0 the token counts for nothing, its nll is 0.
        It has no gradient in either case.
      weights_BT: each token's weight in the loss, as mask / number of tokens.
      implementation: 'tiled' or 'saved', see there; 'auto': 'tiled' where the batch has more rows
        than a chunk, else 'saved'; 'reference': plain autodiff.
      num_valid: columns of the kernel that take part (None: all, as published); the others, padding
        of the vocabulary, get no probability and no gradient.

    Raises:
      ValueError: for an unknown implementation, or a num_valid that the vocabulary does not have.
    """
    if implementation == "auto":
        implementation = "tiled" if targets_BT.size > ROWS else "saved"
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(
            f"cross-entropy implementation {implementation!r} is unknown: "
            f"choose one of auto, {', '.join(IMPLEMENTATIONS)}"
        )
    vocab_size = kernel_DV.shape[1]
    if num_valid is not None and not 1 <= num_valid <= vocab_size:
        raise ValueError(f"num_valid is {num_valid}: use 1 to {vocab_size}, or None")
    num_valid = vocab_size if num_valid is None else num_valid
    possible_BT = (targets_BT >= 0) & (targets_BT < num_valid)
    loss, nll_R = IMPLEMENTATIONS[implementation](
        x_BTD.reshape(-1, x_BTD.shape[-1]),
        kernel_DV.astype(x_BTD.dtype),
        jnp.where(possible_BT, targets_BT, 0).reshape(-1),
        jnp.where(possible_BT, weights_BT, 0).reshape(-1).astype(jnp.float32),
        num_valid,
    )
    impossible_BT = jnp.where(possible_BT | (weights_BT == 0), 0.0, jnp.inf)
    nll_BT = jnp.where(possible_BT, nll_R.reshape(targets_BT.shape), impossible_BT)
    return loss + jnp.max(impossible_BT), jax.lax.stop_gradient(nll_BT)


def reference(x_RD, kernel_DV, targets_R, weights_R, num_valid):
    """Plain, what the others are compared with: all logits in float32, gradients by autodiff."""
    log_probs_RV = jax.nn.log_softmax(_logits(x_RD, kernel_DV, num_valid))
    nll_R = -jnp.take_along_axis(log_probs_RV, targets_R[:, None], 1)[:, 0]
    return jnp.sum(weights_R * nll_R), nll_R


def saved(x_RD, kernel_DV, targets_R, weights_R, num_valid):
    """Keeps the logits' gradient for backward in the dtype of x: R * V values.

    Float32 logits exist for a chunk of rows at a time. Backward is two products over all rows.
    """
    nll_R = _row_losses(num_valid, x_RD, kernel_DV, targets_R)
    return jnp.sum(weights_R * nll_R), nll_R


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def tiled(x_RD, kernel_DV, targets_R, weights_R, num_valid):
    """Computes the gradient in the forward pass, chunk by chunk; nothing of R * V is ever held.

    The gradient itself is kept for backward, R * D and D * V values in float32, so that scaling it
    by the loss's cotangent rounds only once. The matrix work is the same three products.
    """

    def losses_of(chunk):
        x_RD, targets_R, _ = chunk
        return _log_sum_exp_and_target(_logits(x_RD, kernel_DV, num_valid), targets_R)

    log_sum_R, target_R = jax.lax.map(losses_of, _in_chunks(x_RD, targets_R, weights_R))
    nll_R = _joined(log_sum_R - target_R, len(targets_R))
    return jnp.sum(weights_R * nll_R), nll_R


IMPLEMENTATIONS = {"reference": reference, "saved": saved, "tiled": tiled}


def _logits(x_RD, kernel_DV, num_valid):
    logits_RV = jnp.matmul(x_RD, kernel_DV, preferred_element_type=jnp.float32)
    if num_valid == kernel_DV.shape[1]:
        return logits_RV
    return jnp.where(jnp.arange(kernel_DV.shape[1]) < num_valid, logits_RV, -jnp.inf)


def _is_target(targets_R, vocab_size):
    """One-hot as a comparison: it fuses, and a vocabulary that is split stays split."""
    return jnp.arange(vocab_size) == targets_R[:, None]


def _log_sum_exp_and_target(logits_RV, targets_R):
    max_R = jnp.max(logits_RV, -1)
    sum_R = jnp.sum(jnp.exp(logits_RV - max_R[:, None]), -1)
    if traced_device().platform == "cpu":  # there it would be one more array of R * V
        return max_R + jnp.log(sum_R), jnp.take_along_axis(logits_RV, targets_R[:, None], 1)[:, 0]
    is_target_RV = _is_target(targets_R, logits_RV.shape[1])
    return max_R + jnp.log(sum_R), jnp.sum(jnp.where(is_target_RV, logits_RV, 0.0), -1)


def _dlogits(logits_RV, log_sum_R, targets_R):
    """Each row's gradient of its own loss: the probabilities, less 1 at the target."""
    probs_RV = jnp.exp(logits_RV - log_sum_R[:, None])
    return probs_RV - _is_target(targets_R, probs_RV.shape[1])


def _in_chunks(*arrays_R_):
    """Each as [C, rows, ...]; the last chunk is filled up with zeros, rows of no weight."""
    count = len(arrays_R_[0])
    rows = min(count, ROWS)

    def split(x_R_):
        padded = jnp.pad(x_R_, ((0, -count % rows), *((0, 0) for _ in x_R_.shape[1:])))
        return padded.reshape(-1, rows, *x_R_.shape[1:])

    return tuple(map(split, arrays_R_))


def _joined(x_CR_, count: int):
    return x_CR_.reshape(-1, *x_CR_.shape[2:])[:count]


def _tiled_forward(x_RD, kernel_DV, targets_R, weights_R, num_valid):
    def step(dkernel_DV, chunk):
        x_RD, targets_R, weights_R = chunk
        logits_RV = _logits(x_RD, kernel_DV, num_valid)
        log_sum_R, target_R = _log_sum_exp_and_target(logits_RV, targets_R)
        dlogits_RV = weights_R[:, None] * _dlogits(logits_RV, log_sum_R, targets_R)
        dlogits_RV = dlogits_RV.astype(x_RD.dtype)
        dx_RD = jnp.matmul(dlogits_RV, kernel_DV.T, preferred_element_type=jnp.float32)
        dkernel_DV += jnp.matmul(x_RD.T, dlogits_RV, preferred_element_type=jnp.float32)
        return dkernel_DV, (log_sum_R - target_R, dx_RD)

    chunks = _in_chunks(x_RD, targets_R, weights_R)
    zeros_DV = jnp.zeros(kernel_DV.shape, jnp.float32)
    if len(chunks[0]) == 1:
        dkernel_DV, (nll_R, dx_RD) = step(zeros_DV, [x[0] for x in chunks])
    else:
        dkernel_DV, out = jax.lax.scan(step, zeros_DV, chunks)
        nll_R, dx_RD = (_joined(x, len(targets_R)) for x in out)
    like = jnp.zeros(0, x_RD.dtype)  # for its dtype
    return (jnp.sum(weights_R * nll_R), nll_R), (nll_R, dx_RD, dkernel_DV, like)


def _tiled_backward(num_valid, saved, cotangents):
    nll_R, dx_RD, dkernel_DV, like = saved
    scale = cotangents[0]
    scaled = [(scale * g).astype(like.dtype) for g in (dx_RD, dkernel_DV)]
    return *scaled, None, scale * nll_R


tiled.defvjp(_tiled_forward, _tiled_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _row_losses(num_valid, x_RD, kernel_DV, targets_R):
    return tiled(x_RD, kernel_DV, targets_R, jnp.ones(len(targets_R)), num_valid)[1]


def _saved_forward(num_valid, x_RD, kernel_DV, targets_R):
    def step(chunk):
        x_RD, targets_R = chunk
        logits_RV = _logits(x_RD, kernel_DV, num_valid)
        log_sum_R, target_R = _log_sum_exp_and_target(logits_RV, targets_R)
        dlogits_RV = _dlogits(logits_RV, log_sum_R, targets_R).astype(x_RD.dtype)
        return log_sum_R - target_R, dlogits_RV

    chunks = _in_chunks(x_RD, targets_R)
    if len(chunks[0]) == 1:
        losses_R, dlogits_RV = step([x[0] for x in chunks])
    else:
        losses_R, dlogits_RV = (_joined(x, len(targets_R)) for x in jax.lax.map(step, chunks))
    return losses_R, (x_RD, kernel_DV, dlogits_RV)


def _saved_backward(num_valid, saved, g_R):
    """The rows' cotangents go into the small matrices: dlogits are not written a second time."""
    x_RD, kernel_DV, dlogits_RV = saved
    g_R1 = g_R[:, None]
    dx_RD = g_R1 * jnp.matmul(dlogits_RV, kernel_DV.T, preferred_element_type=jnp.float32)
    dkernel_DV = jnp.matmul((g_R1 * x_RD).astype(x_RD.dtype).T, dlogits_RV)
    return dx_RD.astype(x_RD.dtype), dkernel_DV, None


_row_losses.defvjp(_saved_forward, _saved_backward)
