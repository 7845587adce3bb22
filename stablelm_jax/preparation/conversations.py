"""Conversations and preference pairs: out of the records that hold them, into documents.

On reading, a record of any published form becomes one canonical JSON text: {"messages": [...]}, or
{"prompt": [...], "chosen": [...], "rejected": [...]} where the sides of a pair begin to differ. So
what is held out, counted and gone on with follows the rules of any other text. The template fills
it in when its chunk is tokenised. A refusal is a ValueError whose text up to ':' is its kind.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple, Self

import numpy as np

from stablelm_jax.preparation.streams import Rejected
from stablelm_jax.tokenizer.chat import ROLES, ChatTemplate, encode_conversation
from stablelm_jax.tokenizer.tokenizer import Tokenizer

MAX_TURNS = 8  # as reported of Stable LM 2's SFT; not verified

# Keys of lists of messages, of questions, of what a question is about, and of answers.
_LISTS = ("messages", "conversations", "conversation", "items")
_QUESTIONS = ("prompt", "instruction", "question", "query")
_ABOUT = ("input", "context")
_ANSWERS = ("completion", "output", "response", "answer")
_SYSTEM = ("system", "system_prompt")
KEYS = (*_LISTS, *_QUESTIONS, *_ABOUT, *_ANSWERS, *_SYSTEM, "chosen", "rejected", "label")
_ROLES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant"}  # ShareGPT's words


# out of records


def holds_conversation(keys: Iterable[str]) -> bool:
    """Whether a record of these keys is a conversation or a pair."""
    keys = set(keys)
    is_answered = bool(keys & set(_QUESTIONS) and keys & set(_ANSWERS))
    return is_answered or bool(keys & set(_LISTS)) or {"chosen", "rejected"} <= keys


def no_text(text_key: str, keys: Iterable[str], what: str = "key") -> Rejected:
    """Why a record of these keys, or columns, gives no text; and what to do where it is a chat."""
    keys = list(keys)
    if holds_conversation(keys):
        return Rejected("a conversation, no text: prepare --template zephyr, or another, takes it")
    return Rejected(f"no {what} {text_key!r} ({what}s: {', '.join(keys[:8])[:120] or 'none'})")


def canonical(record: Mapping[str, Any]) -> str | Rejected:
    """The JSON text of a record's conversation or pair, keys sorted; or why it holds none."""
    record = {key: value for key, value in record.items() if value is not None}
    try:
        if {"chosen", "rejected"} <= record.keys():
            form = _pair(record)
        else:
            form = {"messages": _checked(_conversation(record))}
            # Labels of other data sets have other meanings.
            if str(record.get("label")).strip().lower() == "negative":
                form["label"] = "negative"
    except ValueError as error:
        return Rejected(str(error)[:200])
    return json.dumps(form, sort_keys=True, ensure_ascii=False, separators=(",", ":"))


def _first(record: Mapping[str, Any], keys: Iterable[str]) -> Any:
    return next((record[key] for key in keys if record.get(key, []) != []), None)


def _conversation(record: Mapping[str, Any]) -> list[dict]:
    if (messages := _first(record, _LISTS)) is not None:
        return _with_system(record, _messages(messages, "user"))
    question, answer = _question(record), _first(record, _ANSWERS)
    if answer is None or not question:
        raise ValueError(f"no conversation (keys: {', '.join(list(record)[:8])[:120] or 'none'})")
    return _with_system(record, question + _messages(answer, "assistant"))


def _question(record: Mapping[str, Any]) -> list[dict]:
    """What comes before the answer; nothing where there is no key for it."""
    question, about = _first(record, _QUESTIONS), _first(record, _ABOUT)
    if isinstance(question, str) and isinstance(about, str) and about:
        question = f"{question}\n\n{about}"
    return [] if question is None else _messages(question, "user")


def _with_system(record: Mapping[str, Any], messages: list[dict]) -> list[dict]:
    system = _first(record, _SYSTEM)
    has_one = not system or messages[0]["role"] == "system"
    return messages if has_one else _messages(system, "system") + messages


