"""What a model is: its shape, its switches, and the named sizes that were published."""

from __future__ import annotations

import dataclasses
import math


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Shape and switches of one decoder; hashable, so it can be a static argument of jit.

    Raises:
      ValueError: when the numbers cannot make a model; says which, why and what to change.
    """

    vocab_size: int  # rows of the embedding and columns of the head, padding rows included
    num_layers: int
    width: int
    num_heads: int  # query heads
    num_kv_heads: int  # key and value heads; fewer than num_heads is grouped-query attention
    feed_forward_width: int
    rotary_fraction: float = 0.25  # share of every head's dims that rotary turns
    rotary_theta: float = 10_000.0
    norm: str = "layer"  # or 'rms', which takes no mean off; biases as the fields for them say
    norm_epsilon: float = 1e-5
    block_norm_bias: bool = False
    final_norm_bias: bool = True
    qkv_bias: bool = True
    qk_norm: bool = False  # a norm of each query and key head, scale only, before rotary
    parallel_residual: bool = False  # attention and MLP read one shared norm and are added together
    tie_embeddings: bool = False  # the head is the embedding turned, no matrix of its own
    init_std: float = 0.02

    @property
    def head_size(self) -> int:
        return self.width // self.num_heads

    @property
    def rotary_size(self) -> int:
        """Dims of each head that rotary turns; the others pass unchanged."""
        return int(self.head_size * self.rotary_fraction)

    def __post_init__(self) -> None:
        counts = ["vocab_size", "num_layers", "width", "num_heads", "num_kv_heads"]
        for name in [*counts, "feed_forward_width"]:
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"model.{name} is {value!r}: give a whole number of at least 1")
        if self.norm not in ("layer", "rms"):
            raise ValueError(f"model.norm is {self.norm!r}: use one of layer, rms")
        for name in ("rotary_theta", "norm_epsilon", "init_std"):
            value = getattr(self, name)
            if not 0 < value < math.inf:
                raise ValueError(f"model.{name} is {value!r}: give a finite number above 0")
        if self.width % self.num_heads:
            nearest = self.num_heads * max(1, round(self.width / self.num_heads))
            raise ValueError(
                f"model.width {self.width} is not a multiple of model.num_heads {self.num_heads}: "
                f"use num_heads * head size, such as {nearest}"
            )
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"model.num_heads {self.num_heads} is not a multiple of model.num_kv_heads "
                f"{self.num_kv_heads}: use a divisor of {self.num_heads}, so that every key head "
                "serves as many query heads"
            )
        if not 0 < self.rotary_fraction <= 1:
            raise ValueError(
                f"model.rotary_fraction is {self.rotary_fraction!r}: give one above 0, at most 1"
            )
        if self.rotary_size < 2 or self.rotary_size % 2:
            raise ValueError(
                f"model.rotary_fraction {self.rotary_fraction} of a head of {self.head_size} gives "
                f"{self.rotary_size} rotary dims: rotary turns pairs, so choose a fraction or a "
                "head size (width / num_heads) that gives an even number of at least 2"
            )


# Sizes as published: model cards and Stability-AI/StableLM configs/*.yml. The training form has
# no biases in the block norms of the Stable LM 2 models (`use_bias_in_norms: false`; the parameter
# count of the 1.6B card, 1,644,417,024, needs it so).
STABLELM_2_1_6B = ModelConfig(
    vocab_size=100_352,
    num_layers=24,
    width=2048,
    num_heads=32,
    num_kv_heads=32,
    feed_forward_width=5632,
)

# init_std: `init_method` normal with 0.01 in its published config.
STABLELM_2_12B = ModelConfig(
    vocab_size=100_352,
    num_layers=40,
    width=5120,
    num_heads=32,
    num_kv_heads=8,
    feed_forward_width=13_824,
    final_norm_bias=False,
    qkv_bias=False,
    qk_norm=True,
    parallel_residual=True,
    init_std=0.01,
)

# init_std is not set in its published config: GPT-NeoX's default, 0.02.
STABLELM_3B_4E1T = ModelConfig(
    vocab_size=50_304,
    num_layers=32,
    width=2560,
    num_heads=32,
    num_kv_heads=32,
    feed_forward_width=6912,
    block_norm_bias=True,
    qkv_bias=False,
)
