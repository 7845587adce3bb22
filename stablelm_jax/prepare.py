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
import collections
import contextlib
import dataclasses
import os
import sys
import time
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from stablelm_jax.run_verb import run_verb

if __name__ == "__main__":  # what is imported below takes seconds, in which Ctrl-C may come
    run_verb(None, "prepare", interrupted="run the same command again to go on")

from datatrove.utils.logging import logger
from rich import box
from rich.console import Console
from rich.table import Column, Table

from stablelm_jax.data import manifest
from stablelm_jax.data.manifest import SourceManifest
from stablelm_jax.preparation import data_roots, hub, recipe_flags, together
from stablelm_jax.preparation.contamination import CONTAMINATED_NAME
from stablelm_jax.preparation.conversations import MAX_TURNS
from stablelm_jax.preparation.executors import EXECUTORS, Executor, TasksFailed, remedy
from stablelm_jax.preparation.filters import FILTERS, SEVERAL
from stablelm_jax.preparation.finding import InputError
from stablelm_jax.preparation.flags import add_input_flags
from stablelm_jax.preparation.formats import Reading
from stablelm_jax.preparation.held_out import MAX_FRACTION
from stablelm_jax.preparation.prepare_source import RECIPE, SHARD_TOKENS, Job, Preparation
from stablelm_jax.preparation.progress import progress
from stablelm_jax.preparation.recipe_table import show
from stablelm_jax.preparation.recipes import Recipe, load_recipe
from stablelm_jax.preparation.show_dropped import ShowDropped
from stablelm_jax.run.console import make_console

_REASONS_SHOWN = 5
_LOSS_WARNED_OF = 0.001


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
        line = f"{directory}: already prepared, {_counts(found)}"
        if found.provenance["settings"].get("recipe") != RECIPE:
            line += f", by an earlier release; remove {directory} to do it anew"
        console.print(line)
        return
    started = time.monotonic()
    resumed = preparation.begin()
    console.print(_plan(preparation, executor, resumed))
    with progress([preparation], console) as watch:
        outputs = preparation.tokenize(executor)
    made = preparation.collate(outputs)
    console.print(_found(preparation))
    console.print(_table(made))
    if "dropped" in made.provenance:
        console.print(_dropped(preparation, made))
    if found := made.provenance.get("contamination"):
        console.print(_contaminated(preparation, found))
    console.print(f"held out: {preparation.plan.held_out.reason}")
    console.print(_rejected(preparation, made))
    if found := made.provenance.get("keep"):
        for name, counts in found.items():
            listed = ", ".join(f"{value}: {count:,}" for value, count in counts.items())
            console.print(f"{name.replace('_', ' ')} by --keep: {listed or 'none'}")
    if chats := made.provenance.get("conversations"):
        console.print(f"last rounds dropped, too long: {chats['rounds_dropped']:,}")
    console.print(_lost(**made.provenance["characters_lost"]))
    console.print(f"unigram entropy of the train tokens: {made.unigram_entropy:.4f} nats")
    seconds = time.monotonic() - started
    speed = f", {watch.new_bytes / 1e6 / seconds:.1f} MB/s of text" if watch.new_bytes else ""
    engines = " and ".join(made.provenance["engines"])
    console.print(f"{seconds:.1f} s from the first byte to the last{speed}, ids by {engines}")
    for problem in sorted({output.engine_problem for output in outputs} - {""}):
        console.print(f"WARNING: {problem}; what it would have made is tiktoken's")
    console.print(
        f"prepared {made.source}: {_counts(made)} -> {directory / manifest.MANIFEST_NAME}"
    )


def _counts(made: SourceManifest) -> str:
    what, *counts = _items(made)
    tokens = made.train.tokens + made.held_out.tokens
    return f"{sum(counts):,} {what}, {tokens:,} tokens"


def _items(made: SourceManifest) -> tuple[str, int, int]:
    """What the source holds, and how many of it are trained on and held out."""
    sides = 2 if made.kind == "pairs" else 1
    what = "documents" if made.kind == "text" else made.kind
    return what, made.train.documents // sides, made.held_out.documents // sides


