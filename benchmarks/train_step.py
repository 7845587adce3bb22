"""Time of a whole training step, ours beside a peer's, same model, same batch, same machine.

    python benchmarks/train_step.py --peer transformers
    python benchmarks/train_step.py --config configs/stablelm_2_1_6b_h200.py
    python benchmarks/train_step.py --config F --rows 4 --peer none \
        --also training.remat=none --also training.remat=dots,training.unroll=24
    python benchmarks/train_step.py --config F --peer none --also training.deterministic=True

Without --config, for a CPU: 115.6 M parameters (4 layers, width 512, 8 heads of 64, feed-forward
1408, 100,352 untied rows), float32. Contestants take turns, one step each, so that a machine whose
speed drifts slows all; the median and the ratio of each pair are printed. Ours keeps the memory
that it frees, as `train` does; the peer has a process of its own, without any setting of ours.

With --config, for one accelerator: that config's model and choices, one microbatch and one update a
step. Contestants run one after the other, each in a process of its own with the whole memory; each
--also adds ours with fields of the config changed. Peak memory stands beside what the compiler
predicted.

All start from the same weights: the losses of one batch after two updates with it are compared, so
that the same work is timed. AdamW with clipping everywhere. `--profile FOLDER` writes a trace of
ours and prints what took the time in it.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from inputs import fields, positions_of, random_segments
from rich.console import Console
from rich.table import Table

from stablelm_jax.model.compute import Compute
from stablelm_jax.model.config import ModelConfig
from stablelm_jax.model.flops import train_flops_per_token
from stablelm_jax.model.parameters import count_parameters, parameter_table
from stablelm_jax.optimizer.kinds import adamw
from stablelm_jax.optimizer.parts import decay_mask
from stablelm_jax.parallel import sharding
from stablelm_jax.parallel.chips import peak_flops
from stablelm_jax.parallel.mesh import make_mesh
from stablelm_jax.run.compilation import make_deterministic
from stablelm_jax.run.cpu import prepare_cpu
from stablelm_jax.run.profile import Profiler
from stablelm_jax.training.objectives import TokenObjective
from stablelm_jax.training.state import abstract_state, init_state
from stablelm_jax.training.step import make_train_step

MODEL = ModelConfig(
    vocab_size=100_352,
    num_layers=4,
    width=512,
    num_heads=8,
    num_kv_heads=8,
    feed_forward_width=1408,
    qkv_bias=False,
    block_norm_bias=True,
)
ADAMW = dict(b1=0.9, b2=0.95, epsilon=1e-8, weight_decay=0.1, clip_norm=1.0)
LEARNING_RATE = 1e-4
SHAPES = ((2, 256), (8, 512))

# Fields of the config that this benchmark follows, of the model's beside these.
COUNTED = (
    "training.dtype",
    "training.remat",
    "training.unroll",
    "training.attention",
    "training.cross_entropy",
    "training.norms",
    "training.num_valid_ids",
    "training.deterministic",
)

Step = Callable[[Mapping[str, np.ndarray]], float]
_peer_step_here: Step | None = None


@dataclasses.dataclass(frozen=True)
class Case:
    """What is trained, and how it is computed.

    `mean_document`: tokens of a document, ours alone; None: each row is one.
    `deterministic`: only in a process of its own, where XLA has not read its flags yet.
    """

    model: ModelConfig
    rows: int
    length: int
    compute: Compute = Compute()
    mean_document: float | None = None
    deterministic: bool = False

    @property
    def dtype_name(self) -> str:
        return jnp.dtype(self.compute.dtype).name

    def batch(self, seed: int) -> dict[str, np.ndarray]:
        """Random tokens: contract 1's arrays."""
        shape = (self.rows, self.length + 1)
        row = np.random.default_rng(seed).integers(
            0, min(100_289, self.model.vocab_size), shape, np.int32
        )
        segments = random_segments(self.rows, self.length, self.mean_document, seed)
        return {
            "tokens": row[:, :-1].copy(),
            "targets": row[:, 1:].copy(),
            "segment_ids": segments,
            "positions": positions_of(segments),
            "loss_mask": np.ones((self.rows, self.length), np.float32),
            "source_ids": np.zeros(self.rows, np.int32),
        }


@dataclasses.dataclass(frozen=True)
class Result:
    """What one contestant took; bytes are None where nobody counts them.

    loss: that of the first batch, after two updates with it.
    """

    loss: float
    seconds: list[float]
    ready_seconds: float
    peak_bytes: int | None = None
    predicted_bytes: int | None = None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", metavar="FILE", help="a config of one accelerator")
    parser.add_argument("--rows", type=int, help="of a microbatch, with --config; as the config's")
    parser.add_argument("--also", action="append", default=[], metavar="KEY=VALUE,...")
    parser.add_argument("--mean-document", type=float, metavar="TOKENS", help="of ours; no peer")
    parser.add_argument("--peer", choices=["transformers", "none"], default="transformers")
    parser.add_argument("--steps", type=int, default=10, help="timed steps of each shape")
    parser.add_argument("--profile", metavar="FOLDER", help="write a jax.profiler trace of ours")
    arguments = parser.parse_args()
    if not arguments.config:
        prepare_cpu()
    if arguments.mean_document and arguments.peer != "none":
        parser.error("--mean-document: the peer knows no documents; use --peer none")
    if not arguments.config and (arguments.also or arguments.rows):
        parser.error("--also and --rows belong to --config")
    table, failed = _one_by_one(arguments) if arguments.config else (_in_turns(arguments), None)
    Console(width=150).print(table)
    if failed:
        raise SystemExit(failed)


