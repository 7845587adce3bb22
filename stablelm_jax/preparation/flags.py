"""The flags that say what is read, the same for every verb that reads documents."""

from __future__ import annotations

import argparse

from stablelm_jax.preparation.inputs import FORMATS


def add_input_flags(parser: argparse.ArgumentParser, *, required: bool = True) -> None:
    """`--input` (as `inputs`), and how its files are read."""
    add = parser.add_argument
    add('--input', dest='inputs', required=required, nargs='+', metavar='PATH',
        help='files, folders, patterns; local or any fsspec URL')  # fmt: skip
    add('--format', default='auto', choices=FORMATS,
        help='auto: by the name; what has no known one is one document a file')  # fmt: skip
    add('--text-key', default='text', metavar='KEY',
        help='key (jsonl) or column (parquet) of the text (default text)')  # fmt: skip
