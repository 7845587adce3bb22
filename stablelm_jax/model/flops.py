"""Floating-point operations a token, counted from the shapes.

A multiply-add is 2 operations; backward costs twice the forward. Looking up the embedding is not
counted, the head is. Norms, softmax and elementwise work are left out, as in the field's MFU.
"""

from __future__ import annotations

from stablelm_jax.model.config import ModelConfig


def flops_per_token(config: ModelConfig, sequence_length: int) -> dict[str, int]:
    """Forward operations a token by part.

    'attention_scores' counts every query against all `sequence_length` keys, as PaLM does
    (arXiv 2204.02311, appendix B); causal attention needs half of it.
    """
    layers, width = config.num_layers, config.width
    query_width, kv_width = (n * config.head_size for n in (config.num_heads, config.num_kv_heads))
    return {
        "attention_projections": 2 * layers * width * (2 * query_width + 2 * kv_width),
        "attention_scores": 4 * layers * query_width * sequence_length,
        "mlp": 2 * layers * 3 * width * config.feed_forward_width,
        "head": 2 * width * config.vocab_size,
    }


def train_flops_per_token(config: ModelConfig, sequence_length: int, causal: bool) -> float:
    """Forward and backward operations a token; `causal` counts only the keys a query may see."""
    parts = flops_per_token(config, sequence_length)
    if causal:
        parts["attention_scores"] //= 2
    return 3.0 * sum(parts.values())
