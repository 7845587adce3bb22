"""Chat templates: a conversation as the text, and the tokens, that a model is tuned on.

The templates are Jinja, as Hugging Face tokenizers carry them. Special tokens come from the
template alone; the same spelling in somebody's message is ordinary text. (Zephyr's `<|user|>` is
ordinary text in the template too: Arcade100k has no such token.)
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from stablelm_jax.tokenizer.tokenizer import Tokenizer

ROLES = ("system", "user", "assistant")

# `zephyr`: Stable LM 2 Zephyr 1.6B (its model card; the system turn has the shape of the others).
# `chatml`: Stable LM 2 1.6B Chat and 12B Chat.
CHAT_TEMPLATES = {
    "zephyr": (
        "{% for message in messages %}"
        "{{ '<|' + message.role + '|>\\n' + message.content + '<|endoftext|>\\n' }}"
        "{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}"
    ),
    "chatml": (
        "{% for message in messages %}"
        "{{ '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}"
        "{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
    ),
}
_SPECIALS = {"zephyr": ("<|endoftext|>",), "chatml": ("<|im_start|>", "<|im_end|>")}
_STOPS = {"zephyr": ("<|endoftext|>",), "chatml": ("<|im_end|>", "<|endoftext|>")}

Message = Mapping[str, str]


def encode_chat(
    tokenizer: Tokenizer, messages: Sequence[Message], template: str, *, answer: bool = True
) -> list[int]:
    """Token ids of a conversation.

    Args:
      messages: {"role": one of ROLES, "content": text} each.
      template: a key of CHAT_TEMPLATES.
      answer: ends with the opening of the assistant's turn.

    Raises:
      ValueError: an unknown template or role, or a tokenizer that lacks one of its special tokens.
    """
    # While the template is filled in, a number between NULs stands for the text of a message.
    places = [{**m, "content": f"\x00{i}\x00"} for i, m in enumerate(messages)]
    text = render_chat(places, template, answer=answer)
    specials = {special: special_id(tokenizer, special) for special in _SPECIALS[template]}
    # The text between two special tokens is encoded as one, template and messages together: cut
    # elsewhere, it would be split into other tokens than the same text was in training.
    parts = re.split("(" + "|".join(map(re.escape, specials)) + ")", text)
    ids: list[int] = []
    for part in parts:
        filled = re.sub("\x00([0-9]+)\x00", lambda m: messages[int(m[1])]["content"], part)
        ids += [specials[part]] if part in specials else tokenizer.encode(filled)
    return ids


def render_chat(messages: Sequence[Message], template: str, *, answer: bool = True) -> str:
    """The conversation as text; arguments and errors as `encode_chat`."""
    if template not in CHAT_TEMPLATES:
        known = ", ".join(CHAT_TEMPLATES)
        raise ValueError(f"chat template {template!r} is unknown: choose one of {known}")
    for message in messages:
        if message["role"] not in ROLES:
            raise ValueError(f"role {message['role']!r} is unknown: use {', '.join(ROLES)}")
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    jinja = environment.from_string(CHAT_TEMPLATES[template])
    return jinja.render(messages=messages, add_generation_prompt=answer)


def stop_ids(tokenizer: Tokenizer, template: str) -> list[int]:
    """The tokens that end the assistant's turn."""
    return [special_id(tokenizer, special) for special in _STOPS[template]]


def special_id(tokenizer: Tokenizer, special: str) -> int:
    """The id of a special token; a ValueError where the tokenizer has none of this spelling."""
    ids = tokenizer.encode(special, specials=True)
    if len(ids) != 1 or ids == tokenizer.encode(special):
        raise ValueError(
            f"tokenizer {tokenizer.name} has no special token {special}: choose another template, "
            "or a tokenizer that has it"
        )
    return ids[0]
