"""Numbers by Pallas's interpreter on this machine, compilation by the TPUs' own compilers."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_cases import in_float64, random_inputs, with_gradients
from jax.sharding import PartitionSpec as P
from jax.sharding import SingleDeviceSharding

from stablelm_jax.kernels import attention, attention_tpu
from stablelm_jax.kernels.attention import reference
from stablelm_jax.kernels.attention_tpu import pallas_tpu
from stablelm_jax.kernels.documents import Tile
from stablelm_jax.parallel.mesh import make_mesh
from stablelm_jax.planning.targets import parse_target

EQUAL, WIDE, TALL = Tile(128, 128), Tile(128, 256), Tile(256, 128)
interpreted = partial(pallas_tpu, tile=EQUAL, interpret=True)
NAMES = ("o", "dq", "dk", "dv")


@pytest.mark.parametrize(
    "heads, kv_heads, size, length, tile",
    [
        (2, 2, 64, 300, EQUAL),  # the last block is part of a block
        (2, 1, 80, 384, WIDE),
        (4, 1, 160, 256, TALL),
        (1, 1, 64, 500, Tile(384, 256)),  # neither divides the other
        (3, 3, 128, 5, EQUAL),  # less than a block
        (4, 2, 12, 200, EQUAL),  # less than a span of sublanes
        pytest.param(8, 2, 160, 1000, EQUAL, marks=pytest.mark.by_hand),
        pytest.param(4, 4, 64, 1100, attention_tpu.TILE, marks=pytest.mark.by_hand),
    ],
)
def test_output_and_gradients_are_those_of_float64(heads, kv_heads, size, length, tile):
    inputs = random_inputs(heads, kv_heads, size, length, block=128)
    found = with_gradients(partial(interpreted, tile=tile), *inputs)
    for name, array, expected in zip(NAMES, found, in_float64(*inputs)):
        tolerance = 3e-6 * np.abs(expected).max()
        np.testing.assert_allclose(array, expected, rtol=0, atol=tolerance, err_msg=name)


@pytest.mark.parametrize("size", [64, 80])
def test_16_bits_lose_no_more_than_they_do_in_the_plain_form(size):
    inputs = random_inputs(4, 2, size, 200, jnp.bfloat16, block=128)
    expected = in_float64(*inputs)
    found, plain = (with_gradients(f, *inputs) for f in (interpreted, reference))
    for name, array, other, right in zip(NAMES, found, plain, expected):
        assert np.linalg.norm(array - right) < 1.5 * np.linalg.norm(other - right), name


def test_a_document_is_the_same_bits_whatever_its_neighbours_hold():
    q, k, v, do, _ = random_inputs(2, 1, 16, 300)
    segments = np.int32(np.repeat([[1, 2, 3]], [100, 73, 127], axis=1).repeat(4, 0))
    others = jnp.asarray(segments != 2)[:, :, None, None]
    disturbed = [jnp.where(others, 3 * x[::-1] + 1, x) for x in (q, k, v, do)]
    ours = with_gradients(interpreted, q, k, v, do, segments)
    theirs = with_gradients(interpreted, *disturbed, segments)
    for a, b in zip(ours, theirs):
        np.testing.assert_array_equal(a[:, 100:173], b[:, 100:173])
        assert (a[:, :100] != b[:, :100]).any() and (a[:, 173:] != b[:, 173:]).any()


def test_tiles_of_other_documents_are_never_visited():
    """NaN there would come through: it times a weight of 0 is NaN."""
    q, k, v, do, _ = random_inputs(1, 1, 16, 512)
    segments = np.int32(np.repeat([[1, 2]], [256, 256], axis=1).repeat(4, 0))
    q, k, v, do = (x.at[:, :256].set(jnp.nan) for x in (q, k, v, do))
    for array in with_gradients(interpreted, q, k, v, do, segments):
        assert np.isfinite(array[:, 256:]).all() and np.isnan(array[:, :256]).any()


def test_rows_and_heads_split_over_a_mesh_give_the_same(monkeypatch):
    monkeypatch.setattr(attention_tpu, "pallas_tpu", interpreted)
    *inputs, segments = random_inputs(6, 2, 16, 140)  # on each device 3 heads and their key head
    split = jax.shard_map(
        attention.IMPLEMENTATIONS["pallas_tpu"],
        mesh=make_mesh(2, 2, jax.devices()[:4]),
        in_specs=P("data"),
        out_specs=P("data"),
        axis_names={"replica", "data"},  # `model` is the compiler's
        check_vma=False,
    )
    found = with_gradients(split, *inputs, segments)
    for name, array, expected in zip(NAMES, found, in_float64(*inputs, segments)):
        tolerance = 3e-6 * np.abs(expected).max()
        np.testing.assert_allclose(array, expected, rtol=0, atol=tolerance, err_msg=name)


@pytest.mark.parametrize(
    "kind, length, size, reason",
    [
        ("TPU v5 lite", 4096, 64, None),
        ("TPU v5", 4096, 160, None),
        ("TPU v6 lite", 8192, 128, None),
        ("TPU v5", 16_384, 64, None),
        ("TPU v5", 16_384, 128, "84 MiB of vector memory"),
        ("TPU v4", 4096, 64, None),
        ("TPU v4", 4096, 80, "MiB of vector memory"),
        ("TPU v3", 4096, 64, "too little vector memory"),
    ],
)
def test_what_the_vector_memory_holds(kind, length, size, reason):
    q = jax.ShapeDtypeStruct((1, length, 8, size), jnp.bfloat16)
    found = attention_tpu.why_unsupported(kind, q)
    assert found is None if reason is None else reason in found


@pytest.mark.by_hand
@pytest.mark.aot
@pytest.mark.parametrize("target", ["v4:2x2x1", "v5e:2x2", "v5p:2x2x1", "v6e:2x2"])
@pytest.mark.parametrize(
    "heads, kv_heads, size, length, dtype",
    [
        (32, 32, 64, 4096, jnp.bfloat16),
        (8, 2, 80, 4096, jnp.float32),
        (16, 16, 128, 4096, jnp.bfloat16),
        (32, 8, 160, 4096, jnp.bfloat16),
        (4, 2, 64, 16_384, jnp.bfloat16),
        (4, 2, 64, 32_768, jnp.bfloat16),
    ],
)
def test_it_compiles_for_the_chip_and_holds_no_scores(target, heads, kv_heads, size, length, dtype):
    """In the vector memory that it says it needs: the compiler refuses what goes beyond."""
    place = SingleDeviceSharding(parse_target(target).devices()[0])

    def array(*shape, dtype=dtype):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=place)

    q, k = array(1, length, heads, size), array(1, length, kv_heads, size)
    if reason := attention_tpu.why_unsupported(place._device.device_kind, q):
        assert "v4" in target or (length, target) == (32_768, "v5p:2x2x1")
        pytest.skip(reason)

    def gradients(q, k, v, segments, g):
        return jax.vjp(lambda *x: pallas_tpu(*x, segments), q, k, v)[1](g)

    lowered = jax.jit(gradients).lower(q, k, k, array(1, length, dtype=jnp.int32), q)
    temporary = lowered.compile().memory_analysis().temp_size_in_bytes
    print(f"{target} {heads} {kv_heads} {size}: temporary {temporary / 2**20:.0f} MiB")
    assert temporary < heads * length * length  # a byte for each score