def _in_turns(arguments: argparse.Namespace) -> Table:
    table = Table(title=f"{count_parameters(MODEL) / 1e6:.1f} M parameters, float32, one step")
    for column in ("rows x tokens", "who", "seconds (median)", "min", "tokens/s", "ours / theirs"):
        table.add_column(column, justify="right")
    for rows, length in SHAPES:
        case = Case(MODEL, rows, length, mean_document=arguments.mean_document)
        times = _race(case, arguments)
        for who, seconds in times.items():
            pairs = [a / b for a, b in zip(times["ours"], seconds)]
            median = statistics.median(seconds)
            table.add_row(
                f"{rows} x {length}",
                who,
                f"{median:.3f}",
                f"{min(seconds):.3f}",
                f"{rows * length / median:,.0f}",
                "" if who == "ours" else f"{statistics.median(pairs):.2f}",
            )
    return table


def _race(case: Case, arguments: argparse.Namespace) -> dict[str, list[float]]:
    """{who: seconds of each timed step}; the competitors take turns."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, context, _set_peer, (case,)) as pool:
        competitors = {"ours": _ours(case)[0]}
        if arguments.peer == "transformers":
            competitors["transformers"] = lambda batch: pool.submit(_peer_step, batch).result()
        warm_losses = {who: _warm(step, case) for who, step in competitors.items()}
        if why := _differ(warm_losses, case.dtype_name):
            raise SystemExit(why)
        with _traced(arguments.profile, arguments.steps):
            batches = [case.batch(seed) for seed in range(1, arguments.steps + 1)]
            return _timed(competitors, batches)


def _set_peer(case: Case) -> None:
    global _peer_step_here
    _peer_step_here = _transformers(case)


def _peer_step(batch: Mapping[str, np.ndarray]) -> float:
    """A step of the peer, in its process."""
    return _peer_step_here(batch)


def _one_by_one(arguments: argparse.Namespace) -> tuple[Table, str | None]:
    """The table, and what makes it worthless, if anything does."""
    case = _case(arguments, {})
    contestants = {"ours": case}
    if arguments.peer != "none":
        contestants[arguments.peer] = case
    for text in arguments.also:
        contestants[f"ours, {text}"] = _case(arguments, fields(text))
    results, console = {}, Console(stderr=True, width=150)
    for who, contestant in contestants.items():
        profile = arguments.profile if who == "ours" else None
        context = multiprocessing.get_context("spawn")
        try:
            with ProcessPoolExecutor(1, mp_context=context) as pool:
                results[who] = pool.submit(
                    _measure, contestant, who == arguments.peer, arguments.steps, profile
                ).result()
            console.print(_table(case, {who: results[who]}))  # should a time limit end the call
        except Exception as error:  # one that does not fit leaves the others their turn
            results[who] = str(error)
            console.print(f"{who}: {error}", markup=False)
    found = {who: r.loss for who, r in results.items() if isinstance(r, Result)}
    failed = _differ(found, case.dtype_name)
    if not isinstance(results["ours"], Result):
        failed = f"ours did not run: {results['ours']}"
    return _table(case, results), failed


def _measure(case: Case, is_peer: bool, steps: int, profile: str | None) -> Result:
    """In a process of its own."""
    began = time.perf_counter()
    if case.deterministic:
        make_deterministic()
    if is_peer:
        jax.config.update("jax_platforms", "cpu")  # of ours only the fresh weights are needed
        step, predicted = _transformers(case), None
    else:
        step, predicted = _ours(case)
    step(case.batch(seed=0))
    ready = time.perf_counter() - began
    loss = _warm(step, case, times=2)
    with _traced(profile, steps):
        seconds = _timed({"": step}, [case.batch(seed) for seed in range(1, steps + 1)])[""]
    if is_peer:
        from transformers_reference import peak_bytes

        return Result(loss, seconds, ready, peak_bytes())
    statistics_of_memory = jax.devices()[0].memory_stats() or {}
    return Result(loss, seconds, ready, statistics_of_memory.get("peak_bytes_in_use"), predicted)


def _table(case: Case, results: Mapping[str, Result | str]) -> Table:
    device = jax.devices()[0]
    documents = f", documents of {case.mean_document:g} tokens" if case.mean_document else ""
    table = Table(
        title=f"{count_parameters(case.model) / 1e6:,.0f} M parameters, {case.dtype_name}, "
        f"{case.rows} x {case.length} tokens a step{documents}, {device.device_kind}"
    )
    for column in ("who", "seconds (median)", "min", "tokens/s", "MFU, full attention"):
        table.add_column(column, justify="right")
    for column in ("MFU, causal", "peak GiB", "predicted", "ready after"):
        table.add_column(column, justify="right")
    peak, tokens = peak_flops(device.device_kind), case.rows * case.length
    gib = lambda n: "" if n is None else f"{n / 2**30:.2f}"  # noqa: E731
    for who, result in results.items():
        if isinstance(result, str):  # why is on the line above the table
            table.add_row(who, "did not run")
            continue
        median = statistics.median(result.seconds)
        mfu = [
            f"{train_flops_per_token(case.model, case.length, causal) * tokens / median / peak:.1%}"
            if peak
            else ""
            for causal in (False, True)
        ]
        row = [who, f"{median:.4f}", f"{min(result.seconds):.4f}", f"{tokens / median:,.0f}", *mfu]
        row += [
            gib(result.peak_bytes),
            gib(result.predicted_bytes),
            f"{result.ready_seconds:.0f} s",
        ]
        table.add_row(*row)
    return table


def _case(arguments: argparse.Namespace, changes: Mapping[str, Any]) -> Case:
    from stablelm_jax import config as config_lib  # these need ml_collections
    from stablelm_jax.planning.estimate import layout_of
    from stablelm_jax.planning.targets import parse_target
    from stablelm_jax.training.setup import compute_of

    config = config_lib.load(Path(arguments.config))
    for key, value in changes.items():
        if key not in COUNTED:
            raise SystemExit(f"--also {key}: changes nothing here; known are {', '.join(COUNTED)}")
        config_lib.set_value(config, key, value)
    config_lib.validate(config)
    training, target = config.training, config.parallel.target
    num_devices = parse_target(target).num_devices if target else 1
    return Case(
        model=config_lib.model_config(config),
        rows=arguments.rows or layout_of(config, num_devices).rows,
        length=config.data.sequence_length,
        compute=compute_of(config),
        mean_document=arguments.mean_document,
        deterministic=training.deterministic,
    )


def _differ(losses: Mapping[str, float], dtype: str) -> str | None:
    """Why not everybody has done the same work; None if they have."""
    allowed = 1e-3 if dtype == "float32" else 5e-2
    values = list(losses.values())
    if not values or max(values) - min(values) <= allowed:
        return None
    return f"the losses after two updates differ, so not the same work was timed: {losses}"


def _warm(step: Step, case: Case, times: int = 3) -> float:
    """The loss of the first batch's last of so many steps."""
    return [step(case.batch(seed=0)) for _ in range(times)][-1]


