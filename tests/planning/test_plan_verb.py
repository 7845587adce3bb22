"""The verb as a user meets it; compiling is tested beside it."""

import os
import subprocess
import sys
from pathlib import Path

import fsspec
import pytest
from tiny import SOURCES, tiny_config, write_data

from stablelm_jax.data.manifest import read_manifest
from stablelm_jax.planning import report

ROOT = Path(__file__).parents[2]
CONFIG = "--config=configs/stablelm_2_1_6b.py"


def plan(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "stablelm_jax.plan", *arguments],
        cwd=ROOT,
        env={**os.environ, "XLA_FLAGS": ""},
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.fixture(scope="module")
def without_target():
    done = plan(CONFIG)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize(
    "said",
    [
        "1,644,417,024",
        "11.048",  # GFLOP a token, full attention (shapes of the model)
        "9.840",  # causal
        "3,523,215,360,000 tokens in 420,000 steps",
        "refinedweb",
        "19.7",  # GB of a checkpoint: three float32 of each parameter
        "no --target: memory, communication, time and cost were left out",
    ],
)
def test_what_needs_no_compiler_is_printed_without_a_target(without_target, said):
    assert said in without_target


def test_a_model_split_over_two_devices_needs_no_target_either():
    done = plan("--config=configs/stablelm_2_12b.py")
    assert done.returncode == 0, done.stderr
    assert "12,142,976,000" in done.stdout and "data 1 x model 2" in done.stdout


def test_tokens_of_data_behind_a_url_are_counted_and_what_is_missing_is_left_out(tmp_path):
    root = write_data(tmp_path / "sources")
    fsspec.filesystem("memory").put(f"{root}/", "/plan_data/", recursive=True)
    config = tiny_config(root, **{"data.root": "memory://plan_data"})
    config.data.weights["absent"] = 1.0
    held = {name: read_manifest(root / name).train.tokens for name in SOURCES}
    assert report._prepared_tokens(config) == held


@pytest.mark.parametrize(
    "arguments, said",
    [
        ((CONFIG, "--target=v9:2x2"), "no chip 'v9'; known are"),
        ((CONFIG, "--target=v5p:4x4"), "v5p needs 3 sizes"),
        ((CONFIG, "--target=a100-40gb:3x8"), "config.data.batch_size=2048"),
        ((), "--config: is missing"),
    ],
)
def test_bad_arguments_are_one_line_and_exit_2(arguments, said):
    done = plan(*arguments)
    assert done.returncode == 2
    assert said in done.stderr.splitlines()[-1]


def test_without_the_compiler_it_names_the_extra_after_all_the_rest():
    hidden = "import sys; sys.modules['libtpu'] = None; sys.argv[0] = 'plan'; "
    code = hidden + "from stablelm_jax.plan import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", code, CONFIG, "--target=v5p:4x4x4"],
        cwd=ROOT,
        env={**os.environ, "XLA_FLAGS": ""},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 1
    assert "pip install -e '.[aot]'" in done.stderr.splitlines()[-1]
    assert "device-hours" in done.stdout
