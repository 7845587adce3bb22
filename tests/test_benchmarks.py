"""Benchmarks start on a machine that has little more than jax."""

import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


def run(*command):
    return subprocess.run(
        [sys.executable, *command], capture_output=True, text=True, cwd=BENCHMARKS.parent
    )


@pytest.mark.parametrize(
    "name", ["attention", "checkpoint", "cross_entropy", "generate", "train_step", "tpu_bundles"]
)
def test_those_of_kernels_and_steps_need_neither_grain_nor_ml_collections(name):
    missing = "import sys; sys.modules['grain'] = sys.modules['ml_collections'] = None; "
    result = run("-c", f"{missing}sys.path.insert(0, 'benchmarks'); import {name}")
    assert result.returncode == 0, result.stderr


@pytest.mark.slow
def test_attention_runs_everything_that_a_cpu_can_interpret():
    result = run("benchmarks/attention.py", "--smoke")
    assert result.returncode == 0, result.stderr
    table = result.stdout[result.stdout.index("┏") :]
    for name in ("reference", "chunked (auto)", "pallas_gpu", "pallas_tpu", "splash"):
        assert table.count(name) == 2, table  # whole rows, and documents


@pytest.mark.slow
def test_checkpoint_times_each_who_saves_and_each_who_restores_bit_for_bit():
    result = run("benchmarks/checkpoint.py", "--smoke")
    assert result.returncode == 0, result.stderr
    table = result.stdout[result.stdout.index("┏") :]
    for name in ("ours, async", "ours, waited for", "Orbax alone, async", "numpy.save"):
        assert table.count(name) == 1, table
    for name in ("restore, ours", "restore, numpy.load"):
        assert table.count(name) >= 1, table  # from page cache, and where it can be from disk


def test_each_names_its_commands():
    for path in sorted(BENCHMARKS.glob("*.py")):
        text = path.read_text(encoding="utf-8")
        if "__main__" in text:
            assert f"python benchmarks/{path.name}" in text, path.name
