import dataclasses
import os
from pathlib import Path

import jax
import numpy as np
import pytest

from stablelm_jax.model.config import (
    STABLELM_2_1_6B,
    STABLELM_2_12B,
    STABLELM_3B_4E1T,
    ModelConfig,
)
from stablelm_jax.model.parameters import (
    count_parameters,
    format_parameter_table,
    nest,
    parameter_table,
)
from stablelm_jax.model.transformer import init_params

GOLDEN = Path(__file__).resolve().parents[1] / "golden"
SIZES = {
    "stablelm_2_1_6b": STABLELM_2_1_6B,
    "stablelm_2_12b": STABLELM_2_12B,
    "stablelm_3b_4e1t": STABLELM_3B_4E1T,
}
SMALL = ModelConfig(
    vocab_size=640,
    num_layers=3,
    width=64,
    num_heads=4,
    num_kv_heads=2,
    feed_forward_width=96,
    block_norm_bias=True,
    qk_norm=True,
)


@pytest.mark.parametrize(
    "model, count",
    [
        (STABLELM_2_1_6B, 1_644_417_024),  # model card
        (
            dataclasses.replace(STABLELM_2_1_6B, block_norm_bias=True),
            1_644_515_328,
        ),  # released file
        (STABLELM_3B_4E1T, 2_795_443_200),  # model card
        (STABLELM_2_12B, 12_142_976_000),  # without the norms the card counts twice
    ],
)
def test_the_published_models_have_exactly_their_parameters(model, count):
    assert count_parameters(model) == count
    shapes = jax.eval_shape(lambda: init_params(model, jax.random.key(0)))
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == count


@pytest.mark.parametrize("name", SIZES)
def test_the_parameter_table_is_the_golden_one(name):
    path = GOLDEN / f"parameters_{name}.txt"
    found = format_parameter_table(parameter_table(SIZES[name]))
    if os.environ.get("STABLELM_UPDATE_GOLDEN"):
        path.write_text(found)
    assert found == path.read_text()


def flat(params):
    leaves, _ = jax.tree_util.tree_flatten_with_path(params)
    return {"/".join(key.key for key in path): leaf for path, leaf in leaves}


def test_the_model_holds_the_tensors_of_the_table_and_no_others():
    params = flat(init_params(SMALL, jax.random.key(0)))
    assert {name: x.shape for name, x in params.items()} == {
        row.name: row.shape for row in parameter_table(SMALL)
    }
    assert {x.dtype for x in params.values()} == {np.dtype("float32")}


def test_first_values_have_the_spread_of_the_table_and_differ_from_layer_to_layer():
    params = flat(init_params(SMALL, jax.random.key(7)))
    for row in parameter_table(SMALL):
        values = np.asarray(params[row.name])
        if row.init_std in ("ones", "zeros"):
            np.testing.assert_array_equal(values, float(row.init_std == "ones"))
            continue
        # five standard deviations of the estimate of a standard deviation
        assert values.std() == pytest.approx(row.init_std, rel=5 / np.sqrt(2 * values.size))
        assert abs(values.mean()) < 5 * row.init_std / np.sqrt(values.size)
        if row.stacked:
            assert not np.array_equal(values[0], values[1])


def test_only_matrices_decay_and_residual_outputs_start_smaller():
    table = {row.name: row for row in parameter_table(SMALL)}
    for name, row in table.items():
        assert row.decay == (not name.endswith(("scale", "bias")))
    small = 0.02 / np.sqrt(2 * SMALL.num_layers)
    for name in ("layers/attention/out/kernel", "layers/mlp/down/kernel"):
        assert table[name].init_std == pytest.approx(small)
    assert table["embed/embedding"].init_std == table["head/kernel"].init_std == 0.02


def test_a_tensor_keeps_its_first_value_when_others_join_the_model():
    plain = dataclasses.replace(SMALL, block_norm_bias=False, qk_norm=False)
    with_norms = flat(init_params(SMALL, jax.random.key(0)))
    for name, values in flat(init_params(plain, jax.random.key(0))).items():
        np.testing.assert_array_equal(values, with_norms[name])


def test_nest_turns_paths_into_a_tree():
    assert nest({"a/b": 1, "a/c/d": 2, "e": 3}) == {"a": {"b": 1, "c": {"d": 2}}, "e": 3}