def _timed(competitors: Mapping[str, Step], batches) -> dict[str, list[float]]:
    times = {who: [] for who in competitors}
    for batch in batches:
        for who, step in competitors.items():
            began = time.perf_counter()
            step(batch)
            times[who].append(time.perf_counter() - began)
    return times


@contextlib.contextmanager
def _traced(folder: str | None, steps: int):
    """jax's trace in the folder, and what took the time."""
    if not folder:
        yield
        return
    profiler = Profiler(range(steps), Path(folder), Console(stderr=True, width=150))
    profiler.before(0)
    yield
    profiler.close()


def _ours(case: Case) -> tuple[Step, int | None]:
    """The step, and the peak of its memory as the compiler predicts it."""
    mesh = make_mesh(1, 1, jax.devices()[:1])
    schedule = lambda _: jnp.float32(LEARNING_RATE)  # noqa: E731
    optimizer = adamw(schedule, decay_mask(parameter_table(case.model)), **ADAMW)
    abstract = abstract_state(case.model, optimizer, mesh, zero1=True)
    state = init_state(case.model, optimizer, abstract, seed=0)
    step_function = make_train_step(
        case.model,
        optimizer,
        schedule,
        mesh,
        abstract,
        objective=TokenObjective(num_sources=1),
        zero1=True,
        accumulation=1,
        compute=case.compute,
    )
    first = sharding.put_batch(case.batch(seed=0), mesh)
    compiled = step_function.lower(state, first).compile()
    memory = compiled.memory_analysis()

    def step(batch):
        nonlocal state
        state, metrics = compiled(state, sharding.put_batch(batch, mesh))
        return float(metrics["nll"][0] / metrics["tokens"][0])

    return step, memory.peak_memory_in_bytes if memory else None


def _transformers(case: Case) -> Step:
    from transformers_reference import make_step

    with jax.default_device(jax.devices("cpu")[0]):
        optimizer = adamw(
            lambda _: jnp.float32(0), decay_mask(parameter_table(case.model)), **ADAMW
        )
        mesh = make_mesh(1, 1, jax.devices("cpu")[:1])
        abstract = abstract_state(case.model, optimizer, mesh, zero1=True)
        params = jax.device_get(init_state(case.model, optimizer, abstract, seed=0).params)
    return make_step(case.model, params, ADAMW, LEARNING_RATE)


if __name__ == "__main__":
    # Processes of --config take their memory as they need it: the first one's parent holds none.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    main()
