"""Numbers are computed by Pallas' interpreter on the CPU; the compilers of the chips run ahead of
time. Nothing here shows speed."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_cases import (
    allowed,
    in_float64,
    layers_of,
    random_inputs,
    rows_of_documents,
    with_gradients,
)
from jax.experimental import pallas as pl
from jax.sharding import PartitionSpec as P

from stablelm_jax.kernels import attention, attention_gpu, documents
from stablelm_jax.kernels.attention import reference
from stablelm_jax.kernels.attention_gpu import Blocks, Tile, pallas_gpu
from stablelm_jax.kernels.residuals import SAVED_NAMES
from stablelm_jax.planning.targets import parse_target

# More queries than keys, more keys than queries, and as many; a loop for all tiles, and three.
BLOCKS = Blocks(Tile(32, 16, 4, 2, True), Tile(16, 32, 4, 2, True), Tile(16, 16, 4, 2, True))
EQUAL = Blocks(*3 * [Tile(16, 16, 4, 2)])
SWAPPED = Blocks(forward=Tile(16, 32, 4, 2), keys=Tile(32, 16, 4, 2), queries=Tile(16, 32, 4, 2))

interpreted = partial(pallas_gpu, blocks=BLOCKS, interpret=True)


@pytest.mark.parametrize(
    "heads, kv_heads, size, length, blocks",
    [
        (2, 2, 64, 61, BLOCKS),  # the last block is part of a block
        (4, 2, 80, 61, BLOCKS),
        (1, 1, 128, 64, BLOCKS),
        (4, 1, 160, 50, BLOCKS),
        (2, 2, 16, 64, EQUAL),
        (2, 1, 48, 70, SWAPPED),
        (2, 1, 16, 5, BLOCKS),  # less than a block
        pytest.param(8, 2, 160, 250, BLOCKS, marks=pytest.mark.by_hand),
        pytest.param(8, 8, 64, 256, SWAPPED, marks=pytest.mark.by_hand),
    ],
)
def test_output_and_gradients_are_those_of_float64(heads, kv_heads, size, length, blocks):
    inputs = random_inputs(heads, kv_heads, size, length)
    found = with_gradients(partial(interpreted, blocks=blocks), *inputs)
    for name, array, expected in zip(("o", "dq", "dk", "dv"), found, in_float64(*inputs)):
        # the worst of 50 draws was 1.3e-6
        tolerance = 3e-6 * np.abs(expected).max()
        np.testing.assert_allclose(array, expected, rtol=0, atol=tolerance, err_msg=name)


@pytest.mark.parametrize("blocks", [BLOCKS, SWAPPED], ids=["one loop", "three loops"])
def test_large_scores_and_small_gradients_keep_their_digits(blocks):
    q, k, v, do, segments = random_inputs(2, 1, 64, 61)
    inputs = 30 * q, k, v, 1e-6 * do, segments
    assert np.abs(np.einsum("bth,bsh->bts", inputs[0][:, :, 0], k[:, :, 0]) / 8).max() > 100
    found = with_gradients(partial(interpreted, blocks=blocks), *inputs)
    for name, array, expected in zip(("o", "dq", "dk", "dv"), found, in_float64(*inputs)):
        # float32 holds a score of 100 to 4e-6, and exp passes that on
        tolerance = 3e-5 * np.abs(expected).max()
        np.testing.assert_allclose(array, expected, rtol=0, atol=tolerance, err_msg=name)


@pytest.mark.parametrize(
    "dtype, size",
    [
        (jnp.bfloat16, 80),
        (jnp.float16, 80),
        *(pytest.param(jnp.bfloat16, n, marks=pytest.mark.by_hand) for n in (64, 128, 160)),
    ],
)
def test_16_bits_lose_no_more_than_they_do_in_the_plain_form(dtype, size):
    inputs = random_inputs(4, 2, size, 61, dtype)
    expected = in_float64(*inputs)
    found, plain = (with_gradients(f, *inputs) for f in (interpreted, reference))
    for name, array, other, right in zip(("o", "dq", "dk", "dv"), found, plain, expected):
        assert np.linalg.norm(array - right) < 1.5 * np.linalg.norm(other - right), name


def test_the_interpreter_begins_outputs_as_nan_so_that_unwritten_places_would_show():
    nothing = pl.pallas_call(
        lambda out: None, jax.ShapeDtypeStruct((16,), jnp.float32), interpret=True
    )
    assert np.isnan(nothing()).all()


def test_a_document_is_the_same_bits_whatever_its_neighbours_hold():
    q, k, v, do, _ = random_inputs(2, 2, 64, 61)
    segments = np.int32(np.repeat([[1, 2, 3]], [20, 23, 18], axis=1).repeat(4, 0))
    others = jnp.asarray(segments != 2)[:, :, None, None]
    disturbed = [jnp.where(others, 3 * x[::-1] + 1, x) for x in (q, k, v, do)]
    ours = with_gradients(interpreted, q, k, v, do, segments)
    theirs = with_gradients(interpreted, *disturbed, segments)
    for a, b in zip(ours, theirs):
        np.testing.assert_array_equal(a[:, 20:43], b[:, 20:43])
        assert (a[:, :20] != b[:, :20]).any() and (a[:, 43:] != b[:, 43:]).any()


@pytest.mark.parametrize("tile", [Tile(16, 16, 4, 2), Tile(32, 16, 4, 2), Tile(16, 64, 4, 2)])
@pytest.mark.parametrize("of_keys", [False, True])
def test_just_the_tiles_with_a_visible_key_are_visited_and_full_ones_without_a_mask(tile, of_keys):
    segments = np.concatenate([rows_of_documents(192, seed=seed) for seed in range(10)])
    start_BT, end_BT = documents.document_spans(jnp.asarray(segments))
    if of_keys:
        bounds = documents.key_block_bounds(end_BT, tile)
    else:
        bounds = documents.query_block_bounds(start_BT, tile)
    pairs = allowed(segments).reshape(40, 192 // tile.queries, tile.queries, -1, tile.keys)
    some, every = pairs.any((2, 4)), pairs.all((2, 4))
    if of_keys:
        some, every = some.swapaxes(1, 2), every.swapaxes(1, 2)
    blocks = np.arange(some.shape[2])
    begin, whole_begin, whole_end, end = np.moveaxis(np.asarray(bounds), -1, 0)[..., None]
    np.testing.assert_array_equal((begin <= blocks) & (blocks < end), some)
    np.testing.assert_array_equal((whole_begin <= blocks) & (blocks < whole_end), every)
    assert (begin <= whole_begin).all() and (whole_begin <= whole_end).all()
    assert (whole_end <= end).all()


saved = jax.checkpoint_policies.save_only_these_names(*SAVED_NAMES)


def test_it_works_in_shard_map_scan_and_checkpoint():
    x, *_, segments = random_inputs(2, 2, 16, 50)
    mesh = jax.sharding.Mesh(jax.devices()[:2], "data")

    @partial(jax.shard_map, mesh=mesh, in_specs=P("data"), out_specs=P("data"), check_vma=False)
    def gradient(x, segments):
        return jax.grad(layers_of(interpreted, saved))(x, segments)

    expected = jax.jit(jax.grad(layers_of(reference, saved)))(x, segments)
    tolerance = 3e-6 * np.abs(expected).max()
    np.testing.assert_allclose(jax.jit(gradient)(x, segments), expected, rtol=0, atol=tolerance)


def test_where_the_compiler_splits_heads_each_device_runs_its_own(monkeypatch):
    heads_seen = []

    def spied(q_BTNH, *others):
        heads_seen.append(q_BTNH.shape[2])
        return interpreted(q_BTNH, *others, blocks=EQUAL)

    monkeypatch.setattr(attention_gpu, "pallas_gpu", spied)
    *inputs, segments = random_inputs(4, 2, 16, 32)
    mesh = jax.sharding.Mesh(np.reshape(jax.devices()[:4], (2, 2)), ("data", "model"))

    split = jax.shard_map(
        attention.IMPLEMENTATIONS["pallas_gpu"],
        mesh=mesh,
        in_specs=P("data"),
        out_specs=P("data"),
        axis_names={"data"},  # `model` is the compiler's
        check_vma=False,
    )
    found = with_gradients(split, *inputs, segments)
    assert set(heads_seen) == {2}
    for name, array, expected in zip(("o", "dq", "dk", "dv"), found, in_float64(*inputs, segments)):
        tolerance = 3e-6 * np.abs(expected).max()
        np.testing.assert_allclose(array, expected, rtol=0, atol=tolerance, err_msg=name)


@pytest.mark.parametrize("policy, times", [(saved, 1), (None, 2)])
def test_backward_runs_the_forward_kernel_again_unless_the_policy_saved_its_results(policy, times):
    x, _, _, _, segments = random_inputs(1, 1, 16, 32)
    jaxpr = jax.make_jaxpr(jax.grad(layers_of(interpreted, policy)))(x, segments)
    names = [name for name in str(jaxpr).split() if name == "name=attention_forward"]
    assert len(names) == times


@pytest.mark.parametrize(
    "shapes, dtype, message",
    [
        ([(1, 8, 2, 72), (1, 8, 2, 72)], jnp.float32, "head size 72 is no multiple of 16"),
        ([(1, 8, 2, 176), (1, 8, 2, 176)], jnp.float32, "head size 176"),
        ([(1, 8, 4, 64), (1, 8, 3, 64)], jnp.float32, "4 query heads cannot share 3 key heads"),
        ([(1, 8, 4, 64), (1, 8, 4, 64)], jnp.int8, "no matrix product for int8"),
    ],
)
def test_what_the_kernels_cannot_do_is_refused(shapes, dtype, message):
    q, k = (jnp.zeros(shape, dtype) for shape in shapes)
    with pytest.raises(ValueError, match=message):
        pallas_gpu(q, k, k, jnp.ones((1, 8), jnp.int32))


@pytest.mark.parametrize("generation", ["sm80", "sm90"])
def test_every_head_size_takes_the_blocks_of_the_next_larger_in_the_table(generation):
    table = attention_gpu.BLOCKS[generation]
    assert list(table) == sorted(table) == [64, 80, 128, 160]
    for size, row in [(16, 64), (64, 64), (80, 80), (96, 128), (160, 160)]:
        assert attention_gpu.blocks_for(size, generation=generation) is table[row]
    float32 = attention_gpu.blocks_for(64, jnp.float32, generation)
    for blocks in (float32, *table.values()):
        for tile in (blocks.forward, blocks.keys, blocks.queries):
            assert all(n >= 16 and n & (n - 1) == 0 for n in (tile.queries, tile.keys))


@pytest.mark.parametrize(
    ("kind", "generation"),
    [
        ("NVIDIA A100-SXM4-40GB", "sm80"),
        ("NVIDIA H100 80GB HBM3", "sm90"),
        ("NVIDIA H200", "sm90"),
        ("Tesla T4", None),
        ("cpu", None),
    ],
)
def test_the_table_is_chosen_by_the_name_of_the_chip(kind, generation):
    assert attention_gpu.generation_of(kind) == generation


def compiled(target, heads, kv_heads, size, length):
    """Forward and backward for that GPU, two rows in bfloat16."""
    mesh = jax.sharding.Mesh(parse_target(target).devices()[:1], "data")
    sharding = jax.sharding.NamedSharding(mesh, P())

    def struct(*shape, dtype=jnp.bfloat16):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    generation = "sm80" if target.startswith("a100") else "sm90"
    attend = partial(pallas_gpu, blocks=attention_gpu.blocks_for(size, generation=generation))

    # jax 0.12 asks the mesh which GPU it compiles for.
    @partial(jax.shard_map, mesh=mesh, in_specs=P(), out_specs=P(), check_vma=False)
    def run(q, k, v, do, segments):
        out, backward = jax.vjp(lambda *qkv: attend(*qkv, segments), q, k, v)
        return out, *backward(do)

    q, k = (struct(2, length, n, size) for n in (heads, kv_heads))
    segments = struct(2, length, dtype=jnp.int32)
    return jax.jit(run).lower(q, k, k, q, segments).compile()


@pytest.mark.by_hand
@pytest.mark.aot
@pytest.mark.parametrize(
    "heads, kv_heads, size", [(32, 32, 64), pytest.param(32, 8, 160, marks=pytest.mark.by_hand)]
)
@pytest.mark.parametrize("target", ["a100-40gb:1x1", "h100:1x1"])
def test_it_compiles_for_the_chip_and_holds_two_numbers_a_query_beside_its_results(
    target, heads, kv_heads, size
):
    program = compiled(target, heads, kv_heads, size, length=4096)
    for kernel in ("attention_forward", "attention_query_gradient", "attention_key_gradients"):
        assert kernel in program.as_text()
    # log-sum-exp and delta; spans and bounds are less than a tenth of them
    two_numbers = 2 * 2 * heads * 4096 * 4
    assert program.memory_analysis().temp_size_in_bytes < 1.1 * two_numbers


@pytest.mark.by_hand
@pytest.mark.aot
def test_memory_grows_with_the_row_not_with_its_square():
    small, large = (
        compiled("a100-40gb:1x1", 32, 32, 64, length).memory_analysis().temp_size_in_bytes
        for length in (2048, 8192)
    )
    assert small < large < 4.1 * small
