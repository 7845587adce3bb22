"""`report D`: one page of a run. `report A B ...`: runs compared, each with the first.

    python -m stablelm_jax.report runs/a                            # writes runs/a/report.html
    python -m stablelm_jax.report runs/a runs/b                     # says which is better
    python -m stablelm_jax.report runs/a runs/b --output both.html  # and draws both on a page
    python -m stablelm_jax.report --fit runs/ladder/*

A difference is the other run's loss minus the first one's: below 0 the other is better. Losses of
training pair step by step where both read the same rows, held-out losses document by document.
`--fit` takes finished runs of several sizes and foretells the 1.6B (configs/ladder.py).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from stablelm_jax.run_verb import run_verb


def main(argv: Sequence[str] | None = None) -> int:
    """Returns 0, or 1 after an error; bad arguments leave with 2."""
    parser = argparse.ArgumentParser(
        prog="stablelm report",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("folders", metavar="DIR", nargs="+", help="run folders")
    parser.add_argument("--output", metavar="FILE.html", help="the page; else DIR/report.html")
    parser.add_argument("--last", type=_steps, metavar="STEPS", help="of training; else a fifth")
    parser.add_argument("--json", metavar="FILE", help="gets the comparisons")
    parser.add_argument("--fit", action="store_true", help="the scaling law of finished runs")
    given = parser.parse_args(argv)
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


def _steps(text: str) -> int:
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"{text!r} is no number of steps; write 100")
    return int(text)


if __name__ == "__main__":
    run_verb(main, "report", prints_result=True)
