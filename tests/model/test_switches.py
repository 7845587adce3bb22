"""RMSNorm and a tied head: what transformers' Llama computes, on any mesh."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from seeds import new_rng
from small_models import random_params

from stablelm_jax.generation.generator import Generator
from stablelm_jax.model.compute import Compute
from stablelm_jax.model.config import ModelConfig
from stablelm_jax.model.layers import Norm
from stablelm_jax.model.loss import batch_loss
from stablelm_jax.model.parameters import nest, parameter_table
from stablelm_jax.model.transformer import logits
from stablelm_jax.parallel import sharding
from stablelm_jax.parallel.mesh import make_mesh
from stablelm_jax.training.gradient import make_gradient_function
from stablelm_jax.training.objectives import TokenObjective

# With both switches, no biases and rotary in all dims it is Llama.
LLAMA = ModelConfig(
    vocab_size=384,
    num_layers=2,
    width=64,
    num_heads=4,
    num_kv_heads=2,
    feed_forward_width=96,
    rotary_fraction=1.0,
    qkv_bias=False,
    final_norm_bias=False,
    norm="rms",
    tie_embeddings=True,
)
EXACT = Compute(attention="reference", cross_entropy="reference")
_THEIRS = {"query": "self_attn.q_proj", "key": "self_attn.k_proj", "value": "self_attn.v_proj"}
_THEIRS |= {"out": "self_attn.o_proj", "attention_norm": "input_layernorm"}
_THEIRS |= {"mlp_norm": "post_attention_layernorm", "embed": "model.embed_tokens"}
_THEIRS |= {"final_norm": "model.norm"}


def llama(flat):
    """transformers' Llama in float64 with these weights."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=LLAMA.vocab_size,
        hidden_size=LLAMA.width,
        intermediate_size=LLAMA.feed_forward_width,
        num_hidden_layers=LLAMA.num_layers,
        num_attention_heads=LLAMA.num_heads,
        num_key_value_heads=LLAMA.num_kv_heads,
        rms_norm_eps=LLAMA.norm_epsilon,
        tie_word_embeddings=True,
        attn_implementation="eager",
    )
    model, weights = transformers.LlamaForCausalLM(config).double(), {}
    for name, values in flat.items():
        *groups, part, leaf = name.split("/")
        if groups[:1] != ["layers"]:
            weights[f"{_THEIRS[part]}.weight"] = values
            continue
        for layer, value in enumerate(values):
            if leaf == "kernel":
                split = 2 if part == "out" else 1
                value = value.reshape(np.prod(value.shape[:split]), -1).T
            theirs = _THEIRS.get(part, f"mlp.{part}_proj")
            weights[f"model.layers.{layer}.{theirs}.weight"] = value
    tensors = {k: torch.tensor(np.ascontiguousarray(v)).double() for k, v in weights.items()}
    missing, unexpected = model.load_state_dict(tensors, strict=False)
    assert not unexpected and missing == ["lm_head.weight"]  # which is the embedding
    return model


def test_logits_and_the_embeddings_gradient_are_those_of_llama_in_float64():
    torch, flat = pytest.importorskip("torch"), random_params(LLAMA)
    theirs, params = llama(flat), jax.tree.map(jnp.asarray, nest(flat))
    tokens = new_rng().integers(0, 384, (2, 25))
    inputs = {"tokens": tokens[:, :-1], "segment_ids": np.ones((2, 24), np.int32)}
    inputs["positions"] = np.broadcast_to(np.arange(24), (2, 24))
    found = theirs(torch.tensor(inputs["tokens"])).logits
    loss = torch.nn.functional.cross_entropy(
        found.flatten(0, 1), torch.tensor(tokens[:, 1:]).flatten()
    )
    loss.backward()
    ours = logits(LLAMA, params, *inputs.values())
    assert np.abs(ours).max() > 1  # the comparison is about something
    np.testing.assert_allclose(ours, found.detach().numpy(), rtol=0, atol=2e-5)
    batch = inputs | {"targets": tokens[:, 1:], "loss_mask": np.ones((2, 24), np.float32)}
    for kernel in ("reference", "saved", "tiled"):
        compute = dataclasses.replace(EXACT, cross_entropy=kernel)
        gradient = jax.grad(lambda p, c=compute: batch_loss(LLAMA, p, batch, 1 / 48, compute=c)[0])
        expected = theirs.model.embed_tokens.weight.grad.numpy()  # of both its uses
        np.testing.assert_allclose(
            gradient(params)["embed"]["embedding"], expected, rtol=0, atol=1e-6
        )


@pytest.mark.parametrize("kind", ["layer", "rms"])
def test_a_norm_is_the_formula_in_float64_with_its_bias(kind):
    rng = new_rng()
    x, scale, bias = rng.normal(3, 2, (5, 64)), rng.normal(1, 0.3, 64), rng.normal(0, 0.3, 64)
    leaves = {"a/scale": scale, "a/bias": bias}
    norm = Norm(
        lambda name: nnx.Param(jnp.float32(leaves[name])),
        "a",
        dataclasses.replace(LLAMA, norm=kind),
    )
    y = x - x.mean(-1, keepdims=True) if kind == "layer" else x
    expected = y / np.sqrt((y**2).mean(-1, keepdims=True) + 1e-5) * scale + bias
    np.testing.assert_allclose(norm(jnp.float32(x)), expected, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("mode", [pytest.param("zero1", marks=pytest.mark.by_hand), "fsdp"])
def test_a_tied_embedding_has_the_same_gradient_on_a_mesh(mode):
    rng, mesh = new_rng(), make_mesh(4, 2)
    flat, fsdp = random_params(LLAMA), mode == "fsdp"
    params = jax.tree.map(jnp.asarray, nest(flat))
    tokens = rng.integers(0, 384, (8, 13), np.int32)
    batch = {
        "tokens": tokens[:, :-1],
        "targets": tokens[:, 1:],
        "segment_ids": np.ones((8, 12), np.int32),
        "positions": np.tile(np.arange(12, dtype=np.int32), (8, 1)),
        "loss_mask": np.ones((8, 12), np.float32),
        "source_ids": np.zeros(8, np.int32),
    }
    compute = dataclasses.replace(EXACT, remat="full")
    options = {"accumulation": 2, "zero1": True, "fsdp": fsdp, "compute": compute}
    gradient = make_gradient_function(LLAMA, mesh, objective=TokenObjective(1), **options)
    specs = sharding.master_specs(parameter_table(LLAMA), mesh, True)
    placed = jax.device_put(params, sharding.named(mesh, specs)) if fsdp else params
    found, _ = jax.jit(gradient)(placed, sharding.put_batch(batch, mesh))
    whole = jax.grad(lambda p: batch_loss(LLAMA, p, batch, 1 / 96, compute=EXACT)[0])
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-7), found, whole(params)
    )


def test_generation_continues_with_the_likeliest_token_of_the_whole_pass():
    params, tokens = jax.tree.map(jnp.asarray, nest(random_params(LLAMA))), [5, 9, 2]
    found = Generator(LLAMA, params, batch_size=1, max_length=16, chunk=4).generate(
        [tokens], max_new_tokens=4
    )
    for expected in found[0]:
        row = np.array([tokens])
        scores = logits(LLAMA, params, row, np.ones_like(row), np.arange(len(tokens))[None])
        assert int(scores[0, -1].argmax()) == expected
        tokens = [*tokens, expected]


def test_a_norm_that_is_not_known_is_refused():
    with pytest.raises(ValueError, match="model.norm is 'batch': use one of layer, rms"):
        dataclasses.replace(LLAMA, norm="batch")
