"""Small models of the three kinds with every tensor random, and checkpoints of them."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from stablelm_jax.checkpoint import saving
from stablelm_jax.model.config import ModelConfig
from stablelm_jax.model.parameters import nest, parameter_table
from stablelm_jax.model.transformer import init_params
from stablelm_jax.tokenizer.tokenizer import load_tokenizer

SMALL = dict(vocab_size=384, num_layers=3, width=64, num_heads=4, feed_forward_width=96)
# As published, but for the sizes: biases in block norms belong to the 3B alone.
KINDS = {
    "1.6b": ModelConfig(**SMALL, num_kv_heads=4),
    "12b": ModelConfig(
        **SMALL,
        num_kv_heads=2,
        qkv_bias=False,
        qk_norm=True,
        parallel_residual=True,
        final_norm_bias=False,
    ),
    "3b": ModelConfig(**SMALL, num_kv_heads=4, qkv_bias=False, block_norm_bias=True),
}


def random_params(model: ModelConfig, seed: int = 0) -> dict[str, np.ndarray]:
    """{name: float32}; what starts at zero or one is random too."""
    rng = np.random.default_rng(seed)
    return {
        row.name: rng.normal(row.init_std == "ones", 0.1, row.shape).astype(np.float32)
        for row in parameter_table(model)
    }


# For generation: weights so large that the likeliest token differs from place to place.
GENERATES = ModelConfig(
    vocab_size=64,
    num_layers=2,
    width=32,
    num_heads=4,
    num_kv_heads=2,
    feed_forward_width=48,
    rotary_fraction=0.5,
    init_std=0.5,
)


def random_tensors(model: ModelConfig = GENERATES):
    """Fresh parameters, as the tree of a run, with noise on each: biases and norms too."""
    fresh = jax.jit(init_params, static_argnums=0)(model, jax.random.key(1))
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda x: x + 0.2 * rng.normal(size=x.shape).astype(np.float32), fresh)


def write_checkpoint(
    path: Path,
    model: ModelConfig,
    params: dict[str, np.ndarray],
    tokenizer: Path,
    chat: dict | None = None,
    **imported,
) -> Path:
    """Weights alone, at `path` (named global_step<N>), with this tokenizer.json.

    `chat`: of the item `run`, `ChatTemplate.to_json()`.
    """
    content = tokenizer.read_bytes()
    run = {
        "step": int(path.name.removeprefix("global_step")),
        "model_config": dataclasses.asdict(model),
        "tokenizer_sha256": load_tokenizer(tokenizer).sha256,
        "imported": {"from": "a test", "max_positions": 64, "end_ids": [], "chat_template": None}
        | imported,
        **({"chat": chat} if chat else {}),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    weights = nest({name: jnp.asarray(x) for name, x in params.items()})
    saving.write_checkpoint(path, {"params": weights}, run)
    (path / "tokenizer.json").write_bytes(content)
    return path


def read_checkpoint(path: Path) -> dict[str, np.ndarray]:
    """{name: float32} of a checkpoint's parameters."""
    from stablelm_jax.checkpoint.saved_model import SavedModel

    return dict(SavedModel.open(path).leaves())
