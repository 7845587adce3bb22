"""Numbers are computed by Pallas' interpreter on the CPU; the compilers of the chips run ahead of
time. Nothing here shows speed."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from seeds import new_rng

from benchmarks import sass
from benchmarks.program_kernels import kernels
from stablelm_jax.kernels import norms, norms_gpu
from stablelm_jax.kernels.norms import Kind
from stablelm_jax.model.compute import Compute
from stablelm_jax.model.config import ModelConfig
from stablelm_jax.model.parameters import nest, parameter_table
from stablelm_jax.model.transformer import hidden_states
from stablelm_jax.parallel.mesh import make_mesh
from stablelm_jax.planning.targets import parse_target

PROGRAMS = norms_gpu.PROGRAMS
interpreted = partial(norms_gpu.pallas_gpu, interpret=True)
NAMES = ("y", "dx", "dscale", "dbias")


@pytest.fixture(autouse=True)
def programs_of_several_rows(monkeypatch):
    monkeypatch.setattr(norms_gpu, "PROGRAMS", 4)


def random_inputs(width, bias, readers, dtype=jnp.float32, rows=11):
    """x, scale, bias or None, and the gradients: of x itself, and of each reader's norm."""
    rng = new_rng()
    x, dx, *dys = rng.normal(1, 2, (2 + readers, rows, width))
    vectors = rng.normal(1, 0.5, (1 + bias, width))
    arrays = [jnp.asarray(a, dtype) for a in (x, dx, *vectors, *dys)]
    vectors, dys = arrays[2 : 3 + bias], tuple(arrays[3 + bias :])
    return arrays[0], vectors[0], vectors[1] if bias else None, arrays[1], dys


def with_gradients(implementation, kind, x, scale, bias, dx, dys):
    norm = lambda *vectors: implementation(*vectors, kind, len(dys))  # noqa: E731
    (same, normed), backward = jax.vjp(norm, x, scale, bias)
    assert (same == x).all() and all((y == normed[0]).all() for y in normed)
    return [np.float64(a) for a in (normed[0], *backward((dx, dys))) if a is not None]


def in_float64(kind, x, scale, bias, dx, dys):
    """By the textbook: the Jacobian of each row, written out."""
    x, scale, dx = (np.float64(a) for a in (x, scale, dx))
    dy, width = sum(np.float64(a) for a in dys), x.shape[1]
    centre = np.eye(width) - (1 / width if kind.name == "layer" else 0)
    centred = x @ centre
    deviation = np.sqrt(np.mean(centred**2, -1, keepdims=True) + kind.epsilon)
    z = centred / deviation
    jacobians = (np.eye(width) - z[:, :, None] * z[:, None] / width) @ centre / deviation[..., None]
    dx = dx + np.einsum("rd,rde->re", dy * scale, jacobians)
    found = [z * scale, dx, np.sum(dy * z, 0)]
    return found if bias is None else [found[0] + np.float64(bias), *found[1:], np.sum(dy, 0)]


@pytest.mark.parametrize("name", ["layer", "rms"])
@pytest.mark.parametrize(
    "width, bias, readers",
    # 4 + 2 + 1; of one number alone the gradient would be a difference of two that are nearly equal
    [(24, False, 1), (100, True, 3), pytest.param(7, True, 2, marks=pytest.mark.by_hand)],
)
def test_results_and_gradients_are_those_of_float64(name, width, bias, readers):
    kind, inputs = Kind(name, 1e-3), random_inputs(width, bias, readers)
    found = with_gradients(interpreted, kind, *inputs)
    for what, array, expected in zip(NAMES, found, in_float64(kind, *inputs), strict=False):
        tolerance = 2e-6 * np.abs(expected).max() + 1e-6
        np.testing.assert_allclose(array, expected, rtol=0, atol=tolerance, err_msg=what)


def test_bfloat16_loses_no_more_than_in_the_plain_form():
    kind, inputs = Kind("layer", 1e-5), random_inputs(320, True, 3, jnp.bfloat16)
    found, plain = (with_gradients(f, kind, *inputs) for f in (interpreted, norms.xla))
    for what, array, other, right in zip(NAMES, found, plain, in_float64(kind, *inputs)):
        assert np.linalg.norm(array - right) < 1.05 * np.linalg.norm(other - right), what


