"""StableLM of transformers with AdamW: what train_step.py and generate.py hold ours against."""

from __future__ import annotations

import contextlib
import functools
import operator
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
import transformers
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from stablelm_jax.interop.hf_config import write_config
from stablelm_jax.interop.tensor_map import tensors
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
    """
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
    network.load_state_dict(dict(_renamed(model, params)))
    return network


def _renamed(model: ModelConfig, params: Mapping[str, Any]) -> Iterator[tuple[str, torch.Tensor]]:
    """Every parameter under its name in transformers; zeros for the biases that ours lack."""
    for tensor in tensors(model):
        values = np.zeros(tensor.shape, np.float32)
        if not tensor.absent:
            ours = functools.reduce(operator.getitem, tensor.ours.split("/"), params)
            values = np.ascontiguousarray(tensor.theirs(ours))
        yield tensor.name, torch.tensor(values)


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
    values = write_config(model, dtype="float32", max_positions=4096, token_ids={})
    attention = "flash_attention_2" if flash else "sdpa_causal"
    return transformers.StableLmConfig(
        **values | {"use_cache": False}, attn_implementation=attention
    )


def make_writer(model: ModelConfig, params: Mapping[str, Any], dtype: str) -> Callable:
    """f(prompts, new tokens) -> the likeliest new tokens of each, and a time stamp after each step.

    On a GPU its static cache, with which it compiles the steps; else its dynamic cache.
    """
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
