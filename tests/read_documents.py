"""Reads a file as `prepare` does: found, told apart by its name, and read."""

import json
import pathlib
import random

from stablelm_jax.preparation.formats import Reading
from stablelm_jax.preparation.inputs import find_files
from stablelm_jax.preparation.readers import read_file
from stablelm_jax.preparation.streams import Meter


def write(path: pathlib.Path, data: bytes | str) -> str:
    """Writes a file and returns its path as a flag holds it."""
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    return str(path)


def records(path, text_key="text", *, file_format="auto", split_on=None, meter=None, part=()):
    """Every record: a text, or a `Rejected`. `part`: (start, end) of what is read."""
    (file,) = find_files([str(path)], file_format)
    reading = Reading(text_key, file_format, split_on)
    return list(read_file(file, reading, meter or Meter(), *part))


def texts_and_reasons(found):
    return [record if isinstance(record, str) else record.reason for record in found]


def read(path, *arguments, **options):
    """Every record: its text, or the reason why there is none."""
    return texts_and_reasons(records(path, *arguments, **options))


def json_lines(texts) -> bytes:
    return b"".join(json.dumps({"text": text}).encode() + b"\n" for text in texts)


def random_texts(count, seed=0):
    source = random.Random(seed)
    letters = 'abcdefgh \n\t"\\äöü漢字🙂'
    return ["".join(source.choices(letters, k=source.randint(1, 80))) + "x" for _ in range(count)]