SMALL = ModelConfig(
    vocab_size=32,
    num_layers=2,
    width=24,
    num_heads=2,
    num_kv_heads=2,
    feed_forward_width=32,
    rotary_fraction=0.5,
    norm="rms",
    block_norm_bias=True,
)


@pytest.mark.parametrize(
    "model",
    [
        dataclasses.replace(SMALL, parallel_residual=True, qk_norm=True),
        pytest.param(SMALL, marks=pytest.mark.by_hand),
    ],
    ids=["one norm for five products", "two"],
)
def test_a_model_has_the_gradients_of_the_plain_form_on_any_mesh(model, monkeypatch):
    monkeypatch.setitem(norms.IMPLEMENTATIONS, "pallas_gpu", interpreted)
    rng, mesh = new_rng(), make_mesh(2, 2, devices=jax.devices()[:4])
    draw = lambda row: rng.normal(row.init_std == "ones", 0.1, row.shape)  # noqa: E731
    params = nest({row.name: jnp.float32(draw(row)) for row in parameter_table(model)})
    tokens, places = rng.integers(0, 32, (2, 8)), np.tile(np.arange(8), (2, 1))

    def gradient(implementation):
        compute = Compute(remat="dots", attention="reference", norms=implementation)

        def loss(params, *inputs):
            return jnp.sum(jnp.sin(hidden_states(model, params, *inputs, compute)))

        of_rows = jax.shard_map(
            lambda *inputs: jax.lax.psum(jax.grad(loss)(*inputs), "data"),
            mesh=mesh,
            in_specs=(P(), P("data"), P("data"), P("data")),
            out_specs=P(),
            axis_names={"data"},  # `model` is the compiler's
            check_vma=False,
        )
        return jax.jit(of_rows)(params, tokens, np.ones_like(tokens), places)

    for found, expected in zip(*(jax.tree.leaves(gradient(n)) for n in ("pallas_gpu", "xla"))):
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4 * np.abs(expected).max())


def test_another_device_is_refused_with_what_to_use():
    with pytest.raises(ValueError, match="'pallas_gpu' run on GPUs, not on a cpu: use 'xla'"):
        norms.pallas_gpu(*random_inputs(16, False, 1)[:3], Kind("rms", 1e-5), 1)


@pytest.mark.aot
@pytest.mark.parametrize(
    "target, width, readers",
    [
        ("h100:1x1", 2048, 3),
        pytest.param("a100-40gb:1x1", 5120, 5, marks=pytest.mark.by_hand),  # the 12B's
        pytest.param("h100:1x1", 5120, 5, marks=pytest.mark.by_hand),
        pytest.param("a100-40gb:1x1", 2560, 3, marks=pytest.mark.by_hand),
    ],
)
def test_each_array_is_read_or_written_once_and_no_register_is_spilled(
    target, width, readers, monkeypatch
):
    monkeypatch.setattr(norms_gpu, "PROGRAMS", PROGRAMS)
    place = jax.sharding.SingleDeviceSharding(parse_target(target).devices()[0])
    rows = 8192
    row, vector = (
        jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=place)
        for shape in ((rows, width), (width,))
    )
    shapes = row, vector, vector, row, readers * (row,)

    def run(x, scale, bias, dx, dys):
        norm = lambda *vectors: norms_gpu._norm(*vectors, Kind("layer", 1e-5), readers, False)  # noqa: E731
        (_, normed), backward = jax.vjp(norm, x, scale, bias)
        return normed[0], backward((dx, dys))

    found = sass.compiled(run, shapes, loops=False)
    for name in ("norm_forward", "norm_backward"):
        assert found[name].spills == 0, name
    # forward x and y; backward x, its two gradients and those of the readers; and the sums
    passes = (2 + 3 + readers) * rows * width * 2 + 4 * PROGRAMS * width * 4
    moved = kernels(jax.jit(run).lower(*shapes).compile().as_text())
    assert sum(k.read + k.written for k in moved) < 1.01 * passes
