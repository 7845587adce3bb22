"""Speed of checkpoints: what a save costs training, and until the bits are on the disk and back.

    python benchmarks/checkpoint.py                              # 115.6 M parameters: 1.39 GB
    python benchmarks/checkpoint.py --config configs/stablelm_2_1_6b_h200.py --repeats 1
    python benchmarks/checkpoint.py --config F --also model.num_layers=2 --folder DIR
    python benchmarks/checkpoint.py --smoke                      # shows in seconds that all runs

Saved is a whole train state, float32 weights and two moments: 12 bytes a parameter, on all devices
at hand. `blocked` is the time inside `save()`, while which training stands; after `whole` the
checkpoint is finished. `on disk after` adds an fsync of every file; GB/s (of the state's bytes) and
the ratio go by it. Give a --folder on the disk that is meant.

Who saves "beside steps" has products of matrices done meanwhile, 0.1 s of each, so that what a save
takes from them shows; everybody else has the machine to himself. Orbax alone is the same library
with its defaults and without our checksums; numpy.save fetches one leaf after the other and writes
it. What is read back "from disk" was first dropped from the page cache, and everything read is
compared with the state bit for bit. Contestants take turns; medians.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from inputs import fields
from rich.console import Console
from rich.table import Table
from train_step import ADAMW, MODEL

from stablelm_jax.checkpoint.checksum import checksums
from stablelm_jax.checkpoint.names import checkpoint_name
from stablelm_jax.checkpoint.reading import read_arrays, read_run
from stablelm_jax.checkpoint.saving import Saver
from stablelm_jax.checkpoint.store import CheckpointStore
from stablelm_jax.model.config import ModelConfig
from stablelm_jax.model.parameters import flatten, parameter_table
from stablelm_jax.optimizer.kinds import adamw
from stablelm_jax.optimizer.parts import decay_mask
from stablelm_jax.parallel.mesh import make_mesh
from stablelm_jax.training.state import abstract_state, init_state, stored_arrays

TINY = dataclasses.replace(
    MODEL, vocab_size=512, num_layers=2, width=64, num_heads=1, num_kv_heads=1
)
STEP = 1000
STEP_SECONDS, STEPS_ALONE = 0.1, 10

Arrays = dict[str, Any]  # {"params": tree, "optimizer": tree}
Step = Callable[[], Any]


@dataclasses.dataclass(frozen=True)
class Contestant:
    """`save` blocks training; `ended`, asked after every step, says whether all is written."""

    save: Callable[[], None]
    ended: Callable[[], bool] = lambda: True


@dataclasses.dataclass(frozen=True)
class Save:
    """Seconds from the call on, the bytes of the files, and steps: their median seconds alone and
    during the save, all seconds that it took from them; zeros where there were none."""

    blocked: float
    whole: float
    on_disk: float
    bytes: int
    alone: float
    during: float
    lost: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", metavar="FILE", help="whose model; else one for a laptop")
    parser.add_argument("--also", action="append", default=[], metavar="KEY=VALUE,...")
    parser.add_argument("--folder", metavar="DIR", help="on the disk meant; else a temporary one")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--smoke", action="store_true", help="a tiny model, once")
    arguments = parser.parse_args()
    if arguments.also and not arguments.config:
        parser.error("--also belongs to --config")
    arrays = train_state(TINY if arguments.smoke else _model(arguments))
    if arguments.folder:
        Path(arguments.folder).mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="checkpoint", dir=arguments.folder) as folder:
        _check_space(Path(folder), arrays)
        results = _race(Path(folder), arrays, 1 if arguments.smoke else arguments.repeats)
        Console(width=170).print(_table(Path(folder), arrays, results))


def _model(arguments: argparse.Namespace) -> ModelConfig:
    if not arguments.config:
        return MODEL
    from stablelm_jax import config as config_lib  # needs ml_collections

    config = config_lib.load(arguments.config)
    for text in arguments.also:
        for key, value in fields(text).items():
            if not key.startswith("model."):
                raise SystemExit(f"--also {key}: changes nothing here; known are the model's")
            config_lib.set_value(config, key, value)
    return config_lib.model_config(config)


def _check_space(folder: Path, arrays: Arrays) -> None:
    needed, free = 1.1 * _bytes(arrays), shutil.disk_usage(folder).free
    if free < needed:
        raise SystemExit(
            f"{folder.parent}: {free / 1e9:.1f} GB are free, one checkpoint needs "
            f"{needed / 1e9:.1f}; give a larger disk by --folder or a smaller model"
        )


def train_state(model: ModelConfig) -> Arrays:
    """A fresh state's arrays; the moments hold noise, as zeros would be compressed to nothing."""
    mesh = make_mesh()
    optimizer = adamw(lambda _: jnp.float32(0), decay_mask(parameter_table(model)), **ADAMW)
    abstract = abstract_state(model, optimizer, mesh, zero1=True)
    state = init_state(model, optimizer, abstract, seed=0)
    m, v = _moments(state.opt_state["m"])
    arrays = stored_arrays(state)
    arrays["optimizer"] |= {"m": m, "v": v}
    return jax.block_until_ready(arrays)


