"""Documents into token shards: `python -m stablelm_jax.prepare --source NAME --input PATH...`

    python -m stablelm_jax.prepare --source news --input news/*.jsonl.gz --output data --workers 8

reads records (jsonl, json, parquet, Arrow, csv), texts, pages of HTML and source trees, archives of
these, compressed or not, local or any fsspec URL (docs/data.md says more), and writes
`data/news/`: token shards, held-out shards, `manifest.json`, `rejected.jsonl`. Stopped at any
moment, the same command goes on where it was and gives the same bytes. `--recipe stablelm_2 --list`
shows the sources of the published mixture and where they lie.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import os
import sys
import time
from collections.abc import Sequence
from typing import NamedTuple

from stablelm_jax.run_verb import run_verb

if __name__ == "__main__":  # what is imported below takes seconds, in which Ctrl-C may come
    run_verb(None, "prepare", interrupted="run the same command again to go on")

from datatrove.utils.logging import logger
from rich.console import Console

from stablelm_jax.data import manifest
from stablelm_jax.preparation import data_roots, hub, recipe_flags, store, summary, together
from stablelm_jax.preparation.conversations import MAX_TURNS
from stablelm_jax.preparation.executors import EXECUTORS, Executor, TasksFailed, remedy
from stablelm_jax.preparation.finding import InputError
from stablelm_jax.preparation.flags import (
    add_chat_flags,
    add_input_flags,
    add_recipe_flags,
    add_screening_flags,
    add_slurm_flags,
    pair,
)
from stablelm_jax.preparation.formats import Reading
from stablelm_jax.preparation.held_out import MAX_FRACTION
from stablelm_jax.preparation.prepare_source import RECIPE, SHARD_TOKENS, Job, Preparation
from stablelm_jax.preparation.progress import progress
from stablelm_jax.preparation.recipe_table import show
from stablelm_jax.preparation.recipes import Recipe, load_recipe
from stablelm_jax.run.console import make_console
from stablelm_jax.storage.remote import is_url


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the verb; returns the exit code: 0, 1 for a failure, 2 for bad arguments."""
    logger.remove()  # datatrove's messages stay in its files
    parser = _parser()
    flags = parser.parse_args(arguments)
    console = make_console(highlight=False, soft_wrap=True)
    failures: list[_Failure] = []
    try:
        executor, is_about_roots = Executor.of(flags), data_roots.is_asked_for(parser, flags)
        recipe = load_recipe(flags.recipe) if flags.recipe else None
        if is_about_roots:
            return data_roots.run(flags, recipe, executor, console)
        if flags.list:
            show(_listed(flags, recipe), console, in_full=bool(flags.source))
            return 0
        jobs = _jobs(parser, arguments, flags, recipe, failures)
    except ValueError as error:
        print("prepare:", " ".join(str(error).splitlines()), file=sys.stderr)
        return 2
    for group in together.groups(jobs):
        failures += _prepare_group(group, executor, console)
    missing = [each for each in failures if recipe and each.is_missing and not flags.inputs]
    if missing:
        names = [name for each in missing for name in each.sources]
        console.print(recipe_flags.weights_without(recipe, names))
    for failure in failures:
        text = f"{', '.join(failure.sources)}: {failure.text}" if recipe else failure.text
        if failure in missing:
            text += f"; {recipe_flags.elsewhere(recipe, failure.sources[0], flags.origin)}"
        print("prepare:", text, file=sys.stderr)
    return max((failure.code for failure in failures), default=0)


class _Failure(NamedTuple):
    sources: tuple[str, ...]
    code: int  # of the exit: 1 where it was begun, else 2
    text: str
    is_missing: bool  # nothing is to be read

    @classmethod
    def of(cls, sources: Sequence[str], error: Exception, begun: bool) -> _Failure:
        text = " ".join(str(error).splitlines())
        if begun and isinstance(error, OSError) and error.errno:  # of this process, not of a worker
            text += f"; {remedy(error)}"
        is_missing = isinstance(error, InputError | recipe_flags.Unavailable) and not begun
        return cls(tuple(sources), 1 if begun else 2, text, is_missing)


def _jobs(
    parser: argparse.ArgumentParser,
    arguments: Sequence[str] | None,
    flags: argparse.Namespace,
    recipe: Recipe | None,
    failures: list[_Failure],
) -> list[Job]:
    """A job for each source that is asked for; ValueError for what is wrong with the flags."""
    names, jobs = flags.source or [], []
    if recipe is None and len(names) > 1:
        raise ValueError("--source: several only out of a --recipe; else one after the other")
    for name in names if recipe is None else recipe_flags.names_asked(recipe, names):
        try:
            known = recipe_flags.filled(recipe, name, flags) if recipe else {}
        except recipe_flags.Unavailable as error:
            failures.append(_Failure.of([name], error, begun=False))
            continue
        # What is given by hand wins.
        one = parser.parse_args(arguments, argparse.Namespace(**known))
        one.source = name
        if recipe:
            one.filters = recipe_flags.filters_asked(recipe.source(name), one.filters)
        jobs.append(_job(one))
    if not (jobs or failures):
        raise ValueError("--source: is missing; give its name")
    return jobs


