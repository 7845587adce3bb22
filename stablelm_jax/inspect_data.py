"""`inspect_data --config F --step N`: the documents that step N was made of.

    python -m stablelm_jax.inspect_data --config configs/smoke.py \\
        --config.data.root=runs/smoke/data --step 12 --rows 2

Step N is the one whose metrics line says N: the update after which N have been done. Of a run that
is a branch, or whose config was changed on the way, `--workdir` says where its rows are counted
from. With `--json` each row is one line.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Sequence

from absl import flags

from stablelm_jax import config as config_lib


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
    config = config_lib.config_from_flags()
    from stablelm_jax.data.inspection import places
    from stablelm_jax.tokenizer.tokenizer import load_tokenizer
    from stablelm_jax.training.begin import position_of
    from stablelm_jax.training.setup import mixture_of, open_data

    given = flags.FLAGS
    try:
        position = position_of(config, given.workdir)
        tokenizer = load_tokenizer(config.data.tokenizer)
        mixture = mixture_of(config, position)
        sources = open_data(config, tokenizer, mixture.sources)
        if given.source and given.source not in mixture.sources:
            raise ValueError(
                f"--source {given.source}: the mixture has {', '.join(mixture.sources)}"
            )
        first = position.first_row(given.step - 1, config.data.batch_size)
        found = places(
            sources,
            mixture,
            range(first, first + config.data.batch_size),
            sequence_length=config.data.sequence_length,
            seed=config.seed,
            tokenizer=tokenizer,
        )
        wanted = (place for place in found if given.source in (None, place.source))
        show = _as_json if given.json else _show
        for number, place in enumerate(wanted):
            if given.rows is not None and number >= given.rows:
                break
            show(place)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def _as_json(place) -> None:
    print(json.dumps(dataclasses.asdict(place), ensure_ascii=False))


def _show(place) -> None:
    from rich.console import Console
    from rich.text import Text

    console = Console(highlight=False)
    console.rule(
        f"row {place.row:,}: {place.source}, epoch {place.epoch}, "
        f"row {place.source_row:,} of {place.source_rows:,}",
        align="left",
    )
    for document in place.documents:
        number = "" if document.number is None else f", document {document.number:,}"
        part = "" if document.opens else ", from its middle"
        head = (
            f"{document.file} token {document.offset:,}{number}: {document.tokens:,} tokens{part}"
        )
        console.print(Text(head, style="bold cyan"), soft_wrap=True)
        console.print(Text(_shortened(document.text, flags.FLAGS.chars)), soft_wrap=True)


def _shortened(text: str, characters: int) -> str:
    """Beginning and end."""
    if not characters or len(text) <= characters:
        return text
    half = characters // 2
    return f"{text[:half]} [... {len(text) - 2 * half:,} characters ...] {text[-half:]}"


if __name__ == "__main__":
    main()
