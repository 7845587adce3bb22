"""The task of a worker: a chunk of input is read, tokenised and split, and written as shards.

A worker that goes on with a chunk skips the records of those outputs (outputs.py) that are
finished, so a kill loses one output at most.
"""

from __future__ import annotations

import functools
import pathlib
import shutil
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
from datatrove.pipeline.base import PipelineStep

from stablelm_jax.preparation import hub
from stablelm_jax.preparation.chunks import Chunk, Record, read_chunk
from stablelm_jax.preparation.contamination import Benchmarks, Item
from stablelm_jax.preparation.conversations import ChatEncoder, Documents
from stablelm_jax.preparation.formats import Reading
from stablelm_jax.preparation.keeping import NotKept, for_all, for_source
from stablelm_jax.preparation.outputs import Output, OutputWriter, Plan, outputs_of_chunk
from stablelm_jax.preparation.screening import Dropped, Screen
from stablelm_jax.preparation.streams import Rejected
from stablelm_jax.preparation.tokenised import TokenisedReader, TokenisedText
from stablelm_jax.tokenizer.tokenizer import Tokenizer, TokenizerError, load_tokenizer

_BATCH_CHARACTERS = 1 << 20
# What the tokenizer loses is looked for in the beginnings of the first 16 documents of 1,024,
# chosen by their number, so that an interruption changes nothing.
_SAMPLED, _SAMPLED_EVERY, _SAMPLED_CHARACTERS = 16, 1024, 8192


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
        so_far = {name: getattr(earlier, name) for name in ("records", "used", "consumed")}
        tokenizer = self.tokenizer
        engine = {"engine": tokenizer.engine, "engine_problem": tokenizer.engine_problem}
        output = Output(self.rank, earlier.number + 1, **so_far, **engine)
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
            number, items = self.writer.output.used, self._items(made)
            if items and self.plan.settings["benchmarks"]["drop"]:
                made = Dropped("benchmarks", items[0].task)
            if not self.writer.add(record, made, items):
                self.writer.close(last=False)
                self.writer = self._writer_after(self.writer.output)
                self.writer.add(record, made, items)
            is_read = isinstance(made, Documents) and not isinstance(made.text, TokenisedText)
            if number % _SAMPLED_EVERY < _SAMPLED and is_read:
                if not (self._chats or self.tokenizer.agrees(made.text, made.ids[0])):
                    place = _place(self.plan.chunks[self.rank], record)
                    raise EngineDiffers(f"{self.tokenizer.engine} gave other ids at {place}")
                self._look_for_losses(made.text, made.ids[0][:-1])
        self.writer.flush()

    def _look_for_losses(self, text: str, ids: np.ndarray) -> None:
        if self._chats or len(text) > _SAMPLED_CHARACTERS:  # else the ids are at hand
            text = text[:_SAMPLED_CHARACTERS]
            ids = self.tokenizer.encode_document(text)
        lost = self.tokenizer.lost_characters(text, ids.tolist())
        self.writer.output.add_sample(text, lost)

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
        made[i] = _document(made[i], ids)
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


def _document(text: str, ids: np.ndarray | TokenizerError) -> Documents | Rejected:
    if isinstance(ids, TokenizerError):
        return Rejected(str(ids)[:200])
    if len(ids) == 1:  # it is the end of the document
        return Rejected("the tokenizer makes no token of it")
    return Documents([ids], [], text)
