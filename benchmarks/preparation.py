"""Speed and memory of each stage of the preparation, and what it is for a corpus of 8.5 TB.

    python benchmarks/preparation.py --input help.jsonl [--filters c4] [--task-data DIR]

Each stage runs on one core in a process of its own, on the same text, and is measured by the CPU
seconds of that process; what is loaded once a process (tokenizer, word splitters, the index of the
benchmarks' items) is loaded before. Its memory is the most that the process held, Python and its
libraries (some 0.1 GB) included. With --task-data (launch/corpora/task_data.py) the search for
items of benchmarks is measured too. Nothing else should be running.
"""

from __future__ import annotations

import sys

if __name__ == "__main__":  # the package, and not this folder, whose tokenize.py hides Python's
    sys.path[0] = __file__.rpartition("/benchmarks/")[0]

import argparse
import io
import os
import pathlib
import tempfile
import traceback
from collections.abc import Callable, Iterator, Sequence
from types import SimpleNamespace
from typing import NamedTuple

from datatrove.utils.logging import logger
from rich.console import Console
from rich.table import Table

from stablelm_jax.data import manifest
from stablelm_jax.preparation import copies, tokenize_chunk
from stablelm_jax.preparation.dedup import Deduplication
from stablelm_jax.preparation.executors import Executor
from stablelm_jax.preparation.flags import FINEWEB
from stablelm_jax.preparation.job import job_of
from stablelm_jax.preparation.prepare_source import Preparation
from stablelm_jax.preparation.verify import verify_root
from stablelm_jax.prepare import make_parser

SOURCE = "texts"
CORPUS_MEGABYTES = 8.5e6
FILTERS = ("gopher_repetition", "gopher_quality", "c4", "fineweb", "language")


class Measured(NamedTuple):
    stage: str
    seconds: float
    gigabytes: float


def measured(stage: str, work: Callable[[], object]) -> Measured:
    """Runs `work` in a process of its own."""
    sys.stdout.flush()
    if not (process := os.fork()):
        try:
            work()
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    _, status, usage = os.wait4(process, 0)
    if status:
        raise SystemExit(f"{stage}: failed, see above")
    print(f"{stage}: {usage.ru_utime + usage.ru_stime:.1f} s", file=sys.stderr, flush=True)
    return Measured(stage, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1e6)


def prepared(
    flags: argparse.Namespace,
    data: pathlib.Path,
    stage: str,
    options: Sequence[str] = (),
    fast: bool = True,
) -> Measured:
    """Reading, tokenising and writing with more options of `prepare`; `fast`: by quicktok."""
    arguments = ["--input", *flags.input, "--output", str(data), "--source", SOURCE, *options]
    arguments += ["--text-key", flags.text_key, "--language", flags.language]
    preparation = Preparation(job_of(make_parser().parse_args(arguments), SOURCE))
    with preparation.locked():
        preparation.begin()
        step, chunks = preparation.step(), len(preparation.plan.chunks)
        tokenize_chunk._tokenizer(step.tokenizer, None).use_fast_engine(fast)
        tokenize_chunk._screen(step.plan)
        if step.benchmarks:
            tokenize_chunk._benchmarks(step.benchmarks)

        def work() -> None:
            for rank in range(chunks):
                step.run(rank=rank)

        found = measured(stage, work)
        preparation.collate(preparation.tokenize(Executor("local", 1)))
    return found


def deduplication(data: pathlib.Path, clean: pathlib.Path) -> Iterator[Measured]:
    """Each stage of `prepare --dedup --near`, of exact copies first."""
    flags = SimpleNamespace(dedup=str(data), output=str(clean), order=[], exact_only=[],
                            near=dict(FINEWEB), tokenizer="arcade100k", ranks=None)  # fmt: skip
    work = Deduplication(flags, None)
    work.begin()
    copies._tokenizer(work._work)
    shards, bands = len(work.plan.shards), FINEWEB["bands"]
    for function, tasks in [
        (copies.hash_documents, shards),
        (copies.find_exact, 1),
        (copies.sign_documents, shards),
        (copies.match_signatures, bands),
        (copies.cluster_pairs, 1),
        (copies.write_shard, shards),
    ]:
        step = copies.Stage(function, work._work)

        def run(step=step, tasks=tasks) -> None:
            for rank in range(tasks):
                step.run(rank=rank, world_size=tasks)

        yield measured(f"--dedup: {function.__name__.replace('_', ' ')}", run)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--input", nargs="+", required=True, help="as of prepare")
    parser.add_argument("--text-key", default="text", help="as of prepare")
    parser.add_argument("--language", default="en", help="of the text, for the filters")
    parser.add_argument("--filters", nargs="*", default=FILTERS, help="each is measured by itself")
    parser.add_argument("--task-data", help="items of benchmarks to look for")
    return parser.parse_args()


def main() -> None:
    flags = parse_arguments()
    logger.remove()
    with tempfile.TemporaryDirectory() as folder:
        root = pathlib.Path(folder)
        data, nowhere = root / "data", Console(file=io.StringIO())
        found = [prepared(flags, data, "prepare")]
        made = manifest.read_manifest(data / SOURCE)
        found += deduplication(data, root / "clean")
        found.append(measured("--verify", lambda: verify_root(str(data), None, 1, nowhere)))
        # Last, because what they load stays in the memory of every process that comes after.
        found.append(prepared(flags, root / "tiktoken", "prepare, by tiktoken", fast=False))
        others = [("--filters", name) for name in flags.filters]
        others += [("--benchmarks", flags.task_data)] if flags.task_data else []
        for number, (flag, value) in enumerate(others):
            shown = f"prepare {flag} {value if flag == '--filters' else ''}".strip()
            found.append(prepared(flags, root / str(number), shown, (flag, value)))
    megabytes = (made.train.text_bytes + made.held_out.text_bytes) / 1e6
    documents = made.train.documents + made.held_out.documents
    title = f"{megabytes:,.0f} MB of text, {documents:,} documents; a core, by its CPU time"
    table = Table(title=title)
    for heading in ("stage", "MB/s", "memory, GB", "core-hours for 8.5 TB"):
        table.add_column(heading, justify="left" if heading == "stage" else "right")
    for stage, seconds, gigabytes in found:
        rate = megabytes / seconds
        hours = f"{CORPUS_MEGABYTES / rate / 3600:,.0f}"
        table.add_row(stage, f"{rate:.3g}", f"{gigabytes:.2f}", hours)
    Console(width=100).print(table)


if __name__ == "__main__":
    main()
