"""What `prepare` does with whole data roots: `--verify DATA` and `--dedup DATA`."""

from __future__ import annotations

import argparse
import sys

from rich.console import Console

from stablelm_jax.preparation.executors import Executor, TasksFailed, remedy
from stablelm_jax.preparation.lock import only_one
from stablelm_jax.preparation.recipes import Recipe
from stablelm_jax.preparation.verify import verify_root

# FineWeb's (datatrove's examples/fineweb.py): 5-grams of words, 112 hashes in 14 bands of 8 rows.
# Two documents of similarity s are found with a probability of 1 - (1 - s^8)^14.
FINEWEB = {"ngram": 5, "bands": 14, "rows": 8, "seed": 1}
_OF_DEDUP = {"near", "order", "exact_only"}
_RUNS = {"executor", "workers", "slurm_partition", "slurm_time", "slurm_option"}
# The flags that go with each of the two.
_ALLOWED = {
    "verify": {"verify", "recipe", "workers"},
    "dedup": {"dedup", "output", "recipe", "tokenizer", "ranks", *_OF_DEDUP, *_RUNS},
}


def add_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("data roots, in place of --source and --input").add_argument
    add("--verify", metavar="DATA", help="compare the sources below DATA with their manifests")
    add('--dedup', metavar='DATA',
        help='write the sources below DATA to --output without the copies in them')  # fmt: skip
    add('--near', nargs='?', const=FINEWEB, type=_near, metavar='NAME=N,...',
        help='near copies too, by MinHash; without a value by the parameters of FineWeb, '
        + ','.join(f'{name}={value}' for name, value in FINEWEB.items()))  # fmt: skip
    add('--order', nargs='+', default=[], metavar='NAME',
        help='of copies the source named first keeps one; the others follow by name')  # fmt: skip
    add('--exact-only', nargs='+', default=[], metavar='NAME',
        help='sources, such as code, whose near copies stay')  # fmt: skip


def _near(text: str) -> dict[str, int]:
    near = dict(FINEWEB)
    for part in text.split(","):
        name, _, value = part.partition("=")
        if name not in near or not value.isdecimal() or not 1 <= int(value) <= 1000:
            usual = ",".join(f"{name}={value}" for name, value in FINEWEB.items())
            raise argparse.ArgumentTypeError(f"{part}: write any of {usual}, numbers up to 1000")
        near[name] = int(value)
    return near


def is_asked_for(parser: argparse.ArgumentParser, flags: argparse.Namespace) -> bool:
    """Whether the flags are about data roots; ValueError for flags that do not go together."""
    mode = next((name for name in _ALLOWED if getattr(flags, name)), "")
    given = [name for name, value in vars(flags).items() if value != parser.get_default(name)]
    wrong = [name for name in given if (name not in _ALLOWED[mode] if mode else name in _OF_DEDUP)]
    if wrong:
        stray = " ".join("--" + name.replace("_", "-") for name in wrong)
        raise ValueError(f"{stray}: {f'not with --{mode}' if mode else 'with --dedup'}")
    if mode == "dedup" and not flags.output:
        raise ValueError("--output: is missing; give the folder that is to hold the new data root")
    if flags.order and flags.recipe:
        raise ValueError("--order: a --recipe has one already; give one of the two")
    if flags.exact_only and not flags.near:
        raise ValueError("--exact-only: without --near all sources are compared exactly alone")
    return bool(mode)


def run(
    flags: argparse.Namespace, recipe: Recipe | None, executor: Executor, console: Console
) -> int:
    """Does what `is_asked_for`; returns the exit code. ValueError: nothing was begun."""
    if flags.verify:
        differences = verify_root(flags.verify, recipe, flags.workers, console)
        if differences:
            count = "1 thing differs" if differences == 1 else f"{differences:,} things differ"
            print(f"prepare: {count}, named above", file=sys.stderr)
        return int(differences > 0)
    from stablelm_jax.preparation.dedup import Deduplication, deduplicate  # slow to import

    work = Deduplication(flags, recipe)
    try:
        work.output.mkdir(parents=True, exist_ok=True)
        with only_one(work.output / ".lock"):
            deduplicate(work, executor, console)
    except (ValueError, OSError, TasksFailed) as error:
        text = " ".join(str(error).splitlines())
        if isinstance(error, OSError) and error.errno:  # of this process, not of a worker
            text += f"; {remedy(error)}"
        print("prepare:", text, file=sys.stderr)
        return 1
    return 0
