"""Documents out of JSON: a record a line, or records that lie in arrays or over many lines.

A scanner of brackets and quotes cuts the stream into records; each is parsed by itself. So a record
may have any form that Python writes, a bad one costs no other, and none has to fit into memory with
its neighbours (docs/data.md says why no parser of others does).
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import re
from collections.abc import Iterator
from typing import Any, NoReturn

import orjson

from stablelm_jax.preparation import conversations, streams
from stablelm_jax.preparation.formats import Reading
from stablelm_jax.preparation.keeping import NotKept, is_kept, value_text
from stablelm_jax.preparation.streams import Blocks, Damaged, Held, Rejected, cut_at, peek
from stablelm_jax.preparation.texts import Noted, decode, not_empty

_NAMES = {
    dict: 'object', list: 'array', str: 'string', int: 'number', float: 'number',
    bool: 'boolean', type(None): 'null',
}  # fmt: skip
_EMPTY = Rejected("empty line")
_NOTHING = object()  # where a record lacks a key
_CUT_SHORT = "JSON cut short"
# Bytes that are looked at, more each time, to tell the forms apart.
_LOOKS = (1 << 16, 1 << 20, 1 << 24)


def read_json(blocks: Blocks, reading: Reading, *, lines: bool = False) -> Iterator[str | Rejected]:
    """One document a record: its text under `reading.text_key`, or its conversation.

    `lines`: what is not JSON at its beginning is taken for damaged lines; otherwise for no JSON.
    """
    is_lines, blocks = lies_in_lines(blocks, lines)
    found = cut_at(blocks, b"\n") if is_lines else values(blocks)
    for number, data in enumerate(found):
        record = parse(data, reading)
        if number == 0 and not lines and isinstance(record, Rejected) and record != _EMPTY:
            reason = f"{record.reason} (--format text takes the file as it is)"
            record = dataclasses.replace(record, reason=reason)
        yield record


def parse(data: bytes | Rejected, reading: Reading) -> str | Rejected | NotKept:
    """The document of one record."""
    record = data if isinstance(data, Rejected) else _loads(data)
    if isinstance(record, Rejected):
        return record
    if not isinstance(record, dict):
        return Rejected(f"a JSON {_NAMES[type(record)]}, not an object")
    return document(record, reading)


def document(record: dict, reading: Reading) -> str | Rejected | NotKept:
    """The text of a record, or its conversation; a `Noted` one where more of it is asked for."""
    if not reading.keep:
        return _content(record, reading)
    found = {key: _reach(record, key) for key, _ in reading.keep}
    values = {key: None if v is _NOTHING else value_text(v) for key, v in found.items()}
    if not is_kept(reading.keep, values):
        return NotKept(values)
    content = _content(record, reading)
    if isinstance(content, Rejected):
        return dataclasses.replace(content, values=values)
    noted = content if isinstance(content, Noted) else Noted(content)
    noted.values = values
    return noted


def _content(record: dict, reading: Reading) -> str | Rejected:
    text = conversations.canonical(record) if reading.chat else _text(record, reading.text_key)
    if isinstance(text, Rejected):
        return text
    try:
        text.encode()
    except UnicodeEncodeError:
        return Rejected("not Unicode: an unpaired surrogate (\\ud800 to \\udfff)")
    if not reading.held_out_by or not text.strip():
        return not_empty(text)
    topic = _reach(record, reading.held_out_by)
    if topic is _NOTHING:
        return Rejected(f"no key to hold out by: {reading.held_out_by!r}")
    noted = Noted(text)
    noted.topic = json.dumps(topic, sort_keys=True, default=str)
    return noted


def _text(record: dict, text_key: str) -> str | Rejected:
    text = _reach(record, text_key)
    if text is _NOTHING:
        return conversations.no_text(text_key, record)
    if isinstance(text, str):
        return text
    return Rejected(f"{text_key!r} is a JSON {_NAMES.get(type(text), 'value')}, not a string")


def _reach(record: dict, key: str) -> Any:
    """What stands under `key`, or under 'b' in the record 'a' if it is 'a.b'; else _NOTHING."""
    if key in record:
        return record[key]
    for dot in re.finditer(r"\.", key):
        inner = record.get(key[: dot.start()])
        if isinstance(inner, dict):
            return _reach(inner, key[dot.end() :])
    return _NOTHING


def _loads(data: bytes) -> Any | Rejected:
    try:
        return orjson.loads(data)
    except orjson.JSONDecodeError:
        pass
    # What orjson refuses: NaN, Infinity, numbers of any size, surrogates; or there is a reason.
    if not data.strip():
        return _EMPTY
    text = decode(data)
    if isinstance(text, Rejected):
        return text
    try:
        return json.loads(text, parse_int=float)
    except (ValueError, RecursionError) as error:
        return Rejected(f"not JSON: {error}"[:200])


# telling the forms apart


def lies_in_lines(blocks: Blocks, unless_clear: bool) -> tuple[bool, Blocks]:
    """Whether there is a record a line; and the blocks as they were.

    `unless_clear`: the answer where the beginning is neither.
    """
    for size in sorted({*_LOOKS, streams.MAX_DOCUMENT_BYTES}):
        head, blocks = peek(blocks, size)
        answer = _in_lines(head, len(head) < size)
        if answer is not None:
            return answer, blocks
        if len(head) < size:
            return unless_clear, blocks
    return False, blocks


def _in_lines(head: bytes, is_whole: bool) -> bool | None:
    """The same of the first bytes; None where they do not tell. `is_whole`: nothing follows."""
    line, newline, rest = head.lstrip().partition(b"\n")
    if not newline and not is_whole:
        return False if line.startswith(b"[") else None
    first = _loads(line)
    if isinstance(first, dict):
        return True
    if isinstance(first, list) and line.startswith(b"["):
        # A line that is an array of its own has others below it.
        return bool(rest.strip()) if is_whole or rest.strip() else None
    value = next(values(iter([head])), None)
    if isinstance(value, bytes) and isinstance(_loads(value), dict):
        return False
    if not is_whole and isinstance(value, Rejected) and value.reason.startswith(_CUT_SHORT):
        return None
    if any(isinstance(_loads(line), dict) for line in rest.split(b"\n")[:100]):
        return True
    return None


def are_records(head: bytes, reading: Reading) -> bool:
    """Whether a text begins as records do: with an object of this key, or with two objects."""
    values_seen = itertools.islice(values(iter([head])), 2)
    whole = [value for value in values_seen if isinstance(value, bytes)]
    if not whole or not all(isinstance(_loads(value), dict) for value in whole):
        return False
    return len(whole) == 2 or not isinstance(parse(whole[0], reading), Rejected)


# cutting a stream into records

_BETWEEN = re.compile(rb"[^\s,]")  # records: commas and the brackets of an array around them
_WORD = re.compile(rb'[\s,\]\[{}"]')  # a number, a literal, or what is no JSON, up to this
_NESTED = re.compile(rb'[][{}"]')
_STRING = re.compile(rb'["\\\r\n]')


def values(blocks: Blocks) -> Iterator[bytes | Rejected]:
    """The bytes of every record: what stands at the top, or in an array at the top.

    After damage the rest is one `Rejected`, with its position.
    """
    scanner = _Scanner()
    try:
        for block in blocks:
            yield from scanner.cut(block)
        yield from scanner.end()
    except Damaged as error:
        yield Rejected(str(error))


class _Scanner:
    """Where records begin and end, by brackets and quotes."""

    def __init__(self):
        self._state, self._depth, self._in_array = _BETWEEN, 0, False
        self._held = Held()  # the record so far, without what lies in the block at hand
        self._begin = 0  # where in the stream it begins
        self._position = 0  # where the block at hand does
        self._skip = 0  # 1 where the block before ended with a backslash

    def cut(self, block: bytes) -> Iterator[bytes | Rejected]:
        """The records that end in the next block."""
        start, place = 0, self._skip
        while found := self._state.search(block, place):
            char, at, place = found.group(), found.start(), found.end()
            state, ends = self._state, False
            if state is _BETWEEN:
                start, self._begin = at, self._position + at
                self._state = self._opened(char)
            elif state is _WORD:  # what ends it is no part of it
                place, ends = at, True
            elif char == b'"':
                self._state = _STRING if state is _NESTED else _NESTED
                ends = state is _STRING and self._depth == 0
            elif char == b"\\":
                place += 1
            elif state is _STRING:
                self._lose("a line ends inside a string", self._position + at)
            else:
                self._depth += 1 if char in b"{[" else -1
                ends = self._depth == 0
            if ends:
                yield self._ended(block[start:place])
        self._skip = max(place - len(block), 0)
        if self._state is not _BETWEEN:
            self._held.add(block[start:])
        self._position += len(block)

    def end(self) -> Iterator[bytes | Rejected]:
        """The last record, or what is missing at the end."""
        if self._state is _WORD:
            yield self._ended(b"")
        elif self._state is not _BETWEEN:
            yield Rejected(f"{_CUT_SHORT}: the record that begins at byte {self._begin} has no end")
        elif self._in_array:
            yield Rejected(f"{_CUT_SHORT}: the array has no end")

    def _opened(self, char: bytes) -> re.Pattern:
        """What `char` between two records begins."""
        if char == (b"]" if self._in_array else b"["):
            self._in_array = not self._in_array
            return _BETWEEN
        if char in b"]}":
            self._lose(f"{char.decode()} without its beginning", self._begin)
        if char in b"{[":
            self._depth = 1
            return _NESTED
        return _STRING if char == b'"' else _WORD

    def _ended(self, last: bytes) -> bytes | Rejected:
        """The whole record."""
        self._held.add(last)
        record = self._held.take()
        is_word = self._state is _WORD and isinstance(record, bytes)
        if is_word and isinstance(_loads(record), Rejected):
            self._lose(f"{record[:20].decode(errors='replace')!r} is no JSON", self._begin)
        self._state = _BETWEEN
        return record

    def _lose(self, reason: str, at: int) -> NoReturn:
        raise Damaged(f"JSON damaged: {reason} at byte {at}; the rest of the file is lost")
