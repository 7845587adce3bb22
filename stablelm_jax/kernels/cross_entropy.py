"""Head and cross-entropy in one: hidden states in, the loss of every token out.

B batch, T sequence, R rows (tokens of the batch in one line), D width, V vocabulary.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp


def cross_entropy(
    x_BTD: jax.Array,
    kernel_DV: jax.Array,
    targets_BT: jax.Array,
    *,
    rows_per_chunk: int | None = None,
) -> jax.Array:
    """-log softmax(x kernel)[target] of every token in nats, float32 [B, T].

    Matrix products run in the dtype of x, logits and softmax in float32. Every column of the
    kernel takes part in the softmax, the padding rows of the vocabulary too (as published).

    Args:
      rows_per_chunk: tokens whose logits are held at a time. Without it the logits of the whole
        batch, B * T * V values, are kept for backward; with it backward computes each chunk's
        again, a third more matrix work for little memory.

    Raises:
      ValueError: for a rows_per_chunk below 1.
    """
    x_RD = x_BTD.reshape(-1, x_BTD.shape[-1])
    kernel_DV = kernel_DV.astype(x_BTD.dtype)
    targets_R = targets_BT.reshape(-1)
    if rows_per_chunk is None:
        return _row_losses(x_RD, kernel_DV, targets_R).reshape(targets_BT.shape)
    if rows_per_chunk < 1:
        raise ValueError(f"rows_per_chunk is {rows_per_chunk}: use a number of at least 1, or None")
    return _chunked(x_RD, kernel_DV, targets_R, rows_per_chunk).reshape(targets_BT.shape)


def reference(x_BTD: jax.Array, kernel_DV: jax.Array, targets_BT: jax.Array) -> jax.Array:
    """The same in three plain lines, to hold the other against."""
    logits_BTV = jnp.matmul(x_BTD, kernel_DV, preferred_element_type=jnp.float32)
    log_probs_BTV = jax.nn.log_softmax(logits_BTV)
    return -jnp.take_along_axis(log_probs_BTV, targets_BT[..., None], -1)[..., 0]


def _chunked(x_RD, kernel_DV, targets_R, rows):
    padding = -x_RD.shape[0] % rows
    x_CRD = jnp.pad(x_RD, ((0, padding), (0, 0))).reshape(-1, rows, x_RD.shape[1])
    targets_CR = jnp.pad(targets_R, (0, padding)).reshape(-1, rows)

    @jax.checkpoint
    def losses_of(chunk):
        return _row_losses(chunk[0], kernel_DV, chunk[1])

    return jax.lax.map(losses_of, (x_CRD, targets_CR)).reshape(-1)[: x_RD.shape[0]]


@jax.custom_vjp
def _row_losses(x_RD, kernel_DV, targets_R):
    return _exponentials(x_RD, kernel_DV, targets_R)[0]


def _exponentials(x_RD, kernel_DV, targets_R):
    """Losses, exp(logits - row maximum), and the row sums of those."""
    logits_RV = jnp.matmul(x_RD, kernel_DV, preferred_element_type=jnp.float32)
    max_R = jnp.max(logits_RV, -1)
    exp_RV = jnp.exp(logits_RV - max_R[:, None])
    sum_R = jnp.sum(exp_RV, -1)
    target_R = jnp.take_along_axis(logits_RV, targets_R[:, None], 1)[:, 0]
    return max_R + jnp.log(sum_R) - target_R, exp_RV, sum_R


def _forward(x_RD, kernel_DV, targets_R):
    """Turns the exponentials into the gradient of the logits where they lie.

    The gradient is (exp / sum - one_hot) * g. Its row factor g / sum is left out here and given to
    the small matrices in `_backward`, so that no pass over all R * V values is spent on it: only
    the target's value of each row changes.
    """
    losses_R, exp_RV, sum_R = _exponentials(x_RD, kernel_DV, targets_R)
    rows_R = jnp.arange(targets_R.shape[0])
    unscaled_RV = exp_RV.at[rows_R, targets_R].add(-sum_R).astype(x_RD.dtype)
    return losses_R, (x_RD, kernel_DV, unscaled_RV, sum_R)


def _backward(saved, g_R):
    x_RD, kernel_DV, unscaled_RV, sum_R = saved
    scale_R1 = (g_R / sum_R)[:, None]
    dx_RD = scale_R1 * jnp.matmul(unscaled_RV, kernel_DV.T, preferred_element_type=jnp.float32)
    scaled_x_RD = (scale_R1 * x_RD).astype(x_RD.dtype)
    dkernel_DV = jnp.matmul(scaled_x_RD.T, unscaled_RV)
    return dx_RD.astype(x_RD.dtype), dkernel_DV, None


_row_losses.defvjp(_forward, _backward)
