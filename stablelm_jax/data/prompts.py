"""Questions out of token shards: what stands before the first answer of a conversation."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator

from stablelm_jax.data.manifest import Source, open_shard
from stablelm_jax.data.shards import read_spans


def held_out_prompts(sources: Iterable[Source], limit: int) -> Iterator[tuple[list[int], str]]:
    """(token ids up to the first trained one, language) of held-out conversations and pairs.

    `limit` of a source at most; text has none, and both sides of a pair have the same. The language
    is "" where a source has none or several. Errors are those of `open_shard`.
    """
    for source in sources:
        languages = source.manifest.languages
        for prompt in itertools.islice(_prompts(source), limit):
            yield prompt, languages[0] if len(languages) == 1 else ""


def _prompts(source: Source) -> Iterator[list[int]]:
    kind = source.manifest.kind
    for info in source.manifest.held_out.shards if kind != "text" else ():
        path = source.directory / info.file
        shard, lengths = open_shard(path, info), {}
        for document, first, _ in read_spans(path, info).tolist():
            lengths.setdefault(document, first)
        for document, length in lengths.items():
            if kind != "pairs" or document % 2 == 0:
                begin = int(shard.document_offsets[document])
                yield shard.read(begin, begin + length).tolist()
