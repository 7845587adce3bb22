"""One source from its inputs to its manifest, in steps that can each be interrupted and resumed.

DATA/NAME/.work/           while it is being made: the plan, outputs of chunks, logs
DATA/NAME/*.bin, .idx      shards, of conversations with .spans.npy
DATA/NAME/rejected.jsonl
DATA/NAME/dropped.jsonl    where there are filters
DATA/NAME/contaminated.jsonl    where benchmarks are looked for
DATA/NAME/manifest.json    written last
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import json
import os
import pathlib
import shutil
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from datatrove.pipeline.base import PipelineStep

from stablelm_jax.data import manifest
from stablelm_jax.data.manifest import SourceManifest, Split, TokenizerInfo
from stablelm_jax.data.shards import ShardInfo
from stablelm_jax.preparation import (
    chunks,
    filters,
    held_out,
    hub,
    inputs,
    keeping,
    streams,
)
from stablelm_jax.preparation.account import Account, list_left_out
from stablelm_jax.preparation.contamination import (
    CONTAMINATED_NAME,
    Benchmarks,
    Hit,
    certificate,
    write_hits,
)
from stablelm_jax.preparation.conversations import MAX_TURNS, ChatEncoder, Documents, kind_of_form
from stablelm_jax.preparation.executors import Executor, TasksFailed, remedy
from stablelm_jax.preparation.finding import LeftOut, shown
from stablelm_jax.preparation.formats import Reading
from stablelm_jax.preparation.lock import only_one
from stablelm_jax.preparation.outputs import (
    SCRATCH,
    SPLITS,
    Output,
    Plan,
    dropped_by,
    outputs_of_chunk,
    provenance_of,
    read_output,
    rows_of,
)
from stablelm_jax.preparation.screening import DROPPED_NAME, Dropped, DroppedSample, Screen
from stablelm_jax.preparation.tokenised import TokenisedReader, find_tokenised
from stablelm_jax.preparation.tokenize_chunk import TokenizeChunk, documents_of
from stablelm_jax.storage.files import replacing, write_json
from stablelm_jax.storage.remote import as_path, described, is_url
from stablelm_jax.tokenizer.chat import chat_template
from stablelm_jax.tokenizer.tokenizer import Tokenizer, load_tokenizer

# Changes when the same inputs and settings would give other bytes.
RECIPE = 3
# 1 GiB of int32: large files for a file system, small ones for a copy or a retry.
SHARD_TOKENS = 1 << 28

_ALLOW_UNREAD = "--allow-unread"
_NOT_IN_THE_BYTES = (
    'source', 'inputs', 'output', 'tokenizer', 'ranks', 'allow_unread', 'adopt', 'recipe',
    'drop_contaminated', 'store',
)  # fmt: skip
# Settings that the others lack.
_WHERE_ASKED_FOR = ("append_eod", "held_out_by", "keep", "sample", "filters", "benchmarks")
# Of a source of fewer bytes of text, what is held out is chosen among the documents that the
# filters keep: they judge it twice, which takes them seconds.
_FILTERED_TWICE = 4_000_000


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
    split_on: str | None
    held_out: float
    shard_tokens: int
    languages: list[str]
    licence: str
    provenance: dict[str, str]
    allow_unread: bool = False
    adopt: bool = False  # the inputs are prefixes of tokenised files
    append_eod: bool = False
    template: str | None = None
    max_turns: int = MAX_TURNS
    max_tokens: int | None = None
    held_out_by: str | None = None
    keep: list[list[str]] | None = None
    sample: int | None = None  # documents that are read, in place of all
    recipe: Mapping[str, Any] | None = None  # what a recipe says of the place, for the manifest
    filters: Sequence[str] = ()
    benchmarks: str | None = None
    drop_contaminated: bool = False
    store: str = ""  # URL that the source is sent to once it is made in `output`


class Preparation:
    """The steps of a job, to be called in order: begin, tokenize, collate.

    Attributes:
      directory: the folder of the source.
      place: the folder behind a URL that it is sent to, if it is.
      outputs: where the workers leave what they make.
      files, input_bytes: what is read, and its size as it lies on disk.
      revisions: of the repositories of the Hub that are read, as `hub.pinned` takes them.
      plan: how the input is cut, and what is held out; known from `begin` on.
      reasons: how often what was rejected; known from `tokenize` on.
      dropped: how many documents which filter dropped for which reason; from `tokenize` on.
      left_out: what was found and is not read.
      account: what became of all that was found; known from `tokenize` on.
    """

    plan: Plan
    account: Account
    look = staticmethod(held_out.look)  # of several sources in the same files, one for all

    def __init__(self, job: Job):
        self.job = job
        self.directory = pathlib.Path(os.path.abspath(job.output)) / job.source
        self.place = as_path(job.store) / job.source if job.store else None
        self._work = self.directory / ".work"
        self._plan_path, self.outputs = self._work / "plan.json", self._work / "outputs"
        self.tokenizer: Tokenizer = load_tokenizer(job.tokenizer, ranks=job.ranks)
        self._ids = TokenisedReader(self.tokenizer, job.append_eod)
        self.left_out: list[inputs.LeftOut] = []
        # What was begun goes on at the revisions that its repositories of the Hub had then.
        path = self._work / "revisions.json"
        begun = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        self._begun_at = begun.get("revisions", {})
        self.revisions = dict(self._begun_at) if begun.get("inputs") == job.inputs else {}
        self.files = self._find(self.left_out)
        for file in self.files:
            if file.path.startswith(f"{self.directory}{os.sep}"):
                raise inputs.InputError(
                    f"--input: {file.name} lies in the output {self.directory}; write elsewhere"
                )
        inputs.check_split(job.split_on, self.files)
        unknown = [item for item in self.left_out if item.size is None]
        if unknown and not job.allow_unread:
            raise inputs.InputError(
                f"--input: {unknown[0].name} {unknown[0].reason}; give yourself the permission, or"
                f" pass {_ALLOW_UNREAD} to do without"
            )
        self.input_bytes = sum(file.size or 0 for file in self.files)
        self.reasons: collections.Counter = collections.Counter()
        self.dropped: collections.Counter = collections.Counter()
        # All that the bytes of the source follow from.
        self._settings = {
            "recipe": RECIPE,
            "inputs_sha256": inputs.fingerprint(self.files),
            "tokenizer_sha256": self.tokenizer.sha256,
            **dataclasses.asdict(job),
        }
        for name in _NOT_IN_THE_BYTES:
            del self._settings[name]
        self._settings["filters"] = filters.in_full(job.filters, job.languages)
        self._benchmarks = Benchmarks(job.benchmarks) if job.benchmarks else None
        if self._benchmarks:
            asked = {"sha256": self._benchmarks.sha256, "drop": job.drop_contaminated}
            self._settings["benchmarks"] = asked
        for name in _WHERE_ASKED_FOR:  # as those of earlier releases
            if not self._settings[name]:
                del self._settings[name]
        if self._settings.pop("template"):
            self._settings["chat"] = chat_template(job.template, self.tokenizer).to_json()
        else:
            del self._settings["max_turns"], self._settings["max_tokens"]
        self._screen = Screen.of(self._settings)

    def _find(self, left_out: list[inputs.LeftOut] | None = None) -> list[inputs.InputFile]:
        if self.job.adopt:
            return find_tokenised(self.job.inputs, self._ids)
        job = self.job
        files = inputs.find_files(job.inputs, job.format, left_out, job.tokenizer, self.revisions)
        if not job.sample:
            return files
        chosen = chunks.spread(files, chunks.SAMPLE_PLACES)
        others = [file for file in files if file not in chosen]
        if left_out is not None:
            left_out += [LeftOut(file.name, "not in the sample", file.size) for file in others]
        return chosen

    def finished(self) -> SourceManifest | None:
        """The manifest if this very job was done before and its shards are all there.

        Raises:
          PreparationError: something else was prepared, or is being prepared, under this name.
          ManifestError, ShardError: what was prepared is damaged.
        """
        for place in filter(None, (self.directory, self.place)):
            with contextlib.suppress(manifest.ManifestMissing):
                found = manifest.read_manifest(place)
                break
        else:
            return None
        # Shards of an earlier recipe are others, but no worse for a run.
        settings = {**found.provenance.get("settings", {}), "recipe": RECIPE}
        revisions = found.provenance.get("revisions", {})
        self._compare(settings, f"{place} was prepared", revisions)
        manifest.verify(place, found)
        shutil.rmtree(self._work, ignore_errors=True)
        return found

    def _differing(self, theirs: Mapping) -> list[str]:
        """The settings that are not `theirs`. Some are there only where they are asked for."""
        names = dict.fromkeys([*self._settings, "chat", *_WHERE_ASKED_FOR])
        return [name for name in names if theirs.get(name) != self._settings.get(name)]

    def _compare(self, theirs: Mapping, what: str, revisions: Mapping[str, str]) -> None:
        files = "input files (names, sizes or dates)"
        if revisions and self.revisions and revisions != self.revisions:
            then, now = hub.pinned_names(revisions), hub.pinned_names(self.revisions)
            files = f"files of the Hub, {then} (now it is {now})"
        for key in self._differing(theirs):
            differs = {
                "inputs_sha256": files,
                "tokenizer_sha256": "tokenizer",
                "chat": "chat template",
                "filters": "filters, parameters of them, or versions of what they run on",
            }.get(key, f"{key} ({theirs.get(key)!r}, not {self._settings.get(key)!r})")
            raise PreparationError(
                f"{what} with other {differs}: ask for the same, choose another --source, or remove"
                f" {self.directory}"
            )

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Keeps a second process from working on the same source at the same time.

        Raises BlockingIOError, which names the other one.
        """
        self.directory.mkdir(parents=True, exist_ok=True)
        with contextlib.ExitStack() as stack:
            try:
                stack.enter_context(only_one(self.directory / ".lock"))
            except OSError as error:
                # A finished source that may only be read has nothing to protect.
                is_finished = (self.directory / manifest.MANIFEST_NAME).exists()
                if isinstance(error, BlockingIOError) or not is_finished:
                    raise
            yield

    def begin(self) -> bool:
        """Cuts the inputs and decides what is held out; True if earlier work is gone on with."""
        resumed = self._plan_path.exists()
        if resumed:
            self.plan = Plan.read(self._plan_path)
            resumed = not self._is_of_no_use()
        if resumed:
            what = f"{self.directory} was begun, not finished,"
            self._compare(self.plan.settings, what, self._begun_at)
        else:
            if (self._work / "settings.json").exists():
                raise PreparationError(
                    f"{self._work} was begun by an earlier release: finish it with that one, or "
                    "remove it to begin anew"
                )
            shutil.rmtree(self._work, ignore_errors=True)
            # Shards of a preparation whose manifest somebody deleted to make it anew.
            for split in SPLITS:
                for path in self.directory.glob(f"{split}-[0-9][0-9][0-9][0-9][0-9].*"):
                    path.unlink()
            self._work.mkdir()
            cut, seen, kind = self._first_look()
            rule = held_out.choose(seen, self.job.held_out, bool(self.job.held_out_by))
            settings = self._settings | ({"kind": kind} if "chat" in self._settings else {})
            self.plan = Plan(settings, rule, cut)
            if self.revisions:
                begun = {"inputs": self.job.inputs, "revisions": self.revisions}
                write_json(self._work / "revisions.json", begun)
            write_json(self._plan_path, self.plan)
        self.outputs.mkdir(exist_ok=True)
        return resumed

    def _is_of_no_use(self) -> bool:
        """Whether what other settings, or other inputs, left behind is nothing to keep."""
        differs = set(self._differing(self.plan.settings))
        if not differs:
            return False
        if (self._work / "logs" / "slurm_job").exists():  # which may still run
            return False
        now = {file.path: (file.size, file.version) for file in self.files}
        for file in {file for chunk in self.plan.chunks for file in chunk.files}:
            as_now = now.get(file.path, (file.size, file.version))
            is_gone = not is_url(file.path) and not os.path.exists(file.path)
            if is_gone or as_now != (file.size, file.version):
                return True
        outputs = list(map(read_output, self.outputs.glob("[0-9]*-*")))
        filled = {split for output in outputs for split in output.shards}
        # All was read, and refused or not as it was meant; or there is nothing yet.
        is_done = sum(output.last for output in outputs) == len(self.plan.chunks)
        is_read_anew = not differs.isdisjoint({*Reading._fields, "filters", "benchmarks"})
        return (is_done and (is_read_anew or len(filled) < len(SPLITS))) or not any(
            sum(output.tokens.values()) for output in outputs
        )

    def _first_look(self) -> tuple[list[chunks.Chunk], held_out.Look, str]:
        """How the input is cut, what was seen of it, and what most of its conversations are."""
        reading, kinds = Reading.of(self._settings), collections.Counter()

        def count(text: str) -> bool:
            kinds[kind_of_form(text)] += 1
            return True

        try:
            sample = self.job.sample
            cut = chunks.cut_sample(self.files, sample) if sample else chunks.cut(self.files)
            seen = self.look(cut, reading, count, self._ids)
            kind = max(sorted(kinds), key=kinds.get, default="")
            is_small = sum(size for _, size in seen.found.values()) < _FILTERED_TWICE
            is_small = is_small and bool(self._screen)
            if seen.whole and (len(seen.found) < held_out.FEW_DOCUMENTS or is_small):
                # The few that are held out must not be such that are refused.
                chats = ChatEncoder.of({**self._settings, "kind": kind}, self.tokenizer)

                def usable(text: str) -> bool:
                    (made,) = documents_of([text], self.tokenizer, chats, self._screen)
                    return isinstance(made, Documents)

                seen = held_out.look(cut, reading, usable, self._ids)
        except Exception as error:  # of a driver: each raises its own
            if isinstance(error, ValueError | OSError):
                raise
            text = f"reading the input failed, {described(error)}; {remedy(error)}"
            raise PreparationError(text) from error
        return cut, seen, kind

    def tokenize(self, executor: Executor) -> list[Output]:
        """The outputs of every chunk, in order, made where they are not there yet.

        Raises:
          PreparationError: an input changed, a split has no document, or too much was not read.
          TasksFailed: some chunk was not done.
        """
        # Local workers of an earlier call ended with it; jobs of SLURM may still run.
        if executor.kind == "local" and not (self._work / "logs" / "slurm_job").exists():
            for path in self.outputs.glob(f"{SCRATCH}*"):
                shutil.rmtree(path)
        self.run(executor, self.step(), "logs")
        self._look_again()
        outputs = []
        for chunk in range(len(self.plan.chunks)):
            outputs += outputs_of_chunk(self.outputs, chunk)
            if not outputs or outputs[-1].chunk != chunk or not outputs[-1].last:
                raise PreparationError(
                    f"{self.outputs}: chunk {chunk} is marked as done, but some of it is gone;"
                    f" remove {self._work} and begin again"
                )
        self._list_rejected(outputs)
        self._list_dropped(outputs)
        list_left_out(self.directory / "left_out.jsonl", self.left_out)
        self._check_documents(outputs)
        read = "read from its beginnings as" if self.job.sample else "read as"
        self.account = Account.of(self.files, [each.files for each in outputs], self.left_out, read)
        if (refusal := self.account.refusal()) and not self.job.allow_unread:
            raise PreparationError(
                f"{refusal}; all is listed in {self.directory} (rejected.jsonl, left_out.jsonl);"
                f" take it out of the input, or pass {_ALLOW_UNREAD} to do without: what is done"
                " is kept"
            )
        return outputs

    def step(self) -> TokenizeChunk:
        """What a worker does for this source."""
        job, name = self.job, self.job.tokenizer
        # Workers may have another working directory.
        name = os.path.abspath(name) if os.path.exists(name) else name
        ranks = job.ranks and os.path.abspath(job.ranks)
        benchmarks = job.benchmarks and os.path.abspath(job.benchmarks)
        return TokenizeChunk(self._plan_path, self.outputs, name, ranks, benchmarks)

    def run(self, executor: Executor, step: PipelineStep, logs: str) -> None:
        """Runs a step for every chunk; TasksFailed, with the place if it is known, if one fails."""
        try:
            executor.run(step, len(self.plan.chunks), self._work / logs)
        except TasksFailed as error:
            self._look_again()  # a file that went away may be the reason
            at = "; ".join(filter(None, map(self._place_of, error.killed)))
            raise TasksFailed(f"{error}" + (f". It was at work near {at}" if at else "")) from error

    def _place_of(self, process: int) -> str:
        """Where in the input a local worker was, which was killed."""
        for path in self.outputs.glob(f"{SCRATCH}*-{process}-*"):
            with contextlib.suppress(OSError, ValueError):
                return read_output(path).place
        return ""

    def _look_again(self) -> None:
        """PreparationError if an input is not what was read any more; notes files that came."""
        try:
            now = {file.path: file for file in self._find()}
        except inputs.InputError:
            if any(map(is_url, self.job.inputs)):  # perhaps only a network that fails
                raise
            now = {}
        for file in self.files:
            then, seen = (file.size, file.version), now.pop(file.path, None)
            if seen is not None and then == (seen.size, seen.version):
                continue
            self._plan_path.unlink()  # what was made of it is worth nothing
            what = "changed" if seen else "went away"
            raise PreparationError(
                f"{file.name} {what} while it was read: wait until nothing writes to the input any"
                " more, then run the same command again, which begins anew"
            )
        for file in now.values():
            self.left_out.append(LeftOut(file.name, "came while others were read", file.size or 0))

    def _list_rejected(self, outputs: list[Output]) -> None:
        """Writes what gave no document, `file`, `line` and `reason` a line, and counts reasons."""
        self.reasons.clear()
        path = self.directory / "rejected.jsonl"
        with replacing(path) as aside, open(aside, "w", encoding="utf-8") as listed:
            for row in rows_of(self.outputs, outputs, self.plan, "rejected.jsonl"):
                listed.write(json.dumps(row, ensure_ascii=False) + "\n")
                self.reasons[streams.reason_kind(row["reason"])] += 1

    def _list_dropped(self, outputs: list[Output]) -> None:
        """Writes some of the documents that the filters dropped, and counts all of them."""
        self.dropped, sample = dropped_by(outputs), DroppedSample()
        listed = rows_of(self.outputs, outputs, self.plan, DROPPED_NAME) if self._screen else ()
        for row in listed:
            kind = str(Dropped(row["by"], row["reason"]))
            sample.add_row({**row, "of": self.dropped[kind]})
        path = self.directory / DROPPED_NAME
        sample.write(path) if self._screen else path.unlink(missing_ok=True)

    def _check_documents(self, outputs: list[Output]) -> None:
        filled = {split for output in outputs for split in output.shards}
        if len(filled) == len(SPLITS):
            return
        if filled:
            side = "train on" if "held_out" in filled else "hold out"
            problem = f"no document to {side}: it needs two different ones, one of them held out"
            if self.job.held_out_by:
                problem = f"no usable document to {side}; change --held-out {self.job.held_out:g}"
            elif not self.job.template:
                problem += "; add documents, or cut long texts: --split-on blank-lines, or 64kB"
        elif self.job.keep and not any(output.kept for output in outputs):
            problem = f"no record is kept by --keep {' '.join(map('='.join, self.job.keep))}"
            seen = keeping.total(output.not_kept for output in outputs)
            problem += f"; there are: {', '.join(seen) or 'no records at all'}"
        elif self.dropped:
            kind, count = self.dropped.most_common(1)[0]
            problem = (
                f"no document is left: the filters dropped {self.dropped.total():,}, {count:,} of"
                f' them by "{kind}"; look at some with --show-dropped {self.directory}, and give'
                " --language or other parameters"
            )
        elif not self.reasons:
            problem = f"no document in {len(self.files)} files: all are empty"
        else:
            reason, count = self.reasons.most_common(1)[0]
            problem = (
                f'no usable document: {self.reasons.total()} rejected, {count} of them "{reason}"'
            )
            if reason.startswith("no key to hold out by"):
                problem += f"; --held-out-by {self.job.held_out_by} is no key of the records"
            elif reason.startswith(("no key", "no column")):
                problem += "; --text-key names the key"
            if reason.startswith("a conversation"):
                problem += "; --template zephyr, chatml, tokenizer or a Jinja file takes them"
        if self.reasons:
            problem += f" (what was rejected is listed in {self.directory / 'rejected.jsonl'})"
        raise PreparationError(problem)

    def collate(self, outputs: list[Output]) -> SourceManifest:
        """Gives the shards their names, writes the manifest, removes what only the work needed."""
        counts = sum(np.load(self.outputs / output.name / "counts.npy") for output in outputs)
        tokenizer, job = self.tokenizer, self.job
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
            provenance={
                **job.provenance,
                "inputs": [shown(name) for name in job.inputs],
                "input_files": len(self.files),
                "input_bytes": self.input_bytes,
                **({"revisions": self.revisions} if self.revisions else {}),
                "found": {
                    end: {"files": files, "bytes": size}
                    for end, (files, size) in self.account.ends.items()
                },
                "unread_bytes": self.account.unread_bytes,
                "settings": self._settings,
                "held_out": self.plan.held_out._asdict(),
                **provenance_of(outputs, self._settings),
                **({"recipe": job.recipe} if job.recipe else {}),
                **self._contaminated(outputs),
            },
            rejected=self.reasons.total(),
            kind=self.plan.settings.get("kind", "text"),
            chat=self._settings.get("chat", {}),
        )
        manifest.verify(self.directory, made)
        manifest.write_manifest(self.directory, made)
        shutil.rmtree(self._work, ignore_errors=True)
        return made

    def _contaminated(self, outputs: list[Output]) -> dict[str, Any]:
        """The certificate, and the list that it counts beside the manifest."""
        if not self._benchmarks:
            return {}
        listed = rows_of(self.outputs, outputs, self.plan, CONTAMINATED_NAME)
        hits = list(map(Hit.of, listed))
        write_hits(self.directory / CONTAMINATED_NAME, hits)
        return {"contamination": certificate(self._benchmarks, hits, self.job.drop_contaminated)}

    def _split(self, split: str, outputs: list[Output]) -> Split:
        """Moves the shards of a split to the folder of the source, numbered in order."""
        infos: list[ShardInfo] = []
        for output in outputs:
            if split not in output.shards:
                continue
            name = f"{split}-{len(infos):05d}"
            infos.append(ShardInfo(**{**output.shards[split], "file": f"{name}.bin"}))
            for suffix in (".spans.npy", ".idx", ".bin"):
                # What is not there was moved by an earlier call, which was stopped.
                with contextlib.suppress(FileNotFoundError):
                    source = self.outputs / output.name / (split + suffix)
                    os.replace(source, self.directory / (name + suffix))
        return Split.of(infos, sum(output.text_bytes[split] for output in outputs))
