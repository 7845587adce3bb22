"""From text to text: prompts of a run, text as it is written, a conversation."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from stablelm_jax.generation import chat
from stablelm_jax.generation.generator import Generator
from stablelm_jax.model.config import ModelConfig
from stablelm_jax.tokenizer.tokenizer import Tokenizer

# What `decode` gives for bytes that are no UTF-8: the first part of a letter, perhaps.
_INCOMPLETE = "\ufffd"


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
      num_valid_ids: as for `Generator`. sampling: arguments of `Sampling`.

    Raises:
      ValueError: an empty prompt, or settings out of range.
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
        text = tokenizer.decode(ids).rstrip(_INCOMPLETE)
        if len(text) > len(shown):
            yield text[len(shown) :]
            shown = text
    rest = tokenizer.decode(ids)[len(shown) :]
    if rest:
        yield rest


class Conversation:
    """A chat with a model; every answer reads the whole conversation again.

    Args:
      template: a key of `chat.CHAT_TEMPLATES`. system: its first message, if not empty.
      forgotten: called with the number of messages left out when the conversation outgrew the
        generator's max_length: the oldest, but for the system's.
      settings: arguments of `Generator.stream`, max_new_tokens among them.
    """

    def __init__(
        self,
        generator: Generator,
        tokenizer: Tokenizer,
        template: str,
        *,
        system: str = "",
        forgotten: Callable[[int], None] = lambda count: None,
        **settings: Any,
    ):
        self._generator, self._tokenizer, self._template = generator, tokenizer, template
        self._system = [{"role": "system", "content": system}] if system else []
        self._messages: list[chat.Message] = []
        self._forgotten = forgotten
        ends = {*settings.pop("stop_tokens", ()), *chat.stop_ids(tokenizer, template)}
        self._settings = {**settings, "stop_tokens": ends}

    def answer(self, text: str) -> Iterator[str]:
        """The answer as it comes; it belongs to the conversation as far as it was read."""
        self._messages.append({"role": "user", "content": text})
        said = ""
        try:
            tokens = self._generator.stream(self._ids(), **self._settings)
            for piece in as_text(self._tokenizer, tokens):
                said += piece
                yield piece
        finally:
            self._messages.append({"role": "assistant", "content": said})

    def _ids(self) -> list[int]:
        """The tokens of the conversation, without its oldest messages where they do not fit."""
        most = self._generator.max_length - self._settings["max_new_tokens"]
        left_out = 0
        while True:
            messages = [*self._system, *self._messages]
            ids = chat.encode_chat(self._tokenizer, messages, self._template)
            if len(ids) <= most or len(self._messages) == 1:
                break
            del self._messages[:2]
            left_out += 2
        if left_out:
            self._forgotten(left_out)
        return ids
