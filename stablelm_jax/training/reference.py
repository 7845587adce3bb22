"""The reference of DPO: the log-probability of every answer under the weights the run began with.

It is computed once, before the first step, by the program that evaluates held-out pairs, from the
very rows that the run trains on, and kept in WORKDIR/reference/tables.npz: what it was computed
from, and for each source and split float32 [pairs, 2] (chosen, rejected), NaN where a pair has not
had its turn. A batch finds its values there by the numbers of its pairs, so neither shuffling nor
epochs matter. `key.json` beside it tells a person the same, and how far it is.

B rows, P pairs of a row.
"""

from __future__ import annotations

import contextlib
import functools
import json
import sys
import time
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from stablelm_jax.checkpoint.merged import read_weights
from stablelm_jax.checkpoint.names import checkpoint_step
from stablelm_jax.checkpoint.reading import read_run, state_hash
from stablelm_jax.parallel import distributed, sharding
from stablelm_jax.run.services import Services
from stablelm_jax.storage.files import replacing, write_json
from stablelm_jax.storage.remote import described
from stablelm_jax.training.held_out import EvalStep, agreed_batches
from stablelm_jax.training.objectives import means

if TYPE_CHECKING:
    from stablelm_jax.training.setup import Run

SAVE_SECONDS = 10.0  # of work that a kill may cost
# How far a log-probability may be from the reference's before the first update, as a share of it:
# one program computes both, but from rows that lie otherwise on the devices, or on other devices.
TOLERANCE = {"float32": 1e-4, "bfloat16": 1e-2}

_ODD = (
    "WORKDIR/reference was altered (move it away, and it is computed again), or the weights are "
    "not those of config.branch.parent, or these devices do not compute the same twice"
)
_GIVE_BACK = (
    "Give it back, or name its new place with --config.branch.parent=PATH/global_stepN, or give "
    "back WORKDIR/reference"
)


class BadReference(ValueError):
    """The reference cannot be computed, or is not that of this run."""


class NoParent(BadReference):
    """The weights that the run began with are not to be found."""


class Reference:
    """The tables of a run by (source, split), NaN at first; `key` says what they follow from."""

    def __init__(self, pairs: Mapping[tuple[str, str], int], key: Mapping[str, Any]):
        """`pairs`: how many each split of a source has; sources in the order of their ids."""
        self.key, self.sources = dict(key), list(dict.fromkeys(name for name, _ in pairs))
        self.tables = {
            name: np.full((count, 2), np.nan, np.float32) for name, count in pairs.items()
        }

    @property
    def total(self) -> int:
        return sum(map(len, self.tables.values()))

    @property
    def missing(self) -> int:
        """Pairs that have no values as yet."""
        return sum(int(np.isnan(table).any(axis=1).sum()) for table in self.tables.values())

    def joined(self, batches: Any, split: str) -> Iterator[dict[str, np.ndarray]]:
        """The batches with "reference", float32 [B, P, 2]; 0 where there is no pair."""
        with contextlib.closing(batches):
            for batch in batches:
                yield batch | {"reference": self.of(batch, split)}

    def of(self, batch: Mapping[str, np.ndarray], split: str) -> np.ndarray:
        """The values of a batch's pairs."""
        ids_BP = batch["pair_ids"]
        values_BP2 = np.zeros((*ids_BP.shape, 2), np.float32)
        for number, name in enumerate(self.sources):
            own_BP = (ids_BP >= 0) & (batch["source_ids"] == number)[:, None]
            if own_BP.any():  # a source may hold out none
                values_BP2[own_BP] = self.tables[name, split][ids_BP[own_BP]]
        return values_BP2

    def load(self, folder: epath.PathLike) -> str:
        """Takes what is there; returns why it cannot be used, or ''."""
        try:
            with np.load(epath.Path(folder) / "tables.npz", allow_pickle=False) as found:
                key = json.loads(str(found["key"]))
                if key != self.key:
                    changed = [part for part in self.key if key.get(part) != self.key[part]]
                    return f"it was computed with another {', '.join(changed)}"
                for name, table in self.tables.items():
                    if "/".join(name) in found:  # else one that is newer than the file
                        table[:] = found["/".join(name)]
        except FileNotFoundError:
            return ""
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
            for table in self.tables.values():
                table[:] = np.nan
            return f"tables.npz cannot be read ({error})"
        return ""

    def save(self, folder: Path) -> None:
        """Writes what there is so far, whole or not at all."""
        folder.mkdir(exist_ok=True)
        arrays = {"/".join(name): table for name, table in self.tables.items()}
        with replacing(folder / "tables.npz") as aside, aside.open("wb") as file:
            np.savez(file, key=json.dumps(self.key), **arrays)
        done = self.total - self.missing
        write_json(folder / "key.json", {"pairs": self.total, "done": done, **self.key})


