from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from stablelm_jax.kernels import attention as attention_module
from stablelm_jax.kernels.attention import attention


def in_float64(q, k, v, segments):
    """Every query by itself."""
    batch, length, heads, size = q.shape
    group = heads // k.shape[2]
    out = np.zeros((batch, length, heads, v.shape[3]))
    for b, t, n in np.ndindex(batch, length, heads):
        keys = [s for s in range(t + 1) if segments[b, s] == segments[b, t]]
        scores = k[b, keys, n // group] @ q[b, t, n] / np.sqrt(size)
        weights = np.exp(scores - scores.max())
        out[b, t, n] = weights @ v[b, keys, n // group] / weights.sum()
    return out


def random_inputs(heads, kv_heads, length=20, size=8):
    rng = np.random.default_rng([heads, kv_heads, length])
    q = rng.normal(size=(2, length, heads, size))
    k, v = rng.normal(size=(2, 2, length, kv_heads, size))
    segments = np.sort(rng.integers(1, 5, (2, length)), axis=1).astype(np.int32)
    return q, k, v, segments


# The others are kernels of chips, which run there only: their own tests have them interpreted.
@pytest.fixture(params=["reference", "chunked"])
def implementation(request, monkeypatch):
    # groups of two chunks and of one, and a last chunk that has to be filled up
    monkeypatch.setattr(attention_module, "QUERIES", 6)
    monkeypatch.setattr(attention_module, "GROUPS", 2)
    return request.param


@pytest.mark.parametrize("heads, kv_heads", [(4, 4), (4, 2), (4, 1)])
def test_every_implementation_is_the_softmax_of_float64(implementation, heads, kv_heads):
    q, k, v, segments = random_inputs(heads, kv_heads)
    found = attention(*map(jnp.float32, (q, k, v)), segments, implementation=implementation)
    np.testing.assert_allclose(found, in_float64(q, k, v, segments), atol=1e-5)


@pytest.mark.parametrize("heads, kv_heads", [(4, 4), (4, 2)])
def test_every_gradient_is_the_slope_of_the_float64_function(implementation, heads, kv_heads):
    q, k, v, segments = random_inputs(heads, kv_heads, length=14)
    rng = np.random.default_rng(1)
    g = rng.normal(size=(2, 14, heads, 8))

    def weighted(q, k, v):
        return jnp.sum(attention(q, k, v, segments, implementation=implementation) * g)

    gradients = jax.grad(weighted, (0, 1, 2))(*map(jnp.float32, (q, k, v)))
    for place, gradient in enumerate(gradients):
        direction = rng.normal(size=gradient.shape)
        shifted = [[*(q, k, v)], [*(q, k, v)]]
        for sign, values in zip((1, -1), shifted):
            values[place] = values[place] + sign * 1e-5 * direction
        plus, minus = (np.sum(in_float64(*values, segments) * g) for values in shifted)
        slope = (plus - minus) / 2e-5
        scale = np.linalg.norm(gradient) * np.linalg.norm(direction)
        assert np.sum(gradient * direction) == pytest.approx(slope, abs=1e-5 * scale)


@pytest.mark.parametrize("length", [1, 127, 128, 256, 1024, 1152, 4096])
def test_the_groups_cover_every_query_once_in_whole_chunks(length):
    groups = attention_module._groups(length)
    assert [i for group in groups for i in range(group.start, group.stop)] == list(range(length))
    assert len(groups) <= attention_module.GROUPS
    assert length < 128 or all((group.stop - group.start) % 128 == 0 for group in groups)


def test_memory_of_the_chunked_form_grows_with_the_row_not_with_its_square(monkeypatch):
    monkeypatch.setattr(attention_module, "GROUPS", 2)

    def temporary_bytes(length):
        x = jax.ShapeDtypeStruct((1, length, 2, 16), jnp.float32)
        ids = jax.ShapeDtypeStruct((1, length), jnp.int32)

        def total(q, k, v, ids):
            return jnp.sum(attention(q, k, v, ids, implementation="chunked"))

        compiled = jax.jit(jax.grad(total, (0, 1, 2))).lower(x, x, x, ids).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert temporary_bytes(4096) < 2.2 * temporary_bytes(2048)


def test_heads_that_do_not_divide_and_unknown_names_are_refused():
    q, k, v, segments = random_inputs(4, 3)
    with pytest.raises(ValueError, match="4 query heads cannot share 3 key heads"):
        attention(q, k, v, segments)
    with pytest.raises(ValueError, match="unknown: choose one of auto, reference, chunked, pallas"):
        attention(q, q, q, segments, implementation="fast")


@pytest.mark.parametrize(
    "platform, kind, heads, size, dtype, name",
    [
        ("cpu", "cpu", 32, 64, jnp.bfloat16, "chunked"),
        ("tpu", "TPU v5 lite", 32, 64, jnp.bfloat16, "pallas_tpu"),
        ("tpu", "TPU v4", 32, 160, jnp.float32, "pallas_tpu"),
        ("tpu", "TPU v3", 32, 64, jnp.bfloat16, "splash"),
        ("gpu", "NVIDIA H200", 32, 64, jnp.bfloat16, "pallas_gpu"),
        ("cuda", "NVIDIA A100-SXM4-40GB", 32, 160, jnp.bfloat16, "pallas_gpu"),
        ("gpu", "NVIDIA H100 80GB HBM3", 8, 24, jnp.bfloat16, "chunked"),
        ("gpu", "Tesla T4", 32, 64, jnp.float16, "chunked"),
    ],
)
def test_auto_takes_the_kernel_of_the_device_where_it_has_one(
    platform, kind, heads, size, dtype, name
):
    device = SimpleNamespace(platform=platform, device_kind=kind)
    q, k = (jax.ShapeDtypeStruct((2, 64, n, size), dtype) for n in (heads, 8))
    found, why = attention_module.choose(device, q, k)
    assert found == name and why
