"""What the task of a chunk makes: outputs, each with its shards, counts and lists.

An output is a folder `<chunk>-<number>` that gets its name when it is whole. So a name means a
finished output, whoever was killed and when, and even where two workers made the same one. It holds

    train.bin, train.idx, held_out.bin, held_out.idx   where the split has documents
    train.spans.npy, held_out.spans.npy                of conversations and pairs
    counts.npy       how often each token stands in the train shard, int64 [vocab_size]
    rejected.jsonl   file, line and reason of each record that gave no document
    dropped.jsonl    where there are filters: some of the documents that they dropped
    contaminated.jsonl   where benchmarks are looked for: documents with items of them
    record.json      the fields of `Output`

A chunk of more than `--shard-tokens` tokens, such as a large compressed file, has several outputs.
"""

from __future__ import annotations

import collections
import dataclasses
import json
import os
import pathlib
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from stablelm_jax.data.shards import ShardWriter
from stablelm_jax.preparation import keeping
from stablelm_jax.preparation.account import Tally
from stablelm_jax.preparation.chunks import Chunk, Record, chunks_from_json
from stablelm_jax.preparation.contamination import Item, hit
from stablelm_jax.preparation.conversations import Documents
from stablelm_jax.preparation.held_out import HeldOutRule, hash_of
from stablelm_jax.preparation.keeping import NotKept, count
from stablelm_jax.preparation.lists import (
    CONTAMINATED_NAME,
    DROPPED_NAME,
    read_list,
    write_list,
)
from stablelm_jax.preparation.screening import Dropped, DroppedSample
from stablelm_jax.preparation.streams import Rejected
from stablelm_jax.storage.files import flush_to_disk, write_json

SPLITS = ("train", "held_out")
SCRATCH = "scratch-"  # begins the name of an output that is being written

_PROGRESS_SECONDS = 1.0
_CHARACTERS_SHOWN = 10


class Plan(NamedTuple):
    """What is fixed before anything is tokenised, as it stands in `plan.json`."""

    settings: dict[str, Any]  # all that the bytes of the source follow from
    held_out: HeldOutRule
    chunks: list[Chunk]

    @classmethod
    def read(cls, path: pathlib.Path) -> Plan:
        settings, rule, saved = json.loads(path.read_text(encoding="utf-8"))
        return cls(settings, HeldOutRule(*rule), chunks_from_json(saved))


@dataclasses.dataclass
class Output:
    """What an output holds. While it is written, its record is rewritten now and then.

    Attributes:
      records, used, consumed: records of the chunk, those of them that gave documents, and bytes
        that were read up to the end of this output.
      shards: the fields of `ShardInfo` for each split that has documents.
      files: what became of the records of each file, by its path.
      place: where in the input the work is.
      sampled, lost: characters of the texts that were looked at, and how many of each of them the
        tokenizer loses.
      trained, rounds_dropped: tokens that are trained of conversations, and last rounds of them
        that were left out because they were too long.
      kept, not_kept: records of a source and of others in its files, by their value under --keep.
      dropped: how many documents the filters dropped, by filter and reason.
      engine, engine_problem: what made the ids, and why a faster one that is installed did not.
      edited: how many of the documents that they kept have another text than before.
    """

    chunk: int
    number: int  # of the outputs of this chunk, from 0
    records: int = 0
    consumed: int = 0
    last: bool = False  # nothing of the chunk follows
    used: int = 0
    rejected: int = 0  # records that gave no document
    tokens: dict[str, int] = dataclasses.field(default_factory=lambda: dict.fromkeys(SPLITS, 0))
    text_bytes: dict[str, int] = dataclasses.field(default_factory=lambda: dict.fromkeys(SPLITS, 0))
    shards: dict[str, dict] = dataclasses.field(default_factory=dict)
    files: dict[str, Tally] = dataclasses.field(default_factory=dict)
    place: str = ""
    sampled: int = 0
    lost: dict[str, int] = dataclasses.field(default_factory=dict)
    trained: dict[str, int] = dataclasses.field(default_factory=lambda: dict.fromkeys(SPLITS, 0))
    rounds_dropped: int = 0
    kept: dict[str, int] = dataclasses.field(default_factory=dict)
    not_kept: dict[str, int] = dataclasses.field(default_factory=dict)
    dropped: dict[str, int] = dataclasses.field(default_factory=dict)
    engine: str = ""
    engine_problem: str = ""
    edited: int = 0

    def add_sample(self, text: str, lost: Mapping[str, int]) -> None:
        """Counts the characters of a text, and those of them that the tokenizer loses."""
        self.sampled += len(text)
        self.lost = dict(collections.Counter(self.lost) + collections.Counter(lost))

    @property
    def name(self) -> str:
        """The name of its folder."""
        return f"{self.chunk:08d}-{self.number:04d}"


