"""What small weights cost: held-out loss with the matrices rounded as decoding holds them.

    python benchmarks/quantisation.py --checkpoint runs/demo/checkpoints/global_step1200
    python benchmarks/quantisation.py --checkpoint C --data FOLDER --max-rows 16

The evaluation is that of `evaluate`, in the config's compute type; perplexity is a token's.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator
from typing import Any

from rich.console import Console
from rich.table import Table

from stablelm_jax import config as config_lib
from stablelm_jax.checkpoint.reading import read_run
from stablelm_jax.checkpoint.saved_model import SavedModel
from stablelm_jax.data.position import DataPosition
from stablelm_jax.generation.quantisation import METHODS
from stablelm_jax.generation.weights import rounded
from stablelm_jax.training.held_out import evaluate_held_out
from stablelm_jax.training.setup import Run, prepare_run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", required=True, metavar="global_step<N>")
    parser.add_argument("--data", help="folder of the prepared sources; default: the config's")
    parser.add_argument("--tokenizer", help="default: the config's")
    parser.add_argument("--max-rows", type=int, default=64, help="held-out rows a source")
    arguments = parser.parse_args()
    saved = read_run(arguments.checkpoint)
    config = config_lib.from_dict(saved["config"])
    config.data.root = arguments.data or config.data.root
    config.data.tokenizer = arguments.tokenizer or config.data.tokenizer
    config.evaluation.max_rows = arguments.max_rows
    run = prepare_run(config, DataPosition.of_checkpoint(saved))
    params = SavedModel.open(arguments.checkpoint, config.data.tokenizer).load(run.mesh)
    Console(width=120).print(_table(arguments, run, dict(_lines(run, params))))


def _lines(run: Run, params: Any) -> Iterator[tuple[str, dict[str, float]]]:
    tokens_per_byte = run.held_out_tokens_per_byte()
    for method in (None, *METHODS):
        weights = params if method is None else rounded(run.model, params, method)
        batches = run.held_out()
        line = evaluate_held_out(run.eval_step, weights, batches, tokens_per_byte, run.mesh)
        yield method or "as trained", line


def _table(arguments: argparse.Namespace, run: Run, lines: dict[str, dict[str, float]]) -> Table:
    rows = arguments.max_rows
    table = Table(title=f"{arguments.checkpoint}, at most {rows} held-out rows a source")
    for column in ("matrices", "loss", "more", "perplexity", "more", "worst source, bits a byte"):
        table.add_column(column, justify="right")
    before = lines["as trained"]
    for name, line in lines.items():
        loss = line["eval/loss"]
        rise = {
            source: line[key] - before[key]
            for source in run.sources
            if (key := f"eval/bits_per_byte/{source}") in line
        }
        worst = max(rise, key=rise.get)
        perplexity, was = math.exp(loss), math.exp(before["eval/loss"])
        table.add_row(
            name,
            f"{loss:.4f}",
            f"{loss - before['eval/loss']:+.4f}",
            f"{perplexity:.2f}",
            f"{perplexity / was - 1:+.2%}",
            f"{worst} {rise[worst]:+.4f}" if line is not before else "",
        )
    return table


if __name__ == "__main__":
    main()
