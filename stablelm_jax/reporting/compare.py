"""Runs compared: which is better, by how much, and how sure that is."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from stablelm_jax.config.access import differing, within
from stablelm_jax.reporting.paired import Interval, of_documents, of_steps
from stablelm_jax.reporting.recorded import RecordedRun

ALL = "all"  # the sources together
_LAST = 0.2  # share of the common steps that is compared where no span is asked for
_BEYOND = 4.0  # how many times its tokens a run is foretold at most
# Fields that say where things lie, not what is learned.
_NOT_SHOWN = ("name", "data.root", "data.cache", "data.cache_gb", "writers", "checkpoint")


@dataclasses.dataclass(frozen=True)
class Difference:
    """The losses of A and B over the same tokens, nats a token, and B's minus A's."""

    a: float
    b: float
    difference: Interval
    count: int  # of documents; of training, of lines


@dataclasses.dataclass(frozen=True)
class Trained:
    """Training losses over the steps `first` + 1 to `last`.

    `by_source`: "all" first. `block_steps`: of a block of the interval of "all".
    """

    first: int
    last: int
    block_steps: int
    by_source: Mapping[str, Difference]


@dataclasses.dataclass(frozen=True)
class Evaluated:
    """Held-out losses after `step_a` of A and `step_b` of B.

    `by_source`: "all" first, then "language/<code>" of those with several sources, then these.
    """

    step_a: int
    step_b: int
    tokens_a: float
    tokens_b: float
    by_source: Mapping[str, Difference]


@dataclasses.dataclass(frozen=True)
class Worth:
    """How many tokens A needs to reach B's held-out loss at `Evaluated.tokens_b`.

    `low` and `high` follow from the interval of the difference. Each is None beyond `most`, which
    is as far as A's curve is prolonged; past `measured`, where A ends, they are foretold. `least`:
    of A's first evaluation, which may have been below B's loss already.
    """

    tokens: float | None
    low: float | None
    high: float | None
    least: float
    measured: float
    most: float


@dataclasses.dataclass(frozen=True)
class Cost:
    """Of a whole run. `hours`: in steps, without evaluations, saves and what came between."""

    steps: int
    tokens: float
    tokens_per_second: float  # median over its lines
    hours: float
    device_hours: float
    wall_hours: float | None  # from its first start to its last line


@dataclasses.dataclass(frozen=True)
class Comparison:
    """B compared with A. Differences are B's minus A's: below 0 where B is better.

    Attributes:
      a, b: the folders.
      notes: what was left out, and why; what was not checked.
      changes: {key of the config: [A's, B's]}.
      trained: None where the runs do not read the same rows at the same steps.
      evaluated: None where neither evaluation has the documents of the other.
      worth: None without an interval of `evaluated`, or with less than three evaluations of A.
      costs: of A and of B.
    """

    a: str
    b: str
    notes: list[str]
    changes: dict[str, list[Any]]
    trained: Trained | None
    evaluated: Evaluated | None
    worth: Worth | None
    costs: tuple[Cost, Cost]


def compare(folder_a: str, folder_b: str, last: int | None = None) -> Comparison:
    """Compares two run folders, over the `last` steps that both have.

    Raises ValueError where there is nothing to compare: no metrics, or other tokenizers.
    """
    a, b = RecordedRun(folder_a), RecordedRun(folder_b)
    _check_tokens(a, b)
    notes, apart = _of_the_runs(a, b), _apart(a, b)
    trained = None
    if apart:
        text = "; ".join(apart)
        notes.append(f"they do not read the same rows at the same steps ({text}): training losses")
        notes[-1] += " are not compared"
    else:
        trained = _trained(a, b, last, notes)
    evaluated = _evaluated(a, b, notes)
    return Comparison(
        a=folder_a,
        b=folder_b,
        notes=notes,
        changes=_changes(a, b),
        trained=trained,
        evaluated=evaluated,
        worth=_worth(a, evaluated) if evaluated else None,
        costs=(_cost(a), _cost(b)),
    )


def _check_tokens(a: RecordedRun, b: RecordedRun) -> None:
    """Nats a token mean something between runs of one tokenizer and one objective alone."""
    hashes = [run.item.get("tokenizer_sha256") for run in (a, b)]
    names = [run.config.get("training.objective") for run in (a, b)]
    for what, (one, other) in (("tokenizers", hashes), ("objectives", names)):
        if one and other and one != other:
            raise ValueError(
                f"{a.folder} and {b.folder} have other {what} ({one[:12]}, {other[:12]}): their "
                "losses do not compare; bits a byte on one text do, as evaluate --checkpoint gives"
            )


def _of_the_runs(a: RecordedRun, b: RecordedRun) -> list[str]:
    found = []
    for run in (a, b):
        if run.step < run.planned_steps:
            progress = f"step {run.step:,} of {run.planned_steps:,}"
            found.append(f"{run.folder} is at {progress}: not finished")
        if not run.item:
            found.append(f"{run.folder} has no checkpoint: not checked that it read the same data")
        if (origin := run.item.get("origin", {})).get("parent"):
            begun = f"{run.folder} branched from {origin['parent']}"
            found.append(f"{begun}: what came before is not compared")
    return found


def _apart(a: RecordedRun, b: RecordedRun) -> list[str]:
    """Why two runs do not read the same rows at the same steps; none where they do."""
    changes = differing(a.order(), b.order()).items()
    found = [f"{key} {one} and {other}" for key, (one, other) in changes]
    if a.item and b.item and a.item["data_hash"] != b.item["data_hash"]:
        found.append("other data")
    common, steps_a, steps_b = np.intersect1d(a.steps, b.steps, return_indices=True)
    if not len(common):
        return [*found, "no step has a line in both"]
    # The ledger shows whatever else makes the rows differ: batch size, weights, what was skipped.
    for name in sorted({*a.curves.names("tokens/"), *b.curves.names("tokens/")}):
        ledgers = a.column(f"tokens/{name}")[steps_a], b.column(f"tokens/{name}")[steps_b]
        one, other = np.nan_to_num(ledgers)  # a source of a later stage has none at first
        if (unlike := one != other).any():
            step = int(common[unlike.argmax()])
            found.append(f"other tokens of {name} at step {step:,}")
    return found


def _trained(a: RecordedRun, b: RecordedRun, last: int | None, notes: list[str]) -> Trained | None:
    """Line by line, over the steps that have one in both."""
    steps, sources = np.intersect1d(a.steps, b.steps), a.curves.names("tokens/")
    (nats_a, tokens), (nats_b, _) = (_sums(run, sources, steps) for run in (a, b))
    differ = (nats_b != nats_a).any(axis=0)
    same = int(differ.argmax()) if differ.any() else 0  # lines of a part that both have in common
    if same:
        notes.append(f"equal up to step {steps[same]:,.0f}, which is left out")
    begin = steps[-1] - (last or _LAST * (steps[-1] - steps[same]))
    kept = (steps[:-1] >= begin) & (np.arange(len(steps) - 1) >= same)
    kept &= np.isfinite(nats_a + nats_b).all(axis=0)
    if not kept.any():
        notes.append("too few steps have a line in both: training losses are not compared")
        return None
    by_source, lengths = {}, []
    for name, rows in [(ALL, sources), *((name, [name]) for name in sources)]:
        chosen = [sources.index(row) for row in rows]
        one, other, weights = (s[chosen][:, kept].sum(axis=0) for s in (nats_a, nats_b, tokens))
        if read := weights.sum():
            interval, length = of_steps(other - one, weights)
            lengths.append(length)
            of_both = (float(nats.sum() / read) for nats in (one, other))
            by_source[name] = Difference(*of_both, interval, int(kept.sum()))
    first = steps[:-1][kept][0]
    stride = (steps[-1] - first) / kept.sum()
    return Trained(int(first), int(steps[-1]), round(lengths[0] * stride), by_source)


def _sums(
    run: RecordedRun, sources: Sequence[str], steps: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Nats and tokens of each source between each two of these steps, [S, len(steps) - 1]."""
    lines = np.searchsorted(run.steps, steps)
    found = np.zeros((2, len(sources), len(steps) - 1))
    for number, name in enumerate(sources):
        tokens = np.diff(run.column(f"tokens/{name}"), prepend=0.0)
        losses = np.where(tokens > 0, run.column(f"loss/{name}"), 0.0)  # none, where none was read
        for sums, values in zip(found[:, number], (losses * tokens, tokens)):
            sums[:] = np.add.reduceat(values[: lines[-1] + 1], lines[:-1] + 1)
    return found[0], found[1]


