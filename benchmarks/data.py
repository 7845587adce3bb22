"""Speed and memory of the batches: 28 sources, one core, against grain's own mix and bare NumPy.

    python benchmarks/data.py --workdir DIR [--tokens 50000000] [--batches 10000] [--core N]
    python benchmarks/data.py --workdir DIR --tokens 500000 --latency-ms 0 1 5 20 [--step-ms 50]

DIR gets the sources (5.6 GB of synthetic tokens by default), which a second run finds there. The
files are read once before the clock starts: what is measured is the loader, not the disk. All
threads share one core. Contestants take turns; the best of their turns counts. `per CPU second`
is what wall time would give with nothing else running; the two part where the machine is busy.

    python benchmarks/data.py --packing DATA [--lengths 1024 4096]

With --packing, only this: of the prepared sources of text in DATA, how many documents rows of each
length cut, how many places are filled, and how fast packing and batches are.

With --latency-ms, only this: how much of a slow storage a training step sees. Every read of a row
takes that long, and a consumer that does nothing takes --step-ms a step.
"""

from __future__ import annotations

import sys

if __name__ == "__main__":  # the package, and not this folder, whose tokenize.py hides Python's
    sys.path[0] = __file__.rpartition("/benchmarks/")[0]

import argparse
import contextlib
import dataclasses
import itertools
import os
import pathlib
import time
from collections.abc import Callable, Iterator
from unittest import mock

import grain
import numpy as np
from rich.console import Console
from rich.table import Table

from stablelm_jax.data import rows as rows_module
from stablelm_jax.data.batches import Batch, BatchSpec, collate, train_batches
from stablelm_jax.data.manifest import (
    MANIFEST_NAME,
    Source,
    SourceManifest,
    Split,
    TokenizerInfo,
    open_sources,
    unigram_entropy,
    write_manifest,
)
from stablelm_jax.data.packing import PackedSources
from stablelm_jax.data.position import DataPosition
from stablelm_jax.data.rows import token_stream
from stablelm_jax.data.shards import Shard, ShardInfo, ShardWriter

# The reported weights of Stable LM 2's 28 sources, in the order of its table.
WEIGHTS = [
    0.0079, 0.0120, 0.0318, 0.0013, 0.0045, 0.0091, 0.0018, 0.2521, 0.0155, 0.0152,
    0.0097, 0.0096, 0.0097, 0.0100, 0.0855, 0.0130, 0.3292, 0.0231, 0.0019, 0.0023,
    0.0088, 0.0063, 0.0066, 0.0011, 0.0132, 0.0363, 0.0724, 0.0102,
]  # fmt: skip
EOD, VOCAB_SIZE = 100_257, 100_352
SEQUENCE_LENGTH, BATCH_SIZE = 4096, 8
SPEC = BatchSpec(SEQUENCE_LENGTH, BATCH_SIZE, seed=1234, eod=EOD)
SHARD_TOKENS = 20_000_000


# --------------------------------------------------------------------------------------------------
# The sources


def make_sources(root: pathlib.Path, tokens: int, console: Console) -> dict[str, Source]:
    """28 sources of `tokens` train tokens, written where they are not there yet."""
    names = [f"source_{number:02d}" for number in range(len(WEIGHTS))]
    for number, name in enumerate(names):
        if not (root / name / MANIFEST_NAME).exists():
            console.print(f"writing {root / name}")
            write_source(root / name, tokens, number)
    return open_sources(root, names)


def write_source(directory: pathlib.Path, tokens: int, seed: int) -> None:
    """A source of random tokens whose documents' lengths are log-normal, 740 tokens on average."""
    directory.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    infos = [
        write_shard(directory / f"train-{number:05d}", min(SHARD_TOKENS, tokens - start), rng)
        for number, start in enumerate(range(0, tokens, SHARD_TOKENS))
    ]
    held_out = write_shard(directory / "held_out-00000", 100_000, rng)
    manifest = SourceManifest(
        source=directory.name,
        tokenizer=TokenizerInfo("synthetic", "0" * 64, VOCAB_SIZE, EOD),
        train=Split.of(infos, 4 * tokens),
        held_out=Split.of([held_out], 400_000),
        unigram_entropy=unigram_entropy(np.ones(EOD)),
    )
    write_manifest(directory, manifest)