def prepare_reference(
    run: Run, services: Services, eval_step: EvalStep, own: Any, left: Callable[[], bool]
) -> bool:
    """Fills `run.reference`, from its file or anew; False where a signal was heard before the end.

    `own`: the run's weights where they are still its parent's, else None. `left`: asked before each
    batch, on every process alike; whether to leave it. BadReference: the parent is gone or another
    one, or a pair gets no finite value.
    """
    reference, events = run.reference, services.events
    folder, refused = services.folder.path / "reference", False

    def save() -> None:
        """Keeps what there is so far; a disk that refuses it is told once, no error."""
        nonlocal refused
        try:
            if distributed.is_first():
                reference.save(folder)
                services.folder.upload()
        except OSError as error:
            if not refused:
                text = f"{folder} does not take the reference ({described(error)}); the run "
                events.tell("disk", text + "goes on, and a later start computes it")
            refused = True
        done = reference.total - reference.missing
        events.print(f"reference: {done:,} of {reference.total:,} pairs")

    problem = reference.load(folder) if distributed.is_first() else ""
    if problem:
        events.tell("reference", f"{folder}: {problem}; the reference is computed again")
    reference.tables = distributed.from_first(reference.tables)
    if not reference.missing:
        events.print(f"the reference of {reference.total:,} pairs is that of {folder}")
        return True
    save()
    if own is None:
        bound = float(run.config.checkpoint.timeout_seconds)
        reading = services.stop.phase("reading the parent", leave=True)  # all there is is saved
        with services.watchdog.patient(bound), reading:
            own = _parents_weights(run, _named(run) or (run.data_position.parent,), _GIVE_BACK)
    finished = _compute(run, eval_step, lambda: own, left, save)
    save()
    if finished and reference.missing:
        raise BadReference(f"{reference.missing} pairs lie in no row; prepare the data again")
    return finished


def compute_held_out(run: Run, workdir: epath.Path) -> None:
    """The held-out pairs of `run.reference`, for who only evaluates: what `workdir` lacks, anew.

    Raises NoParent where a pair has no value there, and what would give it is gone.
    """
    folder = workdir / "reference"
    if problem := run.reference.load(folder):
        print(f"{folder}: {problem}; it is not used", file=sys.stderr)

    @functools.cache
    def weights() -> Any:
        remedy = f"Give it back, or {folder}, or name its new place as branch.parent in the file of"
        places = *_named(run), run.data_position.parent
        return _parents_weights(run, places, f"{remedy} --config")

    _compute(run, run.eval_step, weights, splits=("held_out",))


def _compute(
    run: Run,
    eval_step: EvalStep,
    weights: Callable[[], Any],
    left: Callable[[], bool] = lambda: False,
    save: Callable[[], None] = lambda: None,
    splits: Sequence[str] = ("train", "held_out"),
) -> bool:
    """Fills in what is missing and saves every so often; False where it was left.

    A run keeps all its held-out pairs, so that they can be evaluated without its parent; who only
    evaluates asks for those of `evaluation.max_rows` rows.
    """
    saved_at, only_evaluates = time.monotonic(), "train" not in splits
    for name in (name for name in run.reference.tables if name[1] in splits):
        most = run.config.evaluation.max_rows if only_evaluates else None
        batches = run.packed_batches(*name, most)
        for batch in agreed_batches(batches, f"pairs of {'/'.join(name)}"):
            if left():
                return False
            batch = batch | {"reference": run.reference.of(batch, name[1])}
            if not distributed.anywhere(bool(np.isnan(batch["reference"]).any())):
                continue
            _score(run, eval_step, weights(), name, batch)
            if time.monotonic() - saved_at > SAVE_SECONDS:
                save()
                saved_at = time.monotonic()
    return True


