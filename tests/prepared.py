"""Small prepared sources for the data tests, and the rules of DESIGN.md spelt out slowly.

Nothing here uses the code under test except to write files. The rules are written down again in
plain Python, one row and one token at a time, as what the fast code is compared with.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import numpy as np

from stablelm_jax.data.manifest import (
    Source,
    SourceManifest,
    Split,
    TokenizerInfo,
    open_shard,
    unigram_entropy,
    write_manifest,
)
from stablelm_jax.data.mixture import Mixture, quantise
from stablelm_jax.data.shards import ShardWriter, file_sha256

EOD = 7
TOKENIZER = TokenizerInfo("letters", "a" * 64, 64, EOD)
CHAT = {"name": "letters", "jinja": "{{ messages }}", "enders": ["<|endoftext|>"]}


def mixture_of(weights, stages=()) -> Mixture:
    """The mixture of these weights from row 0 on; `stages`: (first_row, weights) of later ones."""
    later = [(row, quantise(weights)) for row, weights in stages]
    return Mixture([(0, quantise(weights)), *later])


def random_documents(rng: np.random.Generator, count: int, longest: int) -> list[list[int]]:
    """Documents of 1 to `longest` tokens, each ended by EOD and free of it before."""
    documents = []
    for length in rng.integers(0, longest, count):
        tokens = rng.integers(8, 64, length)
        documents.append([*tokens.tolist(), EOD])
    return documents


def write_source(
    root: Path,
    name: str,
    train_shards: list[list[list[int]]],
    held_out: list[list[int]] | None = None,
    tokenizer: TokenizerInfo = TOKENIZER,
    kind: str = "text",
    spans: Callable[[list[int]], list[tuple[int, int]]] | None = None,
) -> Source:
    """Writes `root/name`: a list of documents for each train shard, and one held-out shard.

    `spans(document)` gives its trained spans, where `kind` is not text.
    """
    directory = root / name
    directory.mkdir(parents=True)
    train = [
        _write_shard(directory / f"train-{number:05d}", documents, spans)
        for number, documents in enumerate(train_shards)
    ]
    held_out_shard = _write_shard(directory / "held_out-00000", held_out or [[8, 9, EOD]], spans)
    tokens = [token for documents in train_shards for document in documents for token in document]
    manifest = SourceManifest(
        source=name,
        tokenizer=tokenizer,
        train=Split.of(train, 3 * len(tokens)),
        held_out=Split.of([held_out_shard], 100),
        unigram_entropy=unigram_entropy(np.bincount(tokens)),
        languages=("en",),
        kind=kind,
        chat={} if kind == "text" else CHAT,
    )
    write_manifest(directory, manifest)
    return Source(directory, manifest)


def _write_shard(path: Path, documents: list[list[int]], spans=None):
    with ShardWriter(path) as writer:
        for document in documents:
            rows = spans and np.array([(0, *span) for span in spans(document)]).reshape(-1, 3)
            writer.add_many(np.array(document), [len(document)], rows)
    return writer.info


def check_contents(directory: Path, manifest: SourceManifest) -> None:
    """Every byte of a prepared source: its sha256, the whole index, and where documents end."""
    for info in manifest.train.shards + manifest.held_out.shards:
        assert file_sha256(directory / info.file) == info.sha256
        shard = open_shard(directory / info.file, info)
        shard.check()
        tokens = shard.read(0, shard.num_tokens)
        assert (tokens[shard.document_offsets[1:] - 1] == manifest.tokenizer.eod).all()
        assert tokens.max(initial=0) < manifest.tokenizer.vocab_size


def slow_rows(shards: list[list[list[int]]], sequence_length: int) -> list[list[int]]:
    """The row rule: stride S, S + 1 tokens, the tail dropped."""
    stream = [token for documents in shards for document in documents for token in document]
    rows, start = [], 0
    while start + sequence_length + 1 <= len(stream):
        rows.append(stream[start : start + sequence_length + 1])
        start += sequence_length
    return rows


def slow_marks(row: list[int]) -> tuple[list[int], list[int]]:
    """Segment ids and positions of a row's inputs, `<|endoftext|>` part of what it ends."""
    segment_ids, positions = [], []
    segment, position = 1, 0
    for token in row[:-1]:
        segment_ids.append(segment)
        positions.append(position)
        position += 1
        if token == EOD:
            segment, position = segment + 1, 0
    return segment_ids, positions


def slow_selection(counts: dict[str, int], rows: int) -> list[str]:
    """The names of the first `rows` rows by Tijdeman's rule, in exact fractions."""
    names = sorted(name for name in counts if counts[name])
    if len(names) == 1:
        return names * rows
    period = sum(counts.values())
    share = {name: Fraction(counts[name], period) for name in names}
    slack = Fraction(1, 2 * len(names) - 2)
    dealt = dict.fromkeys(names, 0)
    selection = []
    for t in range(1, rows + 1):
        open_names = [name for name in names if share[name] * t - dealt[name] >= slack]

        def last_chance(name):
            return math.floor((dealt[name] + 1 - slack) / share[name])

        chosen = min(open_names, key=last_chance)  # the first of the names where equal
        dealt[chosen] += 1
        selection.append(chosen)
    return selection


def slow_mixture(stages: list[tuple[int, dict[str, int]]], rows: int) -> list[tuple[str, int]]:
    """(source, which of its rows) of the first `rows` global rows over stages of counts."""
    taken: dict[str, int] = {}
    located = []
    ends = [first for first, _ in stages[1:]] + [rows]
    for (first, counts), end in zip(stages, ends, strict=True):
        for name in slow_selection(counts, max(0, end - first)):
            located.append((name, taken.get(name, 0)))
            taken[name] = taken.get(name, 0) + 1
    return located[:rows]
