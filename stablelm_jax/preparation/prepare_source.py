"""One source from its inputs to its manifest, in steps that can each be interrupted and resumed.

DATA/NAME/.work/           while it is being made: the plan, outputs of chunks, logs
DATA/NAME/*.bin, .idx      shards
DATA/NAME/rejected.jsonl
DATA/NAME/manifest.json    written last
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import fcntl
import json
import os
import pathlib
import re
import shutil
from collections.abc import Iterator, Mapping

import numpy as np

from stablelm_jax.data import manifest
from stablelm_jax.data.manifest import SourceManifest, Split, TokenizerInfo
from stablelm_jax.data.shards import ShardInfo
from stablelm_jax.preparation import chunks, held_out, inputs, tokenize_chunk
from stablelm_jax.preparation.executors import Executor
from stablelm_jax.preparation.held_out import HeldOutRule
from stablelm_jax.preparation.tokenize_chunk import Output, TokenizeChunk
from stablelm_jax.storage.files import replacing, write_json
from stablelm_jax.tokenizer.tokenizer import Tokenizer, load_tokenizer

# Changes when the same inputs and settings would give other bytes.
RECIPE = 2
# 1 GiB of int32: large files for a file system, small ones for a copy or a retry.
SHARD_TOKENS = 1 << 28


class PreparationError(ValueError):
    """The source cannot be made as things stand; the message says why and what to do."""


@dataclasses.dataclass(frozen=True)
class Job:
    """What to prepare; the flags of `prepare` say what each field means."""

    source: str
    inputs: list[str]
    output: str
    tokenizer: str
    ranks: str | None
    format: str
    text_key: str
    held_out: float
    shard_tokens: int
    languages: list[str]
    licence: str
    provenance: dict[str, str]


class Preparation:
    """The steps of a job, to be called in order: begin, tokenize, collate.

    Attributes:
      directory: the folder of the source.
      files, input_bytes: what is read, and its size as it lies on disk.
      chunks, rule: how the input is cut, and what is held out; known from `begin` on.
      reasons: how often what was rejected; known from `tokenize` on.
    """

    def __init__(self, job: Job):
        self.job = job
        self.directory = pathlib.Path(os.path.abspath(job.output)) / job.source
        self._work = self.directory / ".work"
        self._plan = self._work / "plan.json"
        self.tokenizer: Tokenizer = load_tokenizer(job.tokenizer, ranks=job.ranks)
        self.files = inputs.find_files(job.inputs, job.format)
        for file in self.files:
            if file.path.startswith(str(self.directory) + os.sep):
                raise inputs.InputError(
                    f"--input: {file.name} lies in the output {self.directory}; write elsewhere"
                )
        self.input_bytes = sum(file.size or 0 for file in self.files)
        self.chunks: list[chunks.Chunk] = []
        self.rule = HeldOutRule(0, [], "")
        self.reasons: collections.Counter = collections.Counter()
        # All that the bytes of the source follow from.
        self._settings = {
            "recipe": RECIPE,
            "inputs_sha256": inputs.fingerprint(self.files),
            "tokenizer_sha256": self.tokenizer.sha256,
            **dataclasses.asdict(job),
        }
        for name in ("source", "inputs", "output", "tokenizer", "ranks"):
            del self._settings[name]

    @property
    def outputs(self) -> pathlib.Path:
        """Where the workers leave what they make; another place when the rule changes."""
        return self._work / f"outputs-{self.rule.threshold:x}"

    def finished(self) -> SourceManifest | None:
        """The manifest if this very job was done before and its shards are all there.

        Raises:
          PreparationError: something else was prepared, or is being prepared, under this name.
          ManifestError, ShardError: what was prepared is damaged.
        """
        if not (self.directory / manifest.MANIFEST_NAME).exists():
            return None
        found = manifest.read_manifest(self.directory)
        # Shards of an earlier recipe are others, but no worse for a run.
        settings = {**found.provenance.get("settings", {}), "recipe": RECIPE}
        self._compare(settings, f"{self.directory} was prepared")
        manifest.verify(self.directory, found)
        shutil.rmtree(self._work, ignore_errors=True)
        return found

    def _compare(self, theirs: Mapping, what: str) -> None:
        names = {
            "inputs_sha256": "input files (names, sizes or dates)",
            "tokenizer_sha256": "tokenizer",
        }
        for key, ours in self._settings.items():
            if theirs.get(key) != ours:
                values = "" if key.endswith("sha256") else f" ({theirs.get(key)!r}, not {ours!r})"
                raise PreparationError(
                    f"{what} with other {names.get(key, key)}{values}: ask for the same, choose"
                    f" another --source, or remove {self.directory}"
                )

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Keeps a second process from working on the same source at the same time."""
        self.directory.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(self.directory, os.O_RDONLY)
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise PreparationError(
                    f"{self.directory}: another process is preparing this source; wait for it or"
                    " end it"
                ) from None
            yield
        finally:
            os.close(descriptor)

    def begin(self) -> bool:
        """Cuts the inputs and decides what is held out; True if earlier work is gone on with."""
        resumed = self._plan.exists()
        if resumed:
            plan = json.loads(self._plan.read_text())
            self._compare(plan["settings"], f"{self.directory} was begun, not finished,")
            self.chunks = chunks.from_json(plan["chunks"])
            self.rule = HeldOutRule(**plan["held_out"])
        else:
            shutil.rmtree(self._work, ignore_errors=True)
            self._work.mkdir()
            self.chunks = chunks.cut(self.files)
            seen = held_out.look(self.chunks, self.job.text_key)
            self._follow(held_out.choose(seen, self.job.held_out))
        return resumed

    def _follow(self, rule: HeldOutRule) -> None:
        """Writes the plan with this rule, and makes room for what follows from it."""
        self.rule = rule
        self.outputs.mkdir(exist_ok=True)
        plan = {"settings": self._settings, "held_out": rule._asdict(), "chunks": self.chunks}
        write_json(self._plan, plan)

    def tokenize(self, executor: Executor) -> None:
        """Makes the outputs of every chunk, so that both splits have documents.

        Raises:
          PreparationError: there are not two different documents.
        """
        outputs = self._tokenize(executor)
        self._list_rejected(outputs)
        hashes = {value for output in outputs for value in output.hashes}
        if not hashes:
            raise PreparationError(self._no_document())
        if len(hashes) == 1:
            raise PreparationError(
                "all there is is one document, and a source needs two different ones, one of them"
                " to hold out: add documents, or cut this one into several"
            )
        held = any(output.tokens["held_out"] for output in outputs)
        if not held or not any(output.tokens["train"] for output in outputs):
            self._follow(held_out.moved(self.rule, hashes, nothing_held_out=not held))
            self._tokenize(executor)

    def _tokenize(self, executor: Executor) -> list[Output]:
        job, name = self.job, self.job.tokenizer
        # Workers may have another working directory.
        tokenizer = (
            os.path.abspath(name) if os.path.exists(name) else name,
            job.ranks and os.path.abspath(job.ranks),
        )
        step = TokenizeChunk(
            self._plan, self.outputs, self.rule, tokenizer, job.text_key, job.shard_tokens
        )
        if executor.kind == "local":  # the workers of an earlier call ended with it
            for path in self.outputs.glob(f"{tokenize_chunk.SCRATCH}*"):
                shutil.rmtree(path)
        executor.run([step], len(self.chunks), self._work / "logs" / self.outputs.name)
        return tokenize_chunk.all_outputs(self.outputs, len(self.chunks))

    def _list_rejected(self, outputs: list[Output]) -> None:
        """Writes what gave no document, `file`, `line` and `reason` a line, and counts reasons."""
        self.reasons.clear()
        lines: dict[str, int] = {}
        path = self.directory / "rejected.jsonl"
        with replacing(path) as aside, open(aside, "w", encoding="utf-8") as listed:
            for output in outputs:
                chunk = self.chunks[output.chunk]
                # Lines of a byte range are counted from its own start.
                is_range = chunk.start and chunk.files[0].kind == "jsonl"
                earlier = lines.get(chunk.files[0].name, 0) if is_range else 0
                with open(self.outputs / output.name / "rejected.jsonl", encoding="utf-8") as rows:
                    for row in map(json.loads, rows):
                        row["line"] += earlier
                        listed.write(json.dumps(row, ensure_ascii=False) + "\n")
                        self.reasons[re.split(r"[:(]", row["reason"])[0].strip()] += 1
                if output.last:
                    lines[chunk.files[0].name] = earlier + output.records

    def _no_document(self) -> str:
        if not self.reasons:
            return f"no document in {len(self.files)} files: all are empty"
        (reason, count), total = self.reasons.most_common(1)[0], self.reasons.total()
        hint = "; --text-key names the key" if reason.startswith(("no key", "no column")) else ""
        return (
            f'no usable document: {total} rejected, {count} of them "{reason}"{hint}'
            f" (all listed in {self.directory / 'rejected.jsonl'})"
        )

    def collate(self) -> SourceManifest:
        """Gives the shards their names, writes the manifest, removes what only the work needed."""
        outputs = tokenize_chunk.all_outputs(self.outputs, len(self.chunks))
        counts = sum(np.load(self.outputs / output.name / "counts.npy") for output in outputs)
        tokenizer, job = self.tokenizer, self.job
        provenance = {
            "inputs": job.inputs,
            "input_files": len(self.files),
            "input_bytes": self.input_bytes,
            "settings": self._settings,
            "held_out": self.rule._asdict(),
        }
        made = SourceManifest(
            source=job.source,
            tokenizer=TokenizerInfo(
                tokenizer.name, tokenizer.sha256, tokenizer.vocab_size, tokenizer.eod
            ),
            train=self._split("train", outputs),
            held_out=self._split("held_out", outputs),
            unigram_entropy=manifest.unigram_entropy(counts),
            languages=tuple(job.languages),
            licence=job.licence,
            provenance={**job.provenance, **provenance},
            rejected=self.reasons.total(),
        )
        manifest.verify(self.directory, made)
        manifest.write_manifest(self.directory, made)
        shutil.rmtree(self._work, ignore_errors=True)
        return made

    def _split(self, split: str, outputs: list[Output]) -> Split:
        """Moves the shards of a split to the folder of the source, numbered in order."""
        infos: list[ShardInfo] = []
        for output in outputs:
            if split not in output.shards:
                continue
            name = f"{split}-{len(infos):05d}"
            infos.append(dataclasses.replace(output.shards[split], file=f"{name}.bin"))
            for suffix in (".idx", ".bin"):
                # What is not there was moved by an earlier call, which was stopped.
                with contextlib.suppress(FileNotFoundError):
                    source = self.outputs / output.name / (split + suffix)
                    os.replace(source, self.directory / (name + suffix))
        # Shards of a preparation whose manifest somebody deleted to make it anew.
        for path in self.directory.glob(f"{split}-[0-9][0-9][0-9][0-9][0-9].*"):
            if f"{path.stem}.bin" not in {info.file for info in infos}:
                path.unlink()
        return Split.of(infos, sum(output.text_bytes[split] for output in outputs))
