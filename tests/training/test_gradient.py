import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec
from seeds import new_rng

from stablelm_jax.kernels import cross_entropy as cross_entropy_module
from stablelm_jax.model.compute import Compute
from stablelm_jax.model.config import ModelConfig
from stablelm_jax.model.loss import batch_loss, source_sums
from stablelm_jax.model.parameters import parameter_table
from stablelm_jax.model.transformer import init_params
from stablelm_jax.parallel import sharding
from stablelm_jax.parallel.mesh import make_mesh
from stablelm_jax.training.gradient import make_gradient_function
from stablelm_jax.training.objectives import TokenObjective

# As the 12B has it: 8 key heads shared by more query heads, norms of each head, parallel residual.
MODEL = ModelConfig(
    vocab_size=96,
    num_layers=2,
    width=256,
    num_heads=16,
    num_kv_heads=8,
    feed_forward_width=48,
    rotary_fraction=0.5,
    qk_norm=True,
    parallel_residual=True,
    init_std=0.05,
)
EXACT = Compute(attention="reference", cross_entropy="reference")


def random_batch(rows=8, length=12):
    rng = new_rng()
    return {
        "tokens": rng.integers(0, 96, (rows, length), np.int32),
        "targets": rng.integers(0, 96, (rows, length), np.int32),
        "segment_ids": np.sort(rng.integers(1, 4, (rows, length), np.int32), axis=1),
        "positions": np.tile(np.arange(length, dtype=np.int32), (rows, 1)),
        # masks of very different sizes, so that a mean of means would show
        "loss_mask": (rng.random((rows, length)) < rng.random((rows, 1))).astype(np.float32),
        "source_ids": rng.integers(0, 3, rows, np.int32),
    }


def random_params():
    params = jax.jit(init_params, static_argnums=0)(MODEL, jax.random.key(0))
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(new_rng().integers(2**31)), len(leaves))
    noisy = [x + 0.1 * jax.random.normal(key, x.shape) for x, key in zip(leaves, keys)]
    return jax.tree.unflatten(tree, noisy)


MESHES = ((1, 1, 1), (1, 8, 1), (1, 4, 2), (1, 2, 4), (1, 1, 8), (2, 2, 2))  # replica, data, model
MODES = ("whole", "zero1", "fsdp")
ACCUMULATION = (1, 2, 4)
REMAT = ("none", "dots", "attention", "full")
CROSS_ENTROPY = ("saved", "tiled")


def product():
    """Every allowed combination; FSDP has no remat 'none' (config/rules.py)."""
    combinations = itertools.product(MESHES, MODES, ACCUMULATION, REMAT, CROSS_ENTROPY)
    return [c for c in combinations if (c[1], c[3]) != ("fsdp", "none")]


def pairwise():
    """Few of them, in which any two values of two settings that may meet do meet.

    But for mesh and remat: what a device computes again does not depend on where the others are.
    """
    settings = set(itertools.combinations(range(5), 2)) - {(0, 3)}
    pairs = lambda c: {(i, c[i], j, c[j]) for i, j in settings}  # noqa: E731
    left, chosen = set().union(*map(pairs, product())), []
    while left:
        chosen.append(max(product(), key=lambda c: len(pairs(c) & left)))
        left -= pairs(chosen[-1])
    return chosen


@pytest.mark.parametrize(
    "sizes, mode, accumulation, remat, cross_entropy",
    pairwise()
    + [
        pytest.param(*c, marks=pytest.mark.by_hand, id=f"product-{c}")
        for c in product()
        if c not in pairwise()
    ],
)
def test_gradient_and_sums_are_those_of_the_mean_over_the_whole_batch(
    sizes, mode, accumulation, remat, cross_entropy, monkeypatch
):
    monkeypatch.setattr(cross_entropy_module, "ROWS", 7)  # several chunks, the last one not full
    replica, data, model = sizes
    devices = jax.devices()[: replica * data * model]
    mesh = make_mesh(data, model, devices, replica=replica)
    params, batch = random_params(), random_batch(32)
    specs = sharding.master_specs(parameter_table(MODEL), mesh, mode != "whole")
    gradient = make_gradient_function(
        MODEL,
        mesh,
        objective=TokenObjective(3),
        accumulation=accumulation,
        zero1=mode != "whole",
        fsdp=mode == "fsdp",
        compute=dataclasses.replace(EXACT, remat=remat, cross_entropy=cross_entropy),
    )
    placed = jax.device_put(params, sharding.named(mesh, specs)) if mode == "fsdp" else params
    found, sums = jax.jit(gradient)(placed, sharding.put_batch(batch, mesh))

    (_, nll_BT), expected = whole_batch(params, batch)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(
            a, b, atol=2e-6 * float(jnp.abs(b).max()) + 1e-9, rtol=1e-4
        ),
        found,
        expected,
    )
    by_source = [nll_BT[batch["source_ids"] == s].sum() for s in range(3)]
    np.testing.assert_allclose(sums["nll"], by_source, rtol=1e-5, atol=1e-4)
    tokens = [batch["loss_mask"][batch["source_ids"] == s].sum() for s in range(3)]
    np.testing.assert_array_equal(sums["tokens"], tokens)
    assert {g.dtype for g in jax.tree.leaves(found)} == {jnp.dtype("float32")}


@jax.jit
def whole_batch(params, batch):
    """What plain autodiff says, on one device in one piece."""

    def mean_loss(params):
        return batch_loss(MODEL, params, batch, 1 / jnp.sum(batch["loss_mask"]), compute=EXACT)

    return jax.value_and_grad(mean_loss, has_aux=True)(params)


def test_the_chosen_combinations_hold_every_mesh_and_mode_and_are_few():
    assert {c[0] for c in pairwise()} == set(MESHES) and {c[1] for c in pairwise()} == set(MODES)
    assert len(pairwise()) < len(product()) / 4


def test_the_sum_over_replicas_is_one_float32_reduce_scatter_after_the_microbatches():
    mesh = make_mesh(8, 1)
    table = parameter_table(MODEL)
    specs = sharding.master_specs(table, mesh, zero1=True)
    gradient = make_gradient_function(
        MODEL,
        mesh,
        objective=TokenObjective(3),
        accumulation=1,
        zero1=True,
        compute=Compute(dtype=jnp.bfloat16, attention="reference"),
    )
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), random_params())
    jaxpr = str(jax.make_jaxpr(gradient)(params, random_batch()))
    scattered = [line for line in jaxpr.splitlines() if "= reduce_scatter[" in line]
    is_spec = lambda x: isinstance(x, PartitionSpec)  # noqa: E731
    split = [s for s in jax.tree.leaves(specs, is_leaf=is_spec) if sharding.data_dim(s) is not None]
    assert len(scattered) == len(split) > 5
    assert all(":f32[" in line for line in scattered)


def test_sums_by_source_add_rows_of_the_same_source():
    values = jnp.arange(8.0).reshape(4, 2)
    batch = {"source_ids": jnp.array([2, 0, 2, 0]), "loss_mask": jnp.ones((4, 2))}
    sums = source_sums(values, batch, 3)
    np.testing.assert_array_equal(sums["nll"], [2 + 3 + 6 + 7, 0, 0 + 1 + 4 + 5])
    np.testing.assert_array_equal(sums["tokens"], [4, 0, 4])
