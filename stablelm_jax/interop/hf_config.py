"""`config.json` of a Hugging Face directory as our ModelConfig, and back.

Reads what `transformers` writes today (`rope_parameters`), its older flat keys, and those of the
first remote code, model_type `stablelm_epoch`. Defaults are those of its StableLmConfig.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from stablelm_jax.model.config import ModelConfig

_MODEL_TYPES = ("stablelm", "stablelm_epoch")
# Our field: their names for it, newest first, and the value where none is given.
_FIELDS = {
    "vocab_size": (("vocab_size",), 50_304),
    "num_layers": (("num_hidden_layers",), 32),
    "width": (("hidden_size",), 2560),
    "num_heads": (("num_attention_heads", "num_heads"), 32),
    "num_kv_heads": (("num_key_value_heads",), None),  # None: as many as num_heads
    "feed_forward_width": (("intermediate_size",), 6912),
    "rotary_fraction": (("partial_rotary_factor", "rope_pct"), 0.25),
    "rotary_theta": (("rope_theta",), 10_000),
    "norm_epsilon": (("layer_norm_eps", "norm_eps"), 1e-5),
    "qk_norm": (("qk_layernorm",), False),
    "parallel_residual": (("use_parallel_residual",), False),
    "init_std": (("initializer_range",), 0.02),
}
# What must have this value, or be absent, for the mathematics to be ours.
_FIXED = {
    "hidden_act": ("silu",),
    "tie_word_embeddings": (False,),
    "rope_type": ("default",),  # plain rotary embeddings
    "rope_scaling": (None,),
    "rotary_scaling_factor": (1, 1.0),
}
_MAX_POSITIONS = 4096


def read_config(values: Mapping[str, Any], names: Collection[str]) -> ModelConfig:
    """The model of a `config.json`, with biases in all norms as their tensors have them.

    Args:
      values: the content of config.json.
      names: of the tensors, which say whether there are QKV biases where the config does not: the
        old remote code changed its default.

    Raises:
      ValueError: another architecture, or something that our model does not compute.
    """
    if values.get("model_type") not in _MODEL_TYPES:
        raise ValueError(
            f"config.json: model_type is {values.get('model_type')!r}, but only StableLM models "
            f"({', '.join(_MODEL_TYPES)}) can be read"
        )
    rope = values.get("rope_parameters") or {}
    if not isinstance(rope, Mapping):
        raise ValueError(f"config.json: rope_parameters is {rope!r}; it should be an object")
    values = {**values, **{key: value for key, value in rope.items() if value is not None}}
    for key, allowed in _FIXED.items():
        if values.get(key, allowed[0]) not in allowed:
            raise ValueError(
                f"config.json: {key} is {values[key]!r}; StableLM models here have {allowed[0]!r}"
            )
    fields = {ours: _value(values, *theirs) for ours, theirs in _FIELDS.items()}
    if fields["num_kv_heads"] is None:
        fields["num_kv_heads"] = fields["num_heads"]
    has_bias = any(name.endswith("self_attn.q_proj.bias") for name in names)
    try:
        return ModelConfig(
            **fields,
            qkv_bias=bool(values.get("use_qkv_bias", has_bias)),
            block_norm_bias=True,
            final_norm_bias=True,
        )
    except (TypeError, ValueError) as error:
        raise ValueError(f"config.json: {error}") from error


def max_positions(values: Mapping[str, Any]) -> int:
    """The context length that a `config.json` names, in tokens."""
    return int(values.get("max_position_embeddings") or _MAX_POSITIONS)


def _value(values: Mapping[str, Any], names: tuple[str, ...], default: Any) -> Any:
    return next((values[name] for name in names if values.get(name) is not None), default)


def write_config(
    model: ModelConfig, *, dtype: str, max_positions: int, token_ids: Mapping[str, Any]
) -> dict[str, Any]:
    """The content of a `config.json` that `transformers` 4.38 and newer reads.

    Args:
      dtype: the type of the tensors: 'float32', 'bfloat16' or 'float16'.
      max_positions: tokens of context.
      token_ids: bos_token_id, eos_token_id and pad_token_id.
    """
    rope = {
        "partial_rotary_factor": model.rotary_fraction,
        "rope_theta": model.rotary_theta,
    }
    return {
        "architectures": ["StableLmForCausalLM"],
        "model_type": _MODEL_TYPES[0],
        "vocab_size": model.vocab_size,
        "hidden_size": model.width,
        "intermediate_size": model.feed_forward_width,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_heads,
        "num_key_value_heads": model.num_kv_heads,
        "hidden_act": "silu",
        "max_position_embeddings": max_positions,
        "initializer_range": model.init_std,
        "layer_norm_eps": model.norm_epsilon,
        "use_qkv_bias": model.qkv_bias,
        "qk_layernorm": model.qk_norm,
        "use_parallel_residual": model.parallel_residual,
        # Versions before 5 read the flat keys, newer ones the group.
        **rope,
        "rope_parameters": {"rope_type": "default", **rope},
        "tie_word_embeddings": False,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "use_cache": True,
        **token_ids,
        "torch_dtype": dtype,
    }
