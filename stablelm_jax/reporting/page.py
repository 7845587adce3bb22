"""One page of a run, or of several over one another: HTML that needs nothing but a browser."""

from __future__ import annotations

import base64
import contextlib
import functools
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
from etils import epath

from stablelm_jax import __version__
from stablelm_jax import config as config_lib
from stablelm_jax.model.parameters import count_parameters
from stablelm_jax.reporting import run_charts
from stablelm_jax.reporting.charts import SIZE, Axis, Curve, chart, moment, short
from stablelm_jax.reporting.compare import Comparison
from stablelm_jax.reporting.comparison import interval_text, verdict, worth_text
from stablelm_jax.reporting.curves import Curves, Points
from stablelm_jax.reporting.run_record import RunRecord
from stablelm_jax.reporting.tree import relatives
from stablelm_jax.run.console import make_console
from stablelm_jax.storage.files import check_writable, write_text
from stablelm_jax.storage.remote import is_url

PAGE = "report.html"
_MOST_EVENTS = 200
_COMPARED = "stablelm-2-1_6b"  # the published model whose scores stand beside a run's
_MFU = 0.45  # what `plan` assumes


def show_page(
    folders: Sequence[str], output: str | None, comparisons: Sequence[Comparison]
) -> None:
    """Writes the page to the file `output`, else into the first folder, and says where it is.

    Raises ValueError where it cannot be written there, and as `write_page`.
    """
    path = output or f"{folders[0].rstrip('/')}/{PAGE}"
    if is_url(path):
        raise ValueError(f"{path} is behind a URL; write --output FILE.html, of this machine")
    if not output and not Path(folders[0]).is_dir():
        raise ValueError(f"{folders[0]}: no such folder; name the --workdir of a training")
    check_writable(Path(path))
    write_page(folders, Path(path), comparisons=comparisons)
    make_console().print(f"page: {path}", soft_wrap=True, markup=False, highlight=False)


def write_page(
    folders: Sequence[epath.PathLike],
    path: Path,
    curves: Curves | None = None,
    comparisons: Sequence[Comparison] = (),
) -> None:
    """Writes the page of run folders to `path`.

    Args:
      curves: the metrics of the only folder, where a run that goes on has them: then no runs are
        looked for that started from it.
      comparisons: of other folders with the first one.

    Raises:
      ValueError: one of them is no run folder.
    """
    runs = [RunRecord(folder, curves) for folder in folders]
    name = str(runs[0].config.get("name") or runs[0].name)
    if len({run.name for run in runs}) < len(runs):
        for run in runs:
            run.name = str(run.folder)
    html = _template().render(
        title=" and ".join(run.name for run in runs) if runs[1:] else name,
        version=__version__,
        size=SIZE,
        sections=run_charts.sections(runs),
        runs=[_of_run(run) | _branches(run, curves is None) for run in runs],
        comparisons=[_compared(found) for found in comparisons],
    )
    # Half a character, as a JSON file may hold it, is none in UTF-8.
    write_text(path, html.encode(errors="replace").decode())


@functools.cache
def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,  # samples, events and names are anybody's text
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"short": short, "moment": moment, "sha256": _sha256}
    return environment.get_template("run_page.html.jinja")


def _sha256(script: str) -> str:
    """A script's hash, by which the page allows it and no other."""
    return base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()


def _of_run(run: RunRecord) -> dict[str, Any]:
    return {
        "name": run.name,
        "summary": _summary(run),
        "sources": _sources(run),
        "samples": _samples(run),
        "timeline": _timeline(run),
        "events": run.events[-_MOST_EVENTS:][::-1],
        "earlier_events": max(0, len(run.events) - _MOST_EVENTS),
        "seconds": {cause: run.curves.last(f"seconds/{cause}") for cause in _causes(run)},
        "cost": _cost(run),
        "scores": _scores(run),
        "config": [(key, _value(run.config[key]), run.set_by.get(key, "")) for key in run.config],
        "environment": [(moment(time), entry) for time, entry in run.starts],
        "problems": run.problems,
    }


