"""Chat templates: a conversation as the text, and the tokens, that a model is tuned on.

The templates are Jinja, as Hugging Face tokenizers carry them. Special tokens come from the
template alone; the same spelling in somebody's message is ordinary text. (Zephyr's `<|user|>` is
ordinary text in the template too: Arcade100k has no such token.)

No token goes across the place where an answer begins, in training and in the history of a chat
alike. A model that answers has read exactly the prompt, so an answer that begins with a newline
must not merge with the newline that ends the prompt.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Self

from stablelm_jax.tokenizer.tokenizer import Tokenizer

ROLES = ("system", "user", "assistant")
NEGATIVE = "assistant_negative"  # the role of an answer that is trained as a bad one (C-RLFT)
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
# {"role": one of ROLES, "content": text}, perhaps "train": False, or "ids" that an answer came as.
Message = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class ChatTemplate:
    """A template. `enders`: special tokens that end an answer, first the one that it writes."""

    name: str
    jinja: str
    enders: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """As manifests, checkpoints and model folders keep it."""
        return {"name": self.name, "jinja": self.jinja, "enders": list(self.enders)}

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> Self:
        """What `to_json` gave."""
        return cls(fields["name"], fields["jinja"], tuple(fields["enders"]))


class Encoded(NamedTuple):
    """A conversation's ids; `spans`: [first, last) of those that are trained, in order."""

    ids: list[int]
    spans: list[tuple[int, int]]


# finding a template


def chat_template(name_or_file: str, tokenizer: Tokenizer) -> ChatTemplate:
    """The template of a name or a file; errors as `template_of`, or there is none.

    Args:
      name_or_file: a key of CHAT_TEMPLATES, 'tokenizer' for the one that lies beside the
        tokenizer.json, a file of Jinja, or a Hugging Face folder that holds one.
    """
    own = Path(tokenizer.name)
    own = own.parent if own.is_file() else own
    if name_or_file in CHAT_TEMPLATES:
        return template_of(name_or_file, CHAT_TEMPLATES[name_or_file], tokenizer)
    path = own if name_or_file == "tokenizer" else Path(name_or_file)
    jinja = folder_template(path)
    if jinja is None:
        what = f"chat template {name_or_file!r} is unknown"
        if name_or_file == "tokenizer":
            what = f"tokenizer {tokenizer.name} came with no chat template"
        known = ", ".join((*CHAT_TEMPLATES, "tokenizer"))
        raise ValueError(f"{what}: choose one of {known}, or a file of Jinja")
    config = _config(own) | _config(path.parent if path.is_file() else path)
    return template_of(Path(name_or_file).name, jinja, tokenizer, config)


def folder_template(path: Path) -> str | None:
    """The Jinja of a file, or that a Hugging Face folder holds, if any."""
    for file in (path, path / "chat_template.jinja"):
        if file.is_file():
            return file.read_bytes().decode()  # line ends as they are
    found = _config(path).get("chat_template")
    if isinstance(found, list):  # several, by name
        found = {entry["name"]: entry["template"] for entry in found}.get("default")
    return found


def _config(folder: Path) -> dict[str, Any]:
    path = folder / "tokenizer_config.json"
    try:
        return dict(json.loads(path.read_bytes())) if path.is_file() else {}
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path} is damaged ({error}); fetch it again") from error


def template_of(
    name: str, jinja: str, tokenizer: Tokenizer, config: Mapping[str, Any] | None = None
) -> ChatTemplate:
    """The template of a Jinja text, found fit for training.

    Args:
      config: of a tokenizer_config.json: the spellings of `bos_token` and others, as the template
        may name them. They become a part of it.

    Raises:
      ValueError: it is no Jinja, its prompt is no beginning of the answered conversation, or no
        special token of the tokenizer ends an answer.
    """
    end_of_document = tokenizer.decode([tokenizer.eod])
    for key, value in {"eos_token": end_of_document, **(config or {})}.items():
        spelling = value.get("content") if isinstance(value, dict) else value
        if key.endswith("_token") and re.search(rf"\b{key}\b", jinja) and spelling:
            jinja = f"{{% set {key} = {json.dumps(spelling)} %}}" + jinja
    probe = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}] * 2
    text, begins = _rendered(probe, ChatTemplate(name, jinja, ()), answer=False)
    after = _behind(text, *begins[-1])
    special = _specials(tokenizer)[0].search(text, after)
    if special is None:
        raise ValueError(
            f"tokenizer {tokenizer.name} has no special token in {text[after:]!r}, with which chat"
            f" template {name} ends an answer, and no model would learn to stop: choose another"
            " template, or a tokenizer that has its tokens"
        )
    made = ChatTemplate(name, jinja, tuple(dict.fromkeys([special[0], end_of_document])))
    _ends(text, begins, made)
    return made