def _moments(fresh: Any) -> tuple[Any, Any]:
    """First and second, placed like `fresh`, of gradients whose elements are about 1e-4."""
    leaves, structure = jax.tree.flatten(fresh)
    places = [leaf.sharding for leaf in leaves]

    @functools.partial(jax.jit, out_shardings=(places, places))
    def make(key):
        keys = [jax.random.fold_in(key, i) for i in range(len(leaves))]
        m = [1e-4 * jax.random.normal(k, x.shape) for k, x in zip(keys, leaves)]
        return m, [jnp.square(x) for x in m]

    m, v = make(jax.random.key(1, impl="rbg"))  # the generator that compiles fast
    return jax.tree.unflatten(structure, m), jax.tree.unflatten(structure, v)


def _bytes(arrays: Arrays) -> int:
    return sum(leaf.nbytes for leaf in jax.tree.leaves(arrays))


@jax.jit
def _same_bits(a: Arrays, b: Arrays) -> jax.Array:
    def same(x, y):
        x, y = (jax.lax.bitcast_convert_type(z, jnp.uint32) for z in (x, y))
        return jnp.all(x == y)

    return jnp.all(jnp.stack(jax.tree.leaves(jax.tree.map(same, a, b))))


@contextlib.contextmanager
def _ours(folder: Path, arrays: Arrays) -> Iterator[Contestant]:
    settings = SimpleNamespace(asynchronous=True, every_minutes=0, timeout_seconds=1800)
    store = CheckpointStore(folder, keep_latest=1)
    saver = Saver(settings, store, SimpleNamespace(tell=_end))

    def ended():
        saver.look()
        return STEP in store.steps()

    with contextlib.closing(saver):
        yield Contestant(lambda: saver.save(STEP, lambda: (arrays, {})), ended)


def _end(event: str, text: str, **fields: Any) -> None:
    raise SystemExit(f"{event}: {text}")  # a save failed or was slow


@contextlib.contextmanager
def _orbax(folder: Path, arrays: Arrays) -> Iterator[Contestant]:
    items = {name: ocp.args.StandardSave(tree) for name, tree in arrays.items()}
    with ocp.AsyncCheckpointer(ocp.CompositeCheckpointHandler(*arrays)) as checkpointer:

        def save():
            checkpointer.save(folder / "orbax", args=ocp.args.Composite(**items))

        def ended():
            return not checkpointer._async_manager._thread.is_alive()

        yield Contestant(save, ended)


@contextlib.contextmanager
def _numpy(folder: Path, arrays: Arrays) -> Iterator[Contestant]:
    def save():
        for number, leaf in enumerate(jax.tree.leaves(arrays)):
            np.save(folder / f"{number}.npy", jax.device_get(leaf))

    yield Contestant(save)


