import jax
import jax.numpy as jnp
import numpy as np
import pytest

from stablelm_jax.kernels.cross_entropy import cross_entropy

B, T, D, V = 3, 11, 16, 203


@pytest.fixture
def inputs():
    rng = np.random.default_rng()
    x_BTD = rng.normal(size=(B, T, D)).astype(np.float32)
    kernel_DV = rng.normal(size=(D, V)).astype(np.float32)
    return x_BTD, kernel_DV, rng.integers(0, V, (B, T), np.int32), rng.normal(size=(B, T))


def in_float64(x_BTD, kernel_DV, targets_BT, g_BT):
    """Losses, and the gradients of sum(losses * g), by the textbook."""
    x, kernel = x_BTD.astype(np.float64), kernel_DV.astype(np.float64)
    scores = x @ kernel
    log_sum = np.log(np.exp(scores - scores.max(-1, keepdims=True)).sum(-1, keepdims=True))
    log_p = scores - scores.max(-1, keepdims=True) - log_sum
    one_hot = np.eye(V)[targets_BT]
    d_scores = (np.exp(log_p) - one_hot) * g_BT[..., None]
    return -(log_p * one_hot).sum(-1), d_scores @ kernel.T, np.einsum("btd,btv->dv", x, d_scores)


@pytest.mark.parametrize("rows_per_chunk", [None, 1, 8, 33, 100])
def test_loss_and_gradients_are_those_of_float64(inputs, rows_per_chunk):
    x_BTD, kernel_DV, targets_BT, g_BT = inputs

    def weighted(x, kernel):
        losses_BT = cross_entropy(x, kernel, targets_BT, rows_per_chunk=rows_per_chunk)
        return jnp.sum(losses_BT * g_BT), losses_BT

    (_, losses), gradients = jax.value_and_grad(weighted, (0, 1), has_aux=True)(x_BTD, kernel_DV)
    for found, expected in zip((losses, *gradients), in_float64(*inputs)):
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5 * np.abs(expected).max())


def test_large_logits_stay_finite_and_exact(inputs):
    x_BTD, kernel_DV, targets_BT, g_BT = inputs
    found = cross_entropy(100 * x_BTD, 100 * kernel_DV, targets_BT)
    expected, *_ = in_float64(100 * x_BTD, 100 * kernel_DV, targets_BT, g_BT)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=0.1)


def test_in_bfloat16_it_is_more_exact_than_a_head_that_keeps_bfloat16_logits(inputs):
    x_BTD, kernel_DV, targets_BT, g_BT = inputs
    x, kernel = jnp.asarray(x_BTD, jnp.bfloat16), jnp.asarray(kernel_DV, jnp.bfloat16)
    exact = in_float64(np.asarray(x, np.float32), np.asarray(kernel, np.float32), targets_BT, g_BT)

    def errors(function):
        total = lambda x, kernel: jnp.sum(function(x, kernel, targets_BT) * g_BT)  # noqa: E731
        found = (function(x, kernel, targets_BT), *jax.grad(total, (0, 1))(x, kernel))
        return [np.linalg.norm(np.asarray(f, np.float64) - e) for f, e in zip(found, exact)]

    def rounded(x_BTD, kernel_DV, targets_BT):
        log_p_BTV = jax.nn.log_softmax(jnp.matmul(x_BTD, kernel_DV).astype(jnp.float32))
        return -jnp.take_along_axis(log_p_BTV, targets_BT[..., None], -1)[..., 0]

    ours, plain = errors(cross_entropy), errors(rounded)
    assert ours[0] < 0.1 * plain[0]  # float32 logits
    assert ours[1] < plain[1] and ours[2] < plain[2]


def test_a_chunk_without_rows_is_refused(inputs):
    x_BTD, kernel_DV, targets_BT, _ = inputs
    with pytest.raises(ValueError, match="rows_per_chunk is 0"):
        cross_entropy(x_BTD, kernel_DV, targets_BT, rows_per_chunk=0)