def read_output(folder: pathlib.Path) -> Output:
    """The record of one output, finished or not."""
    fields = json.loads((folder / "record.json").read_text(encoding="utf-8"))
    tallies = {path: Tally(**tally) for path, tally in fields.pop("files", {}).items()}
    return Output(**fields, files=tallies)


def outputs_of_chunk(folder: pathlib.Path, chunk: int) -> list[Output]:
    """The finished outputs of a chunk, in order."""
    found: list[Output] = []
    while (path := folder / Output(chunk, len(found)).name).is_dir():
        found.append(read_output(path))
    return found


class OutputWriter:
    """Writes one output aside; `close` gives it its name."""

    def __init__(self, folder: pathlib.Path, output: Output, plan: Plan, vocab_size: int):
        self.output, self._plan, self._final = output, plan, folder / output.name
        prefix = f"{SCRATCH}{output.name}-{os.getpid()}-"
        self._scratch = pathlib.Path(tempfile.mkdtemp(prefix=prefix, dir=folder))
        self._rejected = open(self._scratch / "rejected.jsonl", "w", encoding="utf-8")
        self._has_filters, self._sample = "filters" in plan.settings, DroppedSample()
        self._hits: list[dict] | None = [] if "benchmarks" in plan.settings else None
        self._waiting: dict[str, list[Documents]] = {split: [] for split in SPLITS}
        self._writers: dict[str, ShardWriter] = {}
        self._counts = np.zeros(vocab_size, np.int64)
        self._record_due = 0.0

    def add(
        self,
        record: Record,
        made: Documents | Rejected | NotKept | Dropped,
        items: Sequence[Item] = (),
    ) -> bool:
        """Takes a record; False, and nothing is taken, where it would make a shard too long.

        Args:
          made: its documents, which lie in one shard; or why there are none.
          items: those of benchmarks that stand in it.
        """
        output = self.output
        values = getattr(record.content, "values", None)
        if isinstance(made, NotKept):
            count(output.not_kept, values)
        elif isinstance(made, Dropped):
            output.dropped[str(made)] = output.dropped.get(str(made), 0) + 1
            self._sample.add(record, made, f"{output.chunk} {output.records}")
        elif isinstance(made, Rejected):
            row = {"file": record.file.name, "line": record.line, "reason": made.reason}
            self._rejected.write(json.dumps(row, ensure_ascii=False) + "\n")
            output.rejected += 1
        else:
            is_held_out = self._plan.held_out.holds_out(hash_of(record.content))
            split = "held_out" if is_held_out else "train"
            total = output.tokens[split] + sum(map(len, made.ids))
            if output.tokens[split] and total > self._plan.settings["shard_tokens"]:
                return False
            output.tokens[split] = total
            output.text_bytes[split] += len(made.text.encode())
            output.trained[split] += sum(last - first for s in made.spans for first, last in s)
            output.rounds_dropped += made.rounds_dropped
            output.edited += self._has_filters and made.text != record.content
            self._waiting[split].append(made)
            output.used += 1
        if values and not isinstance(made, NotKept):
            count(output.kept, values)
        if items:
            self._hits += [hit(record.file.name, record.line, item) for item in items]
        reason = made.reason if isinstance(made, Rejected) else None
        tally = output.files.get(record.file.path)
        if tally is None:
            tally = output.files[record.file.path] = Tally()
        tally.add(reason, record.left)
        output.records += 1
        output.consumed = record.consumed
        return True

    def flush(self) -> None:
        """Writes the documents that wait and, about once a second, the record for the progress."""
        for split, waiting in self._waiting.items():
            if not waiting:
                continue
            if split not in self._writers:
                self._writers[split] = ShardWriter(self._scratch / split)
            documents = [ids for made in waiting for ids in made.ids]
            of_each = [spans for made in waiting for spans in made.spans]
            rows = [(number, *span) for number, spans in enumerate(of_each) for span in spans]
            flat, lengths = np.concatenate(documents), list(map(len, documents))
            self._writers[split].add_many(flat, lengths, np.array(rows) if rows else None)
            if split == "train":
                self._counts += np.bincount(flat, minlength=len(self._counts))
            waiting.clear()
        if time.monotonic() > self._record_due:
            self._write_record()

    def note_place(self, place: str, *, at_once: bool) -> None:
        """Notes where the work is, for those who ask what a killed worker was doing."""
        self.output.place = place
        if at_once or time.monotonic() > self._record_due:
            self._write_record()

    def _write_record(self) -> None:
        write_json(self._scratch / "record.json", dataclasses.asdict(self.output))
        self._record_due = time.monotonic() + _PROGRESS_SECONDS

    def close(self, last: bool) -> None:
        """Makes the output visible, whole."""
        self.flush()
        self._rejected.close()
        if self._has_filters:
            self._sample.write(self._scratch / DROPPED_NAME)
        if self._hits is not None:
            write_list(self._scratch / CONTAMINATED_NAME, self._hits)
        self.output.last = last
        for split, writer in self._writers.items():
            self.output.shards[split] = dataclasses.asdict(writer.close())
        np.save(self._scratch / "counts.npy", self._counts)
        self._write_record()
        flush_to_disk(self._scratch)  # what has its name after a loss of power is whole
        try:
            os.rename(self._scratch, self._final)
        except OSError:
            if not self._final.is_dir():
                raise
            shutil.rmtree(self._scratch)  # another worker made the same output first


