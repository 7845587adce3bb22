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
import json
import pathlib
import sys
from collections.abc import Iterator, Sequence

from stablelm_jax.run_verb import run_verb

if __name__ == "__main__":  # what is imported below takes seconds, in which Ctrl-C may come
    run_verb(None, "train_tokenizer")

from stablelm_jax.preparation import chunks, hub, inputs
from stablelm_jax.preparation.flags import add_input_flags
from stablelm_jax.preparation.formats import Reading
from stablelm_jax.preparation.streams import Rejected, reason_kind
from stablelm_jax.storage.files import check_writable, replacing, write_json
from stablelm_jax.storage.remote import described, is_url
from stablelm_jax.tokenizer.train_tokenizer import train

_SIZE_UNKNOWN = 1 << 20  # taken for the bytes of a file whose server does not tell
_AT_ONCE = 1 << 20  # characters; the library takes some 150 bytes of memory for each


class _Documents:
    """The documents of an input, and what was rejected of it, as `prepare` says it.

    Of more than `max_bytes` of text each chunk gives its beginning, as much as is its share.
    """

    def __init__(self, files: Sequence[inputs.InputFile], reading: Reading, max_bytes: int):
        self._files, self._reading, self._max_bytes = files, reading, max_bytes
        self.count = self.text_bytes = 0
        self.is_sample = False
        self.first_rejected = ""
        self.reasons: collections.Counter[str] = collections.Counter()

    def __iter__(self) -> Iterator[str]:
        cut = chunks.cut(self._files)
        sizes = [chunk.size or _SIZE_UNKNOWN for chunk in cut]
        for number, chunk in enumerate(cut):
            left = self._max_bytes - self.text_bytes  # what earlier chunks lack is for later ones
            until = self.text_bytes + left * sizes[number] / sum(sizes[number:])
            for record in chunks.read_chunk(chunk, self._reading):
                if isinstance(record.content, Rejected):
                    self._note(record)
                elif isinstance(record.content, str):
                    if self.text_bytes >= until:
                        self.is_sample = True
                        break
                    yield from self._parts(record.content)

    def _parts(self, text: str) -> Iterator[str]:
        self.count += 1
        self.text_bytes += len(text.encode())
        return (text[start : start + _AT_ONCE] for start in range(0, len(text), _AT_ONCE))

    def _note(self, record: chunks.Record) -> None:
        place, reason = f"{record.file.name}, line {record.line}", record.content.reason
        self.first_rejected = self.first_rejected or f"{place}: {reason}"
        self.reasons[reason_kind(reason)] += 1

    def rejected(self) -> str:
        """What gave no document: how many, why, and where the first of them is."""
        counts = "; ".join(f"{reason}: {count:,}" for reason, count in self.reasons.most_common(5))
        return f"{self.reasons.total():,} ({counts}), the first is {self.first_rejected}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Keeps what the same settings made before. Returns the exit code."""
    parser = argparse.ArgumentParser(
        "stablelm train_tokenizer", description=__doc__.split(":")[0] + "."
    )
    add_input_flags(parser)
    parser.add_argument("--output", required=True, type=pathlib.Path, metavar="tokenizer.json")
    parser.add_argument("--rows", type=int, default=4096, help="size of the vocabulary")
    parser.add_argument('--max-bytes', type=int, default=10**9, metavar='N',
        help='of text to learn from (default 1 GB), spread over the input')  # fmt: skip
    flags = parser.parse_args(arguments)
    try:
        if not flags.output.is_file():
            check_writable(flags.output)
        _train(flags)
    except (ValueError, OSError) as error:
        print("train_tokenizer:", " ".join(str(error).splitlines()), file=sys.stderr)
        return 1
    except Exception as error:  # of a driver: each raises its own
        if not any(map(is_url, flags.inputs)):
            raise
        print(f"train_tokenizer: reading the input failed, {described(error)}", file=sys.stderr)
        return 1
    return 0


def _train(flags: argparse.Namespace) -> None:
    left_out: list[inputs.LeftOut] = []
    revisions: dict[str, str] = {}
    files = inputs.find_files(flags.inputs, flags.format, left_out, str(flags.output), revisions)
    inputs.check_split(flags.split_on, files)
    settings = {**vars(flags), "inputs": inputs.fingerprint(files)}
    del settings["output"]
    if not settings["keep"]:  # as those of earlier releases
        del settings["keep"]
    if revisions:
        settings["revisions"] = revisions
        print(f"from the Hub: {hub.pinned_names(revisions)}")
    notes = flags.output.with_suffix(inputs.TRAINING_NOTES)
    if flags.output.is_file():
        made = json.loads(notes.read_text(encoding="utf-8")) if notes.exists() else {}
        if made != settings:
            other = hub.pinned_names(made.get("revisions", {}))
            raise ValueError(
                f"{flags.output} is there already and was not made by this command from this input"
                f"{other and ', but from '}{other}: choose another --output, or remove it"
            )
        print(f"{flags.output}: kept, it was made by this command before")
        return
    documents = _Documents(files, Reading.of(vars(flags)), flags.max_bytes)
    tokenizer = train(documents, flags.rows)
    if not documents.count:
        why = documents.rejected() if documents.reasons else "all is empty"
        raise ValueError(f"no usable document: {why}")
    with replacing(flags.output) as aside:
        tokenizer.save(str(aside))
        write_json(notes, settings)
    print(f"rejected: {documents.rejected()}" if documents.reasons else "rejected: none")
    for item in left_out:
        print(f"left out: {item.name}, {item.reason}")
    size = tokenizer.get_vocab_size()
    fewer = f" (not {flags.rows:,}: the text repeats no more)" if size < flags.rows else ""
    print(
        f"{flags.output}: {size:,} tokens{fewer}, learned from {documents.count:,} documents"
        f"{' (a sample: --max-bytes)' if documents.is_sample else ''}"
    )
