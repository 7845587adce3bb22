"""`config.json` of a Hugging Face directory as our ModelConfig, and back.

Reads what `transformers` writes today (`rope_parameters`), its older flat keys, and those of the
first remote code, model_type `stablelm_epoch`. Defaults are those of its StableLmConfig.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from stablelm_jax.model.config import ModelConfig

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
    "tie_embeddings": (("tie_word_embeddings",), False),
    "init_std": (("initializer_range",), 0.02),
}
# What must have one of these values, or be absent, for the mathematics to be ours.
_ALLOWED = {
    "model_type": ("stablelm", "stablelm_epoch"),
    "hidden_act": ("silu",),
    "rope_type": ("default",),  # plain rotary embeddings
    "rotary_scaling_factor": (1,),
}


def read_config(values: Mapping[str, Any], names: Collection[str]) -> ModelConfig:
    """The model of a `config.json`, with biases in all norms as their tensors have them.

    Args:
      names: the tensors there are, which say whether there are QKV biases where the config does
        not: the old remote code changed its default.

    Raises:
      ValueError: another architecture, or something that our model does not compute.
    """
    values = {"model_type": None, **values}  # a model_type has to be there
    for group in ("rope_scaling", "rope_parameters"):  # the old name and the new one
        rope = values.pop(group, None) or {}
        if not isinstance(rope, Mapping):
            raise ValueError(f"config.json: {group} is {rope!r}; it should be an object")
        kind = rope.get("rope_type") or rope.get("type") or "default"  # the latter in old files
        if kind != "default":
            values["rope_type"] = kind
        values |= {k: v for k, v in rope.items() if v is not None and k != "rope_type"}
    for key, allowed in _ALLOWED.items():
        if values.get(key, allowed[0]) not in allowed:
            raise ValueError(
                f"config.json: {key} is {values[key]!r}; only StableLM models can be read, which "
                f"have {' or '.join(map(repr, allowed))}"
            )
    fields = {}
    for ours, (theirs, default) in _FIELDS.items():
        given = [values[name] for name in theirs if values.get(name) is not None]
        fields[ours] = given[0] if given else default
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


def check_export(model: ModelConfig, software: str, tied: bool) -> None:
    """Raises ValueError where a StableLM of that software cannot hold what our model computes.

    `tied`: whether it can share the embedding with the head.
    """
    cannot = {
        f"model.norm={model.norm}: there norms are LayerNorm": model.norm != "layer",
        "model.tie_embeddings=True: there the head is its own": model.tie_embeddings and not tied,
    }
    for why in (text for text, applies in cannot.items() if applies):
        raise ValueError(
            f"{software}'s StableLM cannot hold {why}; generate and evaluate take the checkpoint "
            "as it is, and a model to be exported is trained with the field's default"
        )


def write_config(
    model: ModelConfig, *, dtype: str, max_positions: int, token_ids: Mapping[str, Any]
) -> dict[str, Any]:
    """The content of a `config.json` that `transformers` 4.38 and newer reads.

    Args:
      dtype: the type of the tensors. max_positions: tokens of context.
      token_ids: bos_token_id, eos_token_id and pad_token_id.
    """
    rope = {"partial_rotary_factor": model.rotary_fraction, "rope_theta": model.rotary_theta}
    return {
        "architectures": ["StableLmForCausalLM"],
        "model_type": "stablelm",
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
        "tie_word_embeddings": model.tie_embeddings,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "use_cache": True,
        **token_ids,
        "torch_dtype": dtype,
    }
