"""The task of a worker: a chunk of input is read, tokenised and split, and written as shards.

What a task makes is an output, a folder `<chunk>-<number>` that gets its name when it is whole. So
a name means a finished output, whoever was killed and when, and even where two workers made the
same one. It holds

    train.bin, train.idx, held_out.bin, held_out.idx   where the split has documents
    train.spans.npy, held_out.spans.npy                of conversations and pairs
    counts.npy       how often each token stands in the train shard, int64 [vocab_size]
    rejected.jsonl   file, line and reason of each record that gave no document
    dropped.jsonl    where there are filters: some of the documents that they dropped
    contaminated.jsonl   where benchmarks are looked for: documents with items of them
    record.json      the fields of `Output`

A chunk of more than `--shard-tokens` tokens, such as a large compressed file, has several outputs.
A worker that goes on with a chunk skips the records of those that are finished, so a kill loses one
output at most.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import json
import os
import pathlib
import shutil
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from datatrove.pipeline.base import PipelineStep

from stablelm_jax.data.shards import ShardWriter
from stablelm_jax.preparation import hub
from stablelm_jax.preparation.account import Tally
from stablelm_jax.preparation.chunks import Chunk, Record, chunks_from_json, read_chunk
from stablelm_jax.preparation.contamination import (
    CONTAMINATED_NAME,
    Benchmarks,
    Hit,
    Item,
    write_hits,
)
from stablelm_jax.preparation.conversations import ChatEncoder, Documents
from stablelm_jax.preparation.formats import Reading
from stablelm_jax.preparation.held_out import HeldOutRule, hash_of
from stablelm_jax.preparation.keeping import NotKept, count, for_all, for_source
from stablelm_jax.preparation.screening import DROPPED_NAME, Dropped, DroppedSample, Screen
from stablelm_jax.preparation.streams import Rejected
from stablelm_jax.preparation.tokenised import TokenisedReader, TokenisedText
from stablelm_jax.storage.files import flush_to_disk, write_json
from stablelm_jax.tokenizer.tokenizer import Tokenizer, TokenizerError, load_tokenizer

SPLITS = ("train", "held_out")
SCRATCH = "scratch-"  # begins the name of an output that is being written

_BATCH_CHARACTERS = 1 << 20
_PROGRESS_SECONDS = 1.0
# What the tokenizer loses is looked for in the beginnings of the first 32 records of 1,024: chosen
# by their number, so that an interruption changes nothing.
_SAMPLED, _SAMPLED_EVERY, _SAMPLED_CHARACTERS = 32, 1024, 2048


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
      records, consumed: records and bytes of the chunk that were read up to the end of this output.
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
        self._hits: list[Hit] | None = [] if "benchmarks" in plan.settings else None
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
        if values and not isinstance(made, NotKept):
            count(output.kept, values)
        if items:
            self._hits += [Hit(record.file.name, record.line, item) for item in items]
        reason = made.reason if isinstance(made, Rejected) else None
        output.files.setdefault(record.file.path, Tally()).add(reason, record.left)
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
            write_hits(self._scratch / CONTAMINATED_NAME, self._hits)
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


class TokenizeChunk(PipelineStep):
    """datatrove task r makes the outputs of chunk r that are not there yet.

    datatrove brings the executors (this machine, SLURM, Ray), the logs of each task, and the list
    of tasks that are done.
    """

    name = "shards of a chunk"
    type = "TOKENIZER"

    def __init__(
        self,
        plan: pathlib.Path,
        outputs: pathlib.Path,
        tokenizer: str,
        ranks: str | None,
        benchmarks: str | None = None,
    ):
        super().__init__()
        self.plan, self.outputs, self.tokenizer, self.ranks = plan, outputs, tokenizer, ranks
        self.benchmarks = benchmarks

    def run(self, data=None, rank: int = 0, world_size: int = 1) -> None:
        tokenize([self], rank)


class TokenizeTogether(PipelineStep):
    """datatrove task r does the tasks r of several sources that lie in the same files, in one read.

    The sources differ in what they keep, by the same keys. Each gets the outputs that its own task
    would have made, so either may go on with what the other began.
    """

    name = "shards of a chunk, of several sources"
    type = "TOKENIZER"

    def __init__(self, steps: Sequence[TokenizeChunk]):
        super().__init__()
        self.steps = steps

    def run(self, data=None, rank: int = 0, world_size: int = 1) -> None:
        tokenize(self.steps, rank)


class EngineDiffers(Exception):
    """The fast engine of the tokenizer gave other ids than the one that needs no trust."""


def tokenize(steps: Sequence[TokenizeChunk], rank: int) -> None:
    """Makes the outputs of chunk `rank` that are not there yet, of each of the steps' sources."""
    try:
        _tokenize(steps, rank)
    except EngineDiffers as error:
        for step in steps:  # all that it made of this chunk may be wrong
            for output in outputs_of_chunk(step.outputs, rank):
                shutil.rmtree(step.outputs / output.name)
        tokenizer = _tokenizer(steps[0].tokenizer, steps[0].ranks)
        tokenizer.use_fast_engine(False)
        tokenizer.engine_problem = str(error)
        _tokenize(steps, rank)