def _plan(preparation: Preparation, executor: Executor, resumed: bool) -> str:
    kinds = collections.Counter(
        file.kind + (f".{file.compression}" if file.compression else "")
        for file in preparation.files
    )
    files = ", ".join(f"{count:,} {kind}" for kind, count in kinds.items())
    tokenizer = preparation.tokenizer
    return (
        f"{preparation.job.source}: files: {files}; {preparation.input_bytes / 1e6:,.1f} MB;"
        f" chunks: {len(preparation.plan.chunks):,}; {executor.kind} workers: {executor.workers};"
        f" tokenizer {tokenizer.name} ({tokenizer.sha256[:12]}){_filters(preparation)}"
        + ("; going on with what was begun" if resumed else "")
    )


def _filters(preparation: Preparation) -> str:
    asked = preparation.plan.settings.get("filters")
    if not asked:
        return ""
    names = ", ".join(step["name"] for step in asked["steps"])
    languages = ", ".join(preparation.job.languages) or "en, as no --language is given"
    return f"; filters: {names} (language: {languages})"


def _found(preparation: Preparation) -> Table:
    columns = [Column(name, justify="right") for name in ("files", "bytes")]
    table = Table("what was found", *columns, box=box.SIMPLE)
    for end, (files, size) in preparation.account.ends.items():
        table.add_row(end, f"{files:,}", f"{size:,}")
    return table


def _table(made: SourceManifest) -> Table:
    columns = [Column(name, justify="right") for name in ("train", "held out")]
    table, train, held = Table("", *columns, box=box.SIMPLE), made.train, made.held_out
    what, *counts = _items(made)
    table.add_row(what, *(f"{count:,}" for count in counts))
    table.add_row("tokens", f"{train.tokens:,}", f"{held.tokens:,}")
    if chats := made.provenance.get("conversations"):
        trained = chats["trained_tokens"]
        shares = [(trained["train"], train.tokens), (trained["held_out"], held.tokens)]
        table.add_row("trained tokens", *(f"{n:,} ({n / of:.0%})" for n, of in shares))
    table.add_row("bytes of text", f"{train.text_bytes:,}", f"{held.text_bytes:,}")
    table.add_row("shards", f"{len(train.shards):,}", f"{len(held.shards):,}")
    return table


def _rejected(preparation: Preparation, made: SourceManifest) -> str:
    if not made.rejected:
        return "rejected: none"
    first = preparation.reasons.most_common(_REASONS_SHOWN)
    reasons = "; ".join(f"{reason}: {count:,}" for reason, count in first)
    more = "; ..." if len(preparation.reasons) > _REASONS_SHOWN else ""
    path = preparation.directory / "rejected.jsonl"
    return f"rejected: {made.rejected:,} ({reasons}{more}), listed in {path}"


def _dropped(preparation: Preparation, made: SourceManifest) -> str:
    counts, edited = preparation.dropped, made.provenance["edited_by_filters"]
    line = f"dropped by filters: {counts.total():,} documents; edited and kept: {edited:,}"
    each = "".join(f"\n{count:9,} {kind}" for kind, count in counts.most_common())
    look = f"\nlook at some of each: prepare --show-dropped {preparation.directory}"
    return line + each + (look if counts else "")


def _contaminated(preparation: Preparation, found: Mapping) -> str:
    what = "dropped" if found["dropped"] else "kept; --drop-contaminated leaves them out"
    line = f"documents with items of benchmarks: {found['documents']:,}"
    each = "".join(
        f"\n{task['documents']:9,} {name}: {task['items_hit']:,} of {task['items']:,} items"
        for name, task in found["tasks"].items()
        if task["documents"]
    )
    path = preparation.directory / CONTAMINATED_NAME
    return f"{line} ({what}), listed in {path}{each}" if each else line


