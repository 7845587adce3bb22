"""The flags that say what is read, the same for every verb that reads documents."""

from __future__ import annotations

import argparse

from stablelm_jax.preparation.formats import FORMATS
from stablelm_jax.preparation.texts import split_bytes


def add_input_flags(parser: argparse.ArgumentParser, *, required: bool = True) -> None:
    """`--input` (as `inputs`), and how its files are read."""
    add = parser.add_argument
    add('--input', dest='inputs', required=required, nargs='+', metavar='PATH',
        help='files, folders, patterns; local or any fsspec URL')  # fmt: skip
    add('--format', default='auto', choices=FORMATS,
        help='auto: by the name; what has no known one is one document a file. In archives it'
        ' holds for the files within')  # fmt: skip
    add('--text-key', default='text', metavar='KEY',
        help='key or column of the text (default text); a.b is b within a')  # fmt: skip
    add('--keep', type=_keep, nargs='+', action='extend', metavar='KEY=PATTERN',
        help='of records, only those whose value under KEY fits, as in source=OSCAR* (several keys:'
        ' all must fit, several patterns of a key: one)')  # fmt: skip
    add('--split-on', type=_split_on, metavar='TEXT|blank-lines|64kB',
        help='cut each text file into documents: at a text such as "<|endoftext|>", at blank lines,'
        ' or at the line end before so many bytes')  # fmt: skip


def _keep(text: str) -> list[str]:
    key, equals, pattern = text.partition("=")
    if not (key and equals and pattern):
        raise argparse.ArgumentTypeError(f"{text}: write KEY=PATTERN, as in source=OSCAR*")
    return [key, pattern]


def _split_on(text: str) -> str:
    try:
        split_bytes(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return text