def _evaluated(a: RecordedRun, b: RecordedRun, notes: list[str]) -> Evaluated | None:
    """After equally many tokens where there is such a pair of evaluations, else after the last."""
    steps_a, steps_b = a.evaluated(), b.evaluated()
    if not (steps_a and steps_b):
        notes.append("no losses of held-out documents in both folders (held_out/): not compared")
        return None
    after = {a.tokens_at(step): step for step in steps_a}
    pairs = [(after[b.tokens_at(s)], s) for s in steps_b if b.tokens_at(s) in after]
    step_a, step_b = pairs[-1] if pairs else (steps_a[-1], steps_b[-1])
    tokens = a.tokens_at(step_a), b.tokens_at(step_b)
    if not pairs:
        notes.append(f"held-out losses are after {tokens[0]:,.0f} and {tokens[1]:,.0f} tokens")
    one, other = a.documents(step_a), b.documents(step_b)
    names = [name for name in one if name in other and _same_documents(a, b, name, one, other)]
    if left := sorted({*one, *other} - {*names}):
        notes.append(f"held-out text that is not the same in both: {', '.join(left)}")
    if not names:
        return None
    groups = {ALL: names}
    for name in names:
        if language := one[name].get("language"):
            groups.setdefault(f"language/{language}", []).append(name)
    groups = {key: members for key, members in groups.items() if len(members) > 1 or key == ALL}
    groups |= {name: [name] for name in names}
    by_source = {key: _of_documents(one, other, members) for key, members in groups.items()}
    return Evaluated(step_a, step_b, *tokens, by_source)


