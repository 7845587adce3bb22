import jax
import jax.numpy as jnp
import numpy as np
import pytest
from seeds import new_rng
from small_models import KINDS, random_params

from stablelm_jax.model.lora import Lora, target_names
from stablelm_jax.model.parameters import nest

ALL = ("query", "key", "value", "out", "gate", "up", "down")


@pytest.mark.parametrize("kind", KINDS)
def test_a_table_of_adapters_has_the_inputs_and_outputs_of_each_target(kind):
    model = KINDS[kind]
    assert target_names(model) == ALL
    shapes = {row.name: row.shape for row in Lora(3, 1.0, ALL).table(model)}
    heads, keys, size = model.num_heads, model.num_kv_heads, model.head_size
    assert shapes["layers/attention/query/lora_a"] == (3, 64, 3)
    assert shapes["layers/attention/query/lora_b"] == (3, 3, heads, size)
    assert shapes["layers/attention/value/lora_b"] == (3, 3, keys, size)
    assert shapes["layers/attention/out/lora_a"] == (3, heads, size, 3)
    assert shapes["layers/mlp/down/lora_b"] == (3, 3, 64)
    assert len(shapes) == 14 and all(row.decay for row in Lora(3, 1.0, ALL).table(model))


def test_adapters_begin_with_peft_s_variance_and_add_nothing():
    model, lora = KINDS["1.6b"], Lora(32, 1.0, ALL)
    adapters = lora.init(model, jax.random.key(int(new_rng().integers(2**31))))
    down = adapters["layers"]["mlp"]["down"]
    assert float(jnp.std(down["lora_a"])) == pytest.approx((3 * 96) ** -0.5, rel=0.05)
    assert not np.array_equal(down["lora_a"][0], down["lora_a"][1])
    params = nest(random_params(model))
    jax.tree.map(np.testing.assert_array_equal, lora.merge(params, adapters), params)


def test_the_device_and_the_host_add_the_same():
    model, lora, rng = KINDS["12b"], Lora(4, 6.0, ("key", "out", "up")), new_rng()
    flat = random_params(model)
    table = lora.table(model)
    own = {row.name: np.float32(rng.normal(0, 0.3, row.shape)) for row in table}
    merged = lora.merge(nest(flat), nest(own))["layers"]
    key, up = merged["attention"]["key"]["kernel"], merged["mlp"]["up"]["kernel"]
    for name, found in (("layers/attention/key/", key), ("layers/mlp/up/", up)):
        a, b = own[f"{name}lora_a"], own[f"{name}lora_b"]
        kernel = flat[f"{name}kernel"].copy()
        expected = lora.merged_leaf(kernel, a, b)
        assert expected is kernel  # a second one of a large leaf would be gigabytes
        np.testing.assert_allclose(found, expected, atol=1e-6)
        plain = flat[f"{name}kernel"] + 6 / 4 * np.einsum("ldr,lr...->ld...", a, b)
        np.testing.assert_allclose(expected, plain, atol=1e-6)
    np.testing.assert_array_equal(merged["mlp"]["gate"]["kernel"], flat["layers/mlp/gate/kernel"])