def _branches(run: RunRecord, look: bool) -> dict[str, Any]:
    """What the run started from, and which runs started from it."""
    origin, begun = relatives(Path(run.folder)) if look and not is_url(run.folder) else ("", [])
    return {"origin": origin or run.config.get("branch.parent"), "branches": begun}


def _compared(found: Comparison) -> dict[str, Any]:
    """A comparison in the words and numbers of the terminal's."""
    tables = []
    if found.evaluated:
        tables.append(("held-out text, paired by document", found.evaluated.by_source))
    if found.trained:
        title = f"training, steps {found.trained.first + 1:,} to {found.trained.last:,}"
        tables.append((title, found.trained.by_source))
    lines = [verdict(found)] if found.evaluated else []
    lines += [worth_text(found.worth, found.evaluated.tokens_b)] if found.worth else []
    return {
        "a": found.a,
        "b": found.b,
        "lines": [*lines, *(f"note: {note}" for note in found.notes)],
        "changes": found.changes,
        "tables": [
            (title, [(name, row, interval_text(row.difference)) for name, row in rows.items()])
            for title, rows in tables
        ],
    }


def _causes(run: RunRecord) -> list[str]:
    return [cause for cause in run.curves.names("seconds/") if run.curves.last(f"seconds/{cause}")]


