"""From text to text: prompts of a run, text as it is written, a conversation."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from stablelm_jax.generation.generator import Generator
from stablelm_jax.model.config import ModelConfig
from stablelm_jax.tokenizer import chat
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
    """f(params) -> {prompt: continuation}, compiled now: what a run writes as it learns.

    Args:
      params: `ShapeDtypeStruct`s with their shardings, of parameters that f will be given. The copy
        for decoding lives while f runs.
      num_valid_ids: as for `Generator`. sampling: arguments of `Sampling`; errors as there.
    """
    ids = [tokenizer.encode(prompt) for prompt in prompts]
    settings = {"max_new_tokens": max_new_tokens, "stop_tokens": [tokenizer.eod], **sampling}
    generator = Generator(
        model,
        params,
        dtype=dtype,
        batch_size=len(prompts),
        max_length=max(map(len, ids)) + max_new_tokens,
        chunk=max_new_tokens,
        num_valid_ids=num_valid_ids,
    )
    generator.compile(ids, **settings)

    def texts(params: Any) -> dict[str, str]:
        generator.load(params)
        new = generator.generate(ids, **settings)
        generator.unload()
        return {prompt: tokenizer.decode(tokens) for prompt, tokens in zip(prompts, new)}

    return texts


def as_text(tokenizer: Tokenizer, chunks: Iterable[Sequence[int]]) -> Iterator[str]:
    """The text of the chunks, held back where a letter's bytes are not complete yet."""
    ids: list[int] = []
    shown = ""
    for chunk in chunks:
        ids += chunk
        # U+FFFD stands for bytes that are no UTF-8: the first part of a letter, perhaps.
        text = tokenizer.decode(ids).rstrip("\ufffd")
        if len(text) > len(shown):
            yield text[len(shown) :]
            shown = text
    rest = tokenizer.decode(ids)[len(shown) :]
    if rest:
        yield rest


def answer(
    generator: Generator,
    tokenizer: Tokenizer,
    template: chat.ChatTemplate,
    messages: list[chat.Message],
    settings: Mapping[str, Any],
) -> Iterator[str]:
    """The answer to the messages of a chat as it comes; then it is their last, as far as it was
    read.

    Where they outgrow the generator's max_length, the oldest are taken from the list, but for the
    system's, and that is said.

    Args:
      settings: arguments of `Generator.stream`, max_new_tokens and the stop tokens of the template
        among them.
    """
    most = generator.max_length - settings["max_new_tokens"]
    oldest = 1 if messages[0]["role"] == "system" else 0
    left_out, said = 0, ""
    ids = chat.encode_chat(tokenizer, messages, template)
    while len(ids) > most and len(messages) > oldest + 1:
        del messages[oldest : oldest + 2]
        left_out += 2
        ids = chat.encode_chat(tokenizer, messages, template)
    if left_out:
        print(f"(the first {left_out} messages no longer fit)", file=sys.stderr)
    try:
        for piece in as_text(tokenizer, generator.stream(ids, **settings)):
            said += piece
            yield piece
    finally:
        messages.append({"role": "assistant", "content": said})