# from messages to tokens


def encode_chat(
    tokenizer: Tokenizer, messages: Sequence[Message], template: ChatTemplate, *, answer=True
) -> list[int]:
    """Token ids of a conversation; with `answer` it ends with the opening of the assistant's turn.

    Of an answer that has "ids" these are taken, and not those of its text.

    Raises:
      ValueError: an unknown role, or the template cannot take these messages.
    """
    text, begins = _rendered(messages, template, answer=answer)
    ids, done = [], 0
    for (number, begin), end in zip(begins, _ends(text, begins, template)):
        ids += _encode(tokenizer, text[done:begin], messages)
        done = begin
        if "ids" in messages[number]:
            ids += messages[number]["ids"]
            done = end
    return ids + _encode(tokenizer, text[done:], messages)


def encode_conversation(
    tokenizer: Tokenizer, messages: Sequence[Message], template: ChatTemplate, *, negative=False
) -> Encoded:
    """Token ids of a conversation to be trained on, up to the end of its last answer.

    Trained are the answers and the special token that ends each, but for messages of "train":
    False. For every answer the ids begin with those of `encode_chat` of the messages before it.
    With `negative` the last answer has the marker of NEGATIVE; ValueError, too, where the template
    has none.
    """
    text, begins = _rendered(messages, template, answer=False, negative=negative)
    encoded, done = Encoded([], []), 0
    for (number, begin), end in zip(begins, _ends(text, begins, template)):
        end += len(template.enders[0])
        encoded.ids.extend(_encode(tokenizer, text[done:begin], messages))
        first = len(encoded.ids)
        encoded.ids.extend(_encode(tokenizer, text[begin:end], messages))
        if messages[number].get("train", True):
            encoded.spans.append((first, len(encoded.ids)))
        done = end
    return encoded


def stop_ids(tokenizer: Tokenizer, template: ChatTemplate) -> list[int]:
    """The tokens that end the assistant's turn."""
    return [special_id(tokenizer, special) for special in template.enders]


def special_id(tokenizer: Tokenizer, special: str) -> int:
    """The id of a special token; a ValueError where the tokenizer has none of this spelling."""
    ids = tokenizer.encode(special, specials=True)
    if len(ids) != 1 or ids == tokenizer.encode(special):
        raise ValueError(
            f"tokenizer {tokenizer.name} has no special token {special}: choose another template, "
            "or a tokenizer that has it"
        )
    return ids[0]


@functools.lru_cache(maxsize=8)
def _specials(tokenizer: Tokenizer) -> tuple[re.Pattern, dict[str, int]]:
    """What finds the special tokens in a text, and their ids."""
    ids = {tokenizer.decode([i]): i for i in sorted(tokenizer.special_ids)}
    longest_first = sorted(ids, key=len, reverse=True)
    return re.compile("(" + "|".join(map(re.escape, longest_first)) + ")"), ids


def _encode(tokenizer: Tokenizer, text: str, messages: Sequence[Message]) -> list[int]:
    """Ids of a piece of a rendered template, with the messages in their places.

    The text between two special tokens is encoded as one, template and messages together: cut
    elsewhere, it would be split into other tokens than the same text was in training.
    """
    pattern, specials = _specials(tokenizer)
    ids: list[int] = []
    for part in pattern.split(text):
        ids += [specials[part]] if part in specials else tokenizer.encode(_filled(part, messages))
    return ids


# rendering

# While the template is filled in, a number between NULs stands for the text of a message. The
# blanks at the ends of the text stay around it, for the templates that take them away.
_PLACE = re.compile("\x00([0-9]+)\x00")