def write_shard(path: pathlib.Path, tokens: int, rng: np.random.Generator) -> ShardInfo:
    lengths = np.maximum(1, rng.lognormal(6.0, 1.1, tokens // 300 + 10)).astype(np.int64)
    lengths = lengths[: np.searchsorted(np.cumsum(lengths), tokens) + 1]
    lengths[-1] -= lengths.sum() - tokens
    flat = rng.integers(0, EOD, tokens, np.int32)
    flat[np.cumsum(lengths) - 1] = EOD
    with ShardWriter(path) as writer:
        writer.add_many(flat, lengths)
    return writer.info


def fill_page_cache(sources: dict[str, Source]) -> None:
    for source in sources.values():
        for info in source.manifest.train.shards:
            with open(source.directory / info.file, "rb", buffering=0) as file:
                while file.read(1 << 24):
                    pass


# --------------------------------------------------------------------------------------------------
# The contestants: each is a function that gives an endless iterator of batches


def ours(sources: dict[str, Source], prefetch: int) -> Iterator[Batch]:
    mixture = DataPosition().mixture(dict(zip(sources, WEIGHTS, strict=True)), (), ())
    yield from train_batches(sources, mixture, SPEC, prefetch=prefetch)


def ours_without_tables(sources: dict[str, Source], prefetch: int) -> Iterator[Batch]:
    """As for sources of more than 65,536 rows, whose order grain computes row by row."""
    with mock.patch.object(rows_module, "MAX_TABLE", 0):
        mixture = DataPosition().mixture(dict(zip(sources, WEIGHTS, strict=True)), (), ())
        batches = train_batches(sources, mixture, SPEC, prefetch=prefetch)
    yield from batches


class MappedRows:
    """A source's rows from memory maps, as a grain user would write it; rows end with the shard."""

    def __init__(self, source: Source, index: int):
        self.index = index
        self.rows = []
        for info in source.manifest.train.shards:
            tokens = np.memmap(source.directory / info.file, np.int32, "r")
            count = (len(tokens) - 1) // SEQUENCE_LENGTH
            self.rows += [(tokens, row * SEQUENCE_LENGTH) for row in range(count)]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, row: int) -> tuple[np.ndarray, int]:
        tokens, start = self.rows[row]
        return tokens[start : start + SEQUENCE_LENGTH + 1], self.index


def stack(rows: list[tuple[np.ndarray, int]]) -> Batch:
    """Our own marks and masks, so that the contestants differ in the rest alone."""
    return collate(np.stack([row for row, _ in rows]), [index for _, index in rows], SPEC)


def grain_mix(sources: dict[str, Source], prefetch: int) -> Iterator[Batch]:
    datasets = [
        grain.MapDataset.source(MappedRows(source, index)).shuffle(seed=index).repeat()
        for index, source in enumerate(sources.values())
    ]
    mixed = grain.MapDataset.mix(datasets, WEIGHTS).batch(BATCH_SIZE, batch_fn=stack)
    options = grain.ReadOptions(num_threads=prefetch, prefetch_buffer_size=prefetch)
    batches = iter(mixed.to_iter_dataset(options))
    try:
        yield from batches
    finally:
        batches.close()


def numpy_rows(sources: dict[str, Source]) -> Iterator[tuple[np.ndarray, int]]:
    """Rows by chance alone: no epochs, no exact shares, no restart."""
    rng = np.random.default_rng(0)
    datasets = [MappedRows(source, index) for index, source in enumerate(sources.values())]
    shares = np.array(WEIGHTS) / sum(WEIGHTS)
    while True:
        for index in rng.choice(len(datasets), 1024, p=shares).tolist():
            yield datasets[index][int(rng.integers(len(datasets[index])))]


def numpy_loop(sources: dict[str, Source]) -> Iterator[Batch]:
    rows = numpy_rows(sources)
    while True:
        yield stack(list(itertools.islice(rows, BATCH_SIZE)))


def numpy_tokens_only(sources: dict[str, Source]) -> Iterator[Batch]:
    rows = numpy_rows(sources)
    while True:
        yield {"tokens": np.stack([row for row, _ in itertools.islice(rows, BATCH_SIZE)])}


CONTESTANTS: dict[str, Callable[[dict[str, Source]], Iterator[Batch]]] = {
    "train_batches, 2 made ahead": lambda sources: ours(sources, 2),
    "train_batches, made in next": lambda sources: ours(sources, 0),
    "  the same, sources > 65,536 rows": lambda sources: ours_without_tables(sources, 0),
    "grain source, shuffle, mix; 2 ahead": lambda sources: grain_mix(sources, 2),
    "grain source, shuffle, mix; in next": lambda sources: grain_mix(sources, 0),
    "numpy memmap loop, our masks": numpy_loop,
    "numpy memmap loop, tokens alone": numpy_tokens_only,
}


# --------------------------------------------------------------------------------------------------
# The measurements


def speed(batches: Iterator[Batch], count: int) -> tuple[float, float]:
    """Tokens a second, by wall time and by CPU time of all threads, over `count` batches."""
    wall, cpu = time.perf_counter(), time.process_time()
    for _ in range(count):
        next(batches)
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    tokens = count * BATCH_SIZE * SEQUENCE_LENGTH
    return tokens / wall, tokens / cpu


def race(sources: dict[str, Source], count: int, turns: int) -> Table:
    running = {name: make(sources) for name, make in CONTESTANTS.items()}
    best = dict.fromkeys(CONTESTANTS, (0.0, 0.0))
    for batches in running.values():
        speed(batches, 200)  # first tables, allocator, branch predictors
    for _ in range(turns):
        for name, batches in running.items():
            best[name] = tuple(map(max, best[name], speed(batches, count)))
    for batches in running.values():
        batches.close()
    title = f"batches of {BATCH_SIZE} x {SEQUENCE_LENGTH} on one core, million tokens"
    table = Table("", "per second", "per CPU second", "ratio", title=title)
    first = best[next(iter(best))][1]
    for name, (wall, cpu) in best.items():
        table.add_row(name, f"{wall / 1e6:.1f}", f"{cpu / 1e6:.1f}", f"{cpu / first:.2f}")
    return table


def memory() -> dict[str, float]:
    """Megabytes: private (anonymous) and resident in all, file pages of maps included."""
    fields = {}
    with open("/proc/self/smaps_rollup", encoding="ascii") as file:
        for line in file.readlines()[1:]:
            name, value = line.split()[:2]
            fields[name.rstrip(":")] = int(value) / 1024
    return {"anonymous": fields["Anonymous"], "resident": fields["Rss"]}


def watch_memory(sources: dict[str, Source], count: int) -> Table:
    batches = ours(sources, 2)
    speed(batches, 200)
    table = Table("after batches", "anonymous MB", "resident MB", title="memory of train_batches")
    for done in np.linspace(0, count, 6).astype(int).tolist():
        if done:
            speed(batches, count // 5)
        now = memory()
        table.add_row(f"{done}", f"{now['anonymous']:.1f}", f"{now['resident']:.1f}")
    batches.close()
    return table


# --------------------------------------------------------------------------------------------------
# Slow storage


@contextlib.contextmanager
def slow_reads(latency: float) -> Iterator[None]:
    """Every read of a shard takes `latency` seconds more, as on storage that is far away."""
    read = Shard.read

    def slow(shard: Shard, start: int, stop: int) -> np.ndarray:
        time.sleep(latency)
        return read(shard, start, stop)

    with mock.patch.object(Shard, "read", slow if latency else read):
        yield


def mean_wait(batches: Iterator[Batch], step: float, count: int) -> float:
    """Seconds that one of `count` steps of `step` seconds waits for its batch."""
    waited = 0.0
    for _ in range(count):
        began = time.perf_counter()
        next(batches)
        waited += time.perf_counter() - began
        time.sleep(step)
    return waited / count


def show_waits(sources: dict[str, Source], args: argparse.Namespace) -> Table:
    """Waits measured and, by the bound in the docstring of `train_batches`, predicted."""
    table = Table(title=f"slow storage, {args.steps} steps each, milliseconds", caption=BOUND)
    for column in ("a read", "rows a batch", "prefetch", "threads", "a step",
                   "rows x read / threads", "wait predicted", "wait a step"):  # fmt: skip
        table.add_column(column, justify="right")
    mixture = DataPosition().mixture(dict(zip(sources, WEIGHTS, strict=True)), (), ())
    step = args.step_ms
    for rows, prefetch, latency in itertools.product(args.rows, args.prefetch, args.latency_ms):
        threads = (prefetch + 1) // 2
        making = rows * latency / max(threads, 1)
        predicted = max(0.0, making - step) if threads else making
        spec = dataclasses.replace(SPEC, batch_size=rows)
        with (
            slow_reads(latency / 1000),
            contextlib.closing(train_batches(sources, mixture, spec, prefetch=prefetch)) as batches,
        ):
            mean_wait(batches, step / 1000, 2 * prefetch + 2)  # past what is made ahead at first
            wait = 1000 * mean_wait(batches, step / 1000, args.steps)
        counts = (f"{latency:g}", f"{rows}", f"{prefetch}", f"{threads}", f"{step:g}")
        table.add_row(*counts, f"{making:.1f}", f"{predicted:.1f}", f"{wait:.1f}")
    return table


# --------------------------------------------------------------------------------------------------
# Packing


def show_packing(root: pathlib.Path, lengths: list[int], count: int) -> Table:
    """Both ways of filling rows, by source; all are read at once for the speed of batches."""
    sources = open_sources(root, [path.parent.name for path in root.glob(f"*/{MANIFEST_NAME}")])
    table = Table(title=f"packing of {root}")
    columns = ("source", "row", "packing", "rows", "places filled", "documents cut",
               "tokens without beginning", "million items/s", "million tokens/CPU s")  # fmt: skip
    for number, column in enumerate(columns):
        table.add_column(column, justify="right" if number else "left")
    for length, (name, source), packing in itertools.product(
        lengths, sources.items(), ("concatenate", "best_fit")
    ):
        spec = BatchSpec(length, BATCH_SIZE, 1234, source.manifest.tokenizer.eod, packing=packing)
        rows, items = (source.manifest.train.tokens - 1) // length, ""
        cut, lost = documents_cut(source, length, packing)
        filled, packed, mixture = 1.0, None, DataPosition().mixture({name: 1.0}, (), ())
        if packing == "best_fit":
            began = time.process_time()
            packed = PackedSources({name: source}, spec)
            took, train = time.process_time() - began, packed[name, "train"]
            rows, items = len(train), f"{len(train.lengths) / took / 1e6:.2f}"
            filled = train.lengths.sum(dtype=np.int64) / (rows * length)
        batches = train_batches({name: source}, mixture, spec, packed=packed)
        with contextlib.closing(batches):
            speed(batches, 20)
            rate = max(speed(batches, count)[1] for _ in range(3)) * length / SEQUENCE_LENGTH
        table.add_row(name, f"{length:,}", packing, f"{rows:,}", f"{filled:.2%}", f"{cut:.2%}",
                      f"{lost:.2%}", items, f"{rate / 1e6:.1f}")  # fmt: skip
    return table


def documents_cut(source: Source, length: int, packing: str) -> tuple[float, float]:
    """The share of documents that lie in several rows, and of tokens whose document's beginning
    lies in another row than they do."""
    offsets = token_stream(source, "train").document_offsets()
    first, places = offsets[:-1], np.diff(offsets) - 1  # an input for each token but the first
    before = length - first % length if packing == "concatenate" else np.full(len(first), length)
    lost = np.maximum(places - before, 0)
    return (lost > 0).mean(), lost.sum() / places.sum()


BOUND = "nothing is waited for while rows x read / threads <= step; threads = (prefetch + 1) // 2"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--workdir", type=pathlib.Path)
    parser.add_argument("--tokens", type=int, default=50_000_000, help="train tokens a source")
    parser.add_argument("--batches", type=int, default=10_000, help="batches of the memory test")
    parser.add_argument("--count", type=int, default=500, help="batches of one turn")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--core", type=int, default=max(os.sched_getaffinity(0)))
    slow = parser.add_argument_group("slow storage")
    slow.add_argument("--latency-ms", type=float, nargs="+", help="of each read; the rest is left")
    slow.add_argument("--step-ms", type=float, default=50.0)
    slow.add_argument("--prefetch", type=int, nargs="+", default=[0, 1, 2, 4, 8])
    slow.add_argument("--rows", type=int, nargs="+", default=[BATCH_SIZE], help="of a batch")
    slow.add_argument("--steps", type=int, default=40, help="of one measurement")
    packing = parser.add_argument_group("packing")
    packing.add_argument("--packing", type=pathlib.Path, metavar="DATA", help="prepared sources")
    packing.add_argument("--lengths", type=int, nargs="+", default=[1024, 4096], help="of a row")
    args = parser.parse_args()
    console = Console()
    if args.packing:
        os.sched_setaffinity(0, {args.core})
        console.print(show_packing(args.packing, args.lengths, args.count))
        return
    if not args.workdir:
        parser.error("--workdir or --packing: one of them is needed")
    sources = make_sources(args.workdir, args.tokens, console)
    os.sched_setaffinity(0, {args.core})
    fill_page_cache(sources)
    tokens = sum(source.manifest.train.tokens for source in sources.values())
    documents = sum(source.manifest.train.documents for source in sources.values())
    console.print(
        f"{len(sources)} sources, {tokens / 1e6:.0f} M tokens, documents of"
        f" {tokens / documents:.0f} tokens on average; core {args.core};"
        f" load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores"
    )
    if args.latency_ms:
        console.print(show_waits(sources, args))
        return
    began = time.perf_counter()
    next(ours(sources, 2))
    console.print(f"first batch after {time.perf_counter() - began:.2f} s")
    console.print(watch_memory(sources, args.batches))
    console.print(race(sources, args.count, args.turns))


if __name__ == "__main__":
    main()
