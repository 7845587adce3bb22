"""StableLM of transformers with AdamW: what train_step.py and generate.py hold ours against."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
import transformers
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from stablelm_jax.model.config import ModelConfig

INPUTS = ("tokens", "targets")


def make_step(
    model: ModelConfig, params: Mapping[str, Any], adamw: Mapping[str, float], learning_rate: float
) -> Callable[[Mapping[str, np.ndarray]], float]:
    """One training step on a batch, giving its loss, from these weights of ours.

    On a CPU: eager and float32, as ours is there. On a GPU: float32 weights, bfloat16 autocast,
    torch.compile and fused AdamW. Attention is FlashAttention where `flash_attn` is installed, else
    PyTorch's own choice, told that it is causal. It knows no documents: each row is one. Where that
    needs more memory than there is, layers are checkpointed from then on, and a line says so.

    Raises:
      ValueError: for a model with norms of heads or a parallel residual, the 12B's, whose weights
        this file does not rename.
    """
    if model.qk_norm or model.parallel_residual:
        raise ValueError("only models as the 1.6B and the 3B are renamed here: use --peer none")
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda" if on_gpu else "cpu")
    network = _network(model, params).to(device)
    optimizer = _optimizer(network, adamw, learning_rate, fused=on_gpu)

    def loss_of(tokens, targets):
        with torch.autocast(device.type, torch.bfloat16, enabled=on_gpu):
            logits = network(tokens).logits
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())

    if on_gpu:
        loss_of = torch.compile(loss_of)

    def backward(batch):
        loss = loss_of(
            *(torch.tensor(batch[name], dtype=torch.long, device=device) for name in INPUTS)
        )
        loss.backward()
        return loss

    def step(batch):
        loss = None
        with contextlib.suppress(torch.OutOfMemoryError):
            loss = backward(batch)
        if loss is None:  # only here is what the failed attempt held free again
            print("transformers: out of memory; from here on with gradient checkpointing")
            optimizer.zero_grad(set_to_none=True)
            torch.cuda.empty_cache()
            network.gradient_checkpointing_enable()
            loss = backward(batch)
        torch.nn.utils.clip_grad_norm_(network.parameters(), adamw["clip_norm"])
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()

    return step


def peak_bytes() -> int | None:
    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None


def _network(model: ModelConfig, params: Mapping[str, Any]) -> transformers.StableLmForCausalLM:
    network = transformers.StableLmForCausalLM(_config(model))
    network.load_state_dict({name: torch.tensor(x) for name, x in _renamed(model, params)})
    return network


def _optimizer(network, adamw: Mapping[str, float], learning_rate: float, fused: bool):
    return torch.optim.AdamW(
        network.parameters(),
        lr=learning_rate,
        betas=(adamw["b1"], adamw["b2"]),
        eps=adamw["epsilon"],
        weight_decay=adamw["weight_decay"],
        fused=fused,
    )


def _config(model: ModelConfig) -> transformers.StableLmConfig:
    flash = torch.cuda.is_available() and transformers.utils.is_flash_attn_2_available()
    # Under torch.compile `sdpa` is handed a mask of T x T, which shuts out the fast kernels; under
    # a name without a function for masks it is told is_causal.
    transformers.AttentionInterface.register("sdpa_causal", sdpa_attention_forward)
    return transformers.StableLmConfig(
        vocab_size=model.vocab_size,
        hidden_size=model.width,
        num_hidden_layers=model.num_layers,
        intermediate_size=model.feed_forward_width,
        num_attention_heads=model.num_heads,
        num_key_value_heads=model.num_kv_heads,
        layer_norm_eps=model.norm_epsilon,
        use_qkv_bias=model.qkv_bias,
        rope_parameters={
            "rope_type": "default",
            "rope_theta": model.rotary_theta,
            "partial_rotary_factor": model.rotary_fraction,
        },
        tie_word_embeddings=False,
        use_cache=False,
        attn_implementation="flash_attention_2" if flash else "sdpa_causal",
    )


def _renamed(model: ModelConfig, params: Mapping[str, Any]) -> Iterator[tuple[str, np.ndarray]]:
    """(name in transformers, array [out, in]) for every parameter; zeros for its further biases."""
    yield "model.embed_tokens.weight", params["embed"]["embedding"]
    yield "lm_head.weight", np.ascontiguousarray(params["head"]["kernel"].T)
    yield from _norm("model.norm", params["final_norm"])
    layers = params["layers"]
    for i in range(model.num_layers):
        there = f"model.layers.{i}"
        for ours, name in (
            ("attention_norm", "input_layernorm"),
            ("mlp_norm", "post_attention_layernorm"),
        ):
            norm = {leaf: value[i] for leaf, value in layers[ours].items()}
            yield from _norm(f"{there}.{name}", norm)
        for ours, name in (("query", "q"), ("key", "k"), ("value", "v")):
            projection = layers["attention"][ours]
            kernel_DNH = projection["kernel"][i]
            yield f"{there}.self_attn.{name}_proj.weight", _transposed(kernel_DNH, model.width)
            if "bias" in projection:
                bias = np.ascontiguousarray(projection["bias"][i].reshape(-1))
                yield f"{there}.self_attn.{name}_proj.bias", bias
        out_ND = layers["attention"]["out"]["kernel"][i].reshape(-1, model.width)
        yield f"{there}.self_attn.o_proj.weight", _transposed(out_ND, len(out_ND))
        for name in ("gate", "up", "down"):
            kernel = layers["mlp"][name]["kernel"][i]
            yield f"{there}.mlp.{name}_proj.weight", _transposed(kernel, len(kernel))


def _norm(name: str, norm: Mapping[str, np.ndarray]) -> Iterator[tuple[str, np.ndarray]]:
    yield f"{name}.weight", norm["scale"]
    yield f"{name}.bias", norm.get("bias", np.zeros_like(norm["scale"]))


def _transposed(kernel: np.ndarray, inputs: int) -> np.ndarray:
    return np.ascontiguousarray(kernel.reshape(inputs, -1).T)


def make_writer(model: ModelConfig, params: Mapping[str, Any], dtype: str) -> Callable:
    """f(prompts, new tokens) -> the likeliest new tokens of each, and a time stamp after each step.

    On a GPU its static cache, with which it compiles the steps; else its dynamic cache.

    Raises:
      ValueError: as `make_step`.
    """
    if model.qk_norm or model.parallel_residual:
        raise ValueError("only models as the 1.6B and the 3B are renamed here: use --peer none")
    on_gpu = torch.cuda.is_available()
    network = _network(model, params).to("cuda" if on_gpu else "cpu", getattr(torch, dtype)).eval()
    network.config.use_cache = True
    network.set_attn_implementation("sdpa")
    cache = {"cache_implementation": "static"} if on_gpu else {}

    def write(prompts, new):
        stamps = []

        def stamp(ids, scores, **kwargs):
            if on_gpu:
                torch.cuda.synchronize()
            stamps.append(time.perf_counter())
            return torch.zeros(len(ids), dtype=torch.bool, device=ids.device)

        tokens = torch.tensor(prompts, dtype=torch.long, device=network.device)
        with torch.inference_mode():
            whole = network.generate(
                tokens,
                attention_mask=torch.ones_like(tokens),
                max_new_tokens=new,
                min_new_tokens=new,
                do_sample=False,
                pad_token_id=0,
                stopping_criteria=[stamp],
                **cache,
            )
        return whole[:, tokens.shape[1] :].tolist(), stamps

    return write