OURS, ORBAX, PLAIN, BESIDE = "ours", "Orbax alone", "numpy.save", ", beside steps"
SAVERS = {
    OURS + BESIDE: _ours,
    ORBAX + BESIDE: _orbax,
    OURS: _ours,
    ORBAX: _orbax,
    PLAIN: _numpy,
}


def _read_ours(folder: Path, arrays: Arrays) -> Arrays:
    path = folder / checkpoint_name(STEP)
    abstract = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), arrays
    )
    return read_arrays(path, abstract, read_run(path))


def _read_numpy(folder: Path, arrays: Arrays) -> Arrays:
    leaves, structure = jax.tree.flatten(arrays)
    read = [
        jax.device_put(np.load(folder / f"{number}.npy"), leaf.sharding)
        for number, leaf in enumerate(leaves)
    ]
    return jax.tree.unflatten(structure, read)


# By who has saved; each with its name.
READERS = {OURS: (OURS, _read_ours), PLAIN: ("numpy.load", _read_numpy)}


@dataclasses.dataclass
class Results:
    """All repeats: saves by who, seconds of restores by (who, where from), and of checksums."""

    saves: dict[str, list[Save]] = dataclasses.field(default_factory=dict)
    restores: dict[tuple[str, str], list[float]] = dataclasses.field(default_factory=dict)
    checksums: list[float] = dataclasses.field(default_factory=list)


def _race(folder: Path, arrays: Arrays, repeats: int) -> Results:
    results, step = Results(), _make_step()
    console = Console(stderr=True, width=170)  # should a time limit end the call
    checksums(arrays)  # compiles, as once in a run
    for _ in range(repeats):
        results.checksums.append(_seconds(lambda: checksums(arrays)))
        for who, contestant in SAVERS.items():
            place = folder / "saved"
            place.mkdir()
            save = _save(contestant, place, arrays, step if BESIDE in who else None)
            results.saves.setdefault(who, []).append(save)
            console.print(f"{who}: blocked {save.blocked:.3f} s, on disk after {save.on_disk:.3f}")
            if who in READERS:
                name, reader = READERS[who]
                for where, seconds in _restore(reader, place, arrays).items():
                    results.restores.setdefault((name, where), []).append(seconds)
                    console.print(f"{name}, {where}: {seconds:.3f} s")
            shutil.rmtree(place)
    return results


def _save(contestant: Callable, folder: Path, arrays: Arrays, step: Step | None) -> Save:
    """One save into the empty `folder`, `step` being done over and over until it is written."""
    alone = [_seconds(step) for _ in range(STEPS_ALONE)] if step else [0.0]
    during = []
    # A copy, as an array that was fetched once keeps what it gave the host.
    copy = jax.block_until_ready(jax.tree.map(jnp.copy, arrays))
    with contestant(folder, copy) as saver:
        began = time.perf_counter()
        saver.save()
        blocked = time.perf_counter() - began
        while not saver.ended():
            during.append(_seconds(step) if step else time.sleep(0.002) or 0.0)
        whole = time.perf_counter() - began
        size = _to_disk(folder)
        on_disk = time.perf_counter() - began
    seconds = statistics.median(alone)
    usual, lost = statistics.median(during or [0.0]), whole - seconds * len(during)
    return Save(blocked, whole, on_disk, size, seconds, usual, lost)


def _restore(reader: Callable, folder: Path, arrays: Arrays) -> dict[str, float]:
    """{where from: seconds}."""
    times = {}
    for where in ("from disk", "from page cache"):
        if where == "from disk" and not _forget(folder):
            continue
        began = time.perf_counter()
        found = jax.block_until_ready(reader(folder, arrays))
        times[where] = time.perf_counter() - began
        if not _same_bits(found, arrays):
            raise SystemExit(f"{reader.__name__}: what was read {where} is not what was saved")
        del found  # room for the next
    return times


