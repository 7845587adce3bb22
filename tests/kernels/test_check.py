"""A kernel that is wrong must not train: what is tried out before a run."""

import jax
import jax.numpy as jnp
import pytest

from stablelm_jax.kernels import attention, check, norms
from stablelm_jax.kernels.check import LIMIT, WrongKernel, check_attention, check_norms


@pytest.mark.parametrize("dtype, length", [(jnp.float32, 512), (jnp.bfloat16, check.LENGTH)])
def test_an_implementation_that_is_right_passes(monkeypatch, dtype, length):
    monkeypatch.setattr(check, "LENGTH", length)
    assert 0 < check_attention("chunked", 4, 2, 16, dtype) < 3 < LIMIT


def one_wrong_tile(q, k, v, segments):
    """Right but for 64 queries of one head, by a tenth."""
    return attention.chunked(q, k, v, segments).at[0, -64:, 1].multiply(0.9)


def later_tokens_seen(q, k, v, segments):
    return attention.chunked(q, jnp.roll(k, -1, 1), jnp.roll(v, -1, 1), segments)


def documents_forgotten(q, k, v, segments):
    return attention.chunked(q, k, v, jnp.zeros_like(segments))


def last_token_unwritten(q, k, v, segments):
    return attention.chunked(q, k, v, segments).at[1, -1].set(jnp.nan)


@jax.custom_vjp
def gradient_of_keys_halved(q, k, v, segments):
    return attention.chunked(q, k, v, segments)


def _forward(q, k, v, segments):
    return jax.vjp(lambda *x: attention.chunked(*x, segments), q, k, v)


def _backward(pullback, do):
    dq, dk, dv = pullback(do)
    return dq, dk / 2, dv, None


gradient_of_keys_halved.defvjp(_forward, _backward)


@pytest.mark.parametrize(
    "wrong",
    [
        one_wrong_tile,
        later_tokens_seen,
        documents_forgotten,
        last_token_unwritten,
        gradient_of_keys_halved,
    ],
    ids=lambda f: getattr(f, "__name__", "gradient_of_keys_halved"),
)
def test_one_that_is_wrong_is_refused_with_its_name_and_what_to_do(monkeypatch, wrong):
    monkeypatch.setitem(attention.IMPLEMENTATIONS, "wrong", wrong)
    monkeypatch.setattr(check, "LENGTH", 512)
    with pytest.raises(WrongKernel, match="'wrong' .*is wrong on .*training.attention='chunked'"):
        check_attention("wrong", 2, 2, 16, jnp.bfloat16)


def one_wrong_row(x, scale, bias, kind, readers):
    x, normed = norms.xla(x, scale, bias, kind, readers)
    return x, tuple(y.at[7].multiply(1.1) for y in normed)


def gradient_of_the_scale_halved(x, scale, bias, kind, readers):
    return norms.xla(x, scale / 2 + jax.lax.stop_gradient(scale / 2), bias, kind, readers)


@pytest.mark.parametrize("wrong", [one_wrong_row, gradient_of_the_scale_halved])
def test_norms_that_are_wrong_are_refused_and_right_ones_pass(monkeypatch, wrong):
    monkeypatch.setitem(norms.IMPLEMENTATIONS, "wrong", wrong)
    monkeypatch.setattr(check, "LENGTH", 64)
    arguments = 48, True, norms.Kind("layer", 1e-5), jnp.bfloat16
    assert 0 < check_norms("xla", *arguments) <= 3 < LIMIT
    with pytest.raises(WrongKernel, match="norms 'wrong' .*is wrong on .*training.norms='xla'"):
        check_norms("wrong", *arguments)
