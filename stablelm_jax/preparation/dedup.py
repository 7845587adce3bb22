"""`prepare --dedup DATA --output CLEAN`: a data root without its copies, as another data root.

CLEAN/.work/        while it is being made: what the tasks of copies.py leave
CLEAN/NAME/         a source, made in .work and renamed; `duplicates.jsonl` lists what it lost
CLEAN/dedup.json    what was done, and what became of each source; written last
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import os
import pathlib
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Column, Table

from stablelm_jax.data import manifest
from stablelm_jax.data.manifest import SourceManifest, Split
from stablelm_jax.data.shards import ShardInfo
from stablelm_jax.preparation import copies
from stablelm_jax.preparation.copies import KINDS, Plan, PlannedShard, Stage
from stablelm_jax.preparation.executors import Executor
from stablelm_jax.preparation.job import difference
from stablelm_jax.preparation.outputs import SPLITS
from stablelm_jax.preparation.recipes import Recipe
from stablelm_jax.preparation.verify import names_in, source_names
from stablelm_jax.storage.files import flush_to_disk, write_json
from stablelm_jax.storage.remote import as_path, is_url
from stablelm_jax.tokenizer.tokenizer import ARCADE100K, load_tokenizer

# Changes when the same sources and settings would give other bytes.
RECIPE = 2
SUMMARY = "dedup.json"
_RANGE_DOCUMENTS = 1 << 24  # whose hashes a task compares, in about 1.5 GB
_BAND_DOCUMENTS = 1 << 26  # whose signatures a task compares, one after the other


class Deduplication:
    """The steps of a job, to be called in order: finished, begin, run.

    Attributes:
      sources: the manifests of the data root by the names of their folders, without samples.
      samples: the names of sources that `--sample` made: other sources hold the same documents.
      order: the sources of texts; of copies the one in the earlier source stays.
      settings: all that the result follows from.
    """

    plan: Plan

    def __init__(self, flags: argparse.Namespace, recipe: Recipe | None):
        """`flags`: of `prepare`. ValueError for what cannot be done."""
        if is_url(flags.output):
            raise ValueError("--output: with --dedup a folder of this machine; copy it from there")
        data = flags.dedup if is_url(flags.dedup) else os.path.abspath(flags.dedup)
        self.root, self.output = as_path(data), pathlib.Path(os.path.abspath(flags.output))
        self._work = self.output / ".work"
        if self.root in (self.output, *self.output.parents):
            raise ValueError(f"--output: {flags.output} lies in {flags.dedup}; write elsewhere")
        names = source_names(self.root, "--dedup")
        found = {name: manifest.read_manifest(self.root / name) for name in names}
        self.samples = [n for n in found if found[n].provenance.get("settings", {}).get("sample")]
        self.sources = {n: made for n, made in found.items() if n not in self.samples}
        texts = [name for name, made in self.sources.items() if made.kind == "text"]
        if not texts:
            but = f" but samples ({', '.join(self.samples)})" if self.samples else ""
            raise ValueError(f"{data}: no source of texts{but}, and only texts are compared")
        manifest.open_sources(self.root, texts)  # whole, and of one tokenizer: tokens are compared
        for name in {*flags.order, *flags.exact_only} - self.sources.keys():
            raise ValueError(f"no source {name} in {data}; there are {', '.join(self.sources)}")
        known = recipe.sources if recipe else ()
        wanted = dict.fromkeys([*flags.order, *(each.name for each in known), *texts])
        self.order = [name for name in wanted if name in texts]
        unfiltered = [each.name for each in known if each.unfiltered]
        exact_only = {*flags.exact_only, *unfiltered} & self.sources.keys()
        self._tokenizer = self._find_tokenizer(flags, data)
        self.settings = {
            "recipe": RECIPE,
            "data_hash": manifest.data_hash(self.sources),
            "order": self.order,
            "near": flags.near,
            "exact_only": sorted(exact_only) if flags.near else [],
        }

    def _find_tokenizer(self, flags: argparse.Namespace, data: str) -> tuple[str, str | None]:
        """Name and ranks of the tokenizer that made the texts: as asked for, or as they say."""
        made = self.sources[self.order[0]].tokenizer
        found = made.name if flags.tokenizer == ARCADE100K else flags.tokenizer
        found = os.path.abspath(found) if os.path.exists(found) else found
        remedy = f"--tokenizer says where that of {data} is (sha256 {made.sha256[:12]})"
        try:
            if load_tokenizer(found, ranks=flags.ranks).sha256 != made.sha256:
                raise ValueError(f"{found} is not the tokenizer that made the sources")
        except ValueError as error:
            raise ValueError(f"{error}; {remedy}") from error
        return found, flags.ranks and os.path.abspath(flags.ranks)

    def finished(self) -> dict[str, Any] | None:
        """The summary, where this very job was done before.

        ValueError: something else was done there, or what was done is damaged.
        """
        if not (self.output / SUMMARY).exists():
            return None
        summary = _read_json(self.output / SUMMARY)
        self._check(summary["settings"], "was made")
        for name, result in summary["sources"].items():
            if "nothing_left" not in result:
                manifest.verify(self.output / name, manifest.read_manifest(self.output / name))
        shutil.rmtree(self._work, ignore_errors=True)
        return summary

    def begin(self) -> bool:
        """Writes down what is to be done; True if earlier work is gone on with."""
        path = self._work / "plan.json"
        if path.exists():
            self.plan = Plan.read(self._work)
            self._check(self.plan.settings, "was begun")
            return True
        if others := list(self.output.glob("*/manifest.json")):
            raise ValueError(f"--output: {others[0].parent} lies there already; write elsewhere")
        self._lay_out(dropped=[])
        return False

    def _lay_out(self, dropped: list[str]) -> None:
        """Plans the work; dropped sources come last, so that what others hold too stays there."""
        (self._work / "plan.json").unlink(missing_ok=True)  # first: what is left then is not used
        if self._work.exists():
            shutil.rmtree(self._work)
        for name in (*copies.FOLDERS, *(f"sources/{name}" for name in self.sources)):
            (self._work / name).mkdir(parents=True)
        kept = [name for name in self.order if name not in dropped]
        shards = [
            shard._replace(dropped=names is dropped)
            for names in (kept, dropped)
            for split in ("held_out", "train")
            for name in names
            for shard in self._shards(name, split)
        ]
        self.plan = Plan(self.settings, str(self.root), *self._tokenizer, shards)
        write_json(self._work / "plan.json", self.plan)

    def _check(self, theirs: dict[str, Any], what: str) -> None:
        if differs := difference(self.settings, theirs, {"data_hash": "sources"}):
            raise ValueError(
                f"{self.output} {what} with other {differs}: ask for the same, choose another"
                " --output, or remove it"
            )

    def _shards(self, name: str, split: str) -> Iterator[PlannedShard]:
        first, is_near = 0, name not in self.settings["exact_only"]
        for info in getattr(self.sources[name], split).shards:
            yield PlannedShard(name, split, dataclasses.asdict(info), first, is_near)
            first += info.documents

    def run(self, executor: Executor, console: Console) -> dict[str, Any]:
        """Does the work, or what is left of it; returns the summary. TasksFailed: not all of it."""

        def stage(function: Callable, tasks: int) -> None:
            started, name = time.monotonic(), function.__name__
            executor.run(Stage(function, self._work), tasks, self._work / "logs" / name)
            seconds = time.monotonic() - started
            console.print(f"{name.replace('_', ' ')}: {tasks:,} tasks, {seconds:.1f} s")

        while emptied := self._find_copies(stage):
            console.print(f"{emptied}: nothing is left to train on; begun again without it")
            self._lay_out([*self._dropped(), emptied])
        stage(copies.write_shard, len(self.plan.shards))
        return self._collate()

    def _find_copies(self, stage: Callable[[Callable, int], None]) -> str | None:
        """Does all but to write; returns a source that is to be dropped first, if there is one."""
        shards, documents = self.plan.shards, sum(s.info["documents"] for s in self.plan.shards)
        stage(copies.hash_documents, len(shards))
        stage(copies.find_exact, -(-documents // _RANGE_DOCUMENTS))
        near = self.settings["near"]
        if near and not self._emptied():
            stage(copies.sign_documents, len(shards))
            # A task a band, or several: datatrove divides it by the signatures of the first file.
            first = copies.signed(self._work, self.plan, 0)
            several = max(1, min(documents // _BAND_DOCUMENTS, first))
            stage(copies.match_signatures, near["bands"] * several)
            stage(copies.cluster_pairs, 1)
        return self._emptied()

    def _emptied(self) -> str | None:
        """The last source that has nothing but copies to train on.

        It would not be written, and what it holds out would be nowhere: its copies go from others.
        One at a time, because without it another may have something left.
        """
        tables = [path for kind in KINDS for path in (self._work / kind).glob("*.npy")]
        ranks = (np.load(path, mmap_mode="r")[:, 0] for path in tables)
        gone = sum(np.bincount(each, minlength=len(self.plan.shards)) for each in ranks)
        for name in reversed(self.order):
            train = self._ranks(name, "train")
            documents = self.sources[name].train.documents
            if name not in self._dropped() and gone[train].sum() == documents:
                return name
        return None

    def _dropped(self) -> list[str]:
        return list(dict.fromkeys(shard.source for shard in self.plan.shards if shard.dropped))

    def _collate(self) -> dict[str, Any]:
        """Gives each source its manifest and its place; removes what only the work needed."""
        results: dict[str, Any] = {}
        for name, old in self.sources.items():
            made, results[name] = self._made(name, old)
            is_there = (self.output / name / manifest.MANIFEST_NAME).exists()
            if made and not is_there:  # else an earlier call was stopped after this one
                folder = self._work / "sources" / name
                self._bring(name, folder)
                record = {"settings": self.settings, **results[name]}
                made = dataclasses.replace(made, provenance={**old.provenance, "dedup": record})
                manifest.verify(folder, made)
                manifest.write_manifest(folder, made)
                flush_to_disk(folder)
                os.rename(folder, self.output / name)
        summary = {"settings": self.settings, "sources": results}
        write_json(self.output / SUMMARY, summary)
        shutil.rmtree(self._work, ignore_errors=True)
        return summary

    def _made(self, name: str, old: SourceManifest) -> tuple[SourceManifest | None, dict[str, Any]]:
        """The new manifest of a source, None where nothing is left to train on; and what went."""
        if name not in self.order:
            return old, {"left_as_it_is": old.kind}
        result, splits = {}, {}
        for split in SPLITS:
            paths = [self._work / "records" / f"{r:06d}.json" for r in self._ranks(name, split)]
            records = list(map(_read_json, paths))
            result = _sum([result, *(record["dedup"] for record in records)])
            infos = [ShardInfo(**record["shard"]) for record in records if record["shard"]]
            lost = sum(gone["text_bytes"] for gone in result[split].values())
            splits[split] = Split.of(infos, max(getattr(old, split).text_bytes - lost, 0))
        if name in self._dropped():
            only_here = sum(split.documents for split in splits.values())
            return None, result | {"nothing_left": True, "only_here": only_here}
        ranks = self._ranks(name, "train")
        counts = sum(np.load(self._work / "counts" / f"{rank:06d}.npy") for rank in ranks)
        entropy = manifest.unigram_entropy(counts)
        return dataclasses.replace(old, **splits, unigram_entropy=entropy), result

    def _ranks(self, name: str, split: str) -> list[int]:
        shards = enumerate(self.plan.shards)
        return [rank for rank, shard in shards if (shard.source, shard.split) == (name, split)]

    def _bring(self, name: str, folder: pathlib.Path) -> None:
        """Puts lists beside the new shards of a source, and all shards of what is not text."""
        is_text = name in self.order
        for file in names_in(self.root / name):
            if file.endswith(".jsonl") or (file.endswith((".bin", ".idx", ".npy")) and not is_text):
                path = self.root / name / file
                fetch = getattr(path, "fetch", functools.partial(shutil.copyfile, path))
                fetch(folder / file)
        if is_text:
            with open(folder / "duplicates.jsonl", "wb") as listed:
                for rank in self._ranks(name, "held_out") + self._ranks(name, "train"):
                    listed.write((self._work / "listed" / f"{rank:06d}.jsonl").read_bytes())


def _read_json(path: pathlib.Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def _sum(parts: Sequence[Any]) -> Any:
    """Adds up numbers, or in dictionaries the numbers under the same names."""
    if not isinstance(parts[0], dict):
        return sum(parts)
    names = sorted({name for part in parts for name in part})
    return {name: _sum([part[name] for part in parts if name in part]) for name in names}


def deduplicate(work: Deduplication, executor: Executor, console: Console) -> None:
    """Does a job, unless it was done before, and prints what became of each source."""
    if summary := work.finished():
        console.print(f"{work.output}: already deduplicated")
    else:
        going_on = "; going on with what was begun" if work.begin() else ""
        console.print(f"of copies the first of these keeps one: {', '.join(work.order)}{going_on}")
        summary = work.run(executor, console)
    names = "documents", "exact", "near", "held out", "tokens gone"
    columns = [Column("copies of", no_wrap=True), *(Column(n, justify="right") for n in names)]
    table = Table(*columns, box=box.SIMPLE)
    notes = [f"{name}: left out: a sample" for name in work.samples]
    for name, result in summary["sources"].items():
        old = work.sources[name]
        row = [old.train.documents + old.held_out.documents]
        if kind := result.get("left_as_it_is"):
            notes.append(f"{name}: copied as it is, copies of {kind} are not looked for")
        else:
            row += [_gone(result, "documents", kinds=(kind,)) for kind in KINDS]
            row += [_gone(result, "documents", splits=("held_out",)), _gone(result, "tokens")]
        if result.get("nothing_left"):
            note = f"{name}: nothing is left to train on, take it out of data.weights"
            if only_here := result["only_here"]:
                note += f"; documents that no other source has, gone with it: {only_here:,}"
            notes.append(note)
        table.add_row(name, *(f"{count:,}" for count in row))
    console.print(table)
    for note in notes:
        console.print(note)
    console.print(f"deduplicated {work.root} -> {work.output / SUMMARY}")


def _gone(result: Any, what: str, splits: Iterable = SPLITS, kinds: Iterable = KINDS) -> int:
    return sum(result[split][kind][what] for split in splits for kind in kinds)
