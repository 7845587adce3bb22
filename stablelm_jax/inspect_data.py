"""`inspect_data`: what a step was made of, what made its loss, what a prepared source holds.

    python -m stablelm_jax.inspect_data --config configs/smoke.py \\
        --config.data.root=runs/smoke/data --step 12 --rows 2
    python -m stablelm_jax.inspect_data --workdir runs/smoke/run --step 12 --loss
    python -m stablelm_jax.inspect_data --source python_docs --data runs/smoke/data --show longest

Step N is the one whose metrics line says N: the update after which N have been done. Where a run is
a branch, or its config was changed on the way, name its `--workdir`: its checkpoints say from which
row its steps are counted.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from stablelm_jax.run_verb import end_after_interrupt, run_verb

if __name__ == "__main__":  # what is imported below takes a moment, in which Ctrl-C may come
    end_after_interrupt("inspect_data: interrupted; the rows end here")

from absl import flags, logging
from ml_collections import ConfigDict

from stablelm_jax import config as config_lib
from stablelm_jax.run.console import make_console
from stablelm_jax.storage.files import check_writable

# Flags that mean something of a run alone, and of the documents of a source alone.
_OF_A_RUN = "config", "workdir", "step", "rows"
_OF_DOCUMENTS = "data", "show", "checkpoint", "sample", "seed", "tokenizer", "picture"


def main() -> None:
    """Leaves with 0, 1 after an error, 2 for bad config or arguments."""
    config_lib.define_flags(required=False)
    flags.DEFINE_integer("step", None, "Which step, from 1.", lower_bound=1)
    flags.DEFINE_string("workdir", None, "The run's folder, where it has begun.")
    flags.DEFINE_integer("rows", None, "Show the first rows of the batch; default: all.")
    flags.DEFINE_string("source", None, "Show the rows of one source; or its documents, of --data.")
    flags.DEFINE_integer("chars", 240, "Characters shown of each document; 0: all.")
    flags.DEFINE_bool("json", False, "One JSON object a row; of --loss and --data, a single one.")
    flags.DEFINE_bool("loss", False, "Replay --workdir to --step: what each document did to it.")
    flags.DEFINE_integer("documents", 10, "So many, with --loss and --data; 0: all there are.")
    flags.DEFINE_string("data", None, "Folder or URL of prepared sources: look at --source there.")
    kinds = ["random", "longest", "repetitive", "loss"]
    flags.DEFINE_enum("show", "random", kinds, "Which documents; loss: under --checkpoint.")
    flags.DEFINE_string("checkpoint", None, "For --show loss.")
    flags.DEFINE_integer("sample", None, "Documents of it; default: 2,000, or 256 that are scored.")
    flags.DEFINE_integer("seed", 0, "Of the sample.", lower_bound=0)
    flags.DEFINE_string("tokenizer", None, "Of --data; default: the one it was prepared with.")
    flags.DEFINE_string("picture", None, "Draw what --source holds into this PNG.")
    config_lib.run(_inspect)


def _inspect(argv: Sequence[str]) -> int:
    logging.set_verbosity(logging.WARNING)  # the checkpoint library tells of each of its files
    given = flags.FLAGS
    if given.workdir is not None:
        from stablelm_jax.workdir import check_workdir

        check_workdir(given.workdir)
    of_documents = not given.loss and (
        given.data is not None or (given.config is None and given.source is not None)
    )
    needed = {"config": "configs/smoke.py", "step": "VALUE"}
    if given.loss:
        needed = {"workdir": "runs/NAME", "step": "VALUE"}
    elif of_documents:
        needed = {"source": "NAME"} | ({"checkpoint": "PATH"} if given.show == "loss" else {})
    for name, example in needed.items():
        if given[name].value is None:
            raise config_lib.ConfigError(f"--{name}: is missing; write --{name} {example}")
    strange = _OF_A_RUN if of_documents else _OF_DOCUMENTS
    if unused := [f"--{name}" for name in strange if given[name].present]:
        what = "not with the documents of a source, but with --config, which gives rows"
        what = what if of_documents else "only with --source and --data, which give documents"
        raise config_lib.ConfigError(f"{' '.join(unused)}: {what}")
    if given.checkpoint and given.show != "loss":
        raise config_lib.ConfigError("--checkpoint: only with --show loss")
    if given.picture:
        _check_picture(given.picture)
    try:
        (_show_losses if given.loss else _show_documents if of_documents else _show_rows)()
    except config_lib.ConfigError:
        raise
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def _check_picture(path: str) -> None:
    if not path.endswith(".png"):
        raise config_lib.ConfigError(f"--picture {path}: it will be a PNG; name it .png")
    try:
        check_writable(Path(path))
    except ValueError as error:
        raise config_lib.ConfigError(f"--picture {error}") from error


def _show_rows() -> None:
    given = flags.FLAGS
    config = config_lib.config_from_flags()
    wanted = (row for row in _rows(config) if given.source in (None, row.source))
    for row in itertools.islice(wanted, given.rows):
        if given.json:
            _print_json(dataclasses.asdict(row))
        else:
            _show(row)


def _show_losses() -> None:
    from stablelm_jax.reporting.replay import replay, tables
    from stablelm_jax.run.metrics import finite

    given, console = flags.FLAGS, make_console(stderr=True)
    config = None if given.config is None else config_lib.config_from_flags()
    numbers = itertools.count()

    def wanted(row) -> bool:
        return given.source in (None, row.source) and next(numbers) < (given.rows or math.inf)

    with console.status("replaying"):
        found = replay(given.workdir, given.step, wanted, config, console.print)
    if given.json:
        shares = found.shares[: given.documents or None]
        return _print_json(finite(dataclasses.asdict(dataclasses.replace(found, shares=shares))))
    for part in tables(found, given.documents, _shortened):
        make_console(highlight=False).print(part, soft_wrap=isinstance(part, str))


def _show_documents() -> None:
    from stablelm_jax.preparation.verify import source_names
    from stablelm_jax.reporting import documents
    from stablelm_jax.storage.remote import as_path

    given = flags.FLAGS
    root = given.data or "data"
    try:
        there = source_names(as_path(root), "--data")
    except ValueError as error:
        raise config_lib.ConfigError(str(error)) from error
    if given.source not in there:
        raise config_lib.ConfigError(f"--source {given.source}: {root} has {', '.join(there)}")
    source, tokenizer = documents.open_source(root, given.source, given.tokenizer)
    size = given.sample or (256 if given.show == "loss" else 2000)
    most = given.documents or size
    seen = documents.sample(source, size, most, given.seed)
    found = documents.statistics(source, tokenizer, seen)
    if given.picture:
        from stablelm_jax.reporting.picture import draw_documents

        draw_documents(found, Path(given.picture))
    chosen = documents.choose(given.show, seen, most, source, given.checkpoint)
    shown = [document.shown(source, tokenizer, note) for document, note in chosen]
    if given.json:
        return _print_json(found | {"shown": list(map(dataclasses.asdict, shown))})
    console = make_console(highlight=False)
    for part in documents.tables(found):
        console.print(part, soft_wrap=isinstance(part, str))
    console.rule(f"documents shown: {len(shown)} ({given.show})", align="left")
    for document in shown:
        _show_document(console, document)


def _print_json(value) -> None:
    escaped = sys.stdout.encoding.lower() != "utf-8"  # by JSON's own escapes
    print(json.dumps(value, ensure_ascii=escaped))


def _rows(config: ConfigDict) -> Iterator:
    from stablelm_jax.reporting.inspection import places
    from stablelm_jax.tokenizer.tokenizer import load_tokenizer
    from stablelm_jax.training.begin import position_of
    from stablelm_jax.training.setup import left_out_of, mixture_of, open_data, pack, spec_of

    given, data = flags.FLAGS, config.data
    position = position_of(config, given.workdir)
    tokenizer, mixture = load_tokenizer(data.tokenizer), mixture_of(config, position)
    if given.source and given.source not in mixture.sources:
        known = ", ".join(mixture.sources)
        raise config_lib.ConfigError(f"--source {given.source}: the mixture has {known}")
    sources = open_data(config, tokenizer, mixture.sources)
    sizes = config_lib.batch_sizes(config)
    rows = range(*(position.first_row(step, sizes) for step in (given.step - 1, given.step)))
    spec = spec_of(config, tokenizer)
    packed = pack(sources, spec, held_out=False)
    left_out = left_out_of(config, sources, spec, packed)
    return places(sources, mixture, rows, spec, tokenizer, packed, left_out)


def _show(row) -> None:
    console = make_console(highlight=False)
    number = f"row {row.source_row:,} of {row.source_rows:,}"
    number += f", {row.left_out:,} tokens left out by data.skip" if row.left_out else ""
    console.rule(f"row {row.row:,}: {row.source}, epoch {row.epoch}, {number}", align="left")
    for document in row.documents:
        _show_document(console, document)


def _show_document(console, document) -> None:
    from rich.text import Text

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
