"""Sampling: temperature and nucleus (top-p), one compiled loop, prompts of different lengths.

Every new token runs the model over the whole buffer: right for a handful of samples in training.

P prompts, T buffer length, D width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from stablelm_jax.model.config import ModelConfig
from stablelm_jax.model.transformer import hidden_states


def sample(
    model: ModelConfig, params: Any, prompts: Sequence[Sequence[int]], **settings: Any
) -> list[list[int]]:
    """Continues each prompt until `eod` or `max_new_tokens`; arguments and errors as `prepare`.

    Returns:
      The new tokens of each prompt, without `eod`.
    """
    return prepare(model, params, prompts, **settings)(params)


def prepare(
    model: ModelConfig,
    params: Any,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    temperature: float,
    top_p: float,
    seed: int,
    eod: int,
    dtype: Any = jnp.float32,
) -> Callable[[Any], list[list[int]]]:
    """f(params) as `sample`, compiled now for parameters like `params`.

    Args:
      params: arrays, or `ShapeDtypeStruct`s with their shardings.
      temperature: 0 takes the most likely token each time.
      top_p: the smallest set of tokens whose probability reaches this is sampled from.

    Raises:
      ValueError: an empty prompt, or settings out of range.
    """
    _check(prompts, max_new_tokens, temperature, top_p)
    lengths_P = np.array([len(p) for p in prompts], np.int32)
    buffer_PT = np.full((len(prompts), int(lengths_P.max()) + max_new_tokens), eod, np.int32)
    for row, prompt in zip(buffer_PT, prompts):
        row[: len(prompt)] = prompt
    numbers = np.float32(temperature), np.float32(top_p), np.uint32(seed)
    place = _everywhere(params)
    inputs = jax.device_put((buffer_PT, lengths_P, *numbers), place)
    fill = _fill.lower(model, dtype, place, params, *inputs).compile()

    def fill_and_cut(params: Any) -> list[list[int]]:
        filled_PT = jax.device_get(fill(params, *inputs))
        new = [row[n : n + max_new_tokens].tolist() for row, n in zip(filled_PT, lengths_P)]
        return [tokens[: tokens.index(eod)] if eod in tokens else tokens for tokens in new]

    return fill_and_cut


def prepare_texts(
    model: ModelConfig, params: Any, tokenizer: Any, prompts: Sequence[str], **settings: Any
) -> Callable[[Any], dict[str, str]]:
    """f(params) -> {prompt: continuation}, compiled now; `settings` as in `sample`, but `eod`."""
    ids = [tokenizer.encode(prompt) for prompt in prompts]
    sample_ids = prepare(model, params, ids, eod=tokenizer.eod, **settings)

    def texts(params: Any) -> dict[str, str]:
        return {p: tokenizer.decode(tokens) for p, tokens in zip(prompts, sample_ids(params))}

    return texts


def _check(prompts, max_new_tokens: int, temperature: float, top_p: float) -> None:
    if not prompts or not all(len(prompt) for prompt in prompts):
        raise ValueError("a prompt is empty; give at least one token of text")
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens is {max_new_tokens}; it must be at least 1")
    if temperature < 0 or not 0 < top_p <= 1:
        raise ValueError(f"temperature {temperature} must be 0 or more and top_p {top_p} in (0, 1]")


def _everywhere(params: Any) -> jax.sharding.Sharding:
    """Whole on each of the devices that hold `params`."""
    place = jax.tree.leaves(params)[0].sharding
    return NamedSharding(place.mesh, PartitionSpec()) if hasattr(place, "mesh") else place


@partial(jax.jit, static_argnums=(0, 1, 2))
def _fill(model, dtype, place, params, buffer_PT, lengths_P, temperature, top_p, seed):
    """Fills each row of the buffer from the end of its prompt on."""
    key = jax.random.key(seed)
    length = buffer_PT.shape[1]
    positions_PT = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), buffer_PT.shape)
    one_document_PT = jnp.ones_like(buffer_PT)
    kernel_DV = params["head"]["kernel"].astype(dtype)

    def write(i, buffer_PT):
        x_PTD = hidden_states(model, params, buffer_PT, one_document_PT, positions_PT, dtype=dtype)
        logits_PV = jnp.dot(x_PTD[:, i - 1], kernel_DV, preferred_element_type=jnp.float32)
        drawn_P = _draw(logits_PV, temperature, top_p, jax.random.fold_in(key, i))
        column_P = jnp.where(i < lengths_P, buffer_PT[:, i], drawn_P)
        return buffer_PT.at[:, i].set(column_P)

    filled_PT = jax.lax.fori_loop(jnp.min(lengths_P), length, write, buffer_PT)
    return jax.lax.with_sharding_constraint(filled_PT, place)


def _draw(logits_PV, temperature, top_p, key):
    """One token a prompt, int32 [P]."""
    scaled_PV = logits_PV / jnp.maximum(temperature, 1e-6)
    order_PV = jnp.argsort(scaled_PV, axis=-1, descending=True)
    sorted_PV = jnp.take_along_axis(scaled_PV, order_PV, axis=-1)
    probability_PV = jax.nn.softmax(sorted_PV, axis=-1)
    before_PV = jnp.cumsum(probability_PV, axis=-1) - probability_PV
    nucleus_PV = jnp.where(before_PV < top_p, sorted_PV, -jnp.inf)
    rank_P = jax.random.categorical(key, nucleus_PV, axis=-1)
    rank_P = jnp.where(temperature > 0, rank_P, 0)
    return jnp.take_along_axis(order_PV, rank_P[:, None], axis=-1)[:, 0].astype(jnp.int32)
