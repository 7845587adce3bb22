"""One source from its inputs to its manifest, in steps that can each be interrupted and resumed.

DATA/NAME/.work/       while it is being made: settings, units, parts, logs
DATA/NAME/*.bin, .idx  shards
DATA/NAME/rejected.jsonl
DATA/NAME/manifest.json, written last
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import fcntl
import json
import os
import pathlib
import shutil
from collections.abc import Iterator, Mapping

from stablelm_jax.data import manifest
from stablelm_jax.data.manifest import SourceManifest, Split, TokenizerInfo
from stablelm_jax.preparation import assemble, units
from stablelm_jax.preparation.executors import Executor
from stablelm_jax.preparation.pipeline import ReadUnit, TokenizeToParts
from stablelm_jax.tokenizer.tokenizer import Tokenizer, load_tokenizer

# Changes when the same inputs and settings would give other bytes.
_RECIPE = 1
# 1 GiB of int32: large files for a file system, small ones for a copy or a retry.
SHARD_TOKENS = 1 << 28


class PreparationError(ValueError):
    """The source cannot be made as things stand; the message says why and what to do."""


@dataclasses.dataclass(frozen=True)
class Job:
    """What to prepare; the flags of `prepare` say what each field means."""

    source: str
    inputs: tuple[str, ...]
    output: str
    tokenizer: str = "arcade100k"
    ranks: str | None = None
    text_key: str = "text"
    file_format: str = "auto"
    held_out: float = 0.001
    shard_tokens: int = SHARD_TOKENS
    languages: tuple[str, ...] = ()
    licence: str = ""
    provenance: Mapping[str, str] = dataclasses.field(default_factory=dict)


class Preparation:
    """The steps of a job, to be called in order: begin, tokenize, assemble, finish.

    Attributes:
      directory: of the source. parts: where the workers leave theirs.
      units: what is read, in pieces. input_bytes: of all files, as they lie on disk.
      reasons: how often what was rejected.
    """

    def __init__(self, job: Job):
        self.job = job
        self.directory = pathlib.Path(os.path.abspath(job.output)) / job.source
        self._work = self.directory / ".work"
        self.parts = self._work / "parts"
        self.tokenizer: Tokenizer = load_tokenizer(job.tokenizer, ranks=job.ranks)
        self.files = units.find_files(job.inputs, job.file_format)
        self._refuse_own_output()
        self.input_bytes = sum(file.size or 0 for file in self.files)
        self.units: list[units.Unit] = []
        self.reasons: collections.Counter = collections.Counter()
        self._settings = self._describe()

    def _refuse_own_output(self) -> None:
        inside = str(self.directory) + os.sep
        for file in self.files:
            if file.path.startswith(inside):
                raise units.InputError(
                    f"--input: {file.name} lies in the output {self.directory}; write elsewhere"
                )

    def _describe(self) -> dict:
        """All that the bytes of the source follow from."""
        job = self.job
        return {
            "recipe": _RECIPE,
            "inputs_sha256": units.fingerprint(self.files),
            "tokenizer_sha256": self.tokenizer.sha256,
            "format": job.file_format,
            "text_key": job.text_key,
            "held_out": job.held_out,
            "shard_tokens": job.shard_tokens,
            "languages": list(job.languages),
            "licence": job.licence,
            "provenance": dict(job.provenance),
        }

    def finished(self) -> SourceManifest | None:
        """The manifest if this very job was done before, its shards all there.

        Raises:
          PreparationError: something else was prepared, or is being prepared, under this name.
          ManifestError, ShardError: what was prepared is damaged.
        """
        if not (self.directory / manifest.MANIFEST_NAME).exists():
            return None
        found = manifest.read_manifest(self.directory)
        self._compare(found.provenance.get("settings", {}), f"{self.directory} was prepared")
        manifest.verify(self.directory, found)
        self._clean()
        return found

    def _compare(self, theirs: Mapping, what: str) -> None:
        for key, ours in self._settings.items():
            if theirs.get(key) != ours:
                values = "" if key.endswith("sha256") else f" ({theirs.get(key)!r}, not {ours!r})"
                name = {
                    "inputs_sha256": "input files (names, sizes or dates)",
                    "tokenizer_sha256": "tokenizer",
                }.get(key, key)
                raise PreparationError(
                    f"{what} with other {name}{values}: ask for the same, choose another --source,"
                    f" or remove {self.directory}"
                )

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Keeps a second process from working on the same source at the same time."""
        self.directory.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(self.directory, os.O_RDONLY)
        try:
            self._lock(descriptor)
            yield
        finally:
            os.close(descriptor)

    def _lock(self, descriptor: int) -> None:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise PreparationError(
                f"{self.directory}: another process is preparing this source; wait for it or end it"
            ) from None

    def begin(self) -> bool:
        """Cuts the inputs and makes room for the work; True if earlier work is gone on with."""
        settings = self._work / "settings.json"
        resumed = settings.exists()
        if resumed:
            self._compare(
                json.loads(settings.read_text()), f"{self.directory} was begun, not finished,"
            )
        self.parts.mkdir(parents=True, exist_ok=True)
        self.units = units.cut(self.files)
        units.save(self._work / "units.json", self.units)
        partial = settings.with_suffix(".partial")
        partial.write_text(json.dumps(self._settings))
        os.replace(partial, settings)
        return resumed

    def tokenize(self, executor: Executor) -> None:
        """Makes the parts of every unit."""
        pipeline = [
            ReadUnit(str(self._work / "units.json"), str(self.parts), self.job.text_key),
            TokenizeToParts(str(self.parts), self._tokenizer_path(), _absolute(self.job.ranks)),
        ]
        executor.run(pipeline, len(self.units), self._work / "logs" / "parts")

    def _tokenizer_path(self) -> str:
        """Its name, or its file seen from any working directory."""
        name = self.job.tokenizer
        return os.path.abspath(name) if os.path.exists(name) else name

    def assemble(self, executor: Executor) -> assemble.HeldOut:
        """Lists what was rejected, chooses what is held out, writes the shards.

        Raises:
          SourceError: no document, or only one.
        """
        parts = assemble.all_parts(self.parts, len(self.units))
        self.reasons = assemble.write_rejected(self.directory / "rejected.jsonl", parts, self.units)
        if not any(part.info.documents for part in parts):
            raise assemble.SourceError(self._no_document())
        held_out = assemble.choose_held_out(parts, self.job.held_out)
        self._plans = assemble.plan_shards(parts, held_out, self.job.shard_tokens)
        assemble.save_plan(self._work, parts, self._plans, held_out)
        step = assemble.WriteShard(str(self._work), str(self.directory), self.tokenizer.vocab_size)
        executor.run([step], len(self._plans), self._work / "logs" / "shards")
        return held_out

    def _no_document(self) -> str:
        if not self.reasons:
            return f"no document in {len(self.files)} files: all are empty"
        (reason, count), total = self.reasons.most_common(1)[0], self.reasons.total()
        hint = "; --text-key names the key" if reason.startswith(("no key", "no column")) else ""
        return (
            f'no usable document: {total} rejected, {count} of them "{reason}"{hint}'
            f" (all listed in {self.directory / 'rejected.jsonl'})"
        )

    def finish(self) -> SourceManifest:
        """Writes the manifest and removes what only the work needed."""
        tokenizer = self.tokenizer
        splits, counts = assemble.read_records(self._work, self._plans, tokenizer.vocab_size)
        made = SourceManifest(
            source=self.job.source,
            tokenizer=TokenizerInfo(
                tokenizer.name, tokenizer.sha256, tokenizer.vocab_size, tokenizer.eod
            ),
            train=Split.of(*splits["train"]),
            held_out=Split.of(*splits["held_out"]),
            unigram_entropy=manifest.unigram_entropy(counts),
            languages=self.job.languages,
            licence=self.job.licence,
            provenance=self._provenance(),
            rejected=self.reasons.total(),
        )
        self._remove_stray_shards(made)
        manifest.verify(self.directory, made)
        manifest.write_manifest(self.directory, made)
        self._clean()
        return made

    def _provenance(self) -> dict:
        return {
            **self.job.provenance,
            "inputs": list(self.job.inputs),
            "input_files": len(self.files),
            "input_bytes": self.input_bytes,
            "settings": self._settings,
        }

    def _remove_stray_shards(self, made: SourceManifest) -> None:
        """Shards of a preparation whose manifest somebody deleted to do it anew."""
        wanted = {info.file[:-4] for info in made.train.shards + made.held_out.shards}
        for split in ("train", "held_out"):
            for path in self.directory.glob(f"{split}-[0-9][0-9][0-9][0-9][0-9].*"):
                if path.stem not in wanted:
                    path.unlink()

    def _clean(self) -> None:
        shutil.rmtree(self._work, ignore_errors=True)


def _absolute(path: str | None) -> str | None:
    return path and os.path.abspath(path)
