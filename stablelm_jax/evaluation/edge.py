"""`report --edge`: the ways to write a model for small machines, and what each gives and costs.

Each row is measured once and kept as OUT/rows/<type>.json. launch/edge_others.py adds rows of other
programs to the same folder.
"""

from __future__ import annotations

import functools
import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from stablelm_jax.checkpoint.saved_model import SavedModel
from stablelm_jax.data.manifest import data_hash
from stablelm_jax.evaluation.other_program import (
    Differences,
    Logits,
    eval_step_of,
    held_out_run,
    open_gguf,
)
from stablelm_jax.interop import gguf_types, llama_cpp
from stablelm_jax.interop.conversions import to_gguf
from stablelm_jax.model.parameters import count_parameters
from stablelm_jax.reporting.picture import draw_edge
from stablelm_jax.run.console import make_console
from stablelm_jax.run.metrics import finite
from stablelm_jax.storage.files import write_json, write_text

UNQUANTISED = "unquantised"  # the checkpoint in float32, by our own forward pass
Row = dict[str, Any]
# (heading, value of a row or None, format)
_COLUMNS: tuple[tuple[str, Callable[[Row], Any], str], ...] = (
    ("MB", lambda row: row["bytes"] / 1e6, ".1f"),
    ("bits a weight", lambda row: row["bits_per_weight"], ".2f"),
    ("nats a token", lambda row: row["held_out"]["eval/loss"], ".4f"),
    ("bits a byte", lambda row: row["bits_per_byte"], ".4f"),
    ("KL, nats", lambda row: row.get("kl_mean"), ".1e"),
    ("KL, 99 %", lambda row: row.get("kl_p99"), ".1e"),
    ("same top 1", lambda row: row.get("top1"), ".2%"),
    ("tasks", lambda row: row.get("tasks_mean"), ".4f"),
    ("reads, tokens/s", lambda row: row.get("read_tokens_per_second"), ",.0f"),
    ("writes, tokens/s", lambda row: row.get("write_tokens_per_second"), ",.0f"),
    ("memory, MB", lambda row: row["memory_bytes"] / 1e6 if "memory_bytes" in row else None, ".0f"),
)


class Edge:
    """A checkpoint, its held-out rows, and the folder where its files and measurements go."""

    def __init__(self, checkpoint: str, output: str | None, **held_out: Any):
        """`held_out`: the arguments of `held_out_run`; errors: its."""
        self.saved = SavedModel.open(checkpoint, held_out.get("tokenizer"))
        self.run = held_out_run(self.saved, **held_out | {"dtype": "float32"})
        if self.run.objective.name == "dpo":
            raise ValueError("report --edge scores text: give the --config and --data of a base")
        place = Path(self.saved.path).parent
        beside = place.parent if place.name == "checkpoints" else place
        self.folder = Path(output) if output else beside / "edge" / self.saved.name
        (self.folder / "rows").mkdir(parents=True, exist_ok=True)
        self.num_parameters = count_parameters(self.saved.model)
        self._measured = {
            "checkpoint": str(self.saved.path),
            "data": data_hash(self.run.manifests),
            "rows_of_a_source": min(self.run.config.evaluation.max_rows, 2**31 - 1),
            "sequence_length": self.run.spec.sequence_length,
        }

    @functools.cached_property
    def _params(self) -> Any:
        return self.saved.load(self.run.mesh)

    def row(
        self, kind: str, measure: Callable[[], Row], speed: Callable[[], Row], again: bool = False
    ) -> Row:
        """The row of a type: kept from before where it was measured on the same, else measured.

        `again`: speed and memory are measured anew, whatever is kept.
        """
        file = self.folder / "rows" / f"{kind}.json"
        kept = json.loads(file.read_text("utf-8")) if file.exists() else {}
        if kept.get("measured") != self._measured:
            kept = {"type": kind, "measured": self._measured} | measure()
            write_json(file, finite(kept))
        if again or "cores" not in kept:
            kept |= speed() or {"cores": None}
            write_json(file, finite(kept))
        return kept

    def quality(self, logits: Logits | None) -> Row:
        """Held-out numbers of another program's logits; None: of our own forward pass."""
        from stablelm_jax.training.held_out import evaluate_held_out

        run, differences = self.run, None
        eval_step = run.eval_step
        if logits:
            differences = Differences(run)
            eval_step = eval_step_of(logits, run, differences)
        line = evaluate_held_out(eval_step, self._params, run.held_out(), run.mesh, run.objective)
        bits = [line.get(f"eval/bits_per_byte/{source}") for source in run.sources]
        bits = [value for value in bits if value is not None]  # conversations have none
        mean = float(np.mean(bits)) if bits else None
        found = {"bits_per_byte": mean, "held_out": line}
        if differences:
            kl = np.array(differences.kl)
            found |= {"kl_mean": float(kl.mean()), "kl_p99": float(np.percentile(kl, 99))}
            found |= {"top1": float(np.mean(differences.same)), "places": len(kl)}
        return found

    def rows(self) -> list[Row]:
        """All that are kept and fit this checkpoint and data: the model, then files by size."""
        files = sorted((self.folder / "rows").glob("*.json"))
        rows = [json.loads(file.read_text("utf-8")) for file in files]
        fitting = [row for row in rows if row["measured"] == self._measured]
        return sorted(fitting, key=lambda row: (row["type"] != UNQUANTISED, -row["bytes"]))