def _messages(value: Any, role: str) -> list[dict]:
    """The messages of a list of them, in OpenAI's or ShareGPT's words; of a text, one of `role`."""
    if isinstance(value, str):
        return [{"role": role, "content": value}]
    if not (isinstance(value, list) and value and all(isinstance(item, dict) for item in value)):
        raise ValueError(f"no list of messages: {str(value)[:80]!r}")
    if all({"input", "output"} <= item.keys() for item in value):  # Capybara's rounds
        sides = (("user", "input"), ("assistant", "output"))
        value = [{"role": role, "content": item[key]} for item in value for role, key in sides]
    found = []
    for number, item in enumerate(value, 1):
        item = {key: part for key, part in item.items() if part is not None}  # as tables have them
        role, content = item.get("role", item.get("from")), item.get("content", item.get("value"))
        role = _ROLES.get(role, role) if isinstance(role, str) else role
        if role not in ROLES:
            raise ValueError(f"unknown role: {role!r} in message {number}")
        if not isinstance(content, str):
            raise ValueError(f"content that is no text: {str(content)[:80]!r} in message {number}")
        trains = item.get("train", item.get("weight") != 0)
        if trains not in (True, False):
            raise ValueError(f"train that is not true or false: {trains!r} in message {number}")
        is_left_out = role == "assistant" and not trains
        found.append({"role": role, "content": content} | ({"train": False} if is_left_out else {}))
    return found


def _checked(messages: list[dict]) -> list[dict]:
    """The messages of a whole conversation."""
    for number, message in enumerate(messages, 1):
        if message["role"] == "system" and number > 1:
            raise ValueError(f"a system turn that is not first: message {number}")
        if message["role"] == "assistant" and not message["content"].strip():
            raise ValueError(f"empty answer: message {number}")
    if messages[-1]["role"] != "assistant":
        raise ValueError(f"the last message is no answer: it is of the {messages[-1]['role']}")
    return messages


def _pair(record: Mapping[str, Any]) -> dict[str, Any]:
    prompt = _question(record)
    sides = [_checked(_side(record, record[key], prompt)) for key in ("chosen", "rejected")]
    same = [a["role"] == b["role"] and a["content"] == b["content"] for a, b in zip(*sides)]
    if all(same) and len(sides[0]) == len(sides[1]):
        raise ValueError("chosen is equal to rejected")
    common = [*same, False].index(False)
    chosen, rejected = sides[0][common:], sides[1][common:]
    begins = [side[0]["role"] if side else "" for side in (chosen, rejected)]
    opening = [{"role": m["role"], "content": m["content"]} for m in sides[0][:common]]
    if begins != ["assistant"] * 2 or not opening:
        raise ValueError("the prompts of the pair differ")
    asked = [message["content"].strip() for message in opening]
    if not all(message["content"].strip() in asked for message in prompt):
        raise ValueError("the prompts of the pair differ: the conversations lack the prompt")
    return {"prompt": opening, "chosen": chosen, "rejected": rejected}


def _side(record: Mapping[str, Any], value: Any, prompt: list[dict]) -> list[dict]:
    """A side of a pair as a whole: it gives an answer, what follows the prompt, or everything."""
    if isinstance(value, str) and not prompt:  # Anthropic/hh-rlhf has such texts
        turns = re.split(r"\n\n(Human|Assistant): ?", value)[1:]
        if not turns:
            raise ValueError("a pair without a prompt")
        value = [{"role": a.lower(), "content": b} for a, b in zip(turns[::2], turns[1::2])]
    messages = _messages(value, "assistant")
    before = prompt if messages[0]["role"] == "assistant" else []
    return _with_system(record, before + messages)


# into documents


class Documents(NamedTuple):
    """What a record becomes: a text, a conversation, or both sides of a pair."""

    ids: list[np.ndarray]  # int32 [tokens] of each document, its end included
    spans: list[list[tuple[int, int]]]  # of each document, that are trained; none of a text
    text: str  # before tokens, without the markup of a template
    rounds_dropped: int = 0


