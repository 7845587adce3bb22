"""Speed of tokenising: Arcade100k here, bare tiktoken, and `prepare` from end to end, in one run.

    python benchmarks/tokenize.py [--megabytes 200] [--workdir DIR] [--workers 1,2] [--skip-prepare]

The text is what this Python has installed: descriptions of packages, the standard library, sources
of packages; where it is less than asked for it is cut again at other places. Tokenising is measured
in megabytes of UTF-8 text a second of one core (CPU time, contestants in turns), `prepare` by the
clock on the wall: nothing else should be running.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
if __name__ == "__main__":
    sys.path[0] = str(ROOT)
elif __name__ == "tokenize":
    # Another script of this folder, which its folder's place on the path led here, wants (by way of
    # `inspect`) the standard library's module of that name. For its sake, too, what is heavy is
    # imported in functions.
    theirs = Path(os.__file__).with_name("tokenize.py")
    spec = importlib.util.spec_from_file_location(__name__, theirs)
    sys.modules[__name__] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules[__name__])

DOCUMENT_KILOBYTES = (1, 4, 64)
PREPARE_RUNS = 2  # by the clock on the wall: the lesser counts, what else ran only adds
SLICE_BYTES = 4_000_000  # the contestants take turns at this much text
PATTERNS = ("**/METADATA", "**/*.py", "**/*.md", "**/*.rst", "**/*.txt")


def local_text(limit: int) -> str:
    """Up to `limit` characters of what is installed, the same on every run of one machine."""
    parts, size = [], 0
    for path in _local_files():
        try:
            parts.append(path.read_text("utf-8"))
        except (OSError, UnicodeDecodeError):
            continue  # tests of the standard library hold files of other encodings
        size += len(parts[-1])
        if size >= limit:
            break
    return "\n".join(parts)[:limit]


def _local_files() -> Iterator[Path]:
    places = [Path(sysconfig.get_path(name)) for name in ("purelib", "stdlib")]
    yield from sorted(places[0].glob("*.dist-info/METADATA"))
    for pattern in PATTERNS[1:]:
        for place in reversed(places):
            yield from sorted(place.glob(pattern))


def documents(text: str, kilobytes: int, total: int) -> Iterator[str]:
    """Documents of so many thousand characters, `total` bytes at least, no two alike by design."""
    size, start, made = kilobytes * 1000, 0, 0
    while True:
        # Each round over the text begins a little later than the last.
        for i in range(start, len(text) - size, size):
            document = text[i : i + size]
            yield document
            made += len(document.encode())
            if made >= total:
                return
        start += 37


def slices(source: Iterator[str]) -> Iterator[tuple[list[str], int]]:
    """Documents in lists of SLICE_BYTES, each with its bytes."""
    batch, size = [], 0
    for document in source:
        batch.append(document)
        size += len(document.encode())
        if size >= SLICE_BYTES:
            yield batch, size
            batch, size = [], 0
    if batch:
        yield batch, size


def contestants() -> dict[str, Callable[[list[str]], list]]:
    """Name -> function from a list of texts to their ids."""
    import tiktoken

    from stablelm_jax.tokenizer import tokenizer as module

    ours = module.load_tokenizer(module.ARCADE100K)

    def bare(pattern: str) -> Callable[[list[str]], list]:
        encoding = tiktoken.Encoding(
            "bare", pat_str=pattern, mergeable_ranks=ours.ranks, special_tokens=ours.specials
        )
        return lambda texts: [encoding.encode_ordinary(text) for text in texts]

    return {
        "tiktoken": bare(module.PATTERN),
        "tiktoken, grouped": bare(module._GROUPED_PATTERN),
        "ours": lambda texts: [ours.encode_document(text) for text in texts],
    }


def race(kilobytes: int, text: str, total: int) -> dict:
    """Megabytes a second of each contestant on the same documents, in turns; ids compared."""
    encoders = contestants()
    seconds = dict.fromkeys(encoders, 0.0)
    bytes_done = tokens = 0
    for turn, (batch, size) in enumerate(slices(documents(text, kilobytes, total))):
        results = {}
        for name in sorted(encoders, reverse=bool(turn % 2)):
            start = time.process_time()
            results[name] = encoders[name](batch)
            seconds[name] += time.process_time() - start
        bytes_done += size
        tokens += sum(map(len, results["ours"]))
        _check_same_ids(batch, results)
    rates = {name: bytes_done / s / 1e6 for name, s in seconds.items()}
    return {"kilobytes": kilobytes, "megabytes": bytes_done / 1e6, "tokens": tokens, **rates}


def _check_same_ids(batch: list[str], results: dict[str, list]) -> None:
    """Every 50th document; bare tiktoken knows no NFC, so only those that are NFC already."""
    from stablelm_jax.tokenizer.long_text import normalise

    for i in range(0, len(batch), 50):
        same = list(results["tiktoken"][i]) == list(results["ours"][i])
        if not same and normalise(batch[i]) == batch[i]:
            raise SystemExit(f"ids differ from bare tiktoken: {batch[i]!r}")


def race_prepare(kilobytes: int, text: str, total: int, workers: list[int], workdir: Path) -> list:
    """(workers, least seconds, megabytes a second) of `python -m stablelm_jax.prepare`."""
    source = workdir / f"documents_{kilobytes}kb.jsonl"
    size = 0
    with source.open("w", encoding="utf-8") as lines:
        for document in documents(text, kilobytes, total):
            size += len(document.encode())
            lines.write(json.dumps({"text": document}, ensure_ascii=False) + "\n")
    results = []
    for count in workers:
        output = workdir / f"prepared_{kilobytes}kb_{count}"
        times = []
        for _ in range(PREPARE_RUNS):
            shutil.rmtree(output, ignore_errors=True)
            times.append(_prepare(source, output, count))
        results.append((count, min(times), size / min(times) / 1e6))
        shutil.rmtree(output)
    source.unlink()
    return results


def _prepare(source: Path, output: Path, workers: int) -> float:
    command = [sys.executable, "-m", "stablelm_jax.prepare", "--source", "benchmark"]
    command += ["--input", str(source), "--output", str(output), "--workers", str(workers)]
    start = time.perf_counter()
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    seconds = time.perf_counter() - start
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed ({done.returncode}):\n{done.stderr[-2000:]}")
    return seconds


def print_race(rows: list[dict]) -> None:
    headings = "documents", "MB", "Mtokens", "tiktoken", "grouped", "ours"
    headings += "ours/tiktoken", "ours/grouped"
    lines = []
    for row in rows:
        bare, grouped, ours = row["tiktoken"], row["tiktoken, grouped"], row["ours"]
        sizes = f"{row['kilobytes']} kB", f"{row['megabytes']:.0f}", f"{row['tokens'] / 1e6:.1f}"
        figures = bare, grouped, ours, ours / bare, ours / grouped
        lines.append((*sizes, *(f"{figure:.2f}" for figure in figures)))
    caption = "tiktoken: bare, pattern as published; grouped: bare, the pattern as ours spells it"
    _print_table("Tokenising, MB/s on one core", headings, lines, caption)


def print_prepare(rows: list[dict], results: dict[int, list]) -> None:
    headings = "documents", "workers", "seconds", "MB/s", "/tiktoken", "scaling"
    lines = []
    for row in rows:
        runs = results[row["kilobytes"]]
        for workers, seconds, rate in runs:
            figures = rate, rate / row["tiktoken"], rate / runs[0][2]
            sizes = f"{row['kilobytes']} kB", str(workers), f"{seconds:.1f}"
            lines.append((*sizes, *(f"{figure:.2f}" for figure in figures)))
    _print_table("prepare, from the start of the process to the manifest", headings, lines)


def _print_table(title: str, headings: tuple, lines: list[tuple], caption: str = "") -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, caption=caption)
    for heading in headings:
        table.add_column(heading, justify="right")
    for line in lines:
        table.add_row(*line)
    Console(width=100).print(table)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--megabytes", type=float, default=200, help="text per document size")
    parser.add_argument("--workdir", type=Path, help="for documents and shards (else temporary)")
    parser.add_argument("--workers", default="1,2", help="runs of prepare, the first to scale from")
    parser.add_argument("--skip-prepare", action="store_true", help="tokenising alone")
    arguments = parser.parse_args()
    arguments.workers = [int(count) for count in arguments.workers.split(",")]
    return arguments


def main() -> None:
    arguments = parse_arguments()
    total = int(arguments.megabytes * 1e6)
    text = local_text(total)
    print(f"{len(text) / 1e6:.0f} million characters of local text", flush=True)
    rows = [race(kilobytes, text, total) for kilobytes in DOCUMENT_KILOBYTES]
    print_race(rows)
    if arguments.skip_prepare:
        print("prepare was not measured (--skip-prepare)")
        return
    if arguments.workdir:
        arguments.workdir.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=arguments.workdir) as folder:
        results = {
            kilobytes: race_prepare(kilobytes, text, total, arguments.workers, Path(folder))
            for kilobytes in DOCUMENT_KILOBYTES
        }
    print_prepare(rows, results)


if __name__ == "__main__":
    main()
