"""The tree of runs: which started from which checkpoint of which."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.tree import Tree

from stablelm_jax.checkpoint.names import checkpoint_name, finished_steps
from stablelm_jax.checkpoint.reading import CheckpointError, read_run, state_hash
from stablelm_jax.data.position import DataPosition
from stablelm_jax.reporting.picture import draw_branches
from stablelm_jax.run.metrics import MetricsFile

_NEVER_ENTERED = ("checkpoints", "samples", "profile", "tensorboard", "wandb")


@dataclasses.dataclass
class Found:
    """A run folder with checkpoints.

    Attributes:
      steps: of its finished checkpoints.
      hashes: {step: state hash} of those that could be read.
      origin: where it began.
      run: the newest item `run`.
    """

    path: Path
    steps: list[int]
    hashes: dict[int, str]
    origin: DataPosition
    run: dict[str, Any]


def show_branches(folder: str, picture: str | None = None) -> None:
    """Draws the runs below a folder as a tree, a branch under the checkpoint it started from.

    `picture`: a PNG that gets the curves of all of them.

    Raises:
      ValueError: there are none.
    """
    runs = list(find_runs(Path(folder)))
    if not runs:
        raise ValueError(
            f"{folder}: no run with a checkpoint in it or below; name a folder of run folders"
        )
    Console().print(draw(runs, folder))
    if picture:
        first = _first_shown(runs)
        lines = {
            str(run.path.relative_to(folder)): [
                line
                for line in MetricsFile(run.path / "metrics.jsonl").read()
                if line["step"] >= first
            ]
            for run in runs
        }
        draw_branches(lines, Path(picture))


def _first_shown(runs: list[Found]) -> int:
    """So that what was before the first branch takes no more room than what came after it."""
    starts = [run.origin.parent_step for run in runs if run.origin.parent]
    if not starts:
        return 0
    return max(0, 2 * min(starts) - max(run.steps[-1] for run in runs))


def find_runs(folder: Path) -> Iterator[Found]:
    """The run folders with checkpoints in a folder and below it."""
    for path, folders, _ in os.walk(folder):
        if "checkpoints" in folders:
            found = _read(Path(path))
            if found is not None:
                yield found
        folders[:] = sorted(name for name in folders if name not in _NEVER_ENTERED)


def _read(path: Path) -> Found | None:
    items = {}
    steps = finished_steps(path / "checkpoints")
    for step in steps:
        try:
            items[step] = read_run(path / "checkpoints" / checkpoint_name(step))
        except CheckpointError:
            continue  # shown without
    if not items:
        return None
    newest = items[max(items)]
    hashes = {step: state_hash(run["checksums"]) for step, run in items.items()}
    return Found(path, steps, hashes, DataPosition.of_checkpoint(newest), newest)


def draw(runs: list[Found], title: str) -> Tree:
    """Runs that started fresh, or whose parent is not among `runs`, at the top."""
    tree = Tree(escape(str(title)), guide_style="dim")
    nodes: dict[tuple[int, int], Tree] = {}  # (run, step) -> where branches hang
    waiting = sorted(range(len(runs)), key=lambda n: (runs[n].origin.parent_step, runs[n].path))
    for number in waiting:
        run = runs[number]
        parent = _parent(runs, number)
        where = tree if parent is None else nodes.get(parent, tree)
        label = _label(run, unknown_parent=bool(run.origin.parent) and parent is None)
        node = where.add(label)
        for step in run.steps:
            nodes[number, step] = node.add(_checkpoint(run, step))
    return tree


def _parent(runs: list[Found], number: int) -> tuple[int, int] | None:
    """(run, step) of the checkpoint whose bits a run started from."""
    origin = runs[number].origin
    if not origin.parent:
        return None
    same = (origin.parent_step, origin.parent_hash)
    for index, run in enumerate(runs):
        sibling = (run.origin.parent_step, run.origin.parent_hash) == same
        if not sibling and run.hashes.get(origin.parent_step) == origin.parent_hash:
            return index, origin.parent_step
    return None


def _label(run: Found, unknown_parent: bool) -> str:
    config = run.run["config"]
    text = f"[bold]{escape(str(run.path))}[/bold] ({escape(config['name'])}"
    text += f", to step {run.steps[-1]:,} of {config['training']['num_steps']:,}"
    schedule = config["schedule"]
    if schedule["cooldown_start"] is not None:
        end = schedule["cooldown_start"] + schedule["cooldown_steps"]
        to = schedule["cooldown_end"]
        text += f", learning rate from {schedule['cooldown_start']:,} to {end:,} linear to {to:g}"
    if run.run["config"]["data"].get("stages"):
        text += f", stages {escape(config['data']['stages'])}"
    text += ")"
    if unknown_parent:
        text += f" [yellow]from {escape(run.origin.parent)}, which is not here[/yellow]"
    return text


def _checkpoint(run: Found, step: int) -> str:
    if step not in run.hashes:
        return f"{checkpoint_name(step)} [red]damaged[/red]"
    return f"{checkpoint_name(step)} [dim]{run.hashes[step][:12]}[/dim]"
