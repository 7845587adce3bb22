"""The same weights in transformers' StableLmForCausalLM give the same logits."""

import jax.numpy as jnp
import numpy as np
import pytest
from seeds import new_rng
from transformers_models import their_model

from stablelm_jax.model.config import ModelConfig
from stablelm_jax.model.parameters import parameter_table
from stablelm_jax.model.transformer import logits

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

SMALL = dict(vocab_size=320, num_layers=3, width=64, num_heads=4, feed_forward_width=96)
KINDS = {
    "1.6b": ModelConfig(**SMALL, num_kv_heads=4, block_norm_bias=True),
    "12b": ModelConfig(
        **SMALL,
        num_kv_heads=2,
        qkv_bias=False,
        qk_norm=True,
        parallel_residual=True,
        block_norm_bias=True,
    ),
    "3b": ModelConfig(**SMALL, num_kv_heads=4, block_norm_bias=True, qkv_bias=False),
}


@pytest.mark.parametrize("kind", KINDS)
def test_logits_equal_those_of_transformers_with_random_biases_and_norms(kind):
    config = KINDS[kind]
    params = random_params(config, new_rng())
    tokens = new_rng().integers(0, config.vocab_size, (2, 24))
    positions = np.broadcast_to(np.arange(24), tokens.shape)
    ours = np.asarray(
        logits(
            config,
            nested(params),
            jnp.asarray(tokens),
            jnp.ones_like(tokens),
            jnp.asarray(positions),
        )
    )
    with torch.no_grad():
        theirs = peer(config, params)(torch.tensor(tokens)).logits.numpy()
    assert np.abs(theirs).max() > 1  # the comparison is about something
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-4)


def random_params(config, rng):
    """Every tensor random, the ones that start at zero or one too."""
    return {
        spec.name: rng.normal(spec.init_std == "ones", 0.1, spec.shape).astype(np.float32)
        for spec in parameter_table(config)
    }


def nested(flat):
    tree = {}
    for name, value in flat.items():
        *folders, leaf = name.split("/")
        node = tree
        for folder in folders:
            node = node.setdefault(folder, {})
        node[leaf] = jnp.asarray(value)
    return tree


def peer(config, params):
    model = their_model(config)
    missing, unexpected = model.load_state_dict(
        {name: torch.tensor(np.ascontiguousarray(v)) for name, v in peer_weights(config, params)},
        strict=False,
    )
    assert not unexpected and not missing
    return model.eval()


def peer_weights(config, params):
    """(their name, value): matrices transposed to [out, in], heads joined."""
    width = config.width
    yield "model.embed_tokens.weight", params["embed/embedding"]
    yield "lm_head.weight", params["head/kernel"].T
    for part, leaf in (("weight", "scale"), ("bias", "bias")):
        yield f"model.norm.{part}", params[f"final_norm/{leaf}"]
    for layer in range(config.num_layers):
        ours = {
            name[len("layers/") :]: value[layer]
            for name, value in params.items()
            if name.startswith("layers/")
        }
        theirs = f"model.layers.{layer}"
        for name, value in ours.items():
            match name.split("/"):
                case ["attention_norm" | "mlp_norm" as norm, leaf]:
                    norm = {
                        "attention_norm": "input_layernorm",
                        "mlp_norm": "post_attention_layernorm",
                    }[norm]
                    leaf = {"scale": "weight"}.get(leaf, leaf)
                    yield f"{theirs}.{norm}.{leaf}", value
                case ["attention", "out", "kernel"]:
                    yield f"{theirs}.self_attn.o_proj.weight", value.reshape(-1, width).T
                case ["attention", "query_norm" | "key_norm" as norm, "scale"]:
                    for head, scale in enumerate(value):
                        yield f"{theirs}.self_attn.{norm[0]}_layernorm.norms.{head}.weight", scale
                case ["attention", part, "kernel"]:
                    yield (f"{theirs}.self_attn.{part[0]}_proj.weight", value.reshape(width, -1).T)
                case ["attention", part, "bias"]:
                    yield f"{theirs}.self_attn.{part[0]}_proj.bias", value.reshape(-1)
                case ["mlp", part, "kernel"]:
                    yield f"{theirs}.mlp.{part}_proj.weight", value.T
                case unknown:
                    raise AssertionError(unknown)
