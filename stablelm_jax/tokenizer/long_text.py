"""What keeps a freak document from stopping a tokenizer: NFC in linear time, long whitespace apart,
and, for a tokenizer.json, long documents in parts.

All cost nothing on ordinary text, and none changes a single id.
"""

from __future__ import annotations

import itertools
import re
import unicodedata
from collections.abc import Callable, Iterator
from typing import Any

# tiktoken's regex engine keeps one stack entry a character for `\s+(?!\S)` and gives up at a
# million (tiktoken 0.14); runs from this length on are taken out of its hands.
LONG_RUN = 200_000
# unicodedata sorts combining marks by insertion, quadratic in the length of a run of marks: one of
# 32,000 takes 0.7 s, one of a million would take ten minutes.
LONG_MARKS = 256
# The library `tokenizers` takes 120 to 220 bytes of memory a character. A document is encoded in
# windows of so many characters; in larger ones, up to _LARGEST (about 1 GB), where it has no place
# to be cut at.
_WINDOW = 1 << 18
_LARGEST = 1 << 23
_OVERLAP = 1 << 10

# Whitespace of the split pattern (Unicode White_Space) but for line ends, which it treats apart.
# Python's own \s would add 0x1c..0x1f, which the pattern takes for punctuation.
BLANK = "[\\t\\v\\f \\x85\\xa0\\u1680\\u2000-\\u200a\\u2028\\u2029\\u202f\\u205f\\u3000]"


def normalise(text: str) -> str:
    """NFC of a text, in linear time; ASCII and text that is NFC already cost a look."""
    if text.isascii():
        return text
    if any(all(map(unicodedata.combining, block)) for block in _blocks(text, LONG_MARKS)):
        text = sort_marks(text)
    return unicodedata.normalize("NFC", text)


def sort_marks(text: str) -> str:
    """Runs of combining marks in canonical order, which leaves NFC the same and nothing to sort."""
    runs = itertools.groupby(text, lambda character: unicodedata.combining(character) > 0)
    return "".join(
        "".join(sorted(run, key=unicodedata.combining) if is_marks else run)
        for is_marks, run in runs
    )


def split_long_runs(text: str, limit: int = LONG_RUN) -> Iterator[tuple[int, int, bool]]:
    """(start, end, is_piece) of parts of an NFC text that Arcade100k may encode apart, in order.

    A part with `is_piece` is a run of blanks (whitespace but line ends) that no line end follows,
    without its last one. The split pattern takes it as one piece: the piece before takes no blanks,
    and for two blanks that no line end follows `\\s+(?!\\S)` is the first alternative that fits.
    The parts do not see each other: no alternative looks back, and the one that looks ahead cannot
    meet the end of the part before, which is a line end or a visible character.
    """
    position = 0
    if any(map(str.isspace, _blocks(text, limit))):
        for run in re.finditer(f"(?<!{BLANK}){BLANK}{{{limit},}}+(?![\\r\\n])", text):
            start, end = run.start(), run.end() - (run.end() < len(text))
            if start > position:
                yield position, start, False
            yield start, end, True
            position = end
    if position < len(text):
        yield position, len(text), False


def _blocks(text: str, length: int) -> Iterator[str]:
    """Blocks of a text one of which is filled by any run so long: a cheap look for most texts."""
    step = length // 2
    return (text[i : i + step] for i in range(0, len(text) - step + 1, step))


def encode_in_parts(encode: Callable[[str], Any], text: str) -> Iterator[list[int]]:
    """The ids that `encode(text).ids` would give, part by part, in bounded memory.

    `encode` gives an `Encoding` of the library `tokenizers`. ValueError: there is no place to cut
    in 8 million characters, because the tokenizer does not split a text into words.
    """
    start, size = 0, _WINDOW
    while len(text) - start > size:
        window = text[start : start + size]
        encoding = encode(window)
        cut = _cut(encode, window, encoding)
        if cut is not None:
            token, position = cut
            yield encoding.ids[:token]
            start, size = start + position, _WINDOW
        elif size < _LARGEST:
            size *= 2
        else:
            raise ValueError(
                f"the tokenizer takes {size:,} characters for one word, and more are too many for"
                " the memory; cut the document, or use a tokenizer that splits words"
            )
    yield encode(text[start:]).ids


def _cut(encode: Callable[[str], Any], window: str, encoding: Any) -> tuple[int, int] | None:
    """The last (token, character) of a window before which its ids are those of the whole text.

    A tokenizer splits text into words from left to right, and looks ahead to the end of a run of
    like characters at most; the ids of a word depend on no other word. So a cut is the start of a
    word where the kind of character changes, if what follows has the same ids by itself.
    """
    last = len(window) - _OVERLAP
    for position in range(last, max(last - 4 * _OVERLAP, 0), -1):
        if _kind(window[position]) in ("M", _kind(window[position - 1])):
            continue  # a mark may be joined with what stands before it
        token = encoding.char_to_token(position)
        if not token or encoding.token_to_chars(token)[0] != position:
            continue
        starts_word = encoding.token_to_word(token) != encoding.token_to_word(token - 1)
        if starts_word and encode(window[position:]).ids == encoding.ids[token:]:
            return token, position
    return None


def _kind(character: str) -> str:
    return "Z" if character.isspace() else unicodedata.category(character)[0]
