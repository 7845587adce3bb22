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


def as_text(
    tokenizer: Tokenizer, chunks: Iterable[Sequence[int]], written: list[int] | None = None
) -> Iterator[str]:
    """The text of the chunks, held back where a letter's bytes are not complete yet.

    `written`: an empty list, which gets their tokens.
    """
    ids = [] if written is None else written
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
    """The answer to the messages of a chat as it comes; it is their last, as far as it was read.

    The generator goes on from the turn before. Where the messages outgrow its max_length, the
    oldest are taken from the list, but for the system's, and that is said.

    Args:
      settings: arguments of `Generator.stream`, max_new_tokens and the stop tokens of the template
        among them.

    Raises:
      ValueError: the template refuses the last message, or it alone is too long: it is taken away.
    """
    try:
        ids = _fitting_prompt(generator, tokenizer, template, messages, settings["max_new_tokens"])
    except BaseException:  # Ctrl-C, too: many templates refuse two of the user's in a row
        messages.pop()
        raise
    said: dict[str, Any] = {"role": "assistant", "content": "", "ids": []}
    messages.append(said)
    chunks = generator.stream(ids, go_on=True, **settings)
    for piece in as_text(tokenizer, chunks, said["ids"]):
        said["content"] += piece
        yield piece


def _fitting_prompt(
    generator: Generator,
    tokenizer: Tokenizer,
    template: chat.ChatTemplate,
    messages: list[chat.Message],
    max_new_tokens: int,
) -> list[int]:
    """Ids of the messages, without the oldest where there are too many; those leave the list."""
    most, kept = generator.max_length - max_new_tokens, list(messages)
    oldest = 1 if messages[0]["role"] == "system" else 0
    while len(ids := chat.encode_chat(tokenizer, kept, template)) > most:
        if len(kept) <= oldest + 1:
            raise ValueError(
                f"this message makes a prompt of {len(ids)} tokens; with {max_new_tokens} new ones "
                f"they are more than {generator.max_length}, the context: shorten it, or ask for "
                "fewer new tokens"
            )
        del kept[oldest : oldest + 2]
    if left_out := len(messages) - len(kept):
        print(f"(the first {left_out} messages no longer fit)", file=sys.stderr)
        messages[:] = kept
    return ids
