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
    query_width = config.num_heads * config.head_size
    kv_width = config.num_kv_heads * config.head_size
    projections = config.width * (2 * query_width + 2 * kv_width)
    mlp = 3 * config.width * config.feed_forward_width
    return {
        "attention_projections": 2 * config.num_layers * projections,
        "attention_scores": 4 * config.num_layers * query_width * sequence_length,
        "mlp": 2 * config.num_layers * mlp,
        "head": 2 * config.width * config.vocab_size,
    }


def train_flops_per_token(config: ModelConfig, sequence_length: int, causal: bool) -> float:
    """Forward and backward operations a token; `causal` counts only the keys a query may see."""
    parts = flops_per_token(config, sequence_length)
    if causal:
        parts["attention_scores"] //= 2
    return 3.0 * sum(parts.values())
