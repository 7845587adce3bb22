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
from stablelm_jax.preparation import hub, recipe_flags, store, summary, together
from stablelm_jax.preparation.executors import EXECUTORS, Executor, TasksFailed, remedy
from stablelm_jax.preparation.finding import InputError
from stablelm_jax.preparation.flags import (
    add_chat_flags,
    add_data_root_flags,
    add_input_flags,
    add_recipe_flags,
    add_screening_flags,
    add_slurm_flags,
    check_together,
    pair,
    place,
)
from stablelm_jax.preparation.job import RECIPE, job_of
from stablelm_jax.preparation.lock import only_one
from stablelm_jax.preparation.prepare_source import Preparation
from stablelm_jax.preparation.progress import Watch, progress
from stablelm_jax.preparation.recipe_table import show
from stablelm_jax.preparation.recipes import SUBSTITUTE, Recipe, load_recipe
from stablelm_jax.preparation.screening import show_dropped
from stablelm_jax.preparation.verify import verify_root
from stablelm_jax.run.console import make_console

# 1 GiB of int32: large files for a file system, small ones for a copy or a retry.
_SHARD_TOKENS = 1 << 28


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the verb; returns the exit code: 0, 1 for a failure, 2 for bad arguments."""
    logger.remove()  # datatrove's messages stay in its files
    parser = make_parser()
    flags = parser.parse_args(arguments)
    console = make_console(highlight=False, soft_wrap=True)
    failures: list[_Failure] = []
    try:
        check_together(parser, flags)
        executor = Executor.of(flags)
        recipe = load_recipe(flags.recipe) if flags.recipe else None
        if flags.show_dropped:
            show_dropped(flags.show_dropped, console)
        elif flags.list:
            names = recipe_flags.names_asked(recipe, flags.source or [recipe_flags.ALL])
            listed = dataclasses.replace(recipe, sources=tuple(map(recipe.source, names)))
            show(listed, console, in_full=bool(flags.source))
        elif flags.verify:
            count = verify_root(flags.verify, recipe, flags.workers, console)
            failures = [_Failure((), 1, f"differences, named above: {count:,}")] if count else []
        elif flags.dedup:
            failures = _deduplicate(flags, recipe, executor, console)
        else:
            jobs, failures = _jobs(parser, arguments, flags, recipe, console)
            for group in together.groups(jobs):
                failures += _prepare_group(group, executor, console)
    except ValueError as error:
        failures = [_Failure.of([], error, begun=False)]
    missing = [each for each in failures if each.is_missing and flags.recipe and not flags.inputs]
    if missing:
        names = [name for each in missing for name in each.sources]
        console.print(recipe_flags.weights_without(recipe, names))
    for failure in failures:
        named = [", ".join(failure.sources)] if flags.recipe and failure.sources else []
        text = ": ".join([*named, failure.text])
        if failure in missing:
            text += f"; {recipe_flags.elsewhere(recipe, failure.sources[0], flags.origin)}"
        print("prepare:", text, file=sys.stderr)
    return max((failure.code for failure in failures), default=0)


class _Failure(NamedTuple):
    sources: tuple[str, ...]
    code: int  # of the exit: 1 where it was begun, else 2
    text: str
    is_missing: bool = False  # nothing is to be read

    @classmethod
    def of(cls, sources: Sequence[str], error: Exception, begun: bool) -> _Failure:
        text = " ".join(str(error).splitlines())
        if begun and isinstance(error, OSError) and error.errno:  # of this process, not of a worker
            text += f"; {remedy(error)}"
        is_missing = isinstance(error, InputError) and not begun
        return cls(tuple(sources), 1 if begun else 2, text, is_missing)


def _deduplicate(
    flags: argparse.Namespace, recipe: Recipe | None, executor: Executor, console: Console
) -> list[_Failure]:
    from stablelm_jax.preparation.dedup import Deduplication, deduplicate  # slow to import

    work = Deduplication(flags, recipe)
    try:
        work.output.mkdir(parents=True, exist_ok=True)
        with only_one(work.output / ".lock"):
            deduplicate(work, executor, console)
    except (ValueError, OSError, TasksFailed) as error:
        return [_Failure.of([], error, begun=True)]
    return []


def _jobs(
    parser: argparse.ArgumentParser,
    arguments: Sequence[str] | None,
    flags: argparse.Namespace,
    recipe: Recipe | None,
    console: Console,
) -> tuple[list[argparse.Namespace], list[_Failure]]:
    """A job, or why there is none, for each source; ValueError for what is wrong with the flags."""
    names, jobs, failures = flags.source or [], [], []
    if not names:
        raise ValueError("--source: is missing; give its name")
    if recipe is None and len(names) > 1:
        raise ValueError("--source: several only out of a --recipe; else one after the other")
    for name in names if recipe is None else recipe_flags.names_asked(recipe, names):
        try:
            known = recipe_flags.filled(recipe, name, flags) if recipe else {}
        except InputError as error:
            failures.append(_Failure.of([name], error, begun=False))
            continue
        # What is given by hand wins.
        one = parser.parse_args(arguments, argparse.Namespace(**known))
        if recipe:
            one.filters = recipe_flags.filters_asked(recipe.source(name), one.filters)
            if flags.origin == SUBSTITUTE and one.facts["state"] != SUBSTITUTE:
                console.print(f"{name}: has no substitute; its first place is read, as published")
        jobs.append(job_of(one, name))
    return jobs, failures


def _prepare_group(
    jobs: Sequence[argparse.Namespace], executor: Executor, console: Console
) -> list[_Failure]:
    """Prepares sources, those that lie in the same files in one read; returns what failed."""
    names = [job.facts["source"] if job.facts else job.source for job in jobs]
    begun, failures = False, []
    try:
        preparations = [Preparation(job) for job in jobs]
        begun = True
        with contextlib.ExitStack() as locks:
            for preparation in preparations:
                locks.enter_context(preparation.locked())
            left = [each for each in preparations if len(jobs) > 1 and not each.finished()]
            are_together = len(left) > 1
            if are_together:
                _read_together(left, executor, console)
            for preparation in preparations:
                try:
                    _prepare(preparation, executor, console, are_together)
                except (ValueError, OSError, TasksFailed) as error:
                    failures.append(_Failure.of([preparation.job.source], error, begun))
    except (ValueError, OSError, TasksFailed) as error:
        return [_Failure.of(names, error, begun)]
    return failures


def _read_together(
    preparations: Sequence[Preparation], executor: Executor, console: Console
) -> None:
    started = time.monotonic()
    for preparation, resumed in zip(preparations, together.begin(preparations)):
        console.print(summary.plan(preparation, executor, resumed))
    names = ", ".join(each.job.source for each in preparations)
    console.print(f"reading the files of {names} once")
    with progress(preparations, console) as watch:
        together.tokenize(preparations, executor)
    console.print(f"{_speed(started, watch)}, of all of them together")


def _prepare(preparation: Preparation, executor: Executor, console: Console, is_read: bool) -> None:
    """Prepares a source; `is_read`: its files were, together with others, and that was said."""
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
    if is_read:
        outputs = preparation.tokenize(executor)
    else:
        started = time.monotonic()
        console.print(summary.plan(preparation, executor, preparation.begin()))
        with progress([preparation], console) as watch:
            outputs = preparation.tokenize(executor)
    made = preparation.collate(outputs)
    for part in summary.parts(preparation, made):
        console.print(part)
    read = "read together with others, see above" if is_read else _speed(started, watch)
    console.print(f"{read}, ids by {' and '.join(made.provenance['engines'])}")
    for problem in sorted({output.engine_problem for output in outputs} - {""}):
        console.print(f"WARNING: {problem}; what it would have made is tiktoken's")
    console.print(
        f"prepared {made.source}: {summary.counts(made)} -> {directory / manifest.MANIFEST_NAME}"
    )
    _send(preparation, console)


def _speed(started: float, watch: Watch) -> str:
    seconds = time.monotonic() - started
    speed = f", {watch.new_bytes / 1e6 / seconds:.1f} MB/s of text" if watch.new_bytes else ""
    return f"{seconds:.1f} s from the first byte to the last{speed}"


def _send(preparation: Preparation, console: Console) -> None:
    """Sends a source that lies in a folder here to the store that is its place."""
    if preparation.place and (preparation.directory / manifest.MANIFEST_NAME).exists():
        store.send(preparation.directory, preparation.place, console)
        console.print(f"sent to {preparation.place}; {preparation.directory} is empty again")


def make_parser() -> argparse.ArgumentParser:
    """All flags of the verb."""
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
    add('--output', type=place, metavar='DATA',
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
    add('--shard-tokens', type=int, default=_SHARD_TOKENS, metavar='N',
        help=f'tokens a shard at most (default {_SHARD_TOKENS:,})')  # fmt: skip
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
    add_data_root_flags(parser)
    add_slurm_flags(parser)
    return parser
