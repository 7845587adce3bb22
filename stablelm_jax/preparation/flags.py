"""Flags of `prepare`; those that say what is read are of every verb that reads documents."""

from __future__ import annotations

import argparse
from collections.abc import Iterable

from stablelm_jax.preparation.conversations import MAX_TURNS
from stablelm_jax.preparation.filters import FILTERS, SEVERAL
from stablelm_jax.preparation.finding import local_path
from stablelm_jax.preparation.formats import FORMATS
from stablelm_jax.preparation.texts import split_bytes

# FineWeb's (datatrove's examples/fineweb.py): 5-grams of words, 112 hashes in 14 bands of 8 rows.
# Two documents of similarity s are found with a probability of 1 - (1 - s^8)^14.
FINEWEB = {"ngram": 5, "bands": 14, "rows": 8, "seed": 1}

# Beside a flag: those that mean nothing there, those alone that mean something, and those that mean
# nothing without it.
_NOT_WITH = {
    "adopt": {
        *("format", "text_key", "split_on", "keep", "held_out_by", "sample", "template", "filters"),
    },
    "template": {"text_key", "split_on", "filters"},
    "recipe": {"order"},
}
_ALONE_WITH = {
    "show_dropped": set(),
    "list": {"recipe", "source"},
    "verify": {"recipe", "workers"},
    "dedup": {
        *("output", "recipe", "tokenizer", "ranks", "near", "order", "exact_only"),
        *("executor", "workers", "slurm_partition", "slurm_time", "slurm_option"),
    },
}
_ONLY_WITH = {
    "adopt": {"append_eod"},
    "benchmarks": {"drop_contaminated"},
    "template": {"max_turns", "max_tokens"},
    "recipe": {"list", "origin"},
    "dedup": {"near", "order"},
    "near": {"exact_only"},
}


def check_together(parser: argparse.ArgumentParser, flags: argparse.Namespace) -> None:
    """ValueError for flags that mean nothing beside the others: none is left out without a word."""
    given = {name for name, value in vars(flags).items() if value != parser.get_default(name)}
    for flag, names in _NOT_WITH.items():
        _refuse(given & names if flag in given else (), "not with", flag)
    for flag, names in _ALONE_WITH.items():
        _refuse(given - names - {flag} if flag in given else (), "not with", flag)
    for flag, names in _ONLY_WITH.items():
        _refuse(given & names if flag not in given else (), "only with", flag)
    if not given & {"output", "show_dropped", "verify", "list"}:
        raise ValueError("--output: is missing; give the folder that is to hold what is made")


def place(text: str) -> str:
    """A path of this machine, also where it is written as `file://`, or the URL of a store."""
    return local_path(text) or text


def _refuse(names: Iterable[str], how: str, flag: str) -> None:
    def spelt(name: str) -> str:
        return "--" + {"inputs": "input", "languages": "language"}.get(name, name).replace("_", "-")

    if names:
        raise ValueError(f"{' '.join(map(spelt, sorted(names)))}: {how} {spelt(flag)}")


def add_input_flags(parser: argparse.ArgumentParser, *, required: bool = True) -> None:
    """`--input` (as `inputs`), and how its files are read."""
    add = parser.add_argument
    add('--input', dest='inputs', required=required, nargs='+', metavar='PATH',
        help='files, folders, patterns; local or any fsspec URL')  # fmt: skip
    add('--format', default='auto', choices=FORMATS,
        help='auto: by the name; what has no known one is one document a file. In archives it'
        ' holds for the files within')  # fmt: skip
    add('--text-key', default='text', metavar='KEY',
        help='key or column of the text (default text); a.b is b within a')  # fmt: skip
    add('--keep', type=_keep, nargs='+', action='extend', metavar='KEY=PATTERN',
        help='of records, only those whose value under KEY fits, as in source=OSCAR* (several keys:'
        ' all must fit, several patterns of a key: one)')  # fmt: skip
    add('--split-on', type=_split_on, metavar='TEXT|blank-lines|64kB',
        help='cut each text file into documents: at a text such as "<|endoftext|>", at blank lines,'
        ' or at the line end before so many bytes')  # fmt: skip


def add_recipe_flags(parser: argparse.ArgumentParser) -> None:
    """Where sources that are known lie."""
    known = parser.add_argument_group("sources that are known")
    known.add_argument('--recipe', metavar='NAME_OR_FILE',
        help='where the sources of a mixture lie, and how they are read: stablelm_2, demo, or your'
        ' own FILE.py. It fills in what is not given by hand')  # fmt: skip
    known.add_argument("--list", action="store_true", help="show the recipe's sources, do no more")
    known.add_argument('--origin', metavar='N|substitute',
        help='read another place than the first that --list shows')  # fmt: skip


