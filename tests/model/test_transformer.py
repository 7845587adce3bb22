import dataclasses
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from seeds import new_rng

from stablelm_jax.model import layers
from stablelm_jax.model.compute import Compute
from stablelm_jax.model.config import ModelConfig
from stablelm_jax.model.loss import batch_loss
from stablelm_jax.model.parameters import nest, parameter_table
from stablelm_jax.model.transformer import Transformer, hidden_states, init_params, logits

SMALL = ModelConfig(
    vocab_size=320, num_layers=3, width=64, num_heads=4, num_kv_heads=4, feed_forward_width=96
)
BFLOAT16 = Compute(dtype=jnp.bfloat16)
KINDS = {
    "1.6b": SMALL,
    "12b": dataclasses.replace(
        SMALL,
        num_kv_heads=2,
        qkv_bias=False,
        qk_norm=True,
        parallel_residual=True,
        final_norm_bias=False,
    ),
    "3b": dataclasses.replace(SMALL, block_norm_bias=True, qkv_bias=False),
}


def random_params(config):
    """Every tensor random, those that start at zero or one too."""
    rng = new_rng()
    return nest(
        {
            row.name: jnp.asarray(rng.normal(row.init_std == "ones", 0.1, row.shape), jnp.float32)
            for row in parameter_table(config)
        }
    )


def packed(lengths):
    """segment_ids and positions of one row of documents."""
    segments = np.repeat(np.arange(1, len(lengths) + 1), lengths)
    positions = np.concatenate([np.arange(n) for n in lengths])
    return segments[None].astype(np.int32), positions[None].astype(np.int32)


@pytest.mark.parametrize("kind", KINDS)
def test_a_packed_row_gives_each_document_the_logits_it_has_alone(kind):
    config, params, lengths = KINDS[kind], random_params(KINDS[kind]), (1, 7, 30, 2, 24)
    tokens = new_rng().integers(0, 320, (1, sum(lengths)), np.int32)
    jitted = jax.jit(logits, static_argnums=0)
    together = jitted(config, params, tokens, *packed(lengths))
    for start, length in zip(np.cumsum((0, *lengths)), lengths):
        alone = jitted(config, params, tokens[:, start : start + length], *packed((length,)))
        np.testing.assert_allclose(together[:, start : start + length], alone, rtol=0, atol=2e-5)


def test_a_later_token_never_changes_an_earlier_logit():
    params, segments_positions = random_params(SMALL), packed((20,))
    tokens = new_rng().integers(0, 320, (1, 20), np.int32)
    before = logits(SMALL, params, tokens, *segments_positions)
    tokens[0, 12] = (tokens[0, 12] + 1) % 320
    after = logits(SMALL, params, tokens, *segments_positions)
    np.testing.assert_array_equal(before[:, :12], after[:, :12])
    assert not np.allclose(before[:, 12:], after[:, 12:])


def test_for_a_tpu_no_product_joins_rows_and_the_result_is_the_same(monkeypatch):
    """Joined, its compiler lays each result out anew: a third of a layer's time on a v5e."""
    params, inputs = random_params(SMALL), (np.zeros((2, 24), np.int32), *packed((9, 15)))

    def traced_and_gradient():
        def total(params):  # a new one, or jax would take what it has traced before
            return jnp.sum(jnp.sin(hidden_states(SMALL, params, *inputs)))

        return str(jax.make_jaxpr(total)(params)), jax.grad(total)(params)

    joined, expected = traced_and_gradient()
    monkeypatch.setattr(layers, "traced_device", lambda: SimpleNamespace(platform="tpu"))
    apart, found = traced_and_gradient()
    assert "f32[48,64]" in joined and "f32[48," not in apart
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-4), found, expected)


@pytest.mark.parametrize("remat", ["dots", "attention", "full"])
def test_what_is_computed_again_changes_neither_loss_nor_gradient(remat):
    params = random_params(SMALL)
    tokens = new_rng().integers(0, 320, (2, 24), np.int32)
    segments, positions = packed((10, 14))
    batch = {
        "tokens": tokens,
        "targets": np.roll(tokens, -1, 1),
        "segment_ids": np.repeat(segments, 2, 0),
        "positions": np.repeat(positions, 2, 0),
        "loss_mask": np.ones((2, 24), np.float32),
    }

    def loss(params, remat):
        compute = Compute(remat=remat, attention="chunked")
        return batch_loss(SMALL, params, batch, 1 / 48, compute=compute)[0]

    gradient = jax.jit(jax.value_and_grad(loss), static_argnums=1)
    plain, plain_gradient = gradient(params, "none")
    again, again_gradient = gradient(params, remat)
    np.testing.assert_allclose(plain, again, rtol=1e-6)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6),
        plain_gradient,
        again_gradient,
    )