def render_chat(messages: Sequence[Message], template: ChatTemplate, *, answer=True) -> str:
    """The conversation as text; arguments and errors as `encode_chat`."""
    return _filled(_rendered(messages, template, answer=answer)[0], messages)


def _filled(text: str, messages: Sequence[Message]) -> str:
    return _PLACE.sub(lambda match: messages[int(match[1])]["content"].strip(), text)


def _place(number: int, message: Message) -> dict[str, Any]:
    core = message["content"].strip()
    before, _, after = message["content"].partition(core or message["content"] + "\x00")
    return {**message, "content": f"{before}\x00{number}\x00{after}"}


def _behind(text: str, number: int, begin: int) -> int:
    """Where the message `number` ends, which lies behind `begin`."""
    place = f"\x00{number}\x00"
    return text.index(place, begin) + len(place)


def _ends(text: str, begins: Sequence[tuple[int, int]], template: ChatTemplate) -> list[int]:
    """Where the special token lies that ends each answer: behind its text, before what follows."""
    ends = []
    for (number, begin), (_, later) in zip(begins, [*begins[1:], (-1, len(text))]):
        after = _behind(text, number, begin)
        following = _PLACE.search(text, after, later)
        ends.append(text.find(template.enders[0], after, following.start() if following else later))
        if ends[-1] < 0:
            raise ValueError(
                f"chat template {template.name} does not end every answer with"
                f" {template.enders[0]}: message {number + 1}; end all of them alike, or choose"
                " another template"
            )
    return ends


def _rendered(
    messages: Sequence[Message], template: ChatTemplate, *, answer: bool, negative: bool = False
) -> tuple[str, list[tuple[int, int]]]:
    """The text, with places for the messages, and (message, where it begins) of each answer."""
    for message in messages:
        if message["role"] not in ROLES:
            raise ValueError(f"role {message['role']!r} is unknown: use {', '.join(ROLES)}")
    places = [_place(number, message) for number, message in enumerate(messages)]
    text, begins = _render(places, template, answer), []
    if list(map(int, _PLACE.findall(text))) != list(range(len(places))):
        raise ValueError(f"chat template {template.name} leaves out, repeats or moves a message")
    for number in [n for n, message in enumerate(messages) if message["role"] == "assistant"]:
        prompt = _render(places[:number], template, answer=True)
        if not text.startswith(prompt):
            raise ValueError(
                f"chat template {template.name} writes a prompt that is no beginning of the"
                " answered conversation; a model tuned on one would never see the other"
            )
        begins.append((number, len(prompt)))
    if negative:
        number, begin = begins.pop()
        places[number]["role"], rest = NEGATIVE, text[begin:]
        text = _render(places, template, answer=False)
        if not text.endswith(rest) or len(text) <= begin + len(rest):
            raise ValueError(
                f"chat template {template.name} has no marker for negative answers: it must write"
                f" the role {NEGATIVE} as it writes others, as zephyr and chatml do"
            )
        begins.append((number, len(text) - len(rest)))
    return text, begins


def _render(messages: Sequence[Message], template: ChatTemplate, answer: bool) -> str:
    given = {"messages": messages, "add_generation_prompt": answer}
    try:  # without tools and documents, as transformers says it
        return _compiled(template.jinja).render(**given, tools=None, documents=None)
    except Exception as error:  # a template may be anybody's, and raise anything
        raise ValueError(f"chat template {template.name} refuses it: {error}") from error


@functools.lru_cache(maxsize=8)
def _compiled(jinja: str):
    """A template as transformers compiles it, without the time of day."""
    import jinja2
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def raise_exception(message):
        raise jinja2.TemplateError(message)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = functools.partial(json.dumps, ensure_ascii=False)
    environment.globals["raise_exception"] = raise_exception
    return environment.from_string(plain_jinja(jinja))


def plain_jinja(jinja: str) -> str:
    """The template without `{% generation %}`, which only transformers knows: it marks what is
    trained and writes nothing."""
    jinja = re.sub(r"({%-?)\s*generation\s*(-?%})", r"\1 if true \2", jinja)
    return re.sub(r"({%-?)\s*endgeneration\b", r"\1 endif", jinja)
