"""Replays a run to one of its steps: what each document gave to its loss and its gradient."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import math
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
from stablelm_jax.data.batches import mark_documents
from stablelm_jax.parallel import sharding
from stablelm_jax.reporting.inspection import RowPlace, places
from stablelm_jax.run.compilation import CompilationCache, make_deterministic
from stablelm_jax.run.console import make_console
from stablelm_jax.run.goodput import Goodput
from stablelm_jax.run.metrics import MetricsFile, finite
from stablelm_jax.training.begin import Beginning, ResumeOptions, resume
from stablelm_jax.training.gradient import make_gradient_function
from stablelm_jax.training.metrics import LossSums
from stablelm_jax.training.objectives import Objective, means, sum_names
from stablelm_jax.training.programs import compile_steps, gradient_options
from stablelm_jax.training.setup import Run
from stablelm_jax.training.state import TrainState


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


@dataclasses.dataclass
class Replay:
    """A step of a run, done once more."""

    step: int
    restored: str  # the checkpoint that the replay began with
    loss: float | None = None  # of this step alone
    grad_norm: float = math.nan
    compared: list[int] = dataclasses.field(default_factory=list)  # steps with metrics lines
    # {"step N, KEY": [as the run had it, as the replay has it]}: losses, norms, learning rate.
    differences: dict[str, list[Any]] = dataclasses.field(default_factory=dict)
    shares: list[Share] = dataclasses.field(default_factory=list)  # the largest gradient first


def replay(
    workdir: str,
    step: int,
    wanted: Callable[[RowPlace], bool] = lambda _: True,
    config: ConfigDict | None = None,
    tell: Callable[[str], None] = print,
) -> Replay:
    """Restores the last checkpoint before a step, and trains on to it as the run did.

    It goes on to the next metrics line, so that one at least is compared.

    Args:
      step: that of a metrics line: the update after which so many have been done.
      wanted: which rows of its batch to look into.
      config: of the run; None: as its next checkpoint has it, or its last.
      tell: called with what the run would say as it resumes.

    Raises:
      ValueError: no checkpoint lies before it, or the run cannot be resumed here.
    """
    folder = checkpoint_path(workdir) / "checkpoints"
    lines = MetricsFile(Path(workdir) / "metrics.jsonl").read()
    steps = finished_steps(folder)
    earlier = [number for number in steps if number < step]
    if not earlier or step > max([*steps, *(line["step"] for line in lines)]):
        raise ValueError(
            f"{workdir}: step {step} lies before its checkpoints, or has not been done: there are "
            f"{steps or 'none'}. Ask for another step, or train up to it in another --workdir"
        )
    if config is None:  # whoever saved the next checkpoint had that of the step
        named = next((number for number in steps if number >= step), earlier[-1])
        saved = read_run(folder / checkpoint_name(named))
        config = config_lib.from_dict(saved["config"])
    if config.training.deterministic:
        make_deterministic()
    CompilationCache(workdir)  # the run's own program, where it is kept
    restored = checkpoint_name(earlier[-1])
    begun = _begin(config, folder / restored, tell)
    reference = begun.run.reference
    if reference and (reference.load(Path(workdir) / "reference") or reference.missing):
        raise ValueError(
            f"{workdir}/reference: what DPO compares with is not there, or not all of it; start the"
            " run once more, which computes it"
        )
    return _replayed(begun, {n["step"]: n for n in lines if "loss" in n}, step, restored, wanted)


def _begin(config: ConfigDict, path: Any, tell: Callable[[str], None]) -> Beginning:
    """As a start of the run that writes nothing; what changed in its config was accepted then."""
    services = SimpleNamespace(
        console=make_console(quiet=True),
        goodput=Goodput(),
        events=SimpleNamespace(tell=lambda _, text, **__: tell(text), print=tell),
        store=SimpleNamespace(folder=path.parent),
    )
    return resume(config, path, services, ResumeOptions(accept_config_change=True))


def _replayed(
    begun: Beginning,
    lines: Mapping[int, Mapping[str, Any]],
    step: int,
    restored: str,
    wanted: Callable[[RowPlace], bool],
) -> Replay:
    run, state, progress, found = begun.run, begun.state, begun.progress, Replay(step, restored)
    program = compile_steps(run, progress.step)
    sums = LossSums(run.objective, list(run.sources), progress.loss_sums)
    last = min((number for number in lines if number >= step), default=step)
    with contextlib.closing(run.batches(progress.step)) as batches:
        while progress.step < last:
            batch = next(batches)
            if progress.step == step - 1:
                found.shares = _shares(run, state, batch, progress.step, wanted)
            state, metrics = program(state, sharding.put_batch(batch, run.mesh))
            progress.move(run, 1)
            sums.add(progress.step, metrics)
            metrics = jax.device_get(metrics)
            if progress.step == step:
                found.loss, found.grad_norm = _loss(run, metrics), metrics["grad_norm"].item()
            if theirs := lines.get(progress.step):
                scalars = ("learning_rate", "grad_norm", "param_norm")
                ours = finite(sums.take() | {key: metrics[key].item() for key in scalars})
                found.compared.append(progress.step)
                found.differences |= {
                    f"step {progress.step}, {key}": [theirs.get(key), value]
                    for key, value in ours.items()
                    if value != theirs.get(key)
                }
    found.shares.sort(key=lambda share: -np.nan_to_num(share.grad_norm, nan=np.inf))
    return found


def _loss(run: Run, sums: Mapping[str, Any]) -> float | None:
    found = {name: np.float64(sums[name]) for name in sum_names(run.objective)}
    return finite(means(run.objective, list(run.sources), found)["loss"])


@dataclasses.dataclass(frozen=True)
class _PartOf:
    """An objective for one of the rows of a step, which `totals` count; on so many `devices`."""

    objective: Objective
    totals: Mapping[str, float]
    devices: int

    def count(self, _: Any) -> dict[str, Any]:
        return {name: np.float32(total / self.devices) for name, total in self.totals.items()}

    def loss(self, *arguments: Any, **options: Any) -> Any:
        return self.objective.loss(*arguments, **options)


def _shares(
    run: Run,
    state: TrainState,
    batch: Mapping[str, np.ndarray],
    step: int,
    wanted: Callable[[RowPlace], bool],
) -> list[Share]:
    """Of each document of the batch that counts: a forward and backward pass of one row."""
    devices, shares = sharding.batch_parts(run.mesh), []
    totals = {name: float(total) for name, total in run.objective.count(batch).items()}
    objective, options = _PartOf(run.objective, totals, devices), gradient_options(run.config)
    gradient = make_gradient_function(
        run.model, run.mesh, objective=objective, accumulation=1, **options
    )

    @jax.jit
    def measure(state, rows):
        weights = run.optimizer.gradient_at(state.params, state.opt_state)
        gradients, sums = gradient(weights, rows, state.frozen)
        return optax.tree.norm(gradients), sums

    rows, pieces = range(run.first_row(step), run.first_row(step + 1)), run.pieces(step)
    found = places(run.sources, run.mixture, rows, run.spec, run.tokenizer, run.packed)
    for number, place in enumerate(found):
        row = {k: value[number * pieces : (number + 1) * pieces] for k, value in batch.items()}
        for segments, name, text in _groups(run, place) if wanted(place) else ():
            alone = _alone(row, segments, devices, run.tokenizer.eod)
            tokens = int(alone["loss_mask"].sum())
            if not tokens or not (alone.get("pair_ids", np.zeros(1)) >= 0).any():
                continue
            norm, sums = jax.device_get(measure(state, sharding.put_batch(alone, run.mesh)))
            parts = [
                sums[above].sum() / totals[below if below in totals else "tokens"]
                for above, below in run.objective.metrics["loss"]
            ]
            numbers = tokens, _loss(run, sums), float(sum(parts)), float(norm)
            shares.append(Share(name, place.row, *numbers, text))
    return shares


def _groups(run: Run, place: RowPlace) -> Iterator[tuple[list[int], str, str]]:
    """Of each document or pair of a row: its segments, what `data.skip` calls it, its text."""
    each, shards = 2 if run.num_pairs else 1, run.manifests[place.source].train.shards
    for first in range(0, len(place.documents), each):
        documents = place.documents[first : first + each]
        name = f"{place.source}:rows:{place.source_row}"  # behind a URL documents have no number
        if documents[0].number is not None:
            file = Path(documents[0].file).name
            before = itertools.takewhile(lambda info: info.file != file, shards)  # noqa: B023
            number = sum(info.documents for info in before) + documents[0].number
            name = f"{place.source}:documents:{number}" + (f"-{number + 1}" if each > 1 else "")
        segments = list(range(first + 1, first + each + 1))
        yield segments, name, "".join(document.text for document in documents)


def _alone(
    row: Mapping[str, np.ndarray], segments: list[int], devices: int, eod: int
) -> dict[str, np.ndarray]:
    """A batch of this row, [pieces, ...], in which these segments alone count, and of others."""
    pieces, whole = len(row["tokens"]), row["segment_ids"]
    if pieces > 1:  # each has numbers of its own
        whole = mark_documents(row["tokens"].reshape(1, -1), eod)[0].reshape(whole.shape)
    more = [(0, -pieces % devices)]
    rows = {k: np.pad(v, more + [(0, 0)] * (v.ndim - 1), "edge") for k, v in row.items()}
    rows["loss_mask"][:pieces] *= np.isin(whole, segments)
    rows["loss_mask"][pieces:] = 0
    if "pair_ids" in rows:
        own = np.arange(rows["pair_ids"].shape[1]) == (segments[0] - 1) // 2
        rows["pair_ids"] = np.where(own, rows["pair_ids"], -1)
        rows["pair_ids"][1:] = -1
    return rows


def tables(found: Replay, most: int, shorten: Callable[[str], str]) -> Iterator[Table | str]:
    """A replay for a terminal: `most` of its documents (0: all), their texts shortened."""
    norm, steps = f"gradient norm {found.grad_norm:.4g}", ", ".join(map(str, found.compared))
    yield f"step {found.step}, replayed from {found.restored}: loss {found.loss}, {norm}"
    if not found.compared:
        yield "metrics.jsonl has no line to compare with"
    elif not found.differences:
        yield f"equal to metrics.jsonl bit for bit: losses, norms, learning rate of steps {steps}"
    else:
        said = [f"{key} {was!r}, here {now!r}" for key, (was, now) in found.differences.items()]
        why = "other devices or software than the run's, or a GPU without training.deterministic?"
        more = f"; and {len(said) - 3} more" if len(said) > 3 else ""
        yield f"NOT AS THE RUN HAD IT ({why}): {'; '.join(said[:3])}{more}"
    shown = found.shares[: most or None]
    yield (
        f"{len(shown)} of {len(found.shares)} documents that count, each by a forward and backward "
        "pass of one row: loss a token, share of the step's loss, norm of the part of its gradient"
    )
    table = Table()
    table.add_column("document", no_wrap=True)
    for name in ("row", "tokens", "loss", "share", "gradient"):
        table.add_column(name, justify="right")
    for share in shown:
        loss = "not finite" if share.loss is None else f"{share.loss:.4f}"
        of_loss = f"{share.part / found.loss:.1%}" if found.loss else ""
        numbers = f"{share.row:,}", f"{share.tokens:,}", loss, of_loss, f"{share.grad_norm:.4g}"
        table.add_row(share.skip, *numbers)
    yield table
    yield from (f"{share.skip}: {shorten(share.text)!r}" for share in shown)