def _value(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _summary(run: RunRecord) -> dict[str, str]:
    """What one wants to know first."""
    last, steps = run.curves.last, run.config.get("training.num_steps")
    config = _config(run)
    loss, error = last("eval/loss"), last("eval/loss_stderr")
    found = {
        "step": f"{run.step:,}" + (f" of {steps:,}" if isinstance(steps, int) else ""),
        "objective": str(run.config.get("training.objective", "")),
        "held-out loss": short(loss) + (f" ± {error:.2g}" if error else ""),
        "loss": short(last("loss")),
        "pairs: chosen preferred": short(last("eval/rewards/accuracy")),
        "tokens": short(last("tokens_seen")),
        "tokens a second": short(last("tokens_per_second")),
        "parameters": short(count_parameters(config_lib.model_config(config))) if config else "",
        "devices": _devices(run),
        "last line": moment(last("time")) + " UTC" if last("time") else "",
    }
    return {name: value for name, value in found.items() if value}


def _devices(run: RunRecord) -> str:
    if not run.starts:
        return ""
    entry = run.starts[-1][1]
    kinds = entry.get("devices") or ["?"]
    return f"{entry.get('num_devices', len(kinds))} x {kinds[0]}"


def _config(run: RunRecord) -> Any:
    """The run's config as the verbs have it; None where it cannot be had."""
    with contextlib.suppress(Exception):  # of a file that was damaged, or of another version
        config = config_lib.from_dict(run.tree)
        config_lib.model_config(config)
        return config
    return None


def _sources(run: RunRecord) -> list[dict[str, Any]]:
    """The ledger, and where each source stands; columns that say something of one at least."""
    last, rows = run.curves.last, {}
    for name in run.sources:
        error = last(f"eval/loss_stderr/{name}")
        rows[name] = {
            "held-out loss": short(last(f"eval/loss/{name}"))
            + (f" ± {error:.2g}" if error else ""),
            "bits a byte": short(last(f"eval/bits_per_byte/{name}")),
            "chosen preferred": short(last(f"eval/rewards/accuracy/{name}")),
            "tokens": short(last(f"tokens/{name}")),
            "epochs": short(last(f"epochs/{name}")),
        }
    filled = {column for row in rows.values() for column, text in row.items() if text}
    tokens = {name: last(f"tokens/{name}") or 0.0 for name in rows}
    total = sum(tokens.values()) or 1.0
    return [
        {
            "name": name,
            "numbers": {column: text for column, text in rows[name].items() if column in filled},
            "share": tokens[name] / total,
        }
        for name in sorted(rows, key=tokens.get, reverse=True)
    ]


def _samples(run: RunRecord) -> list[tuple[str, list[tuple[int, str]]]]:
    """(prompt, [(step, continuation), ...]) of each prompt, the newest first."""
    prompts = [str(prompt) for prompt in run.config.get("samples.prompts") or ()]
    found: dict[str, list[tuple[int, str]]] = {}
    for step, text in sorted(run.samples().items(), reverse=True):
        marks = [f"[{prompt}]" for prompt in prompts if f"[{prompt}]" in text]
        if not marks:
            found.setdefault("", []).append((step, text))
        for mark, after in zip(marks, [*marks[1:], ""]):
            rest = text.partition(mark)[2]
            end = rest.find(f"\n\n{after}") if after else len(rest)
            found.setdefault(mark[1:-1], []).append((step, rest[:end].rstrip()))
    return list(found.items())


def _timeline(run: RunRecord) -> dict[str, Any] | None:
    """Steps over the time of day: starts, times without one, events."""
    spans, steps = run.spans(), run.curves["time"]
    times = [*steps.values, *(t for span in spans for t in span[:2])]
    times += [event["time"] for event in run.events]
    if not len(steps.values):
        return None
    first, last = min(times), max(max(times), min(times) + 1)
    room = 0.012 * (last - first)
    x = Axis(first - room, last + room, "time")
    curve = Curve("step", Points(steps.values, steps.steps))
    gaps = [(end, begin) for (_, end, _), (begin, _, _) in zip(spans, spans[1:])]
    marks = [("start", begin, f"start on {entry.get('host')}") for begin, _, entry in spans]
    marks += [("event", e["time"], e.get("text") or e.get("event")) for e in run.events]
    return chart(
        "Steps, starts and events over time",
        "UTC",
        [curve],
        x=x,
        gaps=[(float(x.place(a)), float(x.place(b) - x.place(a)), moment(a)) for a, b in gaps],
        marks=[(kind, float(x.place(t)), f"{moment(t)}: {says}") for kind, t, says in marks],
    )


def _scores(run: RunRecord) -> list[dict[str, Any]]:
    """Of each task: the last score, and what was published for the same metric."""
    from stablelm_jax.evaluation.scores import published_scores  # that room imports this one

    published = {
        "/".join([row["task"], row["metric"], *([row["how"]] if row["how"] != "none" else [])]): row
        for row in reversed(published_scores())
        if _COMPARED in row["scores"]
    }
    found = []
    for key in run.curves.names("eval/tasks/"):
        row = published.get(key, {})
        score = run.curves.last(f"eval/tasks/{key}")
        beside = row.get("scores", {}).get(_COMPARED)
        found.append({"key": key, "score": score, "published": beside, "shots": row.get("shots")})
    return found


def _cost(run: RunRecord) -> dict[str, Any]:
    """Hours of devices, and what they used, beside what `plan` foretells of the whole run."""
    spans = run.spans()
    hours = sum(end - begin for begin, end, _ in spans) / 3600
    device_hours = sum((end - begin) * _count(entry) for begin, end, entry in spans) / 3600
    found = {"hours": hours, "device_hours": device_hours, "rows": [], "device": _devices(run)}
    config, chip = _config(run), _chip(run)
    if config is None or chip is None:
        return found
    from stablelm_jax.planning import report

    foretold = report.run_hours(config, chip, _MFU)
    was, planned = (
        dict(report.usage(spent, chip.facts))
        for spent in (device_hours, foretold[1] * chip.num_devices)
    )
    speed = run.curves.last("tokens_per_second")
    rows = [("tokens a second", short(speed), short(foretold[0]))]
    rows += [("hours", short(hours), short(foretold[1]))]
    return found | {"rows": rows + [(name, was[name], planned[name]) for name in was]}


def _count(entry: Mapping[str, Any]) -> int:
    count = entry.get("num_devices")
    return count if isinstance(count, int) else 1


def _chip(run: RunRecord) -> Any:
    """The last start's devices as a machine of `plan`; None of a chip that it does not know."""
    from stablelm_jax.planning.targets import Target, chips

    for _, entry in run.starts[-1:]:
        for name, facts in chips().items():
            if entry.get("devices") and entry["devices"][0] == facts["name"]:
                return Target(name, (1, _count(entry)), facts)
    return None
