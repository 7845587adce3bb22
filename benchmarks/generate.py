"""Reading and writing text: tokens a second of ours and of transformers, beside the memory's bound.

    python benchmarks/generate.py                                   # the 1.6B, bfloat16, one GPU
    python benchmarks/generate.py --batch 1 --peer none
    python benchmarks/generate.py --model 150m --batch 1 8 --context 128 --new 64  # for a CPU
    python benchmarks/generate.py --checkpoint runs/demo/checkpoints/global_step1200 --context 256
    python benchmarks/generate.py --model 150m --turns 5 --context 128 --new 32   # a conversation

Random prompts of --context tokens are continued by --new tokens, the likeliest each time. The bound
is the time in which memory gives what a step reads at least: all weights but the embedding table,
and the keys and values of the tokens so far (of half the new ones, on average). It is told for the
data sheet's bandwidth, where chips.json has the device, and for that of a copy in this run: a large
array plus one, bytes read and written.

Ours and transformers have the same weights and type; the best of --repeats is printed. On a GPU
transformers has its static cache and what it compiles for that, on a CPU its dynamic cache.

With --turns a conversation is timed instead: each turn adds --context random tokens and is answered
with --new ones, once with the cache kept from turn to turn, once with the whole history read anew.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import importlib.util
import os
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table

from stablelm_jax.generation.generator import Generator
from stablelm_jax.model.config import STABLELM_2_1_6B, STABLELM_2_12B, ModelConfig
from stablelm_jax.model.parameters import count_parameters, parameter_table
from stablelm_jax.model.transformer import init_params
from stablelm_jax.planning.targets import chips

MODELS = {
    "1.6b": STABLELM_2_1_6B,
    "12b": STABLELM_2_12B,
    # the model of configs/recipe_150m.py
    "150m": dataclasses.replace(
        STABLELM_2_1_6B,
        num_layers=16,
        width=512,
        num_heads=8,
        num_kv_heads=8,
        feed_forward_width=1408,
    ),
}

# f(prompts, new tokens) -> the new tokens, and a time stamp after each look at them
Write = Callable[[np.ndarray, int], tuple[list[list[int]], list[float]]]


@dataclasses.dataclass(frozen=True)
class Speed:
    """One contestant with one batch: seconds, and the bytes that a step reads at least."""

    prompt_seconds: float
    step_seconds: float
    step_bytes: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=MODELS, default="1.6b", help="with random weights")
    parser.add_argument("--checkpoint", metavar="global_step<N>", help="instead of --model")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8, 64])
    parser.add_argument("--context", type=int, default=1024, help="tokens of a prompt")
    parser.add_argument("--new", type=int, default=128, help="tokens written after it")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], help="default: as generate's")
    parser.add_argument("--peer", choices=["transformers", "none"], default="transformers")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--turns", type=int, help="time so many turns of a conversation")
    arguments = parser.parse_args()
    on_cpu = jax.default_backend() == "cpu"
    arguments.dtype = arguments.dtype or ("float32" if on_cpu else "bfloat16")
    model, params = _model(arguments)
    if arguments.turns:
        return Console(width=150).print(_conversation(arguments, model, params))
    reference = None
    if arguments.peer != "none" and importlib.util.find_spec("transformers"):
        reference = _transformers(model, jax.device_get(params), arguments.dtype)
    bandwidths = dict(_bandwidths())
    console = Console(width=150)
    for batch in arguments.batch:
        console.print(_table(arguments, model, params, reference, batch, bandwidths))


def _model(arguments: argparse.Namespace) -> tuple[ModelConfig, Any]:
    if not arguments.checkpoint:
        model = MODELS[arguments.model]
        return model, jax.jit(init_params, static_argnums=0)(model, jax.random.key(0))
    from stablelm_jax.checkpoint.saved_model import SavedModel
    from stablelm_jax.parallel.mesh import make_mesh

    saved = SavedModel.open(arguments.checkpoint)
    return saved.model, saved.load(make_mesh(1, 1, jax.devices()[:1]))


def _table(arguments, model, params, reference, batch: int, bandwidths: dict) -> Table:
    prompts = np.random.default_rng(0).integers(
        0, min(100_257, model.vocab_size), (batch, arguments.context), np.int32
    )
    size = f"{count_parameters(model) / 1e6:,.0f} M parameters, {arguments.dtype}"
    lengths = f"{arguments.context} + {arguments.new} tokens"
    table = Table(title=f"{size}, batch {batch}, {lengths}, {jax.devices()[0].device_kind}")
    for column in ("who", "prompt tokens/s", "new tokens/s", "ms a step", "GB a step"):
        table.add_column(column, justify="right")
    for name, bandwidth in bandwidths.items():
        table.add_column(f"of the bound at {bandwidth / 1e9:,.0f} GB/s ({name})", justify="right")
    step_bytes = _step_bytes(arguments, model, batch)
    for who, write in _contestants(arguments, model, params, reference, batch):
        tokens, speed = _measure(write, prompts, arguments, step_bytes)
        table.add_row(who, *_cells(speed, batch, arguments.context, bandwidths))
        if who == "ours":
            ours = tokens
        elif who == "transformers":
            table.caption = f"{_equal(ours, tokens)} of the new tokens are the same until they part"
    return table


def _conversation(arguments, model: ModelConfig, params: Any) -> Table:
    length = arguments.context + arguments.new
    sizes = {"batch_size": 1, "max_length": arguments.turns * length, "chunk": arguments.new}
    generator = Generator(model, params, dtype=arguments.dtype, **sizes)
    size = f"{count_parameters(model) / 1e6:,.0f} M parameters, {arguments.dtype}"
    lengths = f"{arguments.context} + {arguments.new} tokens a turn"
    table = Table(title=f"{size}, {lengths}, {jax.devices()[0].device_kind}; seconds of a turn")
    for column in ("turn", "history", "first token", "whole turn", "anew: first", "anew: whole"):
        table.add_column(column, justify="right")
    for _ in range(2):  # the first time compiles
        generator.load(params)  # nothing is kept
        kept, anew = (list(_turns(generator, arguments, go_on=go_on)) for go_on in (True, False))
    for turn, times in enumerate(zip(kept, anew), 1):
        seconds = (f"{x:.3f}" for both in times for x in both)
        table.add_row(str(turn), f"{turn * length - arguments.new:,}", *seconds)
    return table


def _turns(generator: Generator, arguments, *, go_on: bool) -> Iterator[tuple[float, float]]:
    """Seconds to the first token and to the last one of each turn."""
    rng, history = np.random.default_rng(0), []
    for _ in range(arguments.turns):
        history += rng.integers(0, 1000, arguments.context).tolist()
        stamps = [time.perf_counter()]
        for tokens in generator.stream(history, go_on=go_on, max_new_tokens=arguments.new):
            history = history + tokens
            stamps.append(time.perf_counter())
        yield stamps[1] - stamps[0], stamps[-1] - stamps[0]


def _contestants(arguments, model, params, reference, batch) -> Iterator[tuple[str, Write]]:
    generator = Generator(
        model,
        params,
        dtype=arguments.dtype,
        batch_size=batch,
        max_length=arguments.context + arguments.new,
        chunk=arguments.new,
    )
    yield "ours", functools.partial(_ours, generator)
    if reference:
        yield "transformers", reference


def _ours(
    generator: Generator, prompts: np.ndarray, new: int
) -> tuple[list[list[int]], list[float]]:
    stamps = []
    stopped = lambda index, tokens: stamps.append(time.perf_counter())  # noqa: E731
    found = generator.generate(prompts.tolist(), max_new_tokens=new, stopped=stopped)
    return found, [*stamps, time.perf_counter()]


def _transformers(model: ModelConfig, params: Any, dtype: str) -> Write:
    from transformers_reference import make_writer

    return make_writer(model, params, dtype)


def _measure(write: Write, prompts, arguments, step_bytes) -> tuple[list[list[int]], Speed]:
    write(prompts, arguments.new)  # compiles
    prompt_seconds, step_seconds = [], []
    for _ in range(arguments.repeats):
        began = time.perf_counter()
        tokens, stamps = write(prompts, arguments.new)
        prompt_seconds.append(stamps[0] - began)
        step_seconds.append((stamps[-1] - stamps[0]) / (arguments.new - 1))
    return tokens, Speed(min(prompt_seconds), min(step_seconds), step_bytes)


def _step_bytes(arguments, model: ModelConfig, batch: int) -> float:
    read = sum(row.count for row in parameter_table(model) if row.name != "embed/embedding")
    tokens = batch * (arguments.context + arguments.new / 2)
    cached = 2 * model.num_layers * model.num_kv_heads * model.head_size  # numbers a token
    return (read + tokens * cached) * jnp.dtype(arguments.dtype).itemsize


def _cells(speed: Speed, batch: int, context: int, bandwidths: dict[str, float]) -> list[str]:
    shares = [
        speed.step_bytes / bandwidth / speed.step_seconds for bandwidth in bandwidths.values()
    ]
    return [
        f"{batch * context / speed.prompt_seconds:,.0f}",
        f"{batch / speed.step_seconds:,.1f}",
        f"{1e3 * speed.step_seconds:.3f}",
        f"{speed.step_bytes / 1e9:.3f}",
        *(f"{share:.1%}" for share in shares),
    ]


def _bandwidths() -> Iterator[tuple[str, float]]:
    """Bytes a second, by where the number comes from."""
    kind = jax.devices()[0].device_kind
    for facts in chips().values():
        if facts["name"] == kind:
            yield "data sheet", 1e9 * facts["bandwidth_gb_s"]
            break
    yield "copy", _copy_bandwidth()


def _copy_bandwidth() -> float:
    x = jnp.zeros((1 if jax.default_backend() == "cpu" else 8) << 26, jnp.float32)
    add = jax.jit(lambda x: x + 1, donate_argnums=0)
    x = jax.block_until_ready(add(x))
    times = []
    for _ in range(10):
        began = time.perf_counter()
        x = jax.block_until_ready(add(x))
        times.append(time.perf_counter() - began)
    return 2 * x.nbytes / min(times)


def _equal(ours: list[list[int]], theirs: list[list[int]]) -> str:
    """How much of the texts agrees from the start on."""
    until = [
        next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), len(a))
        for a, b in zip(ours, theirs)
    ]
    return f"{sum(until) / sum(map(len, ours)):.0%}"


if __name__ == "__main__":
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # transformers shares the GPU
    main()
