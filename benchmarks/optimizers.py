"""Held-out loss at equal tokens for each optimizer, each at the best of a small grid of rates.

    bash launch/demo_corpus.sh                             # the text, into data/
    python benchmarks/optimizers.py --output runs/optimizers
    python benchmarks/optimizers.py --output runs/optimizers --table   # of the runs that are done

The multilingual demo's eight sources, a model of 2 layers and width 64, one CPU core. Each kind
runs once at every rate of its grid, with the first seed; where the best rate is the grid's first
or last, once more a step further, until it is not; then at the best rate with the other seeds. A
seed is that of the first weights and of the order of rows, so that equal seeds pair. All kinds
have the same warmup; after it all but schedule-free AdamW a cosine that ends near a tenth of the
peak, schedule-free AdamW a constant rate, as it is meant. All else is at its default.

A run that is done is not done again: interrupt it as you like. Intervals are Student's, 95 %.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

CONFIG = Path(__file__).parents[1] / "configs/demo_multilingual.py"
FACTOR = 2.0  # between two neighbours of a grid
# Where the grids begin: the demo's rate in the middle, for Muon and AdEMAMix too, which take
# AdamW's rates (so their papers); Lion's paper says 3 to 10 times less, schedule-free AdamW's more.
GRIDS = {
    "adamw": (1e-3, 2e-3, 4e-3),
    "muon": (1e-3, 2e-3, 4e-3),
    "lion": (2e-4, 4e-4, 8e-4),
    "ademamix": (1e-3, 2e-3, 4e-3),
    "schedule_free_adamw": (2e-3, 4e-3, 8e-3),
}
MODEL = {
    **{"model.num_layers": 2, "model.width": 64, "model.feed_forward_width": 176},
    **{"model.num_heads": 1, "model.num_kv_heads": 1, "data.sequence_length": 128},
}
# Student's t for 97.5 % at so many degrees of freedom, from any table of it.
STUDENT = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", default="data", help="what launch/demo_corpus.sh has made")
    parser.add_argument("--output", required=True, help="folder of the runs")
    parser.add_argument("--kinds", nargs="+", choices=GRIDS, default=list(GRIDS))
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3])
    parser.add_argument("--table", action="store_true", help="runs nothing")
    args = parser.parse_args()
    first = args.seeds[0]
    best = {kind: best_rate(args, kind) for kind in args.kinds}
    if not args.table:
        for seed in args.seeds:  # so that after each round every kind has as many
            for kind in args.kinds:
                run(args, kind, best[kind], seed)
    rows = {
        kind: {seed: loss_of(args, kind, rate, seed) for seed in args.seeds}
        for kind, rate in best.items()
        if rate is not None and loss_of(args, kind, rate, first) is not None
    }
    print(table(best, rows))


def best_rate(args: argparse.Namespace, kind: str) -> float | None:
    """The rate of the least loss with the first seed; None where there is none."""
    rates = list(GRIDS[kind])
    while True:
        for rate in rates:
            run(args, kind, rate, args.seeds[0])
        losses = {rate: loss_of(args, kind, rate, args.seeds[0]) for rate in rates}
        known = {rate: loss for rate, loss in losses.items() if loss is not None}
        if not known or args.table and len(known) < len(rates):
            return min(known, key=known.get, default=None)
        best = min(known, key=known.get)
        if best == rates[0]:
            rates.insert(0, best / FACTOR)
        elif best == rates[-1]:
            rates.append(best * FACTOR)
        else:
            return best


def folder_of(args: argparse.Namespace, kind: str, rate: float, seed: int) -> Path:
    return Path(args.output) / f"{kind}_{rate:g}_{seed}_{args.steps}"


def run(args: argparse.Namespace, kind: str, rate: float, seed: int) -> None:
    """One run, unless it is done or none is wanted."""
    if args.table or loss_of(args, kind, rate, seed) is not None:
        return
    free, folder = kind == "schedule_free_adamw", folder_of(args, kind, rate, seed)
    values = {
        **MODEL,
        **{"data.root": args.data, "data.tokenizer": f"{args.data}/tokenizer.json"},
        **{"seed": seed, "optimizer.kind": kind, "schedule.peak": rate},
        "schedule.kind": "constant" if free else "cosine",
        "schedule.minimum": None if free else rate / 10,
        "schedule.total_steps": None if free else args.steps,
        "schedule.warmup_steps": args.steps // 20,
        **{"training.num_steps": args.steps, "checkpoint.every": args.steps},
        **{"checkpoint.save_initial": False, "evaluation.every": args.steps},
        **{"evaluation.max_rows": 64, "samples.every": 0},
    }
    if kind == "ademamix":
        values["optimizer.ademamix_warmup_steps"] = args.steps
    flags = [f"--config.{key}={value}" for key, value in values.items()]
    command = [sys.executable, "-m", "stablelm_jax.train", f"--config={CONFIG}", *flags]
    one_core = "--xla_cpu_multi_thread_eigen=false"
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": one_core}
    folder.parent.mkdir(parents=True, exist_ok=True)
    output = folder.parent / f"{folder.name}.txt"
    with output.open("w") as file:
        command.append(f"--workdir={folder}")
        code = subprocess.run(command, env=environment, stdout=file, stderr=file).returncode
    found = loss_of(args, kind, rate, seed)
    print(f"{folder.name}: exit code {code}, held-out loss {found}", file=sys.stderr, flush=True)
    if code or found is None:
        raise SystemExit(f"error: {folder.name} failed; see {folder.with_suffix('.txt')}")


def loss_of(args: argparse.Namespace, kind: str, rate: float, seed: int) -> float | None:
    """Held-out loss after the last step, nats a token; None where the run is not done."""
    path = folder_of(args, kind, rate, seed) / "metrics.jsonl"
    lines = map(json.loads, path.read_text().splitlines()) if path.exists() else ()
    found = [line for line in lines if line["step"] == args.steps and "eval/loss" in line]
    return found[-1]["eval/loss"] if found else None


def table(best: dict[str, float], rows: dict[str, dict[int, float | None]]) -> str:
    """Markdown; differences are to the first kind, paired by seed."""
    lines = ["| optimizer | best rate | held-out loss by seed | mean | difference to the first |"]
    lines.append("|---|---|---|---|---|")
    base = next(iter(rows.values()), {})
    for kind, losses in rows.items():
        known = {seed: loss for seed, loss in losses.items() if loss is not None}
        paired = [loss - base[seed] for seed, loss in known.items() if base.get(seed)]
        cells = ", ".join(f"{loss:.4f}" for loss in known.values())
        difference = "" if losses is base else with_interval(paired, sign=True)
        mean = with_interval(list(known.values()))
        lines.append(f"| `{kind}` | {best[kind]:g} | {cells} | {mean} | {difference} |")
    return "\n".join(lines)


def with_interval(values: Sequence[float], sign: bool = False) -> str:
    """ "mean ± half the 95 % interval" of the mean; without it where there is one value."""
    mean = f"{np.mean(values):{'+' if sign else ''}.4f}"
    if len(values) < 2:
        return mean
    half = STUDENT[len(values) - 1] * np.std(values, ddof=1) / math.sqrt(len(values))
    return f"{mean} ± {half:.4f}"


if __name__ == "__main__":
    main()