def rows_of(folder: pathlib.Path, outputs: Sequence[Output], plan: Plan, name: str) -> Iterator:
    """What the outputs list in files of this name, with the lines of whole files."""
    earlier_lines = 0
    for output in outputs:
        chunk = plan.chunks[output.chunk]
        # In a byte range of a file, lines are counted from the start of the range.
        if chunk.start == 0 or chunk.first or chunk.files[0].kind == "parquet":
            earlier_lines = 0
        for row in read_list(folder / output.name / name):
            yield {**row, "line": row["line"] + earlier_lines}
        if output.last:
            earlier_lines += output.records


def provenance_of(outputs: Sequence[Output], settings: Mapping[str, Any]) -> dict[str, Any]:
    """What the manifest says of all outputs of a source together."""
    found = {
        "characters_lost": characters_lost(outputs),
        "engines": dict(collections.Counter(output.engine for output in outputs)),
    }
    if "chat" in settings:
        trained = {split: sum(output.trained[split] for output in outputs) for split in SPLITS}
        dropped = sum(output.rounds_dropped for output in outputs)
        found["conversations"] = {"trained_tokens": trained, "rounds_dropped": dropped}
    if "keep" in settings:
        names = ("kept", "not_kept")
        found["keep"] = {n: keeping.total(getattr(each, n) for each in outputs) for n in names}
    if "filters" in settings:
        found["dropped"] = dict(dropped_by(outputs).most_common())
        found["edited_by_filters"] = sum(output.edited for output in outputs)
    return found


def dropped_by(outputs: Sequence[Output]) -> collections.Counter:
    """How many documents which filter dropped for which reason."""
    return sum((collections.Counter(each.dropped) for each in outputs), collections.Counter())


def characters_lost(outputs: Sequence[Output]) -> dict[str, Any]:
    """How many characters were looked at, and how many of them the tokenizer loses."""
    lost = sum((collections.Counter(output.lost) for output in outputs), collections.Counter())
    most = dict(lost.most_common(_CHARACTERS_SHOWN))
    sampled = sum(output.sampled for output in outputs)
    return {"sampled": sampled, "lost": lost.total(), "most_often": most}
