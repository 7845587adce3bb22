"""`evaluate --checkpoint C`: held-out loss and bits per byte of each source; JSON on stdout."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0, 1 on failure, 2 for bad arguments (argparse)."""
    arguments = _parser().parse_args(argv)
    try:
        print(json.dumps(_evaluate(arguments), indent=1, allow_nan=False))
    except (ValueError, OSError) as error:
        print(f"evaluate: {error}", file=sys.stderr)
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="stablelm evaluate", description=__doc__)
    parser.add_argument(
        "--checkpoint", required=True, help="a folder global_step<N>, or its gs:// URL"
    )
    parser.add_argument("--config", help="config file; default: the one in the checkpoint")
    parser.add_argument(
        "--data", help="folder or URL of the prepared sources; default: the config's"
    )
    parser.add_argument("--max-rows", type=int, help="held-out rows a source; default: all")
    return parser


def _evaluate(arguments: argparse.Namespace) -> dict[str, float | str | None]:
    from rich.console import Console

    from stablelm_jax import config as config_lib
    from stablelm_jax.checkpoint.reading import read_run
    from stablelm_jax.checkpoint.weights import load_weights
    from stablelm_jax.evaluation.held_out import evaluate_held_out
    from stablelm_jax.training.console import show_evaluation
    from stablelm_jax.training.origin import Origin
    from stablelm_jax.training.setup import prepare_run

    saved = read_run(arguments.checkpoint)
    if arguments.config:
        config = config_lib.load(arguments.config)
    else:
        config = config_lib.from_dict(saved["config"])
    if arguments.data:
        config.data.root = arguments.data
    config.evaluation.max_rows = arguments.max_rows or 2**31 - 1
    origin = None if arguments.config else Origin.of_checkpoint(saved)
    run = prepare_run(config, origin)
    saved, model, params = load_weights(arguments.checkpoint, run.mesh)
    if model != run.model:
        raise ValueError(f"the model of {arguments.config} is not the one in the checkpoint")
    line = evaluate_held_out(
        run.eval_step, params, run.held_out(), run.held_out_tokens_per_byte(), run.mesh
    )
    show_evaluation(Console(stderr=True), run, saved["step"], line)
    return {"checkpoint": arguments.checkpoint, "step": saved["step"], **line}


if __name__ == "__main__":
    sys.exit(main())
