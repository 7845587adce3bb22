"""The tasks of `prepare --dedup`: which documents are copies, and shards without them.

The shards of a data root have ranks: first those held out, in the order of the sources, then those
to train on; after them, in the same way, those of sources that are dropped. Of several copies the
one of the lowest (rank, number in its shard) stays, so no train shard that is written keeps what is
held out anywhere. The tasks leave for one another, in one folder:

    plan.json               what is to be done, see `Plan`
    hashes/RANK.npy         uint64 [documents, 3]: 128 bits of a document's hash, its number; sorted
    exact/RANGE.npy         uint32 [copies, 4]: rank and number of a copy, then of the document that
                            it is a copy of; sorted; those of one range of the hashes
    signatures/, pairs/, clusters/, removed/   what datatrove's MinHash leaves
    near/copies.npy         as in exact/
    counts/RANK.npy         how often each token stands in what is left of a train shard
    listed/RANK.jsonl       the copies of a shard
    records/RANK.json       what is left of a shard, or null, and counts for the manifest
    sources/NAME/           the new shards
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import json
import pathlib
import resource
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
from datatrove.data import Document
from datatrove.pipeline.base import PipelineStep
from datatrove.pipeline.dedup import minhash
from datatrove.utils.hashing import HashConfig
from datatrove.utils.word_tokenizers import WordTokenizer

from stablelm_jax.data.manifest import open_shard
from stablelm_jax.data.shards import Shard, ShardInfo, ShardWriter
from stablelm_jax.preparation.verify import blocks, document_hash
from stablelm_jax.storage.files import replacing, write_json
from stablelm_jax.storage.remote import as_path
from stablelm_jax.tokenizer.tokenizer import Tokenizer, load_tokenizer

KINDS = ("exact", "near")  # of copies
FOLDERS = ("hashes", *KINDS, "removed", "counts", "listed", "records")
_BLOCK_TOKENS = 1 << 22  # are counted at once
_SHINGLES = 4096  # are hashed at once: datatrove takes 24 * bands * rows bytes for each


class PlannedShard(NamedTuple):
    source: str
    split: str
    info: dict[str, Any]  # the fields of its `ShardInfo`
    first: int  # the number of its first document among those of the split
    near: bool  # whether its documents are compared for near copies
    dropped: bool = False  # its source has nothing left to train on, and is not written


class Plan(NamedTuple):
    """What is fixed before the work begins; a shard's place in `shards` is its rank."""

    settings: dict[str, Any]  # all that the result follows from; "near": parameters, or None
    root: str
    tokenizer: str
    ranks: str | None
    shards: list[PlannedShard]

    @classmethod
    def read(cls, work: pathlib.Path) -> Plan:
        *fields, shards = json.loads((work / "plan.json").read_text(encoding="utf-8"))
        return cls(*fields, [PlannedShard(*shard) for shard in shards])

    def shard(self, rank: int) -> Shard:
        """The shard of a rank; ShardError where it is not as its manifest says."""
        shard = self.shards[rank]
        path = as_path(self.root) / shard.source / shard.info["file"]
        return open_shard(path, ShardInfo(**shard.info))

    def minhash(self) -> minhash.MinhashConfig:
        """FineWeb's hashes: they need no package more."""
        sizes = (self.settings["near"][name] for name in ("ngram", "bands", "rows", "seed"))
        return minhash.MinhashConfig(*sizes, hash_config=HashConfig(64, "sha1"))


def _plan(work: pathlib.Path) -> Plan:
    return _plan_of(work, (work / "plan.json").stat().st_mtime_ns)


@functools.lru_cache(maxsize=1)  # a worker runs many tasks; another plan may take its place
def _plan_of(work: pathlib.Path, written: int) -> Plan:
    return Plan.read(work)


class Stage(PipelineStep):
    """One of the functions below as a step of datatrove: task r calls it with rank r."""

    type = "DEDUP"

    def __init__(self, function: Callable[[pathlib.Path, int, int], None], work: pathlib.Path):
        self.function, self.work, self.name = function, work, function.__name__
        super().__init__()

    def run(self, data=None, rank: int = 0, world_size: int = 1) -> None:
        self.function(self.work, rank, world_size)


def hash_documents(work: pathlib.Path, rank: int, world_size: int) -> None:
    """Hashes the documents of the shard of a rank."""
    digests = b"".join(map(document_hash, _documents(_plan(work).shard(rank))))
    hashes = np.frombuffer(digests, "<u8").reshape(-1, 2)
    rows = np.column_stack([hashes, np.arange(len(hashes), dtype="u8")])
    _save(work / "hashes" / f"{rank:06d}.npy", rows[np.lexsort((rows[:, 1], rows[:, 0]))])


