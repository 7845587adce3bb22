"""`report D`: a page of a run; `report A B ...`: runs compared; `report --edge C`: small machines.

    python -m stablelm_jax.report runs/a                            # writes runs/a/report.html
    python -m stablelm_jax.report runs/a runs/b                     # says which is better
    python -m stablelm_jax.report runs/a runs/b --output both.html  # and draws both on a page
    python -m stablelm_jax.report --fit runs/ladder/*
    python -m stablelm_jax.report --edge runs/a --types q8_0,q4_0  # size, quality, speed

A difference is the other run's loss minus the first one's: below 0 the other is better. Losses of
training pair step by step where both read the same rows, held-out losses document by document.
`--fit` takes finished runs of several sizes and foretells the 1.6B (configs/ladder.py). `--edge`
writes a checkpoint as files of llama.cpp and measures each (docs/edge.md).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from stablelm_jax.run_verb import run_verb

_OF_EDGE = ("types", "imatrix", "config", "data", "max_rows", "tasks", "task_data", "speed")
_INTERRUPTED = "nothing was written, but what --edge has measured is kept"


def main(argv: Sequence[str] | None = None) -> int:
    """Returns 0, or 1 after an error; bad arguments leave with 2."""
    parser = argparse.ArgumentParser(
        prog="stablelm report",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("folders", metavar="DIR", nargs="+", help="run folders")
    what = "the page; else DIR/report.html; with --edge a folder, else DIR/edge/global_step<N>"
    parser.add_argument("--output", metavar="FILE.html", help=what)
    parser.add_argument("--last", type=_steps, metavar="STEPS", help="of training; else a fifth")
    parser.add_argument("--json", metavar="FILE", help="gets the comparisons")
    parser.add_argument("--fit", action="store_true", help="the scaling law of finished runs")
    add_edge(parser.add_argument_group("small machines"))
    given = parser.parse_args(argv)
    if given.edge:
        return _edge(parser, given)
    for name in _OF_EDGE:
        if getattr(given, name) != parser.get_default(name):
            parser.error(f"--{name.replace('_', '-')}: only with --edge")
    if len(given.folders) < 2 and (given.last or given.json or given.fit):
        parser.error("--last, --json and --fit: name two run folders or more")
    for name in ("last", "output") if given.fit else ():
        if getattr(given, name):
            parser.error(f"--{name}: has no effect with --fit")
    from stablelm_jax.reporting.comparison import show_comparisons
    from stablelm_jax.reporting.foretelling import show_fit
    from stablelm_jax.reporting.page import show_page

    try:
        if given.fit:
            show_fit(given.folders, given.json)
            return 0
        found = show_comparisons(given.folders, given.last, given.json)
        if given.output or not found:
            show_page(given.folders, given.output, found)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def add_edge(group: argparse._ActionsContainer) -> None:
    """The flags of --edge, which launch/edge_others.py takes too."""
    add = group.add_argument
    add("--edge", action="store_true", help="DIR is a checkpoint or run: table of its small files")
    types = "f16,q8_0,q6_k,q5_k_m,q4_k_m,q4_0"
    add("--types", default=types, help="of `convert to-gguf`; none: what is there (%(default)s)")
    what = "as of convert, for the types that take one: rows <type>-imatrix"
    add("--imatrix", type=Path, metavar="FILE", help=what)
    add("--config", help="config file of the held-out text; else the checkpoint's")
    add("--data", help="folder or URL of the prepared sources; else the config's")
    add("--max-rows", type=_steps, default=2**31 - 1, help="held-out rows a source; else all")
    add("--tasks", default="", help="of lm-eval, with commas between: model and each GGUF file")
    add("--task-data", metavar="DIR", help="as of evaluate")
    add("--speed", action="store_true", help="measure speed and memory again")


def _edge(parser: argparse.ArgumentParser, given: argparse.Namespace) -> int:
    from stablelm_jax.convert import GGUF_TYPES
    from stablelm_jax.evaluation.edge import show_edge

    types = [name for name in given.types.split(",") if name not in ("", "none")]
    if unknown := set(types) - set(GGUF_TYPES):
        parser.error(f"--types {', '.join(sorted(unknown))}: choose of {', '.join(GGUF_TYPES)}")
    if len(given.folders) > 1 or given.last or given.json or given.fit:
        parser.error("--edge: takes one checkpoint, and none of --last, --json and --fit")
    names = ("output", "task_data", "config", "data", "max_rows", "imatrix")
    options = {name: getattr(given, name) for name in names}
    tasks = [name for name in given.tasks.split(",") if name]
    try:
        show_edge(given.folders[0], types, tasks=tasks, again=given.speed, **options)
    except (ValueError, OSError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def _steps(text: str) -> int:
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"{text!r} is no number of steps; write 100")
    return int(text)


if __name__ == "__main__":
    run_verb(main, "report", prints_result=True, interrupted=_INTERRUPTED)
