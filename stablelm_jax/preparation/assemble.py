"""Shards out of parts: which documents are held out, where shards are cut, and writing them.

All of it follows from the documents in their order, so neither workers nor interruptions show in
the result. The documents held out are those of the smallest content hash: copies of one document
fall on the same side, and adding documents to a source moves few others.
"""

from __future__ import annotations

import collections
import dataclasses
import json
import os
import pathlib
import re
import shutil
import tempfile
from collections.abc import Iterator, Sequence

import numpy as np
from datatrove.pipeline.base import PipelineStep

from stablelm_jax.data.shards import ShardInfo, ShardWriter
from stablelm_jax.preparation import parts as part_files
from stablelm_jax.preparation.parts import Part
from stablelm_jax.preparation.units import Unit

# Enough text for a loss with two digits (16,000 tokens); and of a small source at most a quarter.
MIN_HELD_OUT_BYTES = 64 << 10
_SMALL_SOURCE_SHARE = 4
MAX_HELD_OUT_FRACTION = 0.25


class SourceError(ValueError):
    """The documents found do not make a source; the message says why and what to do."""


@dataclasses.dataclass(frozen=True)
class HeldOut:
    """What is held out: hashes [documents] uint64, sorted; `note` says how it was decided."""

    hashes: np.ndarray
    note: str


@dataclasses.dataclass(frozen=True)
class ShardPlan:
    """A shard to write: the documents of one split from `start` up to `stop`, not included.

    start, stop: (part, document in the part).
    """

    split: str
    number: int
    start: tuple[int, int]
    stop: tuple[int, int]
    text_bytes: int

    @property
    def name(self) -> str:
        return f"{self.split}-{self.number:05d}"


def all_parts(directory: pathlib.Path, num_units: int) -> list[Part]:
    """The parts of all units, in order; SourceError if one is not finished."""
    parts = []
    for unit in range(num_units):
        found = part_files.parts_of_unit(directory, unit)
        if not found or not found[-1].info.last:
            raise SourceError(
                f"{directory}: unit {unit} is marked as done, but parts of it are gone;"
                f" remove {directory.parent} and begin again"
            )
        parts += found
    return parts


def choose_held_out(parts: Sequence[Part], fraction: float) -> HeldOut:
    """Takes documents by content hash, smallest first, until there are enough bytes of text.

    Enough is max(64 KiB, fraction of the text), and a quarter of the text where that is less than
    64 KiB. A document that would bring it beyond half of the text is passed over.

    Raises:
      SourceError: there are not two different documents.
    """
    total = sum(part.info.text_bytes for part in parts)
    small = total < _SMALL_SOURCE_SHARE * MIN_HELD_OUT_BYTES
    least = total // _SMALL_SOURCE_SHARE if small else MIN_HELD_OUT_BYTES
    target = max(1, least, int(fraction * total))
    # Hashes are uniform: the smallest few percent of them hold what is looked for.
    share = min(1.0, 4 * target / max(total, 1))
    while True:
        hashes, sizes = _below(parts, share)
        chosen, held = _smallest(hashes, sizes, target, total)
        if held >= target or share >= 1:
            break
        share = min(1.0, 4 * share)
    if not chosen:
        raise SourceError(
            "all there is is one document, and a source needs two different ones, one of them to"
            " hold out: add documents, or cut this one into several"
        )
    rule = "a quarter of a small source" if small else "the documents of smallest hash"
    note = f"{rule}, {held / total:.2%} of the text"
    return HeldOut(np.array(chosen, np.uint64), note)


def _below(parts: Sequence[Part], share: float) -> tuple[np.ndarray, np.ndarray]:
    """Distinct hashes in the lowest `share` of their range, and the bytes of text of each."""
    limit = np.uint64(2**64 - 1 if share >= 1 else int(share * 2**64))
    hashes, sizes = [np.zeros(0, np.uint64)], [np.zeros(0, np.int64)]
    for part in parts:
        of_part = part.hashes()
        low = of_part <= limit
        hashes.append(of_part[low])
        sizes.append(part.bytes()[low])
    distinct, group = np.unique(np.concatenate(hashes), return_inverse=True)
    # float64 weights are exact here: a sum of bytes stays far below 2**53.
    return distinct, np.bincount(group, np.concatenate(sizes), len(distinct)).astype(np.int64)