def _make_step() -> Step:
    """Work for the device, so many products that it takes STEP_SECONDS, and one number back."""
    x = jax.random.normal(jax.random.key(0), (1024, 1024))
    work = jax.jit(lambda n: jax.lax.fori_loop(0, n, lambda _, y: jnp.tanh(x @ y), x)[0, 0])
    float(work(1))  # compiles
    products, seconds = 5, 0.0
    while seconds < STEP_SECONDS / 2:
        products *= 2
        began = time.perf_counter()
        float(work(products))
        seconds = time.perf_counter() - began
    products = max(1, round(products * STEP_SECONDS / seconds))
    return lambda: float(work(products))


def _seconds(call: Callable[[], Any]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def _to_disk(folder: Path) -> int:
    """Makes every file durable, and gives their bytes."""
    total = 0
    for path in _files(folder):
        with open(path, "rb+") as file:
            os.fsync(file.fileno())
        total += path.stat().st_size
    return total


def _forget(folder: Path) -> bool:
    """Drops the files, which must be on disk, from the page cache; False where none can."""
    if not hasattr(os, "posix_fadvise"):
        return False
    for path in _files(folder):
        with open(path, "rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return True


def _files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


def _file_system(folder: Path) -> str:
    """Its kind, as Linux knows it."""
    mounts = Path("/proc/self/mounts")
    if not mounts.exists():
        return "a file system of unknown kind"
    places = [line.split()[1:3] for line in mounts.read_text().splitlines()]
    of_folder = [(len(at), kind) for at, kind in places if folder.resolve().is_relative_to(at)]
    kind = max(of_folder)[1]
    return f"{kind}, which is memory and no disk" if kind in ("tmpfs", "ramfs") else kind


def _table(folder: Path, arrays: Arrays, results: Results) -> Table:
    total, device = _bytes(arrays), jax.devices()[0]
    table = Table(
        title=f"{total / 1e9:.3g} GB of state in {len(flatten(arrays))} arrays, "
        f"{jax.device_count()} x {device.device_kind}, {_file_system(folder)}, "
        f"repeated {len(results.checksums)} times",
        caption=f"All checksums take {statistics.median(results.checksums):.3f} s.",
    )
    for column in ("who", "GB in files", "blocked s", "of Orbax's", "whole after s"):
        table.add_column(column, justify="right")
    for column in ("on disk after s", "GB/s", "time / numpy's", "a step s", "of alone", "lost s"):
        table.add_column(column, justify="right")
    saves = {who: _medians(found) for who, found in results.saves.items()}
    for who, save in saves.items():
        rival = saves[ORBAX + BESIDE if BESIDE in who else ORBAX]
        times = [f"{save.blocked:.3f}", f"{save.blocked / rival.blocked:.2f}", f"{save.whole:.3f}"]
        times += [f"{save.on_disk:.3f}", f"{total / save.on_disk / 1e9:.3f}"]
        times.append(f"{save.on_disk / saves[PLAIN].on_disk:.2f}")
        if save.alone:
            times += [f"{save.during:.3f}", f"{save.during / save.alone:.2f}", f"{save.lost:.3f}"]
        table.add_row(who, f"{save.bytes / 1e9:.3g}", *times)
    table.add_section()
    for (name, where), found in results.restores.items():
        seconds = statistics.median(found)
        ratio = seconds / statistics.median(results.restores["numpy.load", where])
        row = [f"restore, {name}, {where}", "", "", "", f"{seconds:.3f}", ""]
        table.add_row(*row, f"{total / seconds / 1e9:.3f}", f"{ratio:.2f}")
    return table


def _medians(saves: list[Save]) -> Save:
    names = [field.name for field in dataclasses.fields(Save)]
    return Save(*(statistics.median(getattr(save, name) for save in saves) for name in names))


if __name__ == "__main__":
    main()