def _listed(flags: argparse.Namespace, recipe: Recipe | None) -> Recipe:
    """The recipe, or the sources of it that are named."""
    if recipe is None:
        raise ValueError("--list: of which recipe? --recipe stablelm_2 --list")
    names = recipe_flags.names_asked(recipe, flags.source or [recipe_flags.ALL])
    return dataclasses.replace(recipe, sources=tuple(map(recipe.source, names)))


def _prepare_group(jobs: Sequence[Job], executor: Executor, console: Console) -> list[_Failure]:
    """Prepares sources, those that lie in the same files in one read; returns what failed."""
    names = [job.recipe["source"] if job.recipe else job.source for job in jobs]
    begun, failures = False, []
    try:
        preparations = [Preparation(job) for job in jobs]
        begun = True
        with contextlib.ExitStack() as locks:
            for preparation in preparations:
                locks.enter_context(preparation.locked())
            if others := [each for each in preparations if len(jobs) > 1 and not each.finished()]:
                _read_together(others, executor, console)
            for preparation in preparations:
                try:
                    _prepare(preparation, executor, console)
                except (ValueError, OSError, TasksFailed) as error:
                    failures.append(_Failure.of([preparation.job.source], error, begun))
    except (ValueError, OSError, TasksFailed) as error:
        return [_Failure.of(names, error, begun)]
    return failures


def _read_together(
    preparations: Sequence[Preparation], executor: Executor, console: Console
) -> None:
    together.begin(preparations)
    names = ", ".join(preparation.job.source for preparation in preparations)
    console.print(f"reading the files of {names} once")
    with progress(preparations, console):
        together.tokenize(preparations, executor)


def _prepare(preparation: Preparation, executor: Executor, console: Console) -> None:
    directory = preparation.directory
    if names := hub.pinned_names(preparation.revisions):
        console.print(f"from the Hub: {names}, which names the same files at any time")
    if found := preparation.finished():
        place = directory if (directory / manifest.MANIFEST_NAME).exists() else preparation.place
        line = f"{place}: already prepared, {summary.counts(found)}"
        if found.provenance["settings"].get("recipe") != RECIPE:
            line += f", by an earlier release; remove {place} to do it anew"
        console.print(line)
        _send(preparation, console)
        return
    started = time.monotonic()
    resumed = preparation.begin()
    console.print(summary.plan(preparation, executor, resumed))
    with progress([preparation], console) as watch:
        outputs = preparation.tokenize(executor)
    made = preparation.collate(outputs)
    for part in summary.parts(preparation, made):
        console.print(part)
    seconds = time.monotonic() - started
    speed = f", {watch.new_bytes / 1e6 / seconds:.1f} MB/s of text" if watch.new_bytes else ""
    engines = " and ".join(made.provenance["engines"])
    console.print(f"{seconds:.1f} s from the first byte to the last{speed}, ids by {engines}")
    for problem in sorted({output.engine_problem for output in outputs} - {""}):
        console.print(f"WARNING: {problem}; what it would have made is tiktoken's")
    console.print(
        f"prepared {made.source}: {summary.counts(made)} -> {directory / manifest.MANIFEST_NAME}"
    )
    _send(preparation, console)


def _send(preparation: Preparation, console: Console) -> None:
    """Sends a source that lies in a folder here to the store that is its place."""
    if preparation.place and (preparation.directory / manifest.MANIFEST_NAME).exists():
        store.send(preparation.directory, preparation.place, console)
        console.print(f"sent to {preparation.place}; {preparation.directory} is empty again")