def _smallest(hashes, sizes, target: int, total: int) -> tuple[list[int], int]:
    chosen, held = [], 0
    for value, size in zip(hashes.tolist(), sizes.tolist(), strict=True):
        if held >= target:
            break
        if 2 * (held + size) <= total:
            chosen.append(value)
            held += size
    return chosen, held


def plan_shards(parts: Sequence[Part], held_out: HeldOut, shard_tokens: int) -> list[ShardPlan]:
    """Cuts each split into shards of up to `shard_tokens`; a longer document is a shard alone."""
    cutters = {split: _Cutter(split, shard_tokens) for split in ("train", "held_out")}
    for number, part in enumerate(parts):
        lengths, sizes = part.lengths(), part.bytes()
        held = np.isin(part.hashes(), held_out.hashes)
        cutters["train"].add(number, np.flatnonzero(~held), lengths, sizes)
        cutters["held_out"].add(number, np.flatnonzero(held), lengths, sizes)
    return [plan for cutter in cutters.values() for plan in cutter.plans((len(parts), 0))]


class _Cutter:
    """Walks the documents of one split and notes where a new shard begins."""

    def __init__(self, split: str, shard_tokens: int):
        self._split, self._limit = split, shard_tokens
        self._starts: list[tuple[int, int]] = []
        self._bytes: list[int] = []
        self._tokens = 0

    def add(self, part: int, documents: np.ndarray, lengths: np.ndarray, sizes: np.ndarray):
        """Goes on with `documents` (indices) of a part."""
        ends = np.cumsum(lengths[documents])
        taken = 0
        while taken < len(documents):
            before = int(ends[taken - 1]) if taken else 0
            room = self._limit - self._tokens
            upto = int(np.searchsorted(ends, before + room, side="right"))
            if not self._starts or upto <= taken:  # a shard of one long document leaves no room
                self._starts.append((part, int(documents[taken])))
                self._bytes.append(0)
                self._tokens = 0
                upto = int(np.searchsorted(ends, before + self._limit, side="right"))
                upto = max(upto, taken + 1)
            self._bytes[-1] += int(sizes[documents[taken:upto]].sum())
            self._tokens += int(ends[upto - 1]) - before
            taken = upto

    def plans(self, end: tuple[int, int]) -> Iterator[ShardPlan]:
        """The shards, the last of which stops at `end`."""
        stops = [*self._starts[1:], end]
        for number, (start, stop) in enumerate(zip(self._starts, stops, strict=True)):
            yield ShardPlan(self._split, number, start, stop, self._bytes[number])


class WriteShard(PipelineStep):
    """datatrove task r writes shard r of the plan, unless its record says that it is there."""

    name = "shards"
    type = "WRITER"

    def __init__(self, work: str, target: str, vocab_size: int):
        super().__init__()
        self.work, self.target, self.vocab_size = work, target, vocab_size

    def run(self, data=None, rank: int = 0, world_size: int = 1) -> None:
        work, target = pathlib.Path(self.work), pathlib.Path(self.target)
        parts, plans = load_plan(work)
        plan = plans[rank]
        if record_path(work, plan).is_file():
            return
        held = np.load(work / "held_out.npy")
        counts = np.zeros(self.vocab_size, np.int64)
        scratch = pathlib.Path(tempfile.mkdtemp(prefix="scratch-", dir=work))
        with ShardWriter(scratch / plan.name) as writer:
            for tokens, lengths in _documents(parts, plan, held):
                writer.add_many(tokens, lengths)
                counts += np.bincount(tokens, minlength=self.vocab_size)
        for suffix in (".idx", ".bin"):
            os.replace(scratch / (plan.name + suffix), target / (plan.name + suffix))
        record = {**dataclasses.asdict(writer.info), "text_bytes": plan.text_bytes}
        np.savez(scratch / "record.npz", info=np.array(json.dumps(record)), counts=counts)
        os.replace(scratch / "record.npz", record_path(work, plan))
        shutil.rmtree(scratch)


