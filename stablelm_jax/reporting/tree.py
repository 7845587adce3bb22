"""The tree of runs: which one started from which checkpoint of which."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.text import Text
from rich.tree import Tree

from stablelm_jax.checkpoint.names import checkpoint_name, finished_steps
from stablelm_jax.checkpoint.reading import CheckpointError, read_run, state_hash
from stablelm_jax.data.position import DataPosition
from stablelm_jax.reporting.curves import Curves
from stablelm_jax.reporting.picture import draw_runs
from stablelm_jax.run.console import make_console
from stablelm_jax.run.metrics import MetricsFile
from stablelm_jax.storage.files import check_writable

_NEVER_ENTERED = ("checkpoints", "samples", "held_out", "profile", "tensorboard", "wandb")


@dataclasses.dataclass
class FoundRun:
    """A run folder with checkpoints."""

    path: Path
    steps: list[int]  # of its finished checkpoints, ascending
    hashes: dict[int, str]  # {step: state hash} of the checkpoints that could be read
    start: DataPosition  # where the run began, and from which parent
    config: dict[str, Any]  # in its newest checkpoint


def show_runs(folder: str, picture: str | None = None) -> None:
    """Prints the runs below a folder as a tree; the PNG `picture` gets the curves of all of them.

    Raises:
      ValueError: there are none.
    """
    if picture:
        check_writable(Path(picture))
    runs = list(find_runs(Path(folder)))
    if not runs:
        raise ValueError(
            f"{folder}: no run with a checkpoint in it or below; name a folder of run folders"
        )
    make_console().print(run_tree(runs, folder))
    if not picture:
        return
    curves = {run.path: MetricsFile(run.path / "metrics.jsonl").read() for run in runs}
    # What was before the first branch takes no more room than what came after it. A branch of
    # weights counts its steps from 0.
    branched_at = [
        min(run.start.parent_step, *(line["step"] for line in curves[run.path]))
        for run in runs
        if run.start.parent and curves[run.path]
    ]
    first = 2 * min(branched_at) - max(run.steps[-1] for run in runs) if branched_at else 0
    kept = {
        str(path.relative_to(folder)): Curves(line for line in lines if line["step"] >= first)
        for path, lines in curves.items()
    }
    draw_runs(kept, Path(picture))


def find_runs(folder: Path, depth: int | None = None) -> Iterator[FoundRun]:
    """The run folders with a readable checkpoint, in a folder and below it.

    `depth`: of how many folders within one another; None: however many there are.
    """
    seen = set()  # a link may lead to a folder above it
    for path, folders, _ in os.walk(folder, followlinks=True):
        if (real := os.path.realpath(path)) in seen:
            folders.clear()
            continue
        seen.add(real)
        items, checkpoints = {}, Path(path) / "checkpoints"
        steps = finished_steps(checkpoints) if "checkpoints" in folders else []
        for step in steps:
            try:
                items[step] = read_run(checkpoints / checkpoint_name(step))
            except CheckpointError:
                continue  # the tree shows it as damaged
        items = {step: run for step, run in items.items() if "config" in run}  # not imported ones
        if items:
            newest = items[max(items)]
            hashes = {step: state_hash(run["checksums"]) for step, run in items.items()}
            start = DataPosition.of_checkpoint(newest)
            yield FoundRun(Path(path), steps, hashes, start, newest["config"])
        if depth is not None and len(Path(path).relative_to(folder).parts) >= depth:
            folders.clear()
        entered = sorted(name for name in folders if name not in _NEVER_ENTERED)
        folders[:] = sorted(entered, key=lambda name: os.path.islink(os.path.join(path, name)))


def run_tree(runs: list[FoundRun], title: str) -> Tree:
    """Puts runs that started fresh, or whose parent is not among `runs`, at the top."""
    tree = Tree(Text(str(title)), guide_style="dim")
    branches: dict[tuple[Path, int] | None, list[FoundRun]] = {}  # by (run folder, step)
    for run in sorted(runs, key=lambda run: (run.start.parent_step, run.path)):
        parent = _parent(runs, run)
        place = (parent.path, run.start.parent_step) if parent else None
        branches.setdefault(place, []).append(run)

    def hang(above: Tree, run: FoundRun, is_top: bool) -> None:
        label = _label(run)
        if is_top and run.start.parent:
            label.append(f" from {run.start.parent}, which is of no run here", style="yellow")
        node = above.add(label)
        for step in run.steps:
            mark = (run.hashes[step][:12], "dim") if step in run.hashes else ("damaged", "red")
            below = node.add(Text.assemble(f"{checkpoint_name(step)} ", mark))
            for branch in branches.get((run.path, step), ()):
                hang(below, branch, False)

    for run in branches.get(None, ()):
        hang(tree, run, True)
    return tree


def _parent(runs: list[FoundRun], run: FoundRun) -> FoundRun | None:
    """The run that has the checkpoint whose bits `run` started from."""
    step, state = run.start.parent_step, run.start.parent_hash
    for other in runs if run.start.parent else ():
        # Another branch of the same checkpoint has saved these bits too, as its first checkpoint.
        sibling = (other.start.parent_step, other.start.parent_hash) == (step, state)
        if not sibling and other.hashes.get(step) == state:
            return other
    return None


def relatives(folder: Path) -> tuple[str, list[tuple[int, Path]]]:
    """Where a run started from, '' for one of its own, and what started from it: (step, folder).

    They are looked for in the folder that the run lies in and one further down.
    """
    folder = folder.resolve()
    runs = list(find_runs(folder.parent, depth=2))
    own = next((run for run in runs if run.path == folder), None)
    if own is None:
        return "", []
    begun = [(run.start.parent_step, run.path) for run in runs if _parent(runs, run) is own]
    parent = _parent(runs, own)
    origin = parent.path / checkpoint_name(own.start.parent_step) if parent else own.start.parent
    return str(origin), sorted(begun)


def _label(run: FoundRun) -> Text:
    schedule, steps = run.config["schedule"], run.config["training"]["num_steps"]
    text = f" ({run.config['name']}, to step {run.steps[-1]:,} of {steps:,}"
    if (begin := schedule["cooldown_start"]) is not None:
        end, to = begin + schedule["cooldown_steps"], schedule["cooldown_end"]
        kind = schedule.get("cooldown_kind", "linear")
        text += f", learning rate from {begin:,} to {end:,} {kind} to {to:g}"
    for kind in ("stages", "batch_stages", "sequence_stages"):
        if stages := run.config["data"].get(kind):
            text += f", {kind.replace('_', ' ')} {stages}"
    if run.config["branch"].get("state") == "weights":
        text += ", weights alone of its parent"
    return Text.assemble((str(run.path), "bold"), f"{text})")
