"""What a file is: by its name, and by its first bytes where the name says little or lies."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from importlib.util import find_spec
from typing import NamedTuple

from stablelm_jax.preparation.keeping import Keep

FORMATS = (
    'auto', 'jsonl', 'json', 'parquet', 'arrow', 'csv', 'tsv', 'text', 'html', 'tar', 'zip', 'warc',
)  # fmt: skip
# Hold files, each of them to be read by its own name.
ARCHIVES = ("tar", "zip")
_KINDS = {
    ".jsonl": "jsonl", ".ndjson": "jsonl", ".jsonlines": "jsonl", ".jl": "jsonl",
    ".json": "json", ".parquet": "parquet",
    ".arrow": "arrow", ".feather": "arrow", ".csv": "csv", ".tsv": "tsv", ".html": "html",
    ".htm": "html", ".xhtml": "html", ".tar": "tar", ".zip": "zip", ".warc": "warc",
    ".wet": "warc",
}  # fmt: skip
_COMPRESSIONS = {
    ".gz": "gzip", ".gzip": "gzip", ".bgz": "gzip", ".zst": "zstd", ".zstd": "zstd", ".xz": "xz",
    ".lzma": "xz", ".bz2": "bzip2", ".lz4": "lz4",
}  # fmt: skip
_SHORT = {".tgz": ".tar.gz", ".tbz2": ".tar.bz2", ".txz": ".tar.xz", ".tzst": ".tar.zst"}
# Packages that a kind needs, of which only an extra brings them: (package, extra).
_NEEDS = {"html": ("resiliparse", "html"), "warc": ("warcio", "warc")}


class Reading(NamedTuple):
    """How documents are read; the flags of the same names say what each means."""

    text_key: str = "text"
    format: str = "auto"
    split_on: str | None = None
    chat: Mapping | None = None  # the template, where records are conversations or pairs
    held_out_by: str | None = None
    keep: Keep | None = None  # a source takes the records that fit

    @property
    def wants_records(self) -> bool:
        return bool(self.chat or self.held_out_by or self.keep)

    @classmethod
    def of(cls, settings: Mapping) -> Reading:
        """The fields of the same names among `settings`."""
        return cls(*(settings.get(name, cls._field_defaults[name]) for name in cls._fields))


def kind_of(name: str, file_format: str = "auto") -> tuple[str, str | None]:
    """(kind, compression) of a file of this name; `file_format` holds for what archives hold, too.

    A name without a known suffix is a text.
    """
    stem, suffix = os.path.splitext(name.lower())
    stem, suffix = os.path.splitext(stem + _SHORT.get(suffix, suffix))
    compression = _COMPRESSIONS.get(suffix)
    suffix = os.path.splitext(stem)[1] if compression else suffix
    kind = _KINDS.get(suffix, "text")
    if file_format != "auto" and kind not in ARCHIVES:
        kind = file_format
    return kind, compression


def missing_package(kind: str) -> str | None:
    """What to do where a package that this kind needs is not installed."""
    package, extra = _NEEDS.get(kind, ("", ""))
    if not package or find_spec(package):
        return None
    return f"{kind} needs {package}: pip install -e '.[{extra}]', or --format text"


# What begins like this is no text, whatever its name says: what people keep beside texts, what they
# have to unpack or fetch first, and what has no zero byte to be told by.
_SIGNATURES = {
    rb"%PDF-": "PDF",
    rb"\{\\rtf": "RTF document",
    rb"%!PS": "PostScript",
    rb"version https://git-lfs": "Git LFS pointer, the file itself is not here, `git lfs pull`",
    rb"SQLite format 3\0": "SQLite database",
    rb"PK\x03\x04|PK\x05\x06\0": "zip archive",
    rb".{257}ustar[\0 ]": "tar archive",
    rb"7z\xbc\xaf\x27\x1c": "7-zip archive",
    rb"Rar!\x1a\x07": "RAR archive",
    rb"\x89PNG\r\n": "PNG image",
    rb"\xff\xd8\xff": "JPEG image",
    rb"GIF8[79]a": "GIF image",
    rb"RIFF.{4}(WAVE|AVI )|OggS\0|fLaC\0|ID3[\x02-\x04]\0|\xff[\xfb\xf3\xf2]": "audio or video",
    rb".{4}ftyp|\x1aE\xdf\xa3": "audio or video",
    rb"\x80[\x02-\x05][\x95}\](cX.]": "Python pickle",
    rb"PAR1[\x15\0\x16\x1c-]": "parquet file",
    rb"PARE": "encrypted parquet file",
    rb"ARROW1\0\0|\xff{4}.{2}\0\0": "arrow file",
    rb"ORC\n?[\0-\x08\x0b\x0e-\x1f]": "ORC file",
    rb"Obj\x01": "Avro file",
    rb"\0asm|!<arch>\n|\x7fELF|MZ.\0|\xcf\xfa\xed\xfe": "program or library",
    rb"\xd0\xcf\x11\xe0\xa1\xb1": "Microsoft Office document",
}
HEAD = 8192  # bytes that tell what a file is


def what_is(head: bytes) -> str | None:
    """What begins with these bytes, if that is known and no text."""
    matches = (name for begin, name in _SIGNATURES.items() if re.match(begin, head, re.DOTALL))
    return next(matches, None)


# How pages of HTML begin. (?> keeps many comments from being matched in all the ways there are.
PAGE = re.compile(rb"\s*(<\?xml[^>]*>\s*|(?><!--.*?-->)\s*)*<(!doctype\s+html|html)\b", re.S | re.I)


def why_no_text(head: bytes) -> str | None:
    """Why what begins with these bytes, of nothing known, is no text; None where it may be."""
    if b"\0" not in head:  # text has no zero byte; what is binary has one early
        return None
    zeros = sorted((head[::2].count(0), head[1::2].count(0)))
    if 4 * zeros[0] < zeros[1] > len(head) // 4:
        return "UTF-16 without a byte order mark, not UTF-8"
    return f"binary of an unknown kind, not text (begins with {head[:8].hex(' ')})"
