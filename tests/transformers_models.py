"""StableLM as transformers has it, of the sizes of a model of ours."""

from stablelm_jax.model.config import ModelConfig


def their_model(sizes: ModelConfig, **more):
    """Random weights; what its config can say of ours, and `more` of its fields."""
    import transformers

    config = transformers.StableLmConfig(
        vocab_size=sizes.vocab_size,
        hidden_size=sizes.width,
        intermediate_size=sizes.feed_forward_width,
        num_hidden_layers=sizes.num_layers,
        num_attention_heads=sizes.num_heads,
        num_key_value_heads=sizes.num_kv_heads,
        use_qkv_bias=sizes.qkv_bias,
        qk_layernorm=sizes.qk_norm,
        use_parallel_residual=sizes.parallel_residual,
        layer_norm_eps=sizes.norm_epsilon,
        tie_word_embeddings=False,
        rope_parameters={
            "rope_type": "default",
            "rope_theta": sizes.rotary_theta,
            "partial_rotary_factor": sizes.rotary_fraction,
        },
        attn_implementation="eager",
        **more,
    )
    return transformers.StableLmForCausalLM(config)
