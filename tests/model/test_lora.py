import jax
import jax.numpy as jnp
import numpy as np
import pytest
from seeds import new_rng
from small_models import KINDS, random_params

from stablelm_jax.interop.verify import our_logits
from stablelm_jax.model.lora import Lora, target_names
from stablelm_jax.model.parameters import flatten, nest

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
    assert not any(np.any(matrix["lora_b"]) for matrix in adapters["layers"]["mlp"].values())


def test_a_leaf_is_merged_in_its_own_memory_to_what_the_device_makes_of_it():
    model, lora, rng = KINDS["12b"], Lora(4, 6.0, ("key", "out", "up")), new_rng()
    own = {row.name: np.float32(rng.normal(0, 0.3, row.shape)) for row in lora.table(model)}
    merged = flatten(lora.merge(nest(random_params(model)), nest(own)))
    for name in ("layers/attention/key/", "layers/mlp/up/"):
        a, b = own[f"{name}lora_a"], own[f"{name}lora_b"]
        kernel = random_params(model)[f"{name}kernel"]
        plain = kernel + 6 / 4 * np.einsum("ldr,lr...->ld...", a, b)
        assert lora.merged_leaf(kernel, a, b) is kernel  # a second large leaf would be gigabytes
        np.testing.assert_allclose(kernel, plain, atol=1e-6)
        np.testing.assert_allclose(merged[f"{name}kernel"], plain, atol=1e-6)


def test_a_forward_pass_of_joined_adapters_is_that_of_the_merged_weights():
    model, lora, rng = KINDS["12b"], Lora(4, 6.0, ("key", "out", "up")), new_rng()
    own = {row.name: np.float32(rng.normal(0, 0.05, row.shape)) for row in lora.table(model)}
    flat, ids = random_params(model), list(range(20))
    joined = lora.join(nest(flat), nest(own))
    found = our_logits(model, jax.tree.map(jnp.asarray, joined), ids)
    for name in {name.rpartition("/")[0] for name in own}:
        a, b = own[f"{name}/lora_a"], own[f"{name}/lora_b"]
        lora.merged_leaf(flat[f"{name}/kernel"], a, b)
    merged = our_logits(model, nest(flat), ids)
    assert np.std(merged) > 0.1
    np.testing.assert_allclose(found, merged, atol=1e-3 * np.std(merged))
