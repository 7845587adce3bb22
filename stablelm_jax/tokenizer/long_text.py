"""What keeps a freak document from stopping a tokenizer: NFC in linear time, long whitespace apart.

Both cost nothing on ordinary text, and neither changes a single id.
"""

from __future__ import annotations

import itertools
import re
import unicodedata
from collections.abc import Iterator

# tiktoken's regex engine keeps one stack entry a character for `\s+(?!\S)` and gives up at a
# million (tiktoken 0.14); runs from this length on are taken out of its hands.
LONG_RUN = 200_000
# unicodedata sorts combining marks by insertion, quadratic in the length of a run of marks: one of
# 32,000 takes 0.7 s, one of a million would take ten minutes.
LONG_MARKS = 256

# Whitespace of the split pattern (Unicode White_Space) but for line ends, which it treats apart.
# Python's own \s would add 0x1c..0x1f, which the pattern takes for punctuation.
BLANK = "[\\t\\v\\f \\x85\\xa0\\u1680\\u2000-\\u200a\\u2028\\u2029\\u202f\\u205f\\u3000]"


def normalise(text: str) -> str:
    """NFC of a text, in linear time; ASCII and text that is NFC already cost a look."""
    if text.isascii():
        return text
    # LONG_MARKS marks that follow one another fill an aligned block of half that.
    step = LONG_MARKS // 2
    starts = range(0, len(text) - step + 1, step)
    if any(all(map(unicodedata.combining, text[i : i + step])) for i in starts):
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

    A part with `is_piece` is a run of whitespace that the split pattern takes as one piece.

    Why the ids stay the same: take a maximal run of two or more blanks (whitespace but \\r and \\n)
    with no line end right behind it.
    * A piece starts there. What stands before is visible or a line end, or nothing; a piece that
      holds that visible character or that line end takes line ends behind it and no blank.
    * That piece is the run without its last blank, or all of it where the text ends. The second
      character is a blank, so no word or mark can start here; no line end follows in this
      whitespace; `\\s+(?!\\S)` is the first alternative left.
    * The parts do not see each other. No alternative looks back, and the one that looks ahead
      cannot meet the end of the part before: that ends in a line end or a visible character.
    A run with a line end behind it belongs to `\\s*[\\r\\n]+`, which needs no stack.
    """
    position = 0
    for start, end in _long_blanks(text, limit):
        end -= end < len(text)
        if start > position:
            yield position, start, False
        yield start, end, True
        position = end
    if position < len(text):
        yield position, len(text), False


def _long_blanks(text: str, limit: int) -> list[tuple[int, int]]:
    """Where `limit` (2 at least) or more blanks stand that no line end follows."""
    # A run this long fills an aligned block of half its length: a cheap look for most texts.
    step = limit // 2
    starts = range(0, len(text) - step + 1, step)
    if not any(text[i : i + step].isspace() for i in starts):
        return []
    runs = f"(?<!{BLANK}){BLANK}{{{limit},}}+(?![\\r\\n])"
    return [match.span() for match in re.finditer(runs, text)]
