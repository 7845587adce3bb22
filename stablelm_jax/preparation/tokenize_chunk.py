"""The task of a worker: a chunk of input is read, tokenised and split, and written as shards.

What a task makes is an output, a folder `<chunk>-<number>` that gets its name when it is whole. So
a name means a finished output, whoever was killed and when, and even where two workers made the
same one. It holds

    train.bin, train.idx, held_out.bin, held_out.idx   where the split has documents
    counts.npy       how often each token stands in the train shard, int64 [vocab_size]
    rejected.jsonl   file, line and reason of each record that gave no document
    record.json      the fields of `Output`

A chunk of more than `--shard-tokens` tokens has several outputs. A worker that goes on with a chunk
skips the records of those that are finished, so a kill loses one output at most.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import pathlib
import shutil
import tempfile
import time
from collections.abc import Iterable, Iterator

import numpy as np
from datatrove.pipeline.base import PipelineStep

from stablelm_jax.data.shards import ShardInfo, ShardWriter
from stablelm_jax.preparation import chunks
from stablelm_jax.preparation.chunks import Record
from stablelm_jax.preparation.held_out import HeldOutRule, content_hash
from stablelm_jax.preparation.readers import Rejected
from stablelm_jax.storage.files import write_json
from stablelm_jax.tokenizer.tokenizer import Tokenizer, TokenizerError, load_tokenizer

SPLITS = ("train", "held_out")
SCRATCH = "scratch-"  # begins the name of an output that is being written

_BATCH_CHARACTERS = 1 << 20
_PROGRESS_SECONDS = 1.0


@dataclasses.dataclass
class Output:
    """What an output holds. While it is written, its record is rewritten now and then.

    Attributes:
      chunk, number: which output of which chunk, from 0.
      records, consumed: records and bytes of the chunk that were read up to the end of this output.
      last: whether nothing of the chunk follows.
      rejected: records that gave no document.
      tokens, text_bytes: counts of each split.
      shards: what the manifest keeps of the shard of each split that has documents.
      hashes: the smallest and the largest content hash, empty without a document.
    """

    chunk: int
    number: int
    records: int = 0
    consumed: int = 0
    last: bool = False
    rejected: int = 0
    tokens: dict[str, int] = dataclasses.field(default_factory=lambda: dict.fromkeys(SPLITS, 0))
    text_bytes: dict[str, int] = dataclasses.field(default_factory=lambda: dict.fromkeys(SPLITS, 0))
    shards: dict[str, ShardInfo] = dataclasses.field(default_factory=dict)
    hashes: list[int] = dataclasses.field(default_factory=list)

    @property
    def name(self) -> str:
        """The name of its folder; names sort as outputs do."""
        return f"{self.chunk:08d}-{self.number:04d}"


def read_output(folder: pathlib.Path) -> Output:
    """The record of one output, finished or not."""
    fields = json.loads((folder / "record.json").read_text())
    shards = {split: ShardInfo(**info) for split, info in fields.pop("shards").items()}
    return Output(shards=shards, **fields)


def outputs_of_chunk(folder: pathlib.Path, chunk: int) -> list[Output]:
    """The finished outputs of a chunk, in order."""
    found: list[Output] = []
    while (path := folder / Output(chunk, len(found)).name).is_dir():
        found.append(read_output(path))
    return found


def all_outputs(folder: pathlib.Path, num_chunks: int) -> list[Output]:
    """The outputs of all chunks, in order.

    Raises:
      ValueError: a chunk is not finished.
    """
    outputs = []
    for chunk in range(num_chunks):
        found = outputs_of_chunk(folder, chunk)
        if not found or not found[-1].last:
            raise ValueError(
                f"{folder}: chunk {chunk} is marked as done, but some of it is gone;"
                f" remove {folder.parent} and begin again"
            )
        outputs += found
    return outputs


class OutputWriter:
    """Writes one output aside; `close` gives it its name."""

    def __init__(self, folder: pathlib.Path, output: Output, rule: HeldOutRule, vocab_size: int):
        self.output, self._rule, self._final = output, rule, folder / output.name
        prefix = f"{SCRATCH}{output.name}-"
        self._scratch = pathlib.Path(tempfile.mkdtemp(prefix=prefix, dir=folder))
        self._rejected = open(self._scratch / "rejected.jsonl", "w", encoding="utf-8")
        self._waiting: dict[str, list[np.ndarray]] = {split: [] for split in SPLITS}
        self._writers: dict[str, ShardWriter] = {}
        self._counts = np.zeros(vocab_size, np.int64)
        self._record_due = 0.0

    def add(self, text: str, tokens: np.ndarray, shard_tokens: int) -> bool:
        """Adds a document; False, and nothing is added, where it would make a shard too long.

        Args:
          tokens: int32, the one that ends the document included.
        """
        data = text.encode()
        value = content_hash(data)
        split = "held_out" if self._rule.holds_out(value) else "train"
        output = self.output
        if output.tokens[split] and output.tokens[split] + len(tokens) > shard_tokens:
            return False
        output.tokens[split] += len(tokens)
        output.text_bytes[split] += len(data)
        output.hashes.append(value)
        self._waiting[split].append(tokens)
        return True

    def reject(self, record: Record, reason: str) -> None:
        """Notes a record that gives no document."""
        row = {"file": record.file.name, "line": record.line, "reason": reason}
        self._rejected.write(json.dumps(row, ensure_ascii=False) + "\n")
        self.output.rejected += 1

    def flush(self) -> None:
        """Writes the documents that wait and, about once a second, the record for the progress."""
        for split, documents in self._waiting.items():
            if not documents:
                continue
            if split not in self._writers:
                self._writers[split] = ShardWriter(self._scratch / split)
            flat = np.concatenate(documents)
            self._writers[split].add_many(flat, [len(tokens) for tokens in documents])
            if split == "train":
                self._counts += np.bincount(flat, minlength=len(self._counts))
            documents.clear()
        if hashes := self.output.hashes:
            self.output.hashes = [min(hashes), max(hashes)]
        if time.monotonic() > self._record_due:
            write_json(self._scratch / "record.json", dataclasses.asdict(self.output))
            self._record_due = time.monotonic() + _PROGRESS_SECONDS

    def close(self, last: bool) -> None:
        """Makes the output visible, whole."""
        self._record_due = float("inf")
        self.flush()
        self._rejected.close()
        output = self.output
        output.last = last
        output.shards = {split: writer.close() for split, writer in self._writers.items()}
        np.save(self._scratch / "counts.npy", self._counts)
        write_json(self._scratch / "record.json", dataclasses.asdict(output))
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
        rule: HeldOutRule,
        tokenizer: tuple[str, str | None],
        text_key: str,
        shard_tokens: int,
    ):
        """`plan`: the JSON file with the chunks. `tokenizer`: its name or file, and its ranks."""
        super().__init__()
        self.plan, self.outputs, self.rule = plan, outputs, rule
        self.tokenizer, self.text_key, self.shard_tokens = tokenizer, text_key, shard_tokens

    def run(self, data=None, rank: int = 0, world_size: int = 1) -> None:
        done = outputs_of_chunk(self.outputs, rank)
        if done and done[-1].last:
            return
        chunk, tokenizer = _chunks(self.plan)[rank], _tokenizer(*self.tokenizer)

        def new_writer(number: int, records: int, consumed: int) -> OutputWriter:
            output = Output(rank, number, records, consumed)
            return OutputWriter(self.outputs, output, self.rule, tokenizer.vocab_size)

        earlier = done[-1] if done else Output(rank, 0)
        writer = new_writer(len(done), earlier.records, earlier.consumed)
        for batch in _batches(chunks.read_chunk(chunk, self.text_key, skip=earlier.records)):
            for record, tokens in [(record, _encoded(record, tokenizer)) for record in batch]:
                if isinstance(tokens, Rejected):
                    writer.reject(record, tokens.reason)
                elif not writer.add(record.content, tokens, self.shard_tokens):
                    writer.close(last=False)
                    full = writer.output
                    writer = new_writer(full.number + 1, full.records, full.consumed)
                    writer.add(record.content, tokens, self.shard_tokens)
                writer.output.records += 1
                writer.output.consumed = record.consumed
            writer.flush()
        writer.close(last=True)


def _batches(records: Iterable[Record]) -> Iterator[list[Record]]:
    """Records by the megabyte.

    Not one by one: reading JSON between two calls of the tokenizer slows the latter by 10 to 15 %
    on the CPU at hand.
    """
    batch, size = [], 0
    for record in records:
        batch.append(record)
        size += len(record.content) if isinstance(record.content, str) else 100
        if size >= _BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    yield batch


def _encoded(record: Record, tokenizer: Tokenizer) -> np.ndarray | Rejected:
    """The tokens of a record, the one that ends it included; or why there are none."""
    if isinstance(record.content, Rejected):
        return record.content
    try:
        tokens = tokenizer.encode_document(record.content)
    except TokenizerError as error:
        return Rejected(str(error)[:200])
    if not len(tokens):
        return Rejected("the tokenizer makes no token of it")
    return np.append(tokens, np.int32(tokenizer.eod))


@functools.lru_cache(maxsize=1)
def _chunks(plan: pathlib.Path) -> list[chunks.Chunk]:
    return chunks.from_json(json.loads(plan.read_text())["chunks"])


@functools.lru_cache(maxsize=1)
def _tokenizer(name: str, ranks: str | None) -> Tokenizer:
    """Loaded once a process: a worker runs many tasks."""
    return load_tokenizer(name, ranks=ranks)
