"""One source from its inputs to its manifest, in steps that can each be interrupted and resumed.

DATA/NAME/.work/           while it is being made: the plan, outputs of chunks, logs
DATA/NAME/*.bin, .idx      shards, of conversations with .spans.npy
DATA/NAME/rejected.jsonl
DATA/NAME/dropped.jsonl    where there are filters
DATA/NAME/contaminated.jsonl    where benchmarks are looked for
DATA/NAME/manifest.json    written last
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import json
import os
import pathlib
import shutil
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from datatrove.pipeline.base import PipelineStep

from stablelm_jax.data import manifest
from stablelm_jax.data.manifest import SourceManifest, Split, TokenizerInfo
from stablelm_jax.data.shards import ShardInfo
from stablelm_jax.preparation import chunks, held_out, hub, inputs, lists, streams
from stablelm_jax.preparation.account import Account
from stablelm_jax.preparation.contamination import Benchmarks, certificate
from stablelm_jax.preparation.conversations import ChatEncoder, Documents, kind_of_form
from stablelm_jax.preparation.executors import Executor, TasksFailed, remedy
from stablelm_jax.preparation.finding import InputError, InputFile, LeftOut, shown
from stablelm_jax.preparation.formats import Reading
from stablelm_jax.preparation.job import RECIPE, difference, settings_of
from stablelm_jax.preparation.lists import CONTAMINATED_NAME, DROPPED_NAME, write_list
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
from stablelm_jax.preparation.screening import Dropped, DroppedSample, Screen
from stablelm_jax.preparation.tokenised import TokenisedReader, find_tokenised
from stablelm_jax.preparation.tokenize_chunk import TokenizeChunk, documents_of
from stablelm_jax.preparation.why_empty import why_empty
from stablelm_jax.storage.files import write_json
from stablelm_jax.storage.remote import as_path, described, is_url
from stablelm_jax.tokenizer.tokenizer import Tokenizer, load_tokenizer

_ALLOW_UNREAD = "--allow-unread"
_INPUTS = {"inputs_sha256": "input files (names, sizes or dates)"}
# Of a source of fewer bytes of text, what is held out is chosen among the documents that the
# filters keep: they judge it twice, which takes them seconds.
_FILTERED_TWICE = 4_000_000


class PreparationError(ValueError):
    """The source cannot be made as things stand; the message says why and what to do."""


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

    def __init__(self, job: argparse.Namespace):
        self.job = job
        self.directory = pathlib.Path(os.path.abspath(job.output)) / job.source
        self.place = as_path(job.store) / job.source if job.store else None
        self._work = self.directory / ".work"
        self._plan_path, self.outputs = self._work / "plan.json", self._work / "outputs"
        self.tokenizer: Tokenizer = load_tokenizer(job.tokenizer, ranks=job.ranks)
        self._ids = TokenisedReader(self.tokenizer, job.append_eod)
        self.revisions = self._begun_at()
        self.left_out: list[LeftOut] = []
        self.files = self._find(self.left_out)
        self._check_files()
        self.input_bytes = sum(file.size or 0 for file in self.files)
        self.reasons: collections.Counter = collections.Counter()
        self.dropped: collections.Counter = collections.Counter()
        self._benchmarks = self._load_benchmarks()
        self._settings = settings_of(job, self.files, self.tokenizer, self._benchmarks)
        self._screen = Screen.of(self._settings)

    def _load_benchmarks(self) -> Benchmarks | None:
        try:
            return Benchmarks(self.job.benchmarks) if self.job.benchmarks else None
        except ValueError as error:
            raise ValueError(f"--benchmarks {error}") from error

    def _begun_at(self) -> dict[str, str]:
        """The revisions of the Hub at which the same inputs were begun, to go on with."""
        path = self._work / "revisions.json"
        begun = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        return begun.get("revisions", {}) if begun.get("inputs") == self.job.inputs else {}

    def _find(self, left_out: list[LeftOut]) -> list[InputFile]:
        """What is to be read; `left_out` gets what is not."""
        job = self.job
        if job.adopt:
            return find_tokenised(job.inputs, self._ids)
        files = inputs.find_files(job.inputs, job.format, left_out, job.tokenizer, self.revisions)
        if not job.sample:
            return files
        chosen = chunks.spread(files, chunks.SAMPLE_PLACES)
        others = [file for file in files if file not in chosen]
        left_out += [LeftOut(file.name, "not in the sample", file.size) for file in others]
        return chosen

    def _check_files(self) -> None:
        for file in self.files:
            if file.path.startswith(f"{self.directory}{os.sep}"):
                raise InputError(
                    f"--input: {file.name} lies in the output {self.directory}; write elsewhere"
                )
        inputs.check_split(self.job.split_on, self.files)
        unknown = [item for item in self.left_out if item.size is None]
        if unknown and not self.job.allow_unread:
            raise InputError(
                f"--input: {unknown[0].name} {unknown[0].reason}; give yourself the permission, or"
                f" pass {_ALLOW_UNREAD} to do without"
            )

    def locked(self) -> contextlib.AbstractContextManager[None]:
        """Keeps a second process from working on the same source at the same time.

        Entering it raises BlockingIOError, which names the other one.
        """
        self.directory.mkdir(parents=True, exist_ok=True)
        is_made = (self.directory / manifest.MANIFEST_NAME).exists()
        if is_made and not os.access(self.directory, os.W_OK):
            return contextlib.nullcontext()  # it may only be read
        return only_one(self.directory / ".lock")

    def finished(self) -> SourceManifest | None:
        """The manifest if this very job was done before and its shards are all there.

        Raises:
          PreparationError: something else was prepared under this name.
          ManifestError, ShardError: what was prepared is damaged.
        """
        for place in filter(None, (self.directory, self.place)):
            with contextlib.suppress(manifest.ManifestMissing):
                found = manifest.read_manifest(place)
                break
        else:
            return None
        inputs_differ, then = _INPUTS, found.provenance.get("revisions", {})
        if then and self.revisions and then != self.revisions:
            names = hub.pinned_names(then), hub.pinned_names(self.revisions)
            inputs_differ = {"inputs_sha256": "files of the Hub, {} (now it is {})".format(*names)}
        # Shards of an earlier recipe are others, but no worse for a run.
        settings = {**found.provenance.get("settings", {}), "recipe": RECIPE}
        if differs := difference(self._settings, settings, inputs_differ):
            raise self._other(f"{place} was prepared", differs, place)
        manifest.verify(place, found)
        shutil.rmtree(self._work, ignore_errors=True)
        return found

    def _other(self, what: str, differs: str, place: Any) -> PreparationError:
        return PreparationError(
            f"{what} with other {differs}: ask for the same, choose another --source, or remove"
            f" {place}"
        )

    def begin(self, look: Callable[..., held_out.Look] | None = None) -> bool:
        """Cuts the inputs and decides what is held out; True if earlier work is gone on with.

        `look`: in place of `held_out.look`. PreparationError: other work was begun here.
        """
        if self._plan_path.exists():
            self.plan = Plan.read(self._plan_path)
            differs = difference(self._settings, self.plan.settings, _INPUTS)
            if not differs:
                return True
            if not self._is_of_no_use():
                what = f"{self.directory} was begun, not finished,"
                raise self._other(what, differs, self.directory)
        shutil.rmtree(self._work, ignore_errors=True)
        # What a preparation left that was refused, or whose manifest somebody deleted; no more.
        for pattern in (
            *(f"{split}-[0-9][0-9][0-9][0-9][0-9].*" for split in SPLITS),
            *lists.NAMES,
        ):
            for path in self.directory.glob(pattern):
                path.unlink()
        self.outputs.mkdir(parents=True)
        cut, seen, kind = self._first_look(look or held_out.look)
        rule = held_out.choose(seen, self.job.held_out, bool(self.job.held_out_by))
        settings = self._settings | ({"kind": kind} if "chat" in self._settings else {})
        self.plan = Plan(settings, rule, cut)
        if self.revisions:
            begun = {"inputs": self.job.inputs, "revisions": self.revisions}
            write_json(self._work / "revisions.json", begun)
        write_json(self._plan_path, self.plan)
        return False

    def _is_of_no_use(self) -> bool:
        """Whether what was begun with other settings was refused once all was read, or is nothing.

        What is half done is somebody's work, and a job of SLURM may still run.
        """
        if (self._work / "logs" / "slurm_job").exists():
            return False
        outputs = list(map(read_output, self.outputs.glob("[0-9]*-*")))
        is_done = sum(output.last for output in outputs) == len(self.plan.chunks)
        return is_done or not any(sum(output.tokens.values()) for output in outputs)

    def _first_look(
        self, look: Callable[..., held_out.Look]
    ) -> tuple[list[chunks.Chunk], held_out.Look, str]:
        """How the input is cut, what was seen of it, and what most of its conversations are."""
        reading, kinds = Reading.of(self._settings), collections.Counter()

        def count(text: str) -> bool:
            kinds[kind_of_form(text)] += 1
            return True

        def usable(text: str) -> bool:
            (made,) = documents_of([text], self.tokenizer, chats, self._screen)
            return isinstance(made, Documents)

        try:
            sample = self.job.sample
            cut = chunks.cut_sample(self.files, sample) if sample else chunks.cut(self.files)
            seen = look(cut, reading, count, self._ids)
            kind = max(sorted(kinds), key=kinds.get, default="")
            size = sum(size for _, size in seen.found.values())
            is_small = bool(self._screen) and size < _FILTERED_TWICE
            if seen.whole and (len(seen.found) < held_out.FEW_DOCUMENTS or is_small):
                # The few that are held out must not be such that are refused.
                chats = ChatEncoder.of({**self._settings, "kind": kind}, self.tokenizer)
                seen = held_out.look(cut, reading, usable, self._ids)
        except (ValueError, OSError):
            raise
        except Exception as error:  # of a driver: each raises its own
            text = f"reading the input failed, {described(error)}; {remedy(error)}"
            raise PreparationError(text) from error
        return cut, seen, kind

    def step(self) -> TokenizeChunk:
        """What a worker, which may have another working directory, does for this source."""
        job, name = self.job, self.job.tokenizer
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
        left_out = (
            {"file": item.name, "reason": item.reason, "files": item.files, "bytes": item.size}
            for item in self.left_out
        )
        write_list(self.directory / "left_out.jsonl", left_out)
        read = "read from its beginnings as" if self.job.sample else "read as"
        self.account = Account.of(self.files, [each.files for each in outputs], self.left_out, read)
        if why := why_empty(self.job, outputs, self.reasons, self.dropped):
            listed = f" (what was rejected is listed in {self.directory / 'rejected.jsonl'})"
            raise PreparationError(why + (listed if self.reasons else ""))
        if (refusal := self.account.refusal()) and not self.job.allow_unread:
            raise PreparationError(
                f"{refusal}; all is listed in {self.directory} (rejected.jsonl, left_out.jsonl);"
                f" take it out of the input, or pass {_ALLOW_UNREAD} to do without: what is done"
                " is kept"
            )
        return outputs

    def _look_again(self) -> None:
        """PreparationError if an input is not what was read any more; notes files that came."""
        try:
            now = {file.path: file for file in self._find([])}
        except InputError:
            if any(map(is_url, self.job.inputs)):  # perhaps only a network that fails
                raise
            now = {}
        for file in self.files:
            seen = now.pop(file.path, None)
            if seen is None or (file.size, file.version) != (seen.size, seen.version):
                self._plan_path.unlink()  # what was made of it is worth nothing
                raise PreparationError(
                    f"{file.name} {'changed' if seen else 'went away'} while it was read: wait"
                    " until nothing writes to the input any more, then run the same command again,"
                    " which begins anew"
                )
        for file in now.values():
            self.left_out.append(LeftOut(file.name, "came while others were read", file.size or 0))

    def _list_rejected(self, outputs: list[Output]) -> None:
        """Writes what gave no document, `file`, `line` and `reason` a line, and counts reasons."""
        self.reasons.clear()

        def counted() -> Iterator[dict[str, Any]]:
            for row in rows_of(self.outputs, outputs, self.plan, "rejected.jsonl"):
                self.reasons[streams.reason_kind(row["reason"])] += 1
                yield row

        write_list(self.directory / "rejected.jsonl", counted())

    def _list_dropped(self, outputs: list[Output]) -> None:
        """Writes some of the documents that the filters dropped, and counts all of them."""
        self.dropped, sample = dropped_by(outputs), DroppedSample()
        if not self._screen:
            return
        for row in rows_of(self.outputs, outputs, self.plan, DROPPED_NAME):
            kind = str(Dropped(row["by"], row["reason"]))
            sample.add_row({**row, "of": self.dropped[kind]})
        sample.write(self.directory / DROPPED_NAME)

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
            provenance=self._provenance(outputs),
            rejected=self.reasons.total(),
            kind=self.plan.settings.get("kind", "text"),
            chat=self._settings.get("chat", {}),
        )
        manifest.verify(self.directory, made)
        manifest.write_manifest(self.directory, made)
        shutil.rmtree(self._work, ignore_errors=True)
        return made

    def _provenance(self, outputs: list[Output]) -> dict[str, Any]:
        return {
            **self.job.provenance,
            "inputs": [shown(name) for name in self.job.inputs],
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
            **({"recipe": self.job.facts} if self.job.facts else {}),
            **self._contaminated(outputs),
        }

    def _contaminated(self, outputs: list[Output]) -> dict[str, Any]:
        """The certificate, and the list that it counts beside the manifest."""
        if not self._benchmarks:
            return {}
        hits = list(rows_of(self.outputs, outputs, self.plan, CONTAMINATED_NAME))
        write_list(self.directory / CONTAMINATED_NAME, hits)
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