def add_screening_flags(parser: argparse.ArgumentParser) -> None:
    """What leaves documents out, or looks for something in them."""
    add = parser.add_argument_group("documents that are left out").add_argument
    add('--filters', nargs='+', default=[], metavar='NAME',
        help=f'drop documents: {", ".join([*FILTERS, *SEVERAL])}, or a class package.module.Class;'
        " with parameters: 'c4(filter_policy=False)'. With --recipe: recipe, its own")  # fmt: skip
    add('--benchmarks', metavar='TASK_DATA',
        help='look for items of the benchmarks in this folder (launch/corpora/task_data.py); the'
        ' manifest counts those that are found')  # fmt: skip
    add('--drop-contaminated', action='store_true',
        help='with --benchmarks: documents that hold such items are left out')  # fmt: skip
    add('--show-dropped', type=place, metavar='DATA/NAME',
        help='show documents that the filters dropped of a source, do no more')  # fmt: skip


def add_data_root_flags(parser: argparse.ArgumentParser) -> None:
    """What is done with whole data roots."""
    add = parser.add_argument_group("data roots, in place of --source and --input").add_argument
    add('--verify', type=place, metavar='DATA',
        help='compare the sources below DATA with their manifests')  # fmt: skip
    add('--dedup', type=place, metavar='DATA',
        help='write the sources below DATA to --output without the copies in them')  # fmt: skip
    add('--near', nargs='?', const=FINEWEB, type=_near, metavar='NAME=N,...',
        help='near copies too, by MinHash; without a value by the parameters of FineWeb, '
        + ','.join(f'{name}={value}' for name, value in FINEWEB.items()))  # fmt: skip
    add('--order', nargs='+', default=[], metavar='NAME',
        help='of copies the source named first keeps one; the others follow by name')  # fmt: skip
    add('--exact-only', nargs='+', default=[], metavar='NAME',
        help='sources, such as code, whose near copies stay')  # fmt: skip


def add_chat_flags(parser: argparse.ArgumentParser) -> None:
    """How records are conversations or pairs."""
    add = parser.add_argument_group("conversations and preference pairs").add_argument
    add('--template', metavar='NAME_OR_FILE',
        help='records are conversations or preference pairs, written by this chat template: zephyr,'
        ' chatml, tokenizer (the one beside its tokenizer.json), or a file of Jinja')  # fmt: skip
    add('--max-turns', type=int, default=MAX_TURNS, metavar='N',
        help='answers of a conversation at most, one with more is rejected (default'
        f' {MAX_TURNS})')  # fmt: skip
    add('--max-tokens', type=int, metavar='N',
        help='tokens of a conversation, or of both sides of a pair, at most: last rounds are'
        ' dropped where that helps, what is longer still is rejected')  # fmt: skip


def add_slurm_flags(parser: argparse.ArgumentParser) -> None:
    """Where SLURM runs the work."""
    slurm = parser.add_argument_group("SLURM (the output must be on a disk that all nodes share)")
    slurm.add_argument("--slurm-partition", default="", metavar="NAME")
    slurm.add_argument("--slurm-time", default="24:00:00", metavar="H:M:S", help="limit of a job")
    slurm.add_argument('--slurm-option', nargs='+', type=pair, default=[], metavar='KEY=VALUE',
                       help='further options of sbatch, such as account=NAME')  # fmt: skip


def pair(text: str) -> tuple[str, str]:
    """KEY=VALUE, as an argument."""
    key, equals, value = text.partition("=")
    if not (key and equals):
        raise argparse.ArgumentTypeError(f"{text}: write KEY=VALUE")
    return key, value


def _keep(text: str) -> list[str]:
    key, equals, pattern = text.partition("=")
    if not (key and equals and pattern):
        raise argparse.ArgumentTypeError(f"{text}: write KEY=PATTERN, as in source=OSCAR*")
    return [key, pattern]


def _near(text: str) -> dict[str, int]:
    near = dict(FINEWEB)
    for part in text.split(","):
        name, _, value = part.partition("=")
        if name not in near or not value.isdecimal() or not 1 <= int(value) <= 1000:
            usual = ",".join(f"{name}={value}" for name, value in FINEWEB.items())
            raise argparse.ArgumentTypeError(f"{part}: write any of {usual}, numbers up to 1000")
        near[name] = int(value)
    return near


def _split_on(text: str) -> str:
    try:
        split_bytes(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return text
