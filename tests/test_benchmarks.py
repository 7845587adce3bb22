"""Benchmarks start, on a machine that has little more than jax too, and run where they can."""

import argparse
import ast
import re
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import pytest
from rich.console import Console

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


def run(*command):
    return subprocess.run(
        [sys.executable, *command], capture_output=True, text=True, cwd=BENCHMARKS.parent
    )


@pytest.mark.by_hand
def test_attention_runs_everything_that_a_cpu_can_interpret():
    result = run("benchmarks/attention.py", "--smoke")
    assert result.returncode == 0, result.stderr
    table = result.stdout[result.stdout.index("┏") :]
    for name in ("reference", "chunked (auto)", "pallas_gpu", "pallas_tpu", "splash"):
        assert table.count(name) == 2, table  # whole rows, and documents


@pytest.mark.by_hand
def test_of_each_attention_kernel_the_fastest_tile_is_chosen(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    import attention
    import attention_tune

    # As if the kernels took longer the more is loaded ahead; each is run, interpreted.
    def seconds_of(program, inputs):
        program(*inputs)
        return program.__wrapped__.keywords["tile"].stages

    monkeypatch.setattr(attention_tune, "SHAPES", [(32, 64, 4)])
    shape = dict(rows=1, length=256, heads=2, kv_heads=1, head_size=16, dtype="bfloat16")
    inputs = attention.make_inputs(argparse.Namespace(**shape), 64)
    best = attention_tune.tune(Console(quiet=True), inputs, seconds_of, interpret=True)
    assert best.forward == best.queries == attention_tune.Tile(32, 64, 4, 2)
    assert best.keys == attention_tune.Tile(64, 32, 4, 2)


@pytest.mark.by_hand
def test_checkpoint_times_each_who_saves_and_each_who_restores_bit_for_bit():
    result = run("benchmarks/checkpoint.py", "--smoke")
    assert result.returncode == 0, result.stderr
    table = result.stdout[result.stdout.index("┏") :]
    for name in ("ours, beside steps", "Orbax alone, beside steps", "numpy.save"):
        assert table.count(name) == 1, table
    for name in ("restore, ours", "restore, numpy.load"):
        assert table.count(name) >= 1, table  # from page cache, and where it can be from disk


def test_documents_are_packed_as_cudnn_wants_them(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)  # it imports its neighbour `inputs`
    from benchmarks.attention import packed_documents

    segments = jnp.int32([[4, 4, 4, 9, 9, 4], [1, 2, 3, 4, 5, 5], [7, 7, 7, 7, 7, 7]])
    lengths, offsets = packed_documents(segments, 5)
    assert lengths.tolist() == [[3, 2, 1, -1, -1], [1, 1, 1, 1, 2], [6, -1, -1, -1, -1]]
    assert offsets.tolist() == [[0, 3, 5, -1, -1, -1], [0, 1, 2, 3, 4, -1], [0, *5 * [-1]]]


def commands(path):
    """The flags of each command line that the file's first text shows."""
    text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    lines = re.sub(r"\\\n", " ", text).splitlines()
    shown = [line.split("#")[0] for line in lines if f" python benchmarks/{path.name}" in line]
    return [set(re.findall(r"--[\w-]+", line)) for line in shown]


# Those of kernels and steps start on a machine for which nobody has installed the rest.
BARE = ("attention", "checkpoint", "cross_entropy", "generate", "train_step", "tpu_bundles")

# Each in a fork of a process that has imported most of what they need; a line of = after each.
HELP = """
import os, runpy, sys
import flax, jax, numpy, optax, rich.table

bare = sys.argv[1].split()
for name in sys.argv[2:]:
    sys.stdout.flush()
    if os.fork() == 0:
        if name.removesuffix(".py") in bare:
            sys.modules["grain"] = sys.modules["ml_collections"] = None
        sys.argv = [name, "--help"]
        sys.path.insert(0, "benchmarks")
        try:
            runpy.run_path(f"benchmarks/{name}", run_name="__main__")
        except ModuleNotFoundError as error:
            assert error.name not in ("grain", "ml_collections") and "stablelm" not in error.name
            print("not installed:", error.name)
            sys.exit(0)
    assert os.wait()[1] == 0, name
    print("=" * 80)
"""


def test_every_benchmark_starts_shows_its_commands_and_has_the_flags_that_these_give():
    paths = [path for path in sorted(BENCHMARKS.glob("*.py")) if "__main__" in path.read_text()]
    result = run("-c", HELP, " ".join(BARE), *(path.name for path in paths))
    assert result.returncode == 0, result.stderr
    for path, told in zip(paths, result.stdout.split("=" * 80)):
        assert commands(path), f"{path.name} shows no command"
        for flag in set() if "not installed:" in told else set.union(*commands(path)):
            assert re.search(rf"{flag}\b", told), f"{path.name} has no {flag}"


def test_each_field_that_on_gpu_changes_is_one_that_train_step_counts(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    from benchmarks.train_step import COUNTED

    changes = re.findall(r"--also (\S+)", (BENCHMARKS / "on_gpu.sh").read_text(encoding="utf-8"))
    fields = [change.split("=")[0] for text in changes for change in text.split(",")]
    assert len(fields) > 5 and set(fields) <= set(COUNTED)