def _parser() -> argparse.ArgumentParser:
    # Cores this process may use, which a container or taskset may have made fewer.
    has_affinity = hasattr(os, "sched_getaffinity")
    cores = len(os.sched_getaffinity(0)) if has_affinity else os.cpu_count() or 1
    parser = argparse.ArgumentParser("stablelm prepare", description=__doc__.split(":")[0] + ".")
    add = parser.add_argument
    add('--source', nargs='+', metavar='NAME',
        help='its name: lower case letters, digits, _; with --recipe several of its names, or'
        ' all')  # fmt: skip
    add_input_flags(parser, required=False)
    add('--adopt', nargs='+', metavar='PREFIX',
        help='in place of --input: what Megatron or NeoX tokenised, PREFIX.bin and PREFIX.idx, with'
        ' the --tokenizer named')  # fmt: skip
    add('--append-eod', action='store_true',
        help='with --adopt: documents that lack the token for their end get it')  # fmt: skip
    add('--output', metavar='DATA',
        help='the source becomes DATA/NAME; a URL, as in gs://BUCKET/data, where it is sent once it'
        ' is made')  # fmt: skip
    add('--work-folder', metavar='DIR',
        help='where it is made if --output is a URL (default: in ~/.cache); it takes the size of'
        ' the shards, and with SLURM is on a disk that all nodes share')  # fmt: skip
    add('--tokenizer', default='arcade100k', metavar='NAME_OR_FILE',
        help='arcade100k (default), or a tokenizer.json')  # fmt: skip
    add("--ranks", metavar="FILE", help="cl100k ranks for arcade100k, if not found by themselves")
    add('--held-out', type=float, default=0.001, metavar='FRACTION',
        help='of the text, kept out of training at least (default 0.001)')  # fmt: skip
    add('--shard-tokens', type=int, default=SHARD_TOKENS, metavar='N',
        help=f'tokens a shard at most (default {SHARD_TOKENS:,})')  # fmt: skip
    add('--language', dest='languages', nargs='+', default=[], metavar='CODE',
        help='ISO 639-1, for the manifest and for --filters')  # fmt: skip
    add("--licence", default="", metavar="TEXT", help="of the text, for the manifest")
    add('--provenance', nargs='+', type=pair, default=[], metavar='KEY=VALUE',
        help='anything else to keep in the manifest')  # fmt: skip
    add('--held-out-by', metavar='KEY',
        help='records of the same value under this key are held out together, or not at'
        ' all')  # fmt: skip
    add('--allow-unread', action='store_true',
        help='go on where more than a tenth of the bytes found is not read as text')  # fmt: skip
    add('--sample', type=int, metavar='N',
        help='N documents alone, from the beginnings of files here and there: NAME_sample, a source'
        ' to look at')  # fmt: skip
    add("--executor", default="local", choices=EXECUTORS, help="where the work runs")
    add('--workers', type=int, default=cores, metavar='N',
        help='tasks at a time (default: the cores of this machine)')  # fmt: skip
    parser.set_defaults(facts=None, store="")
    add_recipe_flags(parser)
    add_screening_flags(parser)
    add_chat_flags(parser)
    data_roots.add_flags(parser)
    add_slurm_flags(parser)
    return parser


def _job(flags: argparse.Namespace) -> Job:
    """The job that the flags ask for; ValueError for what argparse cannot see."""
    reads_texts = Reading.of(vars(flags)) != Reading()  # other than by default
    has_name = manifest.SOURCE_NAME.fullmatch(flags.source)
    for is_wrong, problem in [
        (bool(flags.inputs) == bool(flags.adopt), "give --input, or --adopt in its place"),
        (flags.append_eod and not flags.adopt, "--append-eod: only with --adopt"),
        (flags.adopt and flags.template, "--adopt: tokens have no conversations, no --template"),
        (
            flags.template
            and Reading.of({**vars(flags), "format": "auto", "held_out_by": None, "keep": None})
            != Reading(),
            "--template: conversations have keys of their own, no --text-key, --split-on",
        ),
        (
            flags.filters and (flags.template or flags.adopt),
            "--filters: they judge texts, not conversations (--template) or tokens (--adopt)",
        ),
        (
            flags.drop_contaminated and not flags.benchmarks,
            "--drop-contaminated: of which --benchmarks?",
        ),
        (flags.max_tokens is not None and not flags.template, "--max-tokens: with --template"),
        (flags.max_turns != MAX_TURNS and not flags.template, "--max-turns: with --template"),
        (flags.max_turns < 1, "--max-turns: from 1 up"),
        (flags.max_tokens is not None and flags.max_tokens < 1, "--max-tokens: from 1 up"),
        (
            flags.adopt and reads_texts,
            "--adopt: no --format, --text-key, --split-on, --keep for tokens",
        ),
        (not flags.output, "--output: is missing; give the folder that is to hold the source"),
        (flags.origin and not flags.recipe, "--origin: a place of a --recipe"),
        (flags.sample is not None and flags.sample < 2, "--sample: from 2 documents up"),
        (flags.sample and flags.adopt, "--adopt: tokens are taken whole, no --sample"),
        (not has_name, "--source: use lower case letters, digits and _, a letter first"),
        (
            flags.work_folder and not is_url(flags.output),
            "--work-folder: --output is a folder of this machine, where the work lies too",
        ),
        (not 0 <= flags.held_out <= MAX_FRACTION, f"--held-out: give 0 to {MAX_FRACTION}"),
        (flags.shard_tokens < 1, "--shard-tokens: give a number from 1 up"),
    ]:
        if is_wrong:
            raise ValueError(problem)
    fields = {field.name: getattr(flags, field.name) for field in dataclasses.fields(Job)}
    fields |= {"inputs": flags.inputs or flags.adopt, "adopt": bool(flags.adopt)}
    # Another name, and it is no source of the config: never taken for the whole.
    fields |= {"source": f"{flags.source}_sample" if flags.sample else flags.source}
    fields["recipe"] = flags.facts
    if is_url(flags.output):
        fields["store"] = flags.output
        fields["output"] = flags.work_folder or str(store.work_folder(flags.output))
    return Job(**{**fields, "provenance": dict(flags.provenance)})