def _score(run: Run, eval_step: EvalStep, params: Any, name: tuple[str, str], batch: Any) -> None:
    """Fills in the pairs of one batch; each process gets those of all."""
    found = _measured(run, eval_step, params, batch)["parts"]
    there_BP = found["pair_ids"] >= 0
    numbers_N, values_N2 = found["pair_ids"][there_BP], found["logps"][there_BP]
    if not np.isfinite(values_N2).all():
        odd = numbers_N[~np.isfinite(values_N2).all(axis=1)][0]
        raise BadReference(
            f"pair {odd} of {'/'.join(name)} has no finite log-probability under "
            f"{run.data_position.parent}: look at that checkpoint, and at training.num_valid_ids"
        )
    run.reference.tables[name][numbers_N] = values_N2


def _measured(run: Run, eval_step: EvalStep, params: Any, batch: Any) -> dict[str, Any]:
    """What the program that evaluates says of a batch."""
    try:
        return jax.device_get(eval_step(params, sharding.put_batch(batch, run.mesh)))
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise BadReference(
            f"config.data.batch_size={run.spec.batch_size}: the devices have too little memory for "
            "the log-probabilities of so many rows, which are computed without gradients but, "
            "whatever training.accumulation is, all at once; use a smaller batch or more devices "
            f"({described(error)})"
        ) from error


def _named(run: Run) -> tuple[str, ...]:
    """`branch.parent`; not where it is a folder, whose newest checkpoint may be another by now."""
    named = run.config.branch.parent
    return (named,) if checkpoint_step(Path(named).name) is not None else ()


def _parents_weights(run: Run, places: Sequence[str], remedy: str) -> Any:
    """From the first place that has them: never of a checkpoint of the run itself, they moved.

    They are as the evaluation takes them: under LoRA with adapters that add nothing.
    """
    errors = []
    for path in dict.fromkeys(places):
        try:
            saved = read_run(path)
            if state_hash(saved["checksums"]) != run.data_position.parent_hash:
                raise ValueError(f"{path} is not the one that this run began with")
            weights = read_weights(path, saved, run.abstract.base)
        except ValueError as error:
            errors.append(str(error))
            continue
        if run.lora is None:
            return weights
        zero = lambda x: jnp.zeros(x.shape, x.dtype, device=x.sharding)  # noqa: E731
        return run.lora.join(weights, jax.tree.map(zero, run.abstract.params))
    raise NoParent(f"the reference is computed from {places[-1]}: {'; '.join(errors)}. {remedy}")


def check_start(run: Run, eval_step: EvalStep, params: Any, batch: Any) -> str:
    """Before the first update every reward is 0, and the loss ln 2; of ipo 1 / (4 beta^2).

    `params` are the run's weights, `batch` is its first one. Returns a sentence with the loss;
    raises BadReference where a log-probability is further from its reference than `TOLERANCE`.
    """
    sums = _measured(run, eval_step, params, batch)
    parts = sums.pop("parts")
    loss = means(run.objective, list(run.sources), sums)["loss"]
    logps, expected = parts["logps"], parts["reference"]
    off = np.abs(logps - expected) / np.maximum(1, np.abs(expected))
    tolerance = TOLERANCE[run.config.training.dtype]
    if not off.max() <= tolerance:  # NaN too
        row, pair, side = np.unravel_index(np.argmax(np.nan_to_num(off, nan=np.inf)), off.shape)
        source = list(run.sources)[parts["source_ids"][row]]
        raise BadReference(
            f"before the first update the loss is {loss:.6f}, though nothing was learnt yet: pair "
            f"{parts['pair_ids'][row, pair]} of {source} has the log-probability "
            f"{logps[row, pair, side]:.4f}, its reference {expected[row, pair, side]:.4f}, further "
            f"apart than {tolerance:g} of it. Either {_ODD}"
        )
    return (
        f"before the first update: loss {loss:.6f}, every log-probability is its reference to "
        f"{off.max():.1g}"
    )