def _tokenize(steps: Sequence[TokenizeChunk], rank: int) -> None:
    tasks = [task for step in steps if not (task := _Task(step, rank)).is_done]
    if not tasks:
        return
    for task in tasks:
        task.begin()
    hub.tell, told = (lambda text: tasks[0].writer.note_place(text, at_once=True)), hub.tell
    try:
        _read(tasks, rank)
    finally:
        hub.tell = told
    for task in tasks:
        task.writer.close(last=True)


def _read(tasks: Sequence[_Task], rank: int) -> None:
    """Each task takes what is its own of the records of a chunk."""
    plan, tokenizer = tasks[0].plan, tasks[0].tokenizer
    reading = Reading.of(plan.settings)
    reading = reading._replace(keep=for_all([task.keep for task in tasks]))
    ids = TokenisedReader(tokenizer, plan.settings.get("append_eod", False))
    number = min(task.writer.output.records for task in tasks)
    for batch in _batches(read_chunk(plan.chunks[rank], reading, number, ids)):
        for task in tasks:
            task.take(batch[max(task.writer.output.records - number, 0) :])
        number += len(batch)


class _Task:
    """A chunk of one source: which outputs of it are there, and the writer of the next one."""

    writer: OutputWriter

    def __init__(self, step: TokenizeChunk, rank: int):
        self.step, self.rank = step, rank
        done = outputs_of_chunk(step.outputs, rank)
        self._earlier = done[-1] if done else Output(rank, number=-1)
        self.is_done = self._earlier.last

    def begin(self) -> None:
        """Opens the output after the last one that is finished."""
        self.plan = _plan(self.step.plan)
        self.tokenizer = _tokenizer(self.step.tokenizer, self.step.ranks)
        self._chats = ChatEncoder.of(self.plan.settings, self.tokenizer)
        self._screen = _screen(self.step.plan)
        self._benchmarks = _benchmarks(self.step.benchmarks) if self.step.benchmarks else None
        self.keep = self.plan.settings.get("keep")
        self.writer = self._writer_after(self._earlier)

    def _writer_after(self, earlier: Output) -> OutputWriter:
        number, records, consumed = earlier.number + 1, earlier.records, earlier.consumed
        tokenizer = self.tokenizer
        engine = {"engine": tokenizer.engine, "engine_problem": tokenizer.engine_problem}
        output = Output(self.rank, number, records, consumed, **engine)
        return OutputWriter(self.step.outputs, output, self.plan, tokenizer.vocab_size)

    def take(self, batch: Sequence[Record]) -> None:
        """Writes the documents of the next records, which may be other sources' too."""
        if batch:
            is_large = sum(map(_characters, batch)) > 2 * _BATCH_CHARACTERS
            place = _place(self.plan.chunks[self.rank], batch[-1])
            self.writer.note_place(place, at_once=is_large)
        contents = [for_source(record.content, self.keep) for record in batch]
        found = documents_of(contents, self.tokenizer, self._chats, self._screen)
        for record, made in zip(batch, found):
            number, items = self.writer.output.records, self._items(made)
            if items and self.plan.settings["benchmarks"]["drop"]:
                made = Dropped("benchmarks", items[0].task)
            if not self.writer.add(record, made, items):
                self.writer.close(last=False)
                self.writer = self._writer_after(self.writer.output)
                self.writer.add(record, made, items)
            is_read = isinstance(made, Documents) and not isinstance(made.text, TokenisedText)
            if number % _SAMPLED_EVERY < _SAMPLED and is_read:
                if not (self._chats or self.tokenizer.agrees(made.text, made.ids[0][:-1])):
                    place = _place(self.plan.chunks[self.rank], record)
                    raise EngineDiffers(f"{self.tokenizer.engine} gave other ids at {place}")
                text = made.text[:_SAMPLED_CHARACTERS]
                self.writer.output.add_sample(text, self.tokenizer.lost_characters(text))
        self.writer.flush()

    def _items(self, made: Any) -> list[Item]:
        """Items of benchmarks in what became of a record."""
        is_read = self._benchmarks and isinstance(made, Documents)
        return self._benchmarks.find(str(made.text)) if is_read else []