def _same_documents(a: RecordedRun, b: RecordedRun, name: str, one: Any, other: Any) -> bool:
    hashes = {run.item["source_hashes"].get(name) for run in (a, b) if run.item}
    return len(hashes) < 2 and one[name]["tokens"] == other[name]["tokens"]


def _of_documents(one: Any, other: Any, names: Sequence[str]) -> Difference:
    parts, sums = [], np.zeros(3)
    for name in names:
        tokens = np.array(one[name]["tokens"], np.float64)
        nats_a, nats_b = (np.array(found[name]["nll"], np.float64) for found in (one, other))
        parts.append(np.stack([nats_b - nats_a, tokens]))
        sums += nats_a.sum(), nats_b.sum(), tokens.sum()
    count = sum(int((part[1] > 0).sum()) for part in parts)
    nats_a, nats_b, tokens = sums
    return Difference(nats_a / tokens, nats_b / tokens, of_documents(parts), count)


def _worth(a: RecordedRun, found: Evaluated) -> Worth | None:
    """Read off A's held-out losses over the logarithm of its tokens."""
    all_of = found.by_source[ALL]
    names = [name for name in found.by_source if name != ALL and not name.startswith("language/")]
    points = []
    for step in a.evaluated():
        documents, tokens = a.documents(step), a.tokens_at(step)
        if tokens and all(name in documents for name in names):
            nats, count = (
                sum(np.sum(documents[name][key]) for name in names) for key in ("nll", "tokens")
            )
            points.append((math.log(tokens), nats / count))
    if len(points) < 3 or all_of.difference.low is None:
        return None
    logs, losses = np.array(points).T
    measured, most = math.exp(logs[-1]), _BEYOND * math.exp(logs[-1])

    def reached(difference: float | None) -> float | None:
        tokens = None if difference is None else _tokens_at(logs, losses, all_of.a + difference)
        return None if tokens is None or tokens > most else tokens

    of = all_of.difference
    return Worth(
        reached(of.mean), reached(of.high), reached(of.low), math.exp(logs[0]), measured, most
    )


def _tokens_at(logs: np.ndarray, losses: np.ndarray, target: float) -> float | None:
    """Where a falling curve reaches a loss: between points straight in the logarithm of tokens,
    beyond the last one along the line through the last third of them. None: it never does."""
    lowest = np.minimum.accumulate(losses)
    if target >= lowest[0]:
        return math.exp(logs[0])
    if target >= lowest[-1]:
        return math.exp(np.interp(-target, -lowest, logs))
    last = max(2, len(logs) // 3)
    slope = np.polyfit(logs[-last:], losses[-last:], 1)[0]
    return math.exp(min(logs[-1] + (target - lowest[-1]) / slope, 700)) if slope < 0 else None


def _changes(a: RecordedRun, b: RecordedRun) -> dict[str, list[Any]]:
    found = differing(a.config, b.config) if a.config and b.config else {}
    return {key: change for key, change in found.items() if not within(key, _NOT_SHOWN)}


def _cost(run: RecordedRun) -> Cost:
    seconds = float(np.nansum(np.diff(run.steps, prepend=0.0) * run.column("step_seconds")))
    begun, start = run.starts[0] if run.starts else (None, {})
    return Cost(
        steps=run.step,
        tokens=run.tokens_at(run.step),
        tokens_per_second=float(np.nanmedian(run.column("tokens_per_second"))),
        hours=seconds / 3600,
        device_hours=seconds / 3600 * start.get("num_devices", 1),
        wall_hours=(run.curves.last("time") - begun) / 3600 if begun else None,
    )
