"""`prepare --show-dropped DATA/NAME`: what the filters dropped of a source, to be judged by eye."""

from __future__ import annotations

import itertools
import json
import pathlib

from rich.console import Console

from stablelm_jax.preparation.finding import shown
from stablelm_jax.preparation.screening import DROPPED_NAME, Dropped


def show_dropped(directory: str, console: Console) -> None:
    """Prints the sample of each filter and reason, the most frequent first.

    ValueError where the source has none.
    """
    try:
        with open(pathlib.Path(directory) / DROPPED_NAME, encoding="utf-8") as lines:
            rows = list(map(json.loads, lines))
    except OSError as error:
        raise ValueError(
            f"--show-dropped {directory}: {error}; name the folder of a source that was prepared"
            " with --filters"
        ) from error
    total, kinds = 0, itertools.groupby(rows, key=lambda row: (row["by"], row["reason"]))
    for sample in sorted((list(of) for _, of in kinds), key=lambda sample: -sample[0]["of"]):
        kind, count = Dropped(sample[0]["by"], sample[0]["reason"]), sample[0]["of"]
        console.print(f"{kind}: {count:,} documents, {len(sample)} of them:\n")
        for row in sample:
            place = f"{row['file']}, line {row['line']:,}: {row['characters']:,} characters"
            text = (f"    {shown(line)}\n" for line in row["beginning"].splitlines() if line)
            console.print(f"  {place}\n{''.join(text)}")
        total += count
    console.print(f"dropped by filters: {total:,} documents of {directory}")
