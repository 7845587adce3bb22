import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from stablelm_jax.model.config import STABLELM_2_1_6B
from stablelm_jax.model.parameters import ParameterSpec, parameter_table
from stablelm_jax.parallel import sharding
from stablelm_jax.parallel.mesh import make_mesh


def leaves(specs):
    return jax.tree.leaves(specs)


def test_every_logical_axis_of_the_parameter_table_has_a_rule():
    for row in parameter_table(STABLELM_2_1_6B):
        assert len(sharding.mesh_axes(row.axes)) == len(row.shape)


def test_heads_feed_forward_and_vocabulary_are_split_over_model_and_width_is_whole():
    specs = sharding.parameter_specs(parameter_table(STABLELM_2_1_6B))
    assert specs["embed"]["embedding"] == P("model", None)
    assert specs["layers"]["attention"]["query"]["kernel"] == P(None, None, "model", None)
    assert specs["layers"]["mlp"]["down"]["kernel"] == P(None, "model", None)
    assert specs["final_norm"]["scale"] == P(None)


@pytest.mark.parametrize(
    "shape, axes, spec",
    [
        ((8, 16), ("width", "heads"), P("data", "model")),
        ((8, 16), ("width", "head_size"), P(None, "data")),
        ((8, 18), ("width", "head_size"), P("data", None)),
        ((8, 4, 6), ("layers", "width", "head_size"), P(None, "data", None)),
        ((7,), ("width",), P(None)),
    ],
)
def test_zero1_splits_the_largest_whole_dim_that_divides_and_never_layers(shape, axes, spec):
    row = ParameterSpec("p", shape, "ones", False, axes)
    assert sharding.master_spec(row, make_mesh(4, 2).shape, zero1=True) == spec
    assert sharding.master_spec(row, make_mesh(4, 2).shape, zero1=False) == sharding.mesh_axes(axes)


def test_zero1_on_one_replica_changes_nothing():
    row = ParameterSpec("p", (8, 16), "ones", False, ("width", "heads"))
    assert sharding.master_spec(row, make_mesh(1, 8).shape, zero1=True) == P(None, "model")


def test_every_large_master_weight_of_the_1_6b_is_split_over_512_replicas():
    class PublishedMesh:
        shape = {"data": 512, "model": 1}

    table = parameter_table(STABLELM_2_1_6B)
    specs = leaves(sharding.master_specs(table, PublishedMesh, zero1=True))
    whole = [s for s in specs if sharding.data_dim(s) is None]
    large = [row for row in table if row.count > 1_000_000]
    assert len(specs) - len(whole) >= len(large)


def test_a_batch_is_split_by_rows_and_keeps_its_values():
    mesh = make_mesh(4, 2)
    rows = np.arange(24, dtype=np.int32).reshape(8, 3)
    placed = sharding.put_batch({"tokens": rows}, mesh)["tokens"]
    assert placed.sharding.spec == P(("replica", "data"))
    assert {shard.data.shape for shard in placed.addressable_shards} == {(2, 3)}
    np.testing.assert_array_equal(placed, rows)


@pytest.mark.parametrize("spec, dim", [(P(None, "data"), 1), (P("model", None), None), (P(), None)])
def test_data_dim_finds_the_split_dim(spec, dim):
    assert sharding.data_dim(spec) == dim