def show_edge(
    checkpoint: str,
    types: Sequence[str],
    *,
    output: str | None = None,
    imatrix: Path | None = None,
    tasks: Sequence[str] = (),
    task_data: str | None = None,
    again: bool = False,
    **held_out: Any,
) -> None:
    """Measures what is missing, prints the table, writes edge.json, edge.md and edge.png.

    Args:
      types: of GGUF files, which are written into the folder too. output: that folder.
      imatrix: of `to_gguf`, for those of the types that take one.
      tasks, task_data: lm-eval's, for each file. again: see `Edge.row`.

    Raises:
      ValueError, ImportError: as of `held_out_run`, of the conversion and of llama.cpp.
    """
    edge = Edge(checkpoint, output, **held_out)
    console = make_console(file_width=140)
    size = 4 * edge.num_parameters
    free = shutil.disk_usage(edge.folder).free
    console.print(
        f"files and measurements go to {edge.folder}: {size / 1e9:.2f} GB for each type at most, "
        f"{free / 1e9:.0f} GB are free",
        soft_wrap=True,
    )

    def ours() -> Row:
        whole = {"program": "JAX", "bytes": size, "bits_per_weight": 32.0}
        return whole | edge.quality(None)

    edge.row(UNQUANTISED, ours, dict)
    length = str(edge.run.spec.sequence_length)
    for file_type in types:
        weighted = imatrix if gguf_types.needs_llama_cpp(file_type) else None
        kind = f"{file_type}-imatrix" if weighted else file_type
        path = edge.folder / f"{edge.saved.name}-{kind}.gguf"
        console.print(f"{kind}: {path.name}", soft_wrap=True)
        measure = functools.partial(_measure, edge, path, file_type, weighted, tasks, task_data)
        timing = ("-m", "stablelm_jax.interop.llama_cpp", str(path), length)
        edge.row(kind, measure, functools.partial(in_fresh_process, *timing), again)
    _write_report(edge, console)


def _write_report(edge: Edge, console: Console) -> None:
    """Table, JSON, Markdown and picture of all rows that are there."""
    rows = edge.rows()
    (headings, *lines), notes = _cells(rows), _notes(rows)
    table = Table(*headings, title=str(edge.saved.path), title_justify="left")
    for line in lines:
        table.add_row(*line)
    console.print(table)
    console.print(*notes, sep="\n", soft_wrap=True)
    write_json(edge.folder / "edge.json", rows)
    markdown = [f"| {' | '.join(x)} |" for x in (headings, ["---"] * len(headings), *lines)]
    write_text(edge.folder / "edge.md", "\n".join([*markdown, "", "\n\n".join(notes), ""]))
    draw_edge(rows, edge.folder / "edge.png")
    console.print(f"{edge.folder}/edge.json, edge.md, edge.png", soft_wrap=True)


def _measure(
    edge: Edge,
    path: Path,
    file_type: str,
    imatrix: Path | None,
    tasks: Sequence[str],
    task_data: str | None,
) -> Row:
    """Writes the file where it is not there yet."""
    if not path.exists():
        how = {"tokenizer": None, "verify": True, "force": False}
        how |= {"imatrix": imatrix} if imatrix else {}
        to_gguf(str(edge.saved.path), path, file_type=file_type, **how)
    llama = open_gguf(str(path), edge.run)
    row = {"program": llama_cpp.name(), "file": path.name, "bytes": path.stat().st_size}
    row |= {"bits_per_weight": llama.bits_per_weight} | edge.quality(llama.logits)
    if tasks:
        row |= _tasks(edge.saved, path, tasks, task_data)
    return row


def _tasks(saved: SavedModel, path: Path, names: Sequence[str], data: str | None) -> Row:
    from stablelm_jax.evaluation.checkpoint_tasks import evaluate_tasks, lm_of_gguf

    def model_of(told: Any) -> Any:
        return lm_of_gguf(str(path), saved, told=told)

    options = {"compared": "stablelm-2-1_6b", "limit": None, "num_fewshot": None}
    found = evaluate_tasks(model_of, names, data=data, **options)
    values = [score["value"] for score in found["tasks"] if score["metric"].startswith("acc")]
    return {"tasks": found["tasks"], "tasks_mean": float(np.mean(values)) if values else None}


def in_fresh_process(*command: str) -> Row:
    """The JSON that a command of this Python prints; ValueError where it fails.

    In a process of its own the memory is that of one file alone.
    """
    done = subprocess.run([sys.executable, *command], capture_output=True, encoding="utf-8")
    if done.returncode:
        raise ValueError(f"{' '.join(command)} failed: {done.stderr.strip()[-400:]}")
    return json.loads(done.stdout)


def _cells(rows: Sequence[Row]) -> list[list[str]]:
    """Headings, then the cells of each row; no column that none fills."""
    columns = [("type", [row["type"] for row in rows])]
    for heading, value, form in _COLUMNS:
        found = [value(row) for row in rows]
        if any(x is not None for x in found):
            columns.append((heading, ["" if x is None else format(x, form) for x in found]))
    return [[h for h, _ in columns], *(list(line) for line in zip(*(c for _, c in columns)))]


def _notes(rows: Sequence[Row]) -> list[str]:
    """How the numbers were measured."""
    places = max((row.get("places", 0) for row in rows), default=0)
    timed = [row for row in rows if row.get("cores")]
    notes = [
        "bits a byte: mean over the sources of held-out text; KL of each type from the unquantised "
        f"model, mean and 99th percentile over {places:,} held-out tokens."
    ]
    if timed:
        first = timed[0]
        notes.append(
            f"Speed on {first['cores']} cores: a prompt of {first['prompt_tokens']} tokens, then "
            f"64 one by one, median of {first['repeats']}; memory: the most that a fresh process "
            "held, less what it held before it loaded the file."
        )
    return notes
