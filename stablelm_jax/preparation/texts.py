"""Documents out of text files and pages of HTML: one a file, or many where a text is split."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence

from stablelm_jax.preparation import streams
from stablelm_jax.preparation.formats import HEAD, Reading, why_no_text
from stablelm_jax.preparation.streams import Blocks, Held, Rejected, cut_at, peek

BLANK_LINES = "blank-lines"
_UNITS = {"k": 1000, "m": 1000**2, "g": 1000**3, "ki": 1024, "mi": 1024**2, "gi": 1024**3}
_BLANK_START = re.compile(rb"\A\s*\n")
_NAVIGATION = ("header", "footer", "aside", "nav")


def decode(data: bytes | Rejected) -> str | Rejected:
    """The text of UTF-8 bytes, unless it is empty; what is rejected already as it is."""
    if isinstance(data, Rejected):
        return data
    try:
        return not_empty(data.decode())
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        where = f" on line {line}" if line > 1 else f" at byte {error.start}"
        return Rejected(f"not UTF-8: 0x{data[error.start]:02x}{where}")


def not_empty(text: str) -> str | Rejected:
    return Rejected("empty document") if not text or text.isspace() else text


class Noted(str):
    """A document with what its record says of it beside the text.

    Attributes:
      topic: decides whether it is held out, where it is set: all of a topic are on one side.
      values: what stands under the keys of `--keep`, where they are asked for.
    """

    topic: str
    values: Mapping[str, str | None]


def read_text(blocks: Blocks, reading: Reading) -> Iterator[str | Rejected]:
    """A whole text as one document, or as those that `reading.split_on` cuts it into."""
    head, blocks = peek(blocks, HEAD)
    if problem := why_no_text(head):  # before reading on: libraries and films are large
        yield Rejected(problem)
    elif reading.split_on:
        yield from map(decode, _pieces(blocks, reading.split_on))
    else:
        yield decode(whole(blocks, " with --split-on"))


def whole(blocks: Blocks, hint: str = "") -> bytes | Rejected:
    """All bytes; why not, where they are too many."""
    held = Held()
    for block in blocks:
        held.add(block)
        if held.is_too_long:
            break
    return held.take(hint)


# splitting


def split_bytes(split_on: str) -> int | None:
    """The size that '64kB' asks for; None of what is no size.

    Raises:
      ValueError: it is no size that a document can have, or empty.
    """
    found = re.fullmatch(r"(\d+) ?([kmg]i?)b?", split_on.lower())
    size = int(found[1]) * _UNITS[found[2]] if found else None
    if not split_on or (found and not 0 < size <= streams.MAX_DOCUMENT_BYTES):
        limit = streams.MAX_DOCUMENT_BYTES >> 20
        raise ValueError(
            f"--split-on {split_on!r}: give a text, {BLANK_LINES}, or a size up to {limit}MiB"
        )
    return size


def _pieces(blocks: Blocks, split_on: str) -> Iterator[bytes | Rejected]:
    """The pieces of a text, those that are blank left out."""
    if size := split_bytes(split_on):
        pieces = _gathered(cut_at(blocks, b"\n"), lambda held, line: held + len(line) > size)
    elif split_on == BLANK_LINES:
        pieces = _gathered(cut_at(blocks, b"\n"), lambda held, line: not line.strip())
    else:  # a shell passes \n on as two characters
        separator = split_on.replace("\\n", "\n").replace("\\t", "\t").encode()
        pieces = cut_at(blocks, separator)
    for piece in pieces:
        if isinstance(piece, Rejected):
            yield piece
        elif piece and not piece.isspace():
            yield _BLANK_START.sub(b"", piece).rstrip(b"\r\n")


def _gathered(
    lines: Iterator[bytes | Rejected], is_next: Callable[[int, bytes], bool]
) -> Iterator[bytes | Rejected]:
    """Puts lines together until `is_next(bytes held, line)` says that a new piece begins."""
    held = Held()
    for line in lines:
        if held.size and (isinstance(line, Rejected) or is_next(held.size, line)):
            yield held.take()
        if isinstance(line, Rejected):
            yield line
        else:
            held.add(line + b"\n")
    if held.size:
        yield held.take()


# HTML


def read_html(blocks: Blocks, reading: Reading) -> Iterator[str | Rejected]:
    """The text of one page."""
    head, blocks = peek(blocks, HEAD)
    problem = why_no_text(head)
    data = Rejected(problem) if problem else whole(blocks)
    yield data if isinstance(data, Rejected) else not_empty(page_text(data))


def page_text(page: bytes, skip: Sequence[str] = ()) -> str:
    """The text of a page of HTML, paragraphs apart; needs resiliparse.

    Headers, footers, sidebars and navigation are left out, and what matches a CSS selector of
    `skip`.
    """
    from resiliparse.extract.html2text import extract_plain_text
    from resiliparse.parse.encoding import bytes_to_str, detect_encoding

    try:  # first as UTF-8: the detector takes short pages with many accents for Latin-1
        html = page.decode("utf-8-sig")
    except UnicodeDecodeError:
        html = bytes_to_str(page, detect_encoding(page))
    left_out = [*_NAVIGATION, *skip]
    text = extract_plain_text(html, alt_texts=False, comments=False, skip_elements=left_out)
    return text.strip()
