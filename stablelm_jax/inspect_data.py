"""`inspect_data --config F --step N`: the documents that step N was made of.

    python -m stablelm_jax.inspect_data --config configs/smoke.py \\
        --config.data.root=runs/smoke/data --step 12 --rows 2

Step N is the one whose metrics line says N: the update after which N have been done. Where a run is
a branch, or its config was changed on the way, name its `--workdir`: its checkpoints say from which
row its steps are counted.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import sys
from collections.abc import Iterator, Sequence

from stablelm_jax.run_verb import end_after_interrupt, run_verb

if __name__ == "__main__":  # what is imported below takes a moment, in which Ctrl-C may come
    end_after_interrupt("inspect_data: interrupted; the rows end here")

from absl import flags
from ml_collections import ConfigDict

from stablelm_jax import config as config_lib
from stablelm_jax.run.console import make_console


def main(argv: Sequence[str] | None = None) -> None:
    """Leaves with 0, 1 after an error, 2 for bad config or arguments."""
    config_lib.define_flags(argv)
    flags.DEFINE_integer("step", None, "Which step, from 1.", required=True, lower_bound=1)
    flags.DEFINE_string("workdir", None, "The run's folder, where it has begun.")
    flags.DEFINE_integer("rows", None, "Show the first rows of the batch; default: all.")
    flags.DEFINE_string("source", None, "Show the rows of one source.")
    flags.DEFINE_integer("chars", 240, "Characters shown of each document; 0: all.")
    flags.DEFINE_bool("json", False, "One JSON object a row.")
    config_lib.run(_inspect, argv)


def _inspect(argv: Sequence[str]) -> int:
    config, given = config_lib.config_from_flags(), flags.FLAGS
    if given.workdir is not None:
        from stablelm_jax.workdir import check_workdir

        check_workdir(given.workdir)
    try:
        wanted = (row for row in _rows(config) if given.source in (None, row.source))
        for row in itertools.islice(wanted, given.rows):
            if given.json:
                escaped = sys.stdout.encoding.lower() != "utf-8"  # by JSON's own escapes
                print(json.dumps(dataclasses.asdict(row), ensure_ascii=escaped))
            else:
                _show(row)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def _rows(config: ConfigDict) -> Iterator:
    from stablelm_jax.reporting.inspection import places
    from stablelm_jax.tokenizer.tokenizer import load_tokenizer
    from stablelm_jax.training.begin import position_of
    from stablelm_jax.training.setup import mixture_of, open_data, pack, spec_of

    given, data = flags.FLAGS, config.data
    position = position_of(config, given.workdir)
    tokenizer, mixture = load_tokenizer(data.tokenizer), mixture_of(config, position)
    if given.source and given.source not in mixture.sources:
        raise ValueError(f"--source {given.source}: the mixture has {', '.join(mixture.sources)}")
    sources = open_data(config, tokenizer, mixture.sources)
    first = position.first_row(given.step - 1, data.batch_size)
    rows = range(first, first + data.batch_size)
    spec = spec_of(config, tokenizer)
    return places(sources, mixture, rows, spec, tokenizer, pack(sources, spec, held_out=False))


def _show(row) -> None:
    from rich.text import Text

    console = make_console(highlight=False)
    number = f"row {row.source_row:,} of {row.source_rows:,}"
    console.rule(f"row {row.row:,}: {row.source}, epoch {row.epoch}, {number}", align="left")
    for document in row.documents:
        number = "" if document.number is None else f", document {document.number:,}"
        head = f"{document.file} token {document.offset:,}{number}: {document.tokens:,} tokens"
        middle = "" if document.opens else ", from its middle"
        item = f"{document.item}: " if document.item else ""
        console.print(Text(item + head + middle, style="bold cyan"), soft_wrap=True)
        for text, trained in document.parts:
            console.print(Text("trained: " if trained else "read: ", "bold"), end="")
            console.print(Text(_shortened(text)), soft_wrap=True)
        if not document.parts:
            console.print(Text(_shortened(document.text)), soft_wrap=True)


def _shortened(text: str) -> str:
    half = flags.FLAGS.chars // 2
    if not half or len(text) <= flags.FLAGS.chars:
        return text
    return f"{text[:half]} [... {len(text) - 2 * half:,} characters ...] {text[-half:]}"


if __name__ == "__main__":
    run_verb(main, "inspect_data", prints_result=True, interrupted="the rows end here")
