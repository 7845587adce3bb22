"""`evaluate --checkpoint C [--tasks a,b]`: held-out text of each source, or lm-eval's tasks.

JSON goes to stdout or --output, tables to stderr. With --tasks only tasks are run, unless --config
or --data says where held-out text lies.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stablelm_jax.run.console import make_console
from stablelm_jax.run_verb import run_verb
from stablelm_jax.storage.files import check_writable, write_json

if TYPE_CHECKING:
    from stablelm_jax.checkpoint.saved_model import SavedModel


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0, 1 on failure, 2 for bad arguments (argparse)."""
    parser = _parser()
    arguments = parser.parse_args(argv)
    for name, value in vars(arguments).items():
        if value == "" or (isinstance(value, list) and "" in value):
            parser.error(f"--{name.replace('_', '-')} is empty: name something, or leave it out")
    try:
        from stablelm_jax.run.metrics import finite  # imports jax, which takes seconds

        if arguments.output:
            check_writable(arguments.output)
        found = finite(_evaluate(arguments))  # what one task found must not cost the others
        _write(found, arguments.output)
    except (ValueError, OSError, ImportError) as error:
        print(f"evaluate: {error}", file=sys.stderr)
        return 1
    if failed := found.get("failed"):
        reasons = "; ".join(f"{name}: {reason}" for name, reason in failed.items())
        print(f"evaluate: tasks without scores: {reasons}", file=sys.stderr)
        return 1
    return 0


def _write(found: dict[str, Any], output: Path | None) -> None:
    """To stdout where no file is named, or where it cannot be written after all."""
    if output:
        try:
            return write_json(output, found)
        except OSError:  # hours of work are in it
            _write(found, None)
            raise
    print(json.dumps(found, indent=1, allow_nan=False))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="stablelm evaluate",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--checkpoint", required=True, help="a folder global_step<N>, or its gs:// URL")
    add("--output", type=Path, help="file for the JSON; default: stdout")
    add("--model", type=_count, default=1, help="devices that share the model (%(default)s)")
    what = "default: held-out text as in training; tasks bfloat16, float32 on a CPU"
    add("--dtype", choices=("bfloat16", "float32"), help=what)
    what = "of a batch on each device (%(default)s)"
    add("--batch-tokens", type=_count, default=16_384, help=what)
    add("--tokenizer", help="default: the one the model was trained with")

    add = parser.add_argument_group("held-out text").add_argument
    add("--config", help="config file; default: the one in the checkpoint")
    add("--data", help="folder or URL of the prepared sources; default: the config's")
    add("--max-rows", type=_count, default=2**31 - 1, help="held-out rows a source; default: all")

    add = parser.add_argument_group("tasks").add_argument
    names = (
        "names with commas between; of lm-eval, or stablelm2_quick, stablelm2_leaderboard, "
        "stablelm2_multilingual, stablelm2_lambada_deepl"
    )
    add("--tasks", type=lambda text: [name.strip() for name in text.split(",")], help=names)
    add("--task-data", help="folder made by launch/corpora/task_data.py; default: the Hub")
    add("--limit", type=_count, help="items of each task; default: all")
    what = "examples, where a task is not fixed to none; default: each task's own number"
    add("--num-fewshot", type=int, help=what)
    add("--max-length", type=_count, help="tokens; default: those of the training")
    add("--compare", default="stablelm-2-1_6b", help="published model; default: %(default)s")
    return parser


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no number from 1 on")
    return int(text)


def _evaluate(arguments: argparse.Namespace) -> dict[str, Any]:
    from stablelm_jax.checkpoint.saved_model import SavedModel
    from stablelm_jax.parallel.mesh import make_mesh
    from stablelm_jax.storage.remote import described

    saved = SavedModel.open(arguments.checkpoint, arguments.tokenizer)
    found = {"checkpoint": str(saved.path), "step": saved.run["step"]}
    if not arguments.tasks or arguments.config or arguments.data:
        found |= _held_out(arguments, saved)
    if arguments.tasks:
        from stablelm_jax.evaluation.checkpoint_tasks import evaluate_tasks

        try:
            found |= evaluate_tasks(
                saved,
                make_mesh(model=arguments.model),
                arguments.tasks,
                data=arguments.task_data,
                compared=arguments.compare,
                limit=arguments.limit,
                num_fewshot=arguments.num_fewshot,
                dtype=arguments.dtype,
                max_length=arguments.max_length,
                batch_tokens=arguments.batch_tokens,
            )
        except Exception as error:  # of any library: what was found before stays
            if "eval/loss" not in found:
                raise
            found["failed"] = {"tasks": described(error)}
    return found


def _held_out(arguments: argparse.Namespace, saved: SavedModel) -> dict[str, Any]:
    import jax

    from stablelm_jax import config as config_lib
    from stablelm_jax.data.position import DataPosition
    from stablelm_jax.reporting.console import show_evaluation
    from stablelm_jax.training.held_out import evaluate_held_out
    from stablelm_jax.training.setup import prepare_run

    if arguments.config:
        config = config_lib.load(arguments.config)
    elif "config" in saved.run:
        config = config_lib.from_dict(saved.run["config"], only_known=True)
    else:
        raise ValueError(
            f"{saved.path} was imported and names no held-out text: give --config (with "
            "data.weights of the sources), or --tasks"
        )
    config.data.root = arguments.data or config.data.root
    config.data.tokenizer = arguments.tokenizer or config.data.tokenizer
    config.training.dtype = arguments.dtype or config.training.dtype
    config.branch.parent = ""
    # Rows and devices are those of this machine, not of the training.
    config.parallel.update(data=-1, model=arguments.model, replica=1, fsdp=False)
    config.training.accumulation = 1
    rows = max(1, arguments.batch_tokens // config.data.sequence_length)
    config.data.batch_size = rows * max(1, jax.device_count() // arguments.model)
    config.evaluation.max_rows = arguments.max_rows
    run = prepare_run(config, DataPosition.of_checkpoint(saved.run))
    if saved.model != run.model:
        found = config_lib.differing(vars(saved.model), vars(run.model))
        what = config_lib.show_changes({f"model.{name}": two for name, two in found.items()})
        raise ValueError(f"the checkpoint has another model: {what}")
    parameters, held_out = saved.load(run.mesh), run.held_out()
    line = evaluate_held_out(run.eval_step, parameters, held_out, run.mesh, run.objective)
    show_evaluation(make_console(stderr=True), run, saved.run["step"], line)
    return line


if __name__ == "__main__":
    run_verb(main, "evaluate", prints_result=True)