# Loaded once a process: a worker runs many tasks.
_plan = functools.lru_cache(maxsize=32)(Plan.read)


@functools.lru_cache(maxsize=32)
def _screen(plan: pathlib.Path) -> Screen | None:
    return Screen.of(_plan(plan).settings)


_benchmarks = functools.lru_cache(maxsize=1)(Benchmarks)


@functools.lru_cache(maxsize=1)
def _tokenizer(name: str, ranks: str | None) -> Tokenizer:
    tokenizer = load_tokenizer(name, ranks=ranks)
    tokenizer.use_fast_engine()
    return tokenizer


def _batches(records: Iterable[Record]) -> Iterator[list[Record]]:
    """Records by the megabyte.

    Not one by one: reading JSON between two calls of the tokenizer slows the latter by 10 to 15 %
    on the CPU at hand.
    """
    batch, size = [], 0
    for record in records:
        batch.append(record)
        size += _characters(record)
        if size >= _BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    yield batch


def _characters(record: Record) -> int:
    return len(record.content) if isinstance(record.content, str) else 100


def _place(chunk: Chunk, record: Record) -> str:
    # In a byte range of a file, lines are counted from the start of the range.
    start = f" after byte {chunk.start:,}" if chunk.start and not chunk.first else ""
    return f"{record.file.name}, line {record.line:,}{start}"


def documents_of(
    contents: Sequence[str | Rejected | NotKept],
    tokenizer: Tokenizer,
    chats: ChatEncoder | None,
    screen: Screen | None = None,
) -> list[Documents | Rejected | NotKept | Dropped]:
    """The documents of records, texts where there are no `chats`; or why there are none.

    `screen`: the filters of texts, which may change them.
    """
    made = [_before_tokenizer(content, chats, screen) for content in contents]
    texts = [i for i, one in enumerate(made) if isinstance(one, str)]
    for i, ids in zip(texts, tokenizer.encode_documents([made[i] for i in texts])):
        made[i] = _document(made[i], ids, tokenizer.eod)
    return made


def _before_tokenizer(
    text: str | Rejected | NotKept, chats: ChatEncoder | None, screen: Screen | None
) -> str | Documents | Rejected | NotKept | Dropped:
    """What becomes of a record: a text to be tokenised, or more where no tokenizer is needed."""
    if screen and isinstance(text, str):
        text = screen.judge(text)
    if not isinstance(text, str):
        return text
    if chats:
        return chats.documents(text)
    if isinstance(text, TokenisedText):
        return Documents([text.ids], [], text)
    return str(text)  # without what is noted of it


def _document(text: str, ids: np.ndarray | TokenizerError, eod: int) -> Documents | Rejected:
    if isinstance(ids, TokenizerError):
        return Rejected(str(ids)[:200])
    if not len(ids):
        return Rejected("the tokenizer makes no token of it")
    return Documents([np.append(ids, np.int32(eod))], [], text)
