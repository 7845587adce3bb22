"""Time of a whole training step, ours beside a peer's, same model, same batch, same machine.

    python benchmarks/train_step.py --peer transformers

The model has 115.6 M parameters (4 layers, width 512, 8 heads of 64, feed-forward 1408, 100,352
untied rows), float32, AdamW with clipping. Both start from the same weights: before timing, the
losses of the first batch are compared, so that the same work is timed. The two take turns, one
step each, so that a machine whose speed drifts slows both; the median and the ratio of each pair
are printed. `--profile FOLDER` writes a trace of ours.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table

from stablelm_jax.model.config import ModelConfig
from stablelm_jax.model.parameters import count_parameters
from stablelm_jax.optimizer.adamw import make_optimizer
from stablelm_jax.parallel import sharding
from stablelm_jax.parallel.mesh import make_mesh
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

Step = Callable[[dict[str, np.ndarray]], float]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--peer", choices=["transformers", "none"], default="transformers")
    parser.add_argument("--steps", type=int, default=10, help="timed steps of each shape")
    parser.add_argument("--profile", metavar="FOLDER", help="write a jax.profiler trace of ours")
    arguments = parser.parse_args()
    console = Console()
    params = jax.device_get(_new_state()[0].params)
    makers = {"ours": _ours}
    if arguments.peer == "transformers":
        makers["transformers"] = lambda: _transformers(params)
    table = Table(title=f"{count_parameters(MODEL) / 1e6:.1f} M parameters, float32, one step")
    for column in ("rows x tokens", "who", "seconds (median)", "min", "tokens/s", "ours / theirs"):
        table.add_column(column, justify="right")
    for rows, length in SHAPES:
        times = _race(makers, rows, length, arguments.steps, arguments.profile)
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
    console.print(table)


def _race(makers, rows: int, length: int, steps: int, profile: str | None) -> dict:
    """{who: seconds of each timed step}; the competitors take turns."""
    competitors = {who: make() for who, make in makers.items()}
    batch = _batch(rows, length, seed=0)
    first = {who: step(batch) for who, step in competitors.items()}
    if max(first.values()) - min(first.values()) > 1e-3:
        raise SystemExit(f"the first losses differ, so not the same work would be timed: {first}")
    _timed(competitors, [batch] * 2)
    trace = jax.profiler.trace(profile) if profile else contextlib.nullcontext()
    with trace:
        return _timed(competitors, [_batch(rows, length, seed) for seed in range(1, steps + 1)])


def _timed(competitors: dict[str, Step], batches) -> dict[str, list[float]]:
    times = {who: [] for who in competitors}
    for batch in batches:
        for who, step in competitors.items():
            began = time.perf_counter()
            step(batch)
            times[who].append(time.perf_counter() - began)
    return times


def _batch(rows: int, length: int, seed: int) -> dict[str, np.ndarray]:
    """Random tokens, one document a row: contract 1's arrays."""
    row = np.random.default_rng(seed).integers(0, 100_289, (rows, length + 1), np.int32)
    return {
        "tokens": row[:, :-1].copy(),
        "targets": row[:, 1:].copy(),
        "segment_ids": np.ones((rows, length), np.int32),
        "positions": np.tile(np.arange(length, dtype=np.int32), (rows, 1)),
        "loss_mask": np.ones((rows, length), np.float32),
        "source_ids": np.zeros(rows, np.int32),
    }


def _new_state():
    mesh = make_mesh(1, 1, jax.devices()[:1])
    optimizer = make_optimizer(ADAMW, lambda _: jnp.float32(LEARNING_RATE), MODEL)
    abstract = abstract_state(MODEL, optimizer, mesh, zero1=True)
    return init_state(MODEL, optimizer, abstract, seed=0), mesh, optimizer, abstract


def _ours() -> Step:
    state, mesh, optimizer, abstract = _new_state()
    step_function = make_train_step(
        MODEL,
        optimizer,
        lambda _: jnp.float32(LEARNING_RATE),
        mesh,
        abstract,
        num_sources=1,
        zero1=True,
        accumulation=1,
        dtype=jnp.float32,
        remat="none",
        attention="auto",
    )

    def step(batch):
        nonlocal state
        state, metrics = step_function(state, sharding.put_batch(batch, mesh))
        return float(metrics["nll"][0] / metrics["tokens"][0])

    return step


def _transformers(params) -> Step:
    import torch
    import transformers

    config = transformers.StableLmConfig(
        vocab_size=MODEL.vocab_size,
        hidden_size=MODEL.width,
        num_hidden_layers=MODEL.num_layers,
        intermediate_size=MODEL.feed_forward_width,
        num_attention_heads=MODEL.num_heads,
        num_key_value_heads=MODEL.num_kv_heads,
        layer_norm_eps=MODEL.norm_epsilon,
        use_qkv_bias=False,
        tie_word_embeddings=False,
        use_cache=False,
        attn_implementation="sdpa",
    )
    model = transformers.StableLmForCausalLM(config)
    model.load_state_dict({name: torch.tensor(value) for name, value in _renamed(params)})
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1
    )

    def step(batch):
        tokens, targets = (torch.tensor(batch[k], dtype=torch.long) for k in ("tokens", "targets"))
        logits = model(tokens).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()

    return step


def _renamed(params):
    """(name in transformers, array [out, in]) for every parameter of ours."""
    yield "model.embed_tokens.weight", params["embed"]["embedding"]
    yield "lm_head.weight", np.ascontiguousarray(params["head"]["kernel"].T)
    for leaf, theirs in (("scale", "weight"), ("bias", "bias")):
        yield f"model.norm.{theirs}", params["final_norm"][leaf]
    layers = params["layers"]
    for i in range(MODEL.num_layers):
        there = f"model.layers.{i}"
        for ours, name in (
            ("attention_norm", "input_layernorm"),
            ("mlp_norm", "post_attention_layernorm"),
        ):
            for leaf, theirs in (("scale", "weight"), ("bias", "bias")):
                yield f"{there}.{name}.{theirs}", layers[ours][leaf][i]
        for ours, name in (("query", "q"), ("key", "k"), ("value", "v")):
            kernel_DNH = layers["attention"][ours]["kernel"][i]
            yield f"{there}.self_attn.{name}_proj.weight", _transposed(kernel_DNH, MODEL.width)
        out_ND = layers["attention"]["out"]["kernel"][i].reshape(-1, MODEL.width)
        yield f"{there}.self_attn.o_proj.weight", _transposed(out_ND, len(out_ND))
        for name in ("gate", "up", "down"):
            kernel = layers["mlp"][name]["kernel"][i]
            yield f"{there}.mlp.{name}_proj.weight", _transposed(kernel, len(kernel))


def _transposed(kernel: np.ndarray, inputs: int) -> np.ndarray:
    return np.ascontiguousarray(kernel.reshape(inputs, -1).T)


if __name__ == "__main__":
    main()