def _lost(sampled: int, lost: int, most_often: Mapping[str, int]) -> str:
    share = lost / max(sampled, 1)
    if not lost:
        return f"lost by the tokenizer: none of {sampled:,} characters looked at"
    line = f"lost by the tokenizer: {share:.2%} of {sampled:,} characters looked at"
    line += f" ({', '.join(map(repr, most_often))})"
    if share < _LOSS_WARNED_OF:
        return line
    return (
        f"WARNING: {line}: they do not come back from its tokens, and no model trained on them can"
        " write them; take a tokenizer that knows all bytes, such as those of train_tokenizer"
    )


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
    add("--output", metavar="DATA", help="the source becomes DATA/NAME")
    add('--tokenizer', default='arcade100k', metavar='NAME_OR_FILE',
        help='arcade100k (default), or a tokenizer.json')  # fmt: skip
    add("--ranks", metavar="FILE", help="cl100k ranks for arcade100k, if not found by themselves")
    add('--held-out', type=float, default=0.001, metavar='FRACTION',
        help='of the text, kept out of training at least (default 0.001)')  # fmt: skip
    add('--shard-tokens', type=int, default=SHARD_TOKENS, metavar='N',
        help=f'tokens a shard at most (default {SHARD_TOKENS:,})')  # fmt: skip
    add('--language', dest='languages', nargs='+', default=[], metavar='CODE',
        help='ISO 639-1, for the manifest and for --filters')  # fmt: skip
    add('--filters', nargs='+', default=[], metavar='NAME',
        help=f'drop documents: {", ".join([*FILTERS, *SEVERAL])}, or a class package.module.Class;'
        " with parameters: 'c4(filter_policy=False)'. With --recipe: recipe, its own")  # fmt: skip
    add('--benchmarks', metavar='TASK_DATA',
        help='look for items of the benchmarks in this folder (launch/corpora/task_data.py); the'
        ' manifest counts those that are found')  # fmt: skip
    add('--drop-contaminated', action='store_true',
        help='with --benchmarks: documents that hold such items are left out')  # fmt: skip
    add('--show-dropped', action=ShowDropped, metavar='DATA/NAME',
        help='show documents that the filters dropped of a prepared source, and end')  # fmt: skip
    add("--licence", default="", metavar="TEXT", help="of the text, for the manifest")
    add('--provenance', nargs='+', type=_pair, default=[], metavar='KEY=VALUE',
        help='anything else to keep in the manifest')  # fmt: skip
    add('--template', metavar='NAME_OR_FILE',
        help='records are conversations or preference pairs, written by this chat template: zephyr,'
        ' chatml, tokenizer (the one beside its tokenizer.json), or a file of Jinja')  # fmt: skip
    add('--max-turns', type=int, default=MAX_TURNS, metavar='N',
        help='answers of a conversation at most, one with more is rejected (default'
        f' {MAX_TURNS})')  # fmt: skip
    add('--max-tokens', type=int, metavar='N',
        help='tokens of a conversation, or of both sides of a pair, at most: last rounds are'
        ' dropped where that helps, what is longer still is rejected')  # fmt: skip
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
    known = parser.add_argument_group("sources that are known")
    known.add_argument('--recipe', metavar='NAME_OR_FILE',
        help='where the sources of a mixture lie, and how they are read: stablelm_2, demo, or your'
        ' own FILE.py. It fills in what is not given by hand')  # fmt: skip
    known.add_argument("--list", action="store_true", help="show the recipe's sources, do no more")
    known.add_argument('--origin', metavar='N|substitute',
        help='read another place than the first that --list shows')  # fmt: skip
    parser.set_defaults(facts=None)
    data_roots.add_flags(parser)
    slurm = parser.add_argument_group("SLURM (the output must be on a disk that all nodes share)")
    slurm.add_argument("--slurm-partition", default="", metavar="NAME")
    slurm.add_argument("--slurm-time", default="24:00:00", metavar="H:M:S", help="limit of a job")
    slurm.add_argument('--slurm-option', nargs='+', type=_pair, default=[], metavar='KEY=VALUE',
                       help='further options of sbatch, such as account=NAME')  # fmt: skip
    return parser


def _pair(text: str) -> tuple[str, str]:
    key, equals, value = text.partition("=")
    if not (key and equals):
        raise argparse.ArgumentTypeError(f"{text}: write KEY=VALUE")
    return key, value


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
        ("://" in (flags.output or ""), "--output: shards are memory-mapped, give a local folder"),
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
    return Job(**{**fields, "provenance": dict(flags.provenance)})
