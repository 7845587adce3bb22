"""What a model writes as it learns: prompts of a run, continued from its float32 masters."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from stablelm_jax.generation.generator import Generator
from stablelm_jax.model.config import ModelConfig
from stablelm_jax.tokenizer.tokenizer import Tokenizer


def prepare_texts(
    model: ModelConfig,
    params: Any,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    *,
    max_new_tokens: int,
    dtype: Any,
    num_valid_ids: int | None = None,
    **sampling: Any,
) -> Callable[[Any], dict[str, str]]:
    """f(params) -> {prompt: continuation}, compiled now.

    Args:
      params: `ShapeDtypeStruct`s with their shardings, of parameters that f will be given. The copy
        for decoding lives while f runs.
      num_valid_ids: of `Generator`. sampling: arguments of `Sampling`.

    Raises:
      ValueError: an empty prompt, or settings out of range.
    """
    ids = [tokenizer.encode(prompt) for prompt in prompts]
    generator = Generator(
        model,
        params,
        dtype=dtype,
        batch_size=len(prompts),
        max_length=max(map(len, ids)) + max_new_tokens,
        chunk=max_new_tokens,
        num_valid_ids=num_valid_ids,
    )
    generator.compile(ids, max_new_tokens=max_new_tokens, **sampling)

    def texts(params: Any) -> dict[str, str]:
        generator.load(params)
        new = generator.generate(
            ids, max_new_tokens=max_new_tokens, stop_tokens=[tokenizer.eod], **sampling
        )
        generator.unload()
        return {prompt: tokenizer.decode(tokens) for prompt, tokens in zip(prompts, new)}

    return texts
