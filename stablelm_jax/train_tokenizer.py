"""A tokenizer of one's own: `stablelm train_tokenizer --input PATH... --output tokenizer.json`

Byte-level BPE by Arcade100k's rules (NFC, the same split into words, single digits), its merges
learned from the text at hand, which is read as `prepare` reads it. A model of few million
parameters spends nearly all of its time on a vocabulary of 100,000 rows; with a few thousand it
learns in minutes. Writes a `tokenizer.json` for `prepare --tokenizer` and `config.data.tokenizer`.
The same text gives the same file.
"""

from __future__ import annotations

import argparse
import collections
import pathlib
import sys
from collections.abc import Iterator, Sequence

from stablelm_jax.run_verb import run_verb

if __name__ == "__main__":  # what is imported below takes seconds, in which Ctrl-C may come
    run_verb(None, "train_tokenizer")

from stablelm_jax.preparation import chunks, inputs, readers
from stablelm_jax.preparation.flags import add_input_flags
from stablelm_jax.storage.files import check_writable, replacing
from stablelm_jax.tokenizer.train_tokenizer import train


class _Documents:
    """The documents of an input, and what was rejected of it, as `prepare` says it."""

    def __init__(self, files: Sequence[inputs.InputFile], text_key: str):
        self._files, self._text_key = files, text_key
        self.count = 0
        self.first_rejected = ""
        self.reasons: collections.Counter[str] = collections.Counter()

    def __iter__(self) -> Iterator[str]:
        for chunk in chunks.cut(self._files):
            for record in chunks.read_chunk(chunk, self._text_key):
                if isinstance(record.content, str):
                    self.count += 1
                    yield record.content
                    continue
                reason = record.content.reason
                place = f"{record.file.name}, line {record.line}"
                self.first_rejected = self.first_rejected or f"{place}: {reason}"
                self.reasons[readers.reason_kind(reason)] += 1

    def rejected(self) -> str:
        """What gave no document: how many, why, and where the first of them is."""
        counts = "; ".join(f"{reason}: {count:,}" for reason, count in self.reasons.most_common(5))
        return f"{self.reasons.total():,} ({counts}), the first is {self.first_rejected}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Keeps a file that is there already. Returns the exit code."""
    parser = argparse.ArgumentParser(
        "stablelm train_tokenizer", description=__doc__.split(":")[0] + "."
    )
    add_input_flags(parser)
    parser.add_argument("--output", required=True, type=pathlib.Path, metavar="tokenizer.json")
    parser.add_argument("--rows", type=int, default=4096, help="size of the vocabulary")
    flags = parser.parse_args(arguments)
    if flags.output.is_file():
        print(f"{flags.output}: kept")
        return 0
    try:
        check_writable(flags.output)
        _train(flags)
    except (ValueError, OSError) as error:
        print("train_tokenizer:", " ".join(str(error).splitlines()), file=sys.stderr)
        return 1
    return 0


def _train(flags: argparse.Namespace) -> None:
    documents = _Documents(inputs.find_files(flags.inputs, flags.format), flags.text_key)
    tokenizer = train(documents, flags.rows)
    if not documents.count:
        why = documents.rejected() if documents.reasons else "all is empty"
        raise ValueError(f"no usable document: {why}")
    with replacing(flags.output) as aside:
        tokenizer.save(str(aside))
    print(f"rejected: {documents.rejected()}" if documents.reasons else "rejected: none")
    size = tokenizer.get_vocab_size()
    fewer = f" (not {flags.rows:,}: the text repeats no more)" if size < flags.rows else ""
    print(f"{flags.output}: {size:,} tokens{fewer}, learned from {documents.count:,} documents")