def find_exact(work: pathlib.Path, rank: int, world_size: int) -> None:
    """Finds copies among the hashes in the range of a rank, of as many equal ranges as ranks."""
    found, largest = [], 2**64 - 1
    bounds = np.array([part * largest // world_size for part in (rank, rank + 1)], np.uint64)
    for number in range(len(_plan(work).shards)):
        rows = np.load(work / "hashes" / f"{number:06d}.npy", mmap_mode="r")
        first, last = np.searchsorted(rows[:, 0], bounds)
        last = len(rows) if rank + 1 == world_size else last
        found.append(np.column_stack([rows[first:last], np.full(last - first, number, "u8")]))
    rows = np.concatenate(found)  # [N, 4]: the two halves of a hash, number, rank
    rows = rows[np.lexsort((rows[:, 1], rows[:, 0]))]  # which keeps the order of equal hashes
    is_copy = np.zeros(len(rows), bool)
    is_copy[1:] = (rows[1:, :2] == rows[:-1, :2]).all(axis=1)
    original = np.maximum.accumulate(np.where(is_copy, 0, np.arange(len(rows))))
    table = np.hstack([rows[is_copy], rows[original[is_copy]]])[:, [3, 2, 7, 6]]
    table = table[np.lexsort((table[:, 1], table[:, 0]))]
    _save(work / "exact" / f"{rank:06d}.npy", table.astype(np.uint32))


def sign_documents(work: pathlib.Path, rank: int, world_size: int) -> None:
    """datatrove's first stage, for the shard of a rank. Exact copies get no signature."""
    plan, tokenizer = _plan(work), _tokenizer(work)
    skipped = set(_copies(work, rank)["exact"][:, 1].tolist())

    def text_of(number: int, ids: np.ndarray) -> str:
        # What is not compared is given as empty: it gets no signature and keeps its number.
        is_compared = plan.shards[rank].near and number not in skipped
        return _text(ids, tokenizer) if is_compared else ""

    documents = _documents(plan.shard(rank))
    texts = (Document(text_of(*numbered), id="") for numbered in enumerate(documents))
    _signature(work).run(texts, rank, world_size)


def match_signatures(work: pathlib.Path, rank: int, world_size: int) -> None:
    """datatrove's second stage: pairs of documents that agree in all rows of a band."""
    _allow_many_files()
    folders = (str(work / name) for name in ("signatures", "pairs"))
    stage = minhash.MinhashDedupBuckets(*folders, config=_plan(work).minhash())
    stage.run(None, rank, world_size)


def cluster_pairs(work: pathlib.Path, rank: int, world_size: int) -> None:
    """datatrove's third stage; of each cluster the first document stays.

    datatrove's own choice follows from the order in which it joined clusters, by their size.
    """
    _allow_many_files()
    folders = (str(work / name) for name in ("pairs", "clusters"))
    config = _plan(work).minhash()
    minhash.MinhashDedupCluster(*folders, config=config, save_cluster_id=True).run()
    found = [np.zeros((0, 3), np.uint32)]  # rank, number, cluster
    for path in sorted((work / "clusters").glob("*.clusters")):
        pairs = np.fromfile(path, "<u4").reshape(-1, 2)
        found.append(np.insert(pairs, 0, int(path.stem), axis=1))
    rows = np.concatenate(found)
    _, first, clusters = np.unique(rows[:, 2], return_index=True, return_inverse=True)
    original = first[clusters]
    table = np.hstack([rows[:, :2], rows[original, :2]])
    _save(work / "near" / "copies.npy", table[original != np.arange(len(rows))])


def write_shard(work: pathlib.Path, rank: int, world_size: int) -> None:
    """Writes what is left of the shard of a rank, by datatrove's fourth stage; lists its copies."""
    plan, tokenizer = _plan(work), _tokenizer(work)
    planned, gone = plan.shards[rank], _gone(work, rank)
    removed, path = work / "removed", work / "sources" / planned.source / planned.info["file"]
    numbers = np.sort(np.concatenate([table[:, 1] for table in gone.values()]))
    numbers.astype("<u4").tofile(removed / f"{rank:06d}.remove")
    record = {"shard": None, "dedup": _list_copies(work, rank, gone)}
    counts = np.zeros(tokenizer.vocab_size, np.int64)
    if len(numbers) < planned.info["documents"]:
        each = _documents(plan.shard(rank))
        documents = (Document("", "", metadata={"ids": ids}) for ids in each)
        with ShardWriter(path) as writer:
            for kept in minhash.MinhashDedupFilter(str(removed)).run(documents, rank):
                writer.add_many(kept.metadata["ids"], [len(kept.metadata["ids"])])
        record["shard"] = dataclasses.asdict(writer.info)
        parts = np.array_split(np.memmap(path, "<i4", "r"), 1 + writer.info.tokens // _BLOCK_TOKENS)
        counts = sum(np.bincount(part, minlength=tokenizer.vocab_size) for part in parts)
    _save(work / "counts" / f"{rank:06d}.npy", counts)
    write_json(work / "records" / f"{rank:06d}.json", record)


def _list_copies(work: pathlib.Path, rank: int, gone: dict[str, np.ndarray]) -> dict[str, Any]:
    """Lists the copies that leave a shard; returns counts of them."""
    plan, tokenizer = _plan(work), _tokenizer(work)
    planned, opened = plan.shards[rank], functools.lru_cache(maxsize=64)(plan.shard)
    sums = {kind: collections.Counter(documents=0, tokens=0, text_bytes=0) for kind in KINDS}
    copies_of: collections.Counter = collections.Counter()
    rows = [(row, kind) for kind, table in gone.items() for row in table.tolist()]
    path = work / "listed" / f"{rank:06d}.jsonl"
    with replacing(path) as aside, open(aside, "w", encoding="utf-8") as listed:
        for (_, number, of_rank, of_number), kind in sorted(rows):
            ids, of = _document(opened(rank), number), plan.shards[of_rank]
            text = _text(ids, tokenizer)
            sums[kind].update(documents=1, tokens=len(ids), text_bytes=len(text.encode()))
            copies_of[of.source] += 1
            place = {"source": of.source, "split": of.split, "document": of.first + of_number}
            row = {"split": planned.split, "document": planned.first + number}
            row |= {"kind": kind, "of": place}
            if kind == "near":
                original = _text(_document(opened(of_rank), of_number), tokenizer)
                row["similarity"] = similarity(_signature(work), text, original)
            listed.write(json.dumps(row) + "\n")
    compared = {"compared": signed(work, plan, rank)} if plan.settings["near"] else {}
    return {planned.split: sums, "copies_of": copies_of, **compared}


def signed(work: pathlib.Path, plan: Plan, rank: int) -> int:
    """Documents of a shard that have a signature: no exact copies, and of `ngram` words or more."""
    path = work / "signatures" / "bucket_000" / f"{rank:05d}.minhash.sig"
    return path.stat().st_size // (8 * plan.settings["near"]["rows"] + 4)


def _gone(work: pathlib.Path, rank: int) -> dict[str, np.ndarray]:
    """What leaves a shard. If all that a source holds out would go, its first document stays."""
    shards, copies = _plan(work).shards, _copies(work, rank)
    same = [r for r, each in enumerate(shards) if each[:2] == shards[rank][:2]]
    if shards[rank].split == "held_out" and rank == same[0] and not shards[rank].dropped:
        going = sum(len(table) for r in same for table in _copies(work, r).values())
        if going == sum(shards[r].info["documents"] for r in same):
            return {kind: table[table[:, 1] != 0] for kind, table in copies.items()}
    return copies


def _copies(work: pathlib.Path, rank: int) -> dict[str, np.ndarray]:
    """The copies in the shard of a rank by kind, [copies, 4], as far as they are known."""
    found = {}
    for kind in KINDS:
        parts = [np.zeros((0, 4), np.uint32)]
        for path in sorted((work / kind).glob("*.npy")):
            table = np.load(path, mmap_mode="r")
            parts.append(table[slice(*np.searchsorted(table[:, 0], [rank, rank + 1]))])
        found[kind] = np.concatenate(parts)
    return found


class _Spaces(WordTokenizer):
    """Splits at spaces: before it splits a text, datatrove has made them of all punctuation.

    Its own splitters are spaCy's, even that for languages it does not know.
    """

    def word_tokenize(self, text: str) -> list[str]:
        return text.split()

    sent_tokenize = span_tokenize = None  # not asked for by MinHash


class _Signature(minhash.MinhashDedupSignature):
    """datatrove's, in little memory however long a document is."""

    def get_signature(self, shingles: np.ndarray) -> list[list[int]]:
        parts = np.array_split(shingles, 1 + len(shingles) // _SHINGLES)
        signatures = [minhash.MinhashDedupSignature.get_signature(self, part) for part in parts]
        return np.min(signatures, axis=0).tolist()


@functools.lru_cache(maxsize=1)
def _signature(work: pathlib.Path) -> _Signature:
    return _Signature(str(work / "signatures"), _plan(work).minhash(), _Spaces())


def similarity(signature: minhash.MinhashDedupSignature, *texts: str) -> float:
    """Jaccard's, of two texts: n-grams of words that are in both, of all that are in either."""
    a, b = (np.unique(signature.get_shingles(text)) for text in texts)
    common = len(np.intersect1d(a, b))
    return round(common / max(len(a) + len(b) - common, 1), 3)


@functools.lru_cache(maxsize=1)
def _tokenizer(work: pathlib.Path) -> Tokenizer:
    return load_tokenizer(_plan(work).tokenizer, ranks=_plan(work).ranks)


def _documents(shard: Shard) -> Iterator[np.ndarray]:
    """The tokens of each document of a shard."""
    for tokens, ends in blocks(shard):
        yield from np.split(tokens, ends[:-1])


def _document(shard: Shard, number: int) -> np.ndarray:
    return shard.read(*shard.document_offsets[number : number + 2])


def _text(ids: np.ndarray, tokenizer: Tokenizer) -> str:
    """The text of a document, without the token that ends it."""
    return tokenizer.decode(ids[: -1 if ids[-1] == tokenizer.eod else None].tolist())


def _save(path: pathlib.Path, array: np.ndarray) -> None:
    with replacing(path) as aside, open(aside, "wb") as file:
        np.save(file, array)


def _allow_many_files() -> None:
    """datatrove opens the files of all shards at once; 1,024 is the usual limit."""
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
