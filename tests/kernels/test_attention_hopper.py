"""The kernels run on Hopper alone (test_on_chip.py); what we hand them is checked here."""

import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_cases import in_float64, random_inputs, rows_of_documents, with_gradients

from stablelm_jax.kernels import attention_gpu, attention_hopper


def test_documents_are_packed_as_cudnn_wants_them():
    segments = np.int32([[4, 4, 4, 9, 9, 4], [1, 2, 3, 4, 5, 5], [7, 7, 7, 7, 7, 7]])
    lengths, offsets, fits = attention_hopper.packed_documents(jnp.asarray(segments), 5)
    assert fits
    np.testing.assert_array_equal(
        lengths, [[3, 2, 1, -1, -1], [1, 1, 1, 1, 2], [6, -1, -1, -1, -1]]
    )
    np.testing.assert_array_equal(
        offsets, [[0, 3, 5, -1, -1, -1], [0, 1, 2, 3, 4, -1], [0, -1, -1, -1, -1, -1]]
    )


@pytest.mark.parametrize("most, fits", [(1, False), (63, False), (64, True)])
def test_a_row_of_too_many_documents_is_noticed(most, fits):
    segments = jnp.asarray(rows_of_documents(64))  # the third row has 64
    assert bool(attention_hopper.packed_documents(segments, most)[2]) is fits


def test_a_row_of_too_many_documents_goes_to_our_kernel(monkeypatch):
    """cuDNN is not here: jax would refuse its branch, so it stands in as zeros."""
    stablehlo = pytest.importorskip("jax._src.cudnn.fused_attention_stablehlo")
    monkeypatch.setattr(
        stablehlo, "dot_product_attention", lambda q, k, v, **options: jnp.zeros_like(q)
    )
    ours = attention_gpu.pallas_gpu
    blocks = attention_gpu.Blocks(*3 * [attention_gpu.Tile(16, 16, 4, 2)])
    monkeypatch.setattr(
        attention_gpu, "pallas_gpu", lambda *x: ours(*x, blocks=blocks, interpret=True)
    )
    q, k, v, do, segments = random_inputs(4, 2, 16, 48)
    monkeypatch.setattr(attention_hopper, "MOST_DOCUMENTS", 47)
    found = with_gradients(attention_hopper.cudnn, q, k, v, do, segments)
    for array, expected in zip(found, in_float64(q, k, v, do, segments)):
        np.testing.assert_allclose(array, expected, atol=1e-5)
    monkeypatch.setattr(attention_hopper, "MOST_DOCUMENTS", 48)
    assert not jax.jit(lambda *x: attention_hopper.cudnn(*x))(q, k, v, segments).any()


def test_without_tokamax_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "tokamax", None)
    q, k, v, _, segments = random_inputs(2, 2, 16, 48)
    with pytest.raises(ImportError, match="pip install tokamax, or choose another attention"):
        attention_hopper.tokamax(q, k, v, segments)