class ChatEncoder(NamedTuple):
    """Fills a template in. `kind`: of the source; '' takes conversations and pairs alike."""

    tokenizer: Tokenizer
    template: ChatTemplate
    kind: str
    max_turns: int
    max_tokens: int | None

    @classmethod
    def of(cls, settings: Mapping[str, Any], tokenizer: Tokenizer) -> Self | None:
        """The one that the settings of a preparation ask for; None: there is no template."""
        if "chat" not in settings:
            return None
        template = ChatTemplate.from_json(settings["chat"])
        limits = settings["max_turns"], settings["max_tokens"]
        return cls(tokenizer, template, settings.get("kind", ""), *limits)

    def documents(self, text: str) -> Documents | Rejected:
        """The documents of a `canonical` text; or why there are none."""
        form = json.loads(text)
        kind = kind_of_form(text)
        try:
            if self.kind and kind != self.kind:
                raise ValueError(
                    f"one of {kind} in a source of {self.kind}: make it another source"
                )
            return self._of_pair(form) if kind == "pairs" else self._of_conversation(form)
        except ValueError as error:
            return Rejected(str(error)[:200])

    def _of_conversation(self, form: Mapping[str, Any]) -> Documents:
        messages, is_negative = form["messages"], form.get("label") == "negative"
        ids, spans, ends = self._encoded(messages, is_negative)
        limit = self.max_tokens or self._size(ids)
        fitting = [end for end in ends if self._size(ids[:end]) <= limit]
        dropped = len(ends) - len(fitting)
        if dropped and (is_negative or not fitting):  # the negative answer is the last
            raise self._too_long(self._size(ids))
        ids = ids[: fitting[-1]]
        spans = [span for span in spans if span[1] <= len(ids)]
        if not spans:
            raise ValueError(
                "no answer is trained" + (": those that fit are not" if dropped else "")
            )
        kept = [n for n, m in enumerate(messages, 1) if m["role"] == "assistant"][: len(fitting)]
        text = "\n".join(message["content"] for message in messages[: kept[-1]])
        return Documents([self._ended(ids)], [spans], text, dropped)

    def _of_pair(self, form: Mapping[str, Any]) -> Documents:
        untrained = [{**message, "train": False} for message in form["prompt"]]
        sides = [self._encoded(untrained + form[key]) for key in ("chosen", "rejected")]
        if not all(spans for _, spans, _ in sides):
            raise ValueError("no answer is trained")
        size = sum(self._size(ids) for ids, _, _ in sides)
        if size > (self.max_tokens or size):
            raise self._too_long(size)
        messages = [*form["prompt"], *form["chosen"], *form["rejected"]]
        text = "\n".join(message["content"] for message in messages)
        ids = [self._ended(ids) for ids, _, _ in sides]
        return Documents(ids, [spans for _, spans, _ in sides], text)

    def _encoded(
        self, messages: list[dict], negative: bool = False
    ) -> tuple[list[int], list[tuple[int, int]], list[int]]:
        """The ids of a conversation, what of them is trained, and where each answer ends."""
        answers = [message for message in messages if message["role"] == "assistant"]
        if len(answers) > self.max_turns:
            raise ValueError(f"too many turns: {len(answers)}, more than {self.max_turns}")
        whole = [{**message, "train": True} for message in messages]
        ids, spans = encode_conversation(self.tokenizer, whole, self.template, negative=negative)
        trained = [span for span, m in zip(spans, answers, strict=True) if m.get("train", True)]
        return ids, trained, [last for _, last in spans]

    def _ended(self, ids: list[int]) -> np.ndarray:
        """With the token that ends documents, where the template does not end answers with it."""
        return np.asarray([*ids, *[self.tokenizer.eod] * (self._size(ids) - len(ids))], np.int32)

    def _size(self, ids: list[int]) -> int:
        return len(ids) + (ids[-1] != self.tokenizer.eod)

    def _too_long(self, size: int) -> ValueError:
        return ValueError(f"too long: {size:,} tokens, more than {self.max_tokens:,}")


def kind_of_form(text: str) -> str:
    """'pairs' or 'conversations', of a `canonical` text."""
    return "pairs" if text.startswith('{"chosen"') else "conversations"