def _documents(
    parts: list[Part], plan: ShardPlan, held: np.ndarray
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(flat tokens, lengths) of what the shard takes of each part."""
    for number in range(plan.start[0], min(plan.stop[0] + 1, len(parts))):
        part = parts[number]
        tokens, lengths = part.tokens(), part.lengths()
        first = plan.start[1] if number == plan.start[0] else 0
        last = plan.stop[1] if number == plan.stop[0] else len(lengths)
        is_held = np.isin(part.hashes()[first:last], held)
        wanted = is_held if plan.split == "held_out" else ~is_held
        edges = np.flatnonzero(np.diff(wanted, prepend=False, append=False)) + first
        offsets = np.concatenate([[0], np.cumsum(lengths)])
        stretches = [tokens[offsets[i] : offsets[j]] for i, j in edges.reshape(-1, 2)]
        if stretches:
            yield np.concatenate(stretches), lengths[first:last][wanted]


def record_path(work: pathlib.Path, plan: ShardPlan) -> pathlib.Path:
    """Where it is noted that a shard is written."""
    return work / "shards" / (plan.name + ".npz")


def save_plan(
    work: pathlib.Path, parts: Sequence[Part], plans: Sequence[ShardPlan], held_out: HeldOut
) -> None:
    """Writes what `WriteShard` reads."""
    (work / "shards").mkdir(exist_ok=True)
    np.save(work / "held_out.npy", held_out.hashes)
    rows = {
        "parts": [[str(part.path), part.unit] for part in parts],
        "shards": [dataclasses.astuple(plan) for plan in plans],
    }
    (work / "shards.json").write_text(json.dumps(rows))


def load_plan(work: pathlib.Path) -> tuple[list[Part], list[ShardPlan]]:
    """Reads what `save_plan` wrote."""
    rows = json.loads((work / "shards.json").read_text())
    parts = [Part(pathlib.Path(path), unit) for path, unit in rows["parts"]]
    plans = [ShardPlan(s, n, tuple(i), tuple(j), size) for s, n, i, j, size in rows["shards"]]
    return parts, plans


def read_records(work: pathlib.Path, plans: Sequence[ShardPlan], vocab_size: int):
    """What the written shards hold: infos and bytes of text per split, and train token counts.

    Returns:
      {split: (list of ShardInfo, bytes of text)}, counts int64 [vocab_size] of the train split.
    """
    counts = np.zeros(vocab_size, np.int64)
    splits = {"train": ([], 0), "held_out": ([], 0)}
    for plan in plans:
        with np.load(record_path(work, plan)) as record:
            fields = json.loads(str(record["info"]))
            counts += record["counts"] if plan.split == "train" else 0
        infos, text_bytes = splits[plan.split]
        text_bytes += fields.pop("text_bytes")
        splits[plan.split] = ([*infos, ShardInfo(**fields)], text_bytes)
    return splits, counts


def write_rejected(
    path: pathlib.Path, parts: Sequence[Part], units: Sequence[Unit]
) -> collections.Counter:
    """Lists what gave no document, `file`, `line` and `reason` a line; counts it by reason."""
    reasons: collections.Counter = collections.Counter()
    lines: dict[str, int] = {}
    partial = path.with_name(path.name + ".partial")
    with open(partial, "w", encoding="utf-8") as file:
        for part in parts:
            unit = units[part.unit]
            # A byte range counts its lines from its own start.
            name = unit.files[0].name
            offset = lines.get(name, 0) if unit.start and unit.files[0].kind == "jsonl" else 0
            for where, line, reason in part.rejected():
                row = {"file": where, "line": line + offset, "reason": reason}
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
                reasons[re.split(r"[:(]", reason)[0].strip()] += 1
            if part.info.last:
                lines[name] = offset + part.info.records
    os.replace(partial, path)
    return reasons
