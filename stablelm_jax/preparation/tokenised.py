"""Documents that are token ids already: the `.bin` and `.idx` of Megatron-LM and GPT-NeoX.

They are written anew, as our shards, because the held-out documents have to be taken out of them.
Each one's text is decoded: which documents are held out, and losses a byte, follow from the text.
"""

from __future__ import annotations

import collections
import itertools
import os
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from stablelm_jax.data.shards import Shard
from stablelm_jax.preparation.finding import InputError, InputFile
from stablelm_jax.preparation.streams import Meter, Rejected
from stablelm_jax.tokenizer.tokenizer import Tokenizer

KIND = "tokens"

# Before the work begins, so many documents of each file are looked at, and so many tokens of each.
_LOOKED_AT, _TOKENS_COMPARED = 64, 1024
# With the tokenizer that made them nearly all are the same; with another, words that are one token
# of it may come out right by chance.
_LEAST_SAME = 0.9


class TokenisedText(str):
    """The text of a document that came as ids, and the `ids`, int32 [tokens], with their end."""

    ids: np.ndarray


class TokenisedReader(NamedTuple):
    """Reads documents of ids.

    `append_eod`: a document that does not end in the token for that gets it; else it is rejected.
    """

    tokenizer: Tokenizer
    append_eod: bool = False

    def read(
        self, path: str, start: int = 0, end: int | None = None, meter: Meter | None = None
    ) -> Iterator[TokenisedText | Rejected]:
        """The documents [start, end) of the `.bin` at `path`."""
        shard, meter = Shard(path), meter or Meter()
        offsets = shard.document_offsets[start : None if end is None else end + 1]
        for first, last in itertools.pairwise(offsets.tolist()):
            yield self.document(shard.read(first, last))
            meter.consumed += (last - first) * shard.dtype.itemsize

    def document(self, ids: np.ndarray) -> TokenisedText | Rejected:
        """A document of int32 `ids`, or why it is none."""
        tokenizer = self.tokenizer
        wrong = ids[(ids < 0) | (ids > tokenizer.largest_id)]
        if len(wrong):
            last = tokenizer.largest_id
            return Rejected(f"holds an id that the tokenizer lacks: {wrong[0]}, its last is {last}")
        if not len(ids) or ids[-1] != tokenizer.eod:
            if not self.append_eod:
                end = f"does not end in token {tokenizer.eod}, which ends documents"
                return Rejected(f"{end}: --append-eod adds it")
            ids = np.append(ids, np.int32(tokenizer.eod))
        if len(ids) == 1:
            return Rejected("empty document")
        text = TokenisedText(tokenizer.decode(ids[:-1]))
        text.ids = ids
        return text


def find_tokenised(prefixes: Sequence[str], reader: TokenisedReader) -> list[InputFile]:
    """The `.bin` files of `prefixes`, which may also be written with `.bin` or `.idx`.

    Raises:
      ShardError: a file is missing or damaged.
      InputError: documents that were looked at are rejected, or of another tokenizer.
    """
    files = {}
    for prefix in prefixes:
        path = os.path.abspath(prefix.removesuffix(".bin").removesuffix(".idx") + ".bin")
        if path in files:
            raise InputError(f"--adopt: {path} is reached twice; name it once")
        shard = Shard(path)
        shard.check()
        status = os.stat(path)
        files[path] = InputFile(path, prefix, status.st_size, str(status.st_mtime_ns), KIND)
        _check(shard, reader)
    return list(files.values())


def _check(shard: Shard, reader: TokenisedReader) -> None:
    """Encodes the texts of some documents again: another tokenizer gives other ids."""
    offsets, tokenizer = shard.document_offsets.tolist(), reader.tokenizer
    numbers = np.linspace(0, max(shard.num_documents - 1, 0), _LOOKED_AT, dtype=int)
    rejected, found, same = collections.Counter(), 0, 0
    for number in np.unique(numbers)[: shard.num_documents].tolist():
        ids = shard.read(*offsets[number : number + 2])
        document = reader.document(ids)
        if isinstance(document, Rejected):
            rejected[document.reason] += 1
            continue
        ids = document.ids[:_TOKENS_COMPARED].tolist()
        again = tokenizer.encode(tokenizer.decode(ids), specials=True)
        found += len(ids)
        same += (collections.Counter(ids) & collections.Counter(again)).total()
    if rejected.total() > _LOOKED_AT / 2:
        raise InputError(f"{shard.path}: document {rejected.most_common(1)[0][0]}")
    if same < _LEAST_SAME * found:
        raise InputError(
            f"{shard.path}: tokenizer {tokenizer.name} gives other ids for its texts; name the one"
            " that made them with --tokenizer"
        )


def document_ranges(path: str, size: int) -> list[tuple[int, int, int]]:
    """(start, end, bytes) of runs of documents, of about `size` bytes each."""
    shard = Shard(path)
    offsets = shard.document_offsets * shard.dtype.itemsize
    edges = np.searchsorted(offsets[:-1], np.arange(0, offsets[-1], size)).tolist()
    pairs = itertools.pairwise([*edges, shard.num_documents])
    return [(a, b, int(offsets[b] - offsets[a])) for a, b in pairs if b > a]
