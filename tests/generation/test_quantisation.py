import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from stablelm_jax.generation.generator import Generator
from stablelm_jax.generation.quantisation import MOST_ROWS, quantised, quantised_spec
from stablelm_jax.generation.weights import rounded
from stablelm_jax.model.config import ModelConfig
from stablelm_jax.model.parameters import parameter_table
from stablelm_jax.model.transformer import init_params
from stablelm_jax.parallel.mesh import make_mesh

MODEL = ModelConfig(
    vocab_size=64,
    num_layers=2,
    width=64,
    num_heads=4,
    num_kv_heads=4,
    feed_forward_width=128,
    init_std=0.3,
)


@pytest.fixture(scope="module")
def kernel():
    rng = np.random.default_rng(0)
    return rng.normal(size=(256, 4, 6)).astype(np.float32) * rng.random((1, 4, 6))


@pytest.mark.parametrize("method, steps, group", [("int8", 127, 256), ("int4", 7, 128)])
def test_no_weight_errs_by_more_than_half_a_step_of_its_group(kernel, method, steps, group):
    error = np.abs(np.asarray(quantised(kernel, method).matrix(), np.float64) - kernel)
    largest = np.abs(kernel).reshape(-1, group, 4, 6).max(1, keepdims=True)
    assert (error.reshape(-1, group, 4, 6) <= largest / steps / 2 * 1.0001).all()
    assert error.max() > 0


def test_a_row_of_zeros_stays_zero():
    assert not np.asarray(quantised(np.zeros((8, 3), np.float32), "int8").matrix()).any()


@pytest.mark.parametrize("method", ["int8", "int4"])
@pytest.mark.parametrize("rows", [3, MOST_ROWS + 1])
def test_the_product_is_that_of_the_matrix_for_few_rows_and_many(kernel, method, rows):
    x = np.random.default_rng(1).normal(size=(rows, 2, 128)).astype(np.float32)
    joined = kernel.reshape(2, 128, 24)
    small = quantised(joined, method, num_in=2)
    expected = x.reshape(rows, 256).astype(np.float64) @ np.float64(small.matrix()).reshape(256, 24)
    found = small.product(x.reshape(rows, 256), np.float32)
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-4)


@pytest.mark.parametrize("method, devices", [("int8", 2), ("int4", 1)])
def test_a_generator_writes_what_the_rounded_matrices_write(method, devices):
    params = jax.jit(init_params, static_argnums=0)(MODEL, jax.random.key(0))
    mesh = make_mesh(1, devices, jax.devices()[:devices])
    sizes = {"batch_size": 1, "max_length": 64}
    small = Generator(MODEL, params, mesh=mesh, weights=method, **sizes)
    expected = Generator(MODEL, rounded(MODEL, params, method), **sizes)
    prompt = [[3, 1, 4, 1, 5]]
    found = small.generate(prompt, max_new_tokens=8)
    assert found == expected.generate(prompt, max_new_tokens=8)


def test_the_copy_is_as_small_as_its_numbers():
    params = jax.jit(init_params, static_argnums=0)(MODEL, jax.random.key(0))
    sizes = {"batch_size": 1, "max_length": 64, "dtype": "bfloat16"}
    whole, int8, int4 = (
        Generator(MODEL, params, weights=method, **sizes).read_bytes
        for method in (None, "int8", "int4")
    )
    matrices = sum(row.count for row in parameter_table(MODEL) if row.name.endswith("/kernel"))
    rest = whole - 2 * matrices
    assert matrices + rest < int8 < 1.1 * matrices + rest
    assert matrices / 2 + rest < int4 < 0.6 * matrices + rest


def test_no_group_lies_across_two_devices():
    kernel = np.ones((5632, 4), np.float32)
    assert quantised(kernel, "int4").values_gIO.shape == (44, 128, 4)
    assert quantised(kernel, "int4", parts=8).values_gIO.shape == (88, 64, 4)
    down = PartitionSpec("model", None)
    assert quantised_spec(down, "int4") == (
        PartitionSpec("model", None, None),
        PartitionSpec("model", None, None),
    )
    assert quantised_spec(down, "int8")[0] == PartitionSpec(None, "model", None)
