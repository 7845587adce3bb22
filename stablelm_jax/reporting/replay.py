"""Replays a run to one of its steps: what each document gave to its loss and its gradient."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import optax
from ml_collections import ConfigDict
from rich.table import Table

from stablelm_jax import config as config_lib
from stablelm_jax.checkpoint.names import checkpoint_name, checkpoint_path, finished_steps
from stablelm_jax.checkpoint.reading import read_run
from stablelm_jax.parallel import sharding
from stablelm_jax.reporting.inspection import RowPlace, places
from stablelm_jax.run.compilation import CompilationCache, make_deterministic
from stablelm_jax.run.console import make_console
from stablelm_jax.run.metrics import MetricsFile, finite
from stablelm_jax.training.begin import Beginning, ResumeOptions, resume
from stablelm_jax.training.metrics import LossSums
from stablelm_jax.training.objectives import Objective, means, sum_names
from stablelm_jax.training.programs import compile_step, gradient_options
from stablelm_jax.training.setup import Run
from stablelm_jax.training.state import TrainState
from stablelm_jax.training.step import make_state_gradient

_SCALARS = ("learning_rate", "grad_norm", "param_norm")


@dataclasses.dataclass(frozen=True)
class Share:
    """What a document, or a preference pair, gave to a step."""

    skip: str  # what `data.skip` calls it
    row: int  # of the mixture
    tokens: int  # its targets that count
    loss: float | None  # in nats a token, or of the pair
    part: float  # of the step's loss: these add up to it
    grad_norm: float  # of its part of the step's gradient: as vectors they add up to it
    text: str  # of all its tokens in the row


@dataclasses.dataclass(frozen=True)
class Replay:
    """A step of a run, done once more."""

    step: int
    loss: float | None  # of this step alone
    grad_norm: float
    restored: str  # the checkpoint that the replay began with
    compared: list[int]  # steps whose metrics lines were compared: losses, norms, learning rate
    differences: dict[str, list[Any]]  # "step N, KEY": [as the run had it, as the replay has it]
    shares: list[Share]  # the largest gradient first


def replay(
    workdir: str,
    step: int,
    wanted: Callable[[RowPlace], bool],
    config: ConfigDict | None = None,
    tell: Callable[[str], None] = print,
) -> Replay:
    """Restores the last checkpoint before a step, and trains on to it as the run did.

    Args:
      step: that of a metrics line: the update after which so many have been done.
      wanted: which rows of its batch to look into.
      config: of the run; None: as its next checkpoint has it, or its folder.
      tell: called with what a person should know of the run.

    Raises:
      ValueError: no checkpoint lies before it, or the run cannot be resumed here.
    """
    folder = checkpoint_path(workdir) / "checkpoints"
    steps, lines = finished_steps(folder), MetricsFile(Path(workdir) / "metrics.jsonl").read()
    earlier = [number for number in steps if number < step]
    if not earlier or step > max([*steps, *(line["step"] for line in lines)]):
        raise ValueError(
            f"{workdir}: step {step} lies before its checkpoints, or has not been done: there are "
            f"{steps or 'none'}. Ask for another step, or train up to it in another --workdir"
        )
    config = config or _config_of(Path(workdir), folder, earlier[-1], step)
    if config.training.deterministic:
        make_deterministic()
    CompilationCache(workdir)  # the run's own program, where it is kept
    begun = _begin(config, folder / checkpoint_name(earlier[-1]), tell)
    if begun.run.reference is not None:
        _load_reference(begun.run, Path(workdir))
    return _Replaying(begun, lines).to(step, wanted)


def _config_of(workdir: Path, folder: Any, before: int, step: int) -> ConfigDict:
    """The config that the run had at a step: whoever saved the next checkpoint had it."""
    later = [number for number in finished_steps(folder) if number >= step]
    path = workdir / "config.json"
    if not later and path.exists():
        tree = json.loads(path.read_text(encoding="utf-8"))["config"]
    else:
        saved = read_run(folder / checkpoint_name((later or [before])[0]))
        changed = [change["step"] for change in saved.get("config_changes", [])]
        if between := [number for number in changed if before < number < step]:
            raise ValueError(
                f"{workdir}: the config changed after step {between[0]}, whose checkpoint is gone: "
                f"from {checkpoint_name(before)} there is no exact way to step {step}"
            )
        tree = saved["config"]
    return config_lib.from_dict(tree, only_known=True)


def _begin(config: ConfigDict, path: Any, tell: Callable[[str], None]) -> Beginning:
    """As a start of the run that keeps nothing; a change of the config was accepted by then."""
    services = SimpleNamespace(
        console=make_console(quiet=True),
        events=SimpleNamespace(tell=lambda _, text, **__: tell(text), print=tell),
        store=SimpleNamespace(folder=path.parent),
    )
    return resume(config, path, services, ResumeOptions(accept_config_change=True))


def _load_reference(run: Run, workdir: Path) -> None:
    problem = run.reference.load(workdir / "reference")
    if problem or run.reference.missing:
        raise ValueError(
            f"{workdir / 'reference'}: {problem or 'not all of it is there'}; DPO compares with it:"
            " start the run once more, which computes it"
        )


class _Replaying:
    """The run while it goes on; `lines`: of its metrics."""

    def __init__(self, begun: Beginning, lines: list[dict[str, Any]]):
        self._run, self._state, self._progress = begun.run, begun.state, begun.progress
        self._lines = {line["step"]: line for line in lines if "loss" in line}
        names = list(begun.run.sources)
        self._sums = LossSums(begun.run.objective, names, begun.progress.loss_sums)
        self._compared: list[int] = []
        self._differences: dict[str, list[Any]] = {}

    def to(self, step: int, wanted: Callable[[RowPlace], bool]) -> Replay:
        """Goes on past the step to the next metrics line, which is compared too."""
        run, before, program = self._run, self._progress.step, compile_step(self._run)
        last = min((number for number in self._lines if number >= step), default=step)
        with contextlib.closing(run.batches(self._progress.rows_consumed)) as batches:
            for number in range(before + 1, last + 1):
                batch = next(batches)
                if number == step:
                    shares = _shares(run, self._state, batch, self._progress.rows_consumed, wanted)
                found = self._step(program, batch)
                if number == step:
                    loss, norm = _loss(run, found), found["grad_norm"].item()
        shares.sort(key=lambda share: -np.nan_to_num(share.grad_norm, nan=np.inf))
        place = step, loss, norm, checkpoint_name(before)
        return Replay(*place, self._compared, self._differences, shares)

    def _step(self, program: Any, batch: Mapping[str, np.ndarray]) -> dict[str, Any]:
        """One update; where the run wrote a metrics line, ours is compared with it."""
        batch = sharding.put_batch(batch, self._run.mesh)
        self._state, metrics = program(self._state, batch)
        self._progress.move(self._run, 1)
        number, found = self._progress.step, jax.device_get(metrics)
        self._sums.add(number, metrics)
        if theirs := self._lines.get(number):
            ours = finite(self._sums.take() | {key: found[key].item() for key in _SCALARS})
            self._compared.append(number)
            for key in ours:
                if ours[key] != theirs.get(key):
                    self._differences[f"step {number}, {key}"] = [theirs.get(key), ours[key]]
        return found


@dataclasses.dataclass(frozen=True)
class _PartOf:
    """An objective for parts of a batch: `totals` are those of the whole, for each of `parts`."""

    objective: Objective
    totals: Mapping[str, float]
    parts: int

    def count(self, _: Any) -> dict[str, Any]:
        return {name: np.float32(total / self.parts) for name, total in self.totals.items()}

    def loss(self, *arguments: Any, **options: Any) -> Any:
        return self.objective.loss(*arguments, **options)


def _loss(run: Run, sums: Mapping[str, Any]) -> float | None:
    found = {name: np.float64(sums[name]) for name in sum_names(run.objective)}
    return finite(means(run.objective, list(run.sources), found)["loss"])


def _shares(
    run: Run,
    state: TrainState,
    batch: Mapping[str, np.ndarray],
    first_row: int,
    wanted: Callable[[RowPlace], bool],
) -> list[Share]:
    """Of each document of the batch that counts: a forward and backward pass of one row."""
    parts, numbers, shares = sharding.batch_parts(run.mesh), _first_numbers(run), []
    totals = {name: float(total) for name, total in run.objective.count(batch).items()}
    objective, options = _PartOf(run.objective, totals, parts), gradient_options(run.config)
    gradient = make_state_gradient(
        run.model, run.mesh, objective=objective, accumulation=1, **options
    )

    @jax.jit
    def measure(state, rows):
        gradients, sums = gradient(state, rows)
        return optax.tree.norm(gradients), sums

    rows = range(first_row, first_row + run.spec.batch_size)
    found = places(run.sources, run.mixture, rows, run.spec, run.tokenizer, run.packed)
    for number, place in enumerate(found):
        row = {key: value[number] for key, value in batch.items()}
        for segments, name, text in _groups(place, numbers, run.num_pairs) if wanted(place) else ():
            alone = _alone(row, segments, parts)
            if not alone["loss_mask"].any() or not (alone.get("pair_ids", np.zeros(1)) >= 0).any():
                continue
            norm, sums = jax.device_get(measure(state, sharding.put_batch(alone, run.mesh)))
            part = sum(
                sums[above].sum() / totals[below if below in totals else "tokens"]
                for above, below in run.objective.metrics["loss"]
            )
            tokens = int(alone["loss_mask"].sum())
            values = _loss(run, sums), float(part), float(norm)
            shares.append(Share(name, place.row, tokens, *values, text))
    return shares


def _first_numbers(run: Run) -> dict[tuple[str, str], int]:
    """How many documents a source has before each of its shards."""
    found = {}
    for name, manifest in run.manifests.items():
        number = 0
        for info in manifest.train.shards:
            found[name, info.file] = number
            number += info.documents
    return found


def _groups(
    place: RowPlace, numbers: Mapping[tuple[str, str], int], pairs: int | None
) -> Iterator[tuple[list[int], str, str]]:
    """Of each document or pair of a row: its segments, what `data.skip` calls it, its text."""
    each = 2 if pairs else 1
    for first in range(0, len(place.documents), each):
        documents = place.documents[first : first + each]
        name = f"{place.source}:rows:{place.source_row}"  # behind a URL documents have no number
        if documents[0].number is not None:
            number = numbers[place.source, Path(documents[0].file).name] + documents[0].number
            name = f"{place.source}:documents:{number}" + (f"-{number + 1}" if pairs else "")
        segments = list(range(first + 1, first + each + 1))
        yield segments, name, "".join(document.text for document in documents)


def _alone(row: Mapping[str, np.ndarray], segments: list[int], parts: int) -> dict[str, np.ndarray]:
    """A batch of this row, in which these segments alone count, and of empty ones."""
    rows = {name: np.repeat(value[None], parts, axis=0) for name, value in row.items()}
    rows["loss_mask"] *= np.isin(rows["segment_ids"], segments)
    rows["loss_mask"][1:] = 0
    if "pair_ids" in rows:
        own = np.arange(rows["pair_ids"].shape[1]) == (segments[0] - 1) // 2
        rows["pair_ids"] = np.where(own, rows["pair_ids"], -1)
        rows["pair_ids"][1:] = -1
    return rows


def tables(found: Replay, most: int, shorten: Callable[[str], str]) -> Iterator[Table | str]:
    """A replay for a terminal: `most` of its documents (0: all), their texts shortened."""
    yield (
        f"step {found.step}, replayed from {found.restored}: loss {found.loss}, gradient norm "
        f"{found.grad_norm:.4g}"
    )
    steps = ", ".join(map(str, found.compared))
    if not found.compared:
        yield "metrics.jsonl has no line to compare with"
    elif not found.differences:
        yield f"equal to metrics.jsonl bit for bit: losses, norms, learning rate of steps {steps}"
    for key, (theirs, ours) in found.differences.items():
        yield f"NOT AS THE RUN HAD IT: {key}: {theirs!r} there, {ours!r} here"
    if found.differences:
        yield "other devices or software than the run's? On a GPU: training.deterministic was off?"
    shown = found.shares[: most or None]
    yield (
        f"{len(shown)} of {len(found.shares)} documents that count, by their parts of the gradient "
        "(a forward and backward pass of one row for each document)"
    )
    names = ("document, for data.skip", "row", "tokens", "loss", "of the step's loss", "gradient")
    table = Table(*names, title_justify="left")
    for share in shown:
        loss = "not finite" if share.loss is None else f"{share.loss:.4f}"
        of_loss = f"{share.part / found.loss:.1%}" if found.loss else ""
        numbers = f"{share.row:,}", f"{share.tokens:,}", loss, of_loss, f"{share.grad_norm:.4g}"
        table.add_row(share.skip, *numbers)
    yield table
    for share in shown:
        yield f"{share.skip}: {shorten(share.text)!r}"
