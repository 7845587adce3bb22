"""`prepare --show-dropped DATA/NAME`: what the filters dropped of a source, to be judged by eye."""

from __future__ import annotations

import argparse
import collections
import json
import pathlib
import sys

from stablelm_jax.preparation.finding import shown
from stablelm_jax.preparation.screening import DROPPED_NAME, Dropped
from stablelm_jax.run.console import make_console


class ShowDropped(argparse.Action):
    """Shows and ends the program, as --help does, whatever else is missing."""

    def __call__(self, parser, namespace, values, option_string=None):
        try:
            _show(pathlib.Path(values))
        except OSError as error:
            print(
                f"prepare: --show-dropped {values}: {error}; name the folder of a source that was"
                " prepared with --filters",
                file=sys.stderr,
            )
            raise SystemExit(2) from None
        raise SystemExit(0)


def _show(directory: pathlib.Path) -> None:
    """Prints the sample of each filter and reason, the most frequent first."""
    rows = collections.defaultdict(list)
    with open(directory / DROPPED_NAME, encoding="utf-8") as lines:
        for row in map(json.loads, lines):
            rows[str(Dropped(row["by"], row["reason"]))].append(row)
    console = make_console(highlight=False, soft_wrap=True)
    for kind, sample in sorted(rows.items(), key=lambda item: -item[1][0]["of"]):
        console.print(f"{kind}: {sample[0]['of']:,} documents, {len(sample)} of them:\n")
        for row in sample:
            console.print(
                f"  {row['file']}, line {row['line']:,}: {row['characters']:,} characters"
            )
            text = "\n".join(f"    {shown(line)}" for line in row["beginning"].splitlines() if line)
            console.print(f"{text}\n")
    total = sum(sample[0]["of"] for sample in rows.values())
    console.print(f"dropped by filters: {total:,} documents of {directory}")