def test_each_kind_of_remat_computes_again_what_it_says():
    config = dataclasses.replace(SMALL, num_layers=1)  # the count sees a loop's body once
    batch, length = 1, 128
    shapes = jax.eval_shape(lambda: init_params(config, jax.random.key(0)))
    ids = jax.ShapeDtypeStruct((batch, length), jnp.int32)

    def flops(remat):
        def total(params, tokens, segment_ids, positions):
            compute = Compute(remat=remat, attention="chunked")
            return hidden_states(config, params, tokens, segment_ids, positions, compute).sum()

        compiled = jax.jit(jax.grad(total)).lower(shapes, ids, ids, ids).compile()
        return compiled.cost_analysis()["flops"]

    counted = {remat: flops(remat) for remat in ("none", "dots", "attention", "full")}
    width = config.num_heads * config.head_size
    scores = 4 * batch * length**2 * width  # both matrix products, of which chunks skip a part
    assert counted["none"] < 1.05 * counted["dots"] < counted["attention"]
    assert scores / 2 < counted["full"] - counted["attention"] < scores


@pytest.mark.parametrize(("unroll", "kept_apart"), [(1, False), (2, False), (3, True)])
def test_without_a_loop_what_is_computed_again_is_kept_apart_from_the_first_time(
    unroll, kept_apart
):
    """Else the compiler of GPUs merges the two: remat 'full' needed as much memory as 'dots'."""
    shapes = jax.eval_shape(lambda: init_params(SMALL, jax.random.key(0)))
    ids = jax.ShapeDtypeStruct((1, 16), jnp.int32)

    def total(params, *inputs):
        return hidden_states(SMALL, params, *inputs, Compute(remat="full", unroll=unroll)).sum()

    text = jax.jit(jax.grad(total)).lower(shapes, ids, ids, ids).as_text()
    assert ("optimization_barrier" in text) == kept_apart


def test_bfloat16_stays_close_to_float32():
    params, place = random_params(SMALL), packed((24,))
    tokens = new_rng().integers(0, 320, (1, 24), np.int32)
    exact = logits(SMALL, params, tokens, *place)
    rounded = logits(SMALL, params, tokens, *place, BFLOAT16)
    assert rounded.dtype == jnp.float32
    assert hidden_states(SMALL, params, tokens, *place, BFLOAT16).dtype == jnp.bfloat16
    # 8 bits of mantissa through 3 layers
    assert np.abs(rounded - exact).max() < 0.05 * np.abs(exact).max()


def test_an_unknown_remat_or_attention_is_refused_with_the_known_ones():
    params, place = random_params(SMALL), packed((4,))
    tokens = np.zeros((1, 4), np.int32)
    with pytest.raises(ValueError, match="remat is 'some'.*none, dots, attention, full"):
        hidden_states(SMALL, params, tokens, *place, Compute(remat="some"))
    with pytest.raises(ValueError, match="'quick' is unknown.*reference, chunked"):
        hidden_states(SMALL, params, tokens, *place, Compute(attention="quick"))


def test_the_model_is_one_nnx_module_with_its_layers_stacked():
    model = nnx.eval_shape(lambda: Transformer(SMALL, jax.random.key(0)))
    assert isinstance(model, Transformer) and isinstance(model, nnx.Module)
    shapes = {leaf.shape[0] for leaf in jax.tree.leaves(nnx.state(model.layers))}
    assert shapes == {SMALL.num_layers}


@pytest.mark.parametrize(
    "change, message",
    [
        ({"num_heads": 3}, "width 64 is not a multiple of model.num_heads 3"),
        ({"num_kv_heads": 3}, "num_heads 4 is not a multiple of model.num_kv_heads 3"),
        ({"rotary_fraction": 0.1}, "gives 1 rotary dims"),
        ({"num_layers": 0}, "num_layers is 0"),
        ({"init_std": float("nan")}, "init_std is nan"),
    ],
)
def test_an_impossible_shape_is_refused_with_the_remedy(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(SMALL, **change)
