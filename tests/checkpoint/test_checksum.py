import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from stablelm_jax.checkpoint.checksum import checksums
from stablelm_jax.parallel.mesh import make_mesh


def oracle(x):
    """The documented sum in numpy, element by element of the flat array."""
    bits = np.ascontiguousarray(x).view({2: np.uint16, 4: np.uint32}[x.dtype.itemsize])
    position = np.arange(x.size, dtype=np.uint64)
    mixed = ((position ^ (position >> np.uint64(16))) * np.uint64(0x85EBCA6B)) % 2**32
    mixed = ((mixed ^ (mixed >> np.uint64(13))) * np.uint64(0xC2B2AE35)) % 2**32
    products = (bits.reshape(-1).astype(np.uint64) * (mixed | np.uint64(1))) % 2**32
    return int(products.sum() % 2**32)


def test_the_checksum_is_the_documented_sum():
    rng = np.random.default_rng(0)
    for shape in ((0, 4), (5, 7, 3), (3, 2**13), (5, 768)):  # no blocks in two; 3; 15
        x = rng.normal(size=shape).astype(np.float32)
        assert checksums({"leaf": jnp.asarray(x)}) == {"leaf": oracle(x)}
    for x in (rng.integers(-9, 9, 11, np.int32), rng.integers(-9, 9, (), np.int32)):
        assert checksums({"leaf": jnp.asarray(x)}) == {"leaf": oracle(x)}
    x = jnp.asarray(rng.normal(size=(4, 4)), jnp.bfloat16)
    assert checksums({"leaf": x}) == {"leaf": oracle(np.asarray(x))}


def test_every_single_flipped_bit_changes_the_checksum():
    x = np.random.default_rng(0).normal(size=(3, 5)).astype(np.float32)
    before = checksums({"x": jnp.asarray(x)})
    for element in range(x.size):
        for bit in range(32):
            y = x.copy()
            y.reshape(-1).view(np.uint32)[element] ^= np.uint32(1 << bit)
            assert checksums({"x": jnp.asarray(y)}) != before


def test_swapped_elements_change_the_checksum():
    x = np.random.default_rng(0).normal(size=257).astype(np.float32)
    before = checksums({"x": jnp.asarray(x)})
    for other in range(1, 257):
        y = x.copy()
        y[[0, other]] = y[[other, 0]]
        assert checksums({"x": jnp.asarray(y)}) != before


@pytest.mark.parametrize(
    "data, model, spec",
    [
        (8, 1, P("data", "model")),
        (4, 2, P("data", "model")),
        (4, 2, P(("model", "data"))),  # whole rows, summed in blocks
        (4, 2, P(None, None, "model")),  # each part on four devices
        (8, 1, P()),
    ],
)
def test_the_checksum_does_not_depend_on_the_sharding(data, model, spec):
    x = np.random.default_rng(0).normal(size=(8, 16, 24)).astype(np.float32)
    split = jax.device_put(x, NamedSharding(make_mesh(data, model), spec))
    assert checksums({"x": split}) == {"x": oracle(x)}
