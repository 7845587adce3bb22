"""`report --edge`: the ways to write a model for small machines, and what each gives and costs.

Each row is measured once and kept as OUT/rows/<type>.json. launch/edge_others.py adds rows of other
programs to the same folder.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from stablelm_jax.checkpoint.saved_model import SavedModel
from stablelm_jax.data.manifest import MANIFEST_NAME, data_hash
from stablelm_jax.evaluation.other_program import (
    Differences,
    Logits,
    eval_step_of,
    held_out_run,
    open_gguf,
)
from stablelm_jax.evaluation.scores import TaskScore, shown_scores
from stablelm_jax.interop import gguf_types, llama_cpp
from stablelm_jax.interop.conversions import to_gguf
from stablelm_jax.model.parameters import count_parameters
from stablelm_jax.reporting.picture import draw_edge
from stablelm_jax.run.console import make_console
from stablelm_jax.run.metrics import finite
from stablelm_jax.storage.files import write_json, write_text
from stablelm_jax.storage.remote import is_url

_MATRIX = "imatrix.gguf"  # computed once for all types
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
        if is_url(output or self.saved.path):
            raise ValueError(f"files cannot go to {output or place}: name a folder by --output")
        self.folder = Path(output) if output else beside / "edge" / self.saved.name
        (self.folder / "rows").mkdir(parents=True, exist_ok=True)
        self.num_parameters = count_parameters(self.saved.model)
        self._measured = {
            "checkpoint": self.saved.run["seal"],  # over the checksums of all weights
            "data": data_hash(self.run.manifests),
            "rows_of_a_source": min(self.run.config.evaluation.max_rows, 2**31 - 1),
            "num_valid_ids": self.run.compute.num_valid_ids,
            **dataclasses.asdict(self.run.spec) | {"batch_size": None},  # that is this machine's
        }

    def row(
        self,
        kind: str,
        measure: Callable[[], Row],
        file: tuple[Path, Callable[[], Any]] | None = None,
        speed: Callable[[], Row] = dict,
        tasks: Callable[[], Row] = dict,
        *,
        again: bool = False,
        asked: Row | None = None,
        imatrix: str | None = None,
    ) -> Row:
        """The row of a type: what was measured before on the same is kept, the rest measured.

        Args:
          measure, speed, tasks: give its parts. again: speed and memory whatever is kept.
          file: its path, and what writes it anew unless a kept row says what it is of.
          asked: the tasks; None: those kept will do. imatrix: tells importance matrices apart.
        """
        place, of = self.folder / "rows" / f"{kind}.json", [self.saved.run["seal"], imatrix]
        kept = json.loads(place.read_text("utf-8")) if place.exists() else {}
        if (kept.get("of"), kept.get("measured")) != (of, self._measured):
            if file and not (kept.get("of") == of and file[0].exists()):
                place.unlink(missing_ok=True)  # it would vouch for the new file
                file[1]()
            kept = {"type": kind, "of": of, "measured": self._measured} | measure()
            write_json(place, finite(kept))
        if again or "cores" not in kept:
            kept |= speed() or {"cores": None}
            write_json(place, finite(kept))
        if asked and kept.get("asked") != asked:
            kept |= tasks() | {"asked": asked}
            write_json(place, finite(kept))
        return kept

    def quality(self, logits: Logits | None) -> Row:
        """Held-out numbers of another program's logits; None: of our own forward pass."""
        from stablelm_jax.training.held_out import evaluate_held_out

        run = self.run
        differences = Differences(run) if logits else None
        eval_step = eval_step_of(logits, run, differences) if logits else run.eval_step
        params = self.saved.load(run.mesh)  # each time: conversions need the room meanwhile
        line = evaluate_held_out(eval_step, params, run.held_out(), run.mesh, run.objective)
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
        found = sorted(fitting, key=lambda row: (row["type"] != UNQUANTISED, -row["bytes"]))
        for row in found[1:]:
            if row.get("asked") != found[0].get("asked"):  # means of other tasks
                row.pop("tasks_mean", None)
        return found


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
      tasks, task_data: lm-eval's, for each file and the checkpoint. again: see `Edge.row`.

    Raises:
      ValueError, ImportError: as of `held_out_run`, of the conversion and of llama.cpp.
    """
    weighted = [name for name in types if imatrix and gguf_types.needs_llama_cpp(name)]
    if imatrix and types and not weighted:
        raise ValueError(f"--imatrix: {', '.join(types)} take none; K-quants and iq4_xs do")
    edge = Edge(checkpoint, output, **held_out)
    if imatrix and imatrix.is_dir():
        (edge.folder / _MATRIX).unlink(missing_ok=True)  # of an earlier report
    console = make_console(file_width=140)
    console.print(f"files, edge.json, edge.md and edge.png go to {edge.folder}", soft_wrap=True)
    asked = {"names": list(tasks), "data": task_data} if tasks else None
    tasks_of = functools.partial(functools.partial, _tasks, edge, asked)
    whole = {"program": "JAX", "bytes": 4 * edge.num_parameters, "bits_per_weight": 32.0}
    edge.row(UNQUANTISED, lambda: whole | edge.quality(None), tasks=tasks_of(None), asked=asked)
    for file_type in types:
        matrix = imatrix if file_type in weighted else None
        kind = f"{file_type}-imatrix" if matrix else file_type
        path = edge.folder / f"{edge.saved.name}-{kind}.gguf"
        console.print(f"{kind}: {path.name}", soft_wrap=True)
        edge.row(
            kind,
            functools.partial(_measure, edge, path, matrix),
            (path, functools.partial(_write, edge, path, file_type, matrix)),
            functools.partial(in_fresh_process, "-m", "stablelm_jax.interop.llama_cpp", str(path)),
            tasks_of(path),
            again=again,
            asked=asked,
            imatrix=matrix and _fingerprint(matrix),
        )
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


def _write(edge: Edge, path: Path, file_type: str, imatrix: Path | None) -> None:
    how = {"tokenizer": None, "verify": True, "force": True}
    if imatrix:
        computed = edge.folder / _MATRIX  # for the types before this one
        source = computed if imatrix.is_dir() and computed.exists() else imatrix
        how |= {"imatrix": source} | ({"save_imatrix": computed} if source.is_dir() else {})
    to_gguf(str(edge.saved.path), path, file_type=file_type, **how)


def _fingerprint(imatrix: Path) -> str:
    """sha256 of a file, or of the manifests of prepared data."""
    files = [imatrix] if imatrix.is_file() else sorted(imatrix.glob(f"*/{MANIFEST_NAME}"))
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


def _measure(edge: Edge, path: Path, imatrix: Path | None) -> Row:
    llama = open_gguf(str(path), edge.run)
    row = {"program": llama_cpp.name(), "file": path.name, "bytes": path.stat().st_size}
    if imatrix:
        row["flattered"] = imatrix.resolve() == Path(edge.run.config.data.root).resolve()
    return row | {"bits_per_weight": llama.bits_per_weight} | edge.quality(llama.logits)


def _tasks(edge: Edge, asked: Row, path: Path | None) -> Row:
    """Scores of a file, or of the checkpoint; ValueError where a task has none."""
    from stablelm_jax.evaluation import checkpoint_tasks

    def model_of(told: Any) -> Any:
        if path:
            return checkpoint_tasks.lm_of_gguf(str(path), edge.saved, told=told)
        how = {"batch_tokens": 16_384, "dtype": "float32", "told": told}
        return checkpoint_tasks.lm_of_checkpoint(edge.saved, edge.run.mesh, **how)

    found = checkpoint_tasks.evaluate_tasks(model_of, asked["names"], data=asked["data"])
    if failed := found.get("failed"):
        raise ValueError(f"--tasks without scores: {failed}")
    fields = [field.name for field in dataclasses.fields(TaskScore)]
    shown = shown_scores([TaskScore(**{k: row[k] for k in fields}) for row in found["tasks"]])
    # Of two metrics of a task the first.
    values = {s.task: s.value for s in reversed(shown) if s.metric.startswith("acc")}
    mean = float(np.mean(list(values.values()))) if values else None
    return {"tasks": found["tasks"], "tasks_mean": mean}


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
    notes = [
        "bits a byte: mean over the sources of held-out text; KL of each type from the unquantised "
        f"model, mean and 99th percentile over {places:,} held-out tokens.",
        "MB: GGUF files hold the tokenizer too, MLX's and OpenVINO's the weights alone. Bits a "
        "weight: of llama.cpp's tensors, of the others' whole files.",
    ]
    if flattered := [row["type"] for row in rows if row.get("flattered")]:
        notes.append(f"{', '.join(flattered)}: the importance matrix is of the data scored here.")
    if asked := rows[0].get("asked"):
        notes.append(f"tasks: mean accuracy of {', '.join(asked['names'])}, by published metrics.")
    if timed := [row for row in rows if row.get("cores")]:
        cores = " or ".join(map(str, sorted({row["cores"] for row in timed})))
        notes.append(
            f"Speed on {cores} core{'s' * (cores != '1')}: a prompt of {llama_cpp.PROMPT} tokens, "
            f"then {llama_cpp.WRITTEN} one by one, median of {timed[0]['repeats']}; memory: the "
            "most that a fresh process held, less what it held before it loaded the file."
        )
    return notes
