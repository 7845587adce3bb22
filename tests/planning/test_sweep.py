"""What `plan --sweep` prints and how it ends; with stand-ins for the compiler, and for real."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from stablelm_jax import config as config_lib
from stablelm_jax import configs_folder
from stablelm_jax.planning.compile import CompiledStep, DoesNotFit
from stablelm_jax.planning.search import candidates
from stablelm_jax.planning.sweep import INTERRUPTED, overrides, sweep
from stablelm_jax.planning.targets import parse_target

ROOT = Path(__file__).parents[2]
CONFIG = "--config=configs/stablelm_2_1_6b.py"
H200 = parse_target("h200:1x1")


@pytest.fixture
def config():
    return config_lib.load(configs_folder() / "stablelm_2_1_6b.py")


def compiled(config, target):
    accumulation = config.training.accumulation
    return CompiledStep(
        target=target,
        mesh={"replica": 1, "data": 1, "model": 1},
        attention="chunked",
        rows=2048 // accumulation,
        seconds=7.0,
        argument_bytes=0,
        temporary_bytes=0,
        peak_bytes=50 * 2**30,
        collectives=[],
    )


def too_large(config, target):
    raise DoesNotFit("h200:1x1: a device needs 999 GiB and has 132.5 GiB; use more microbatches")


def test_each_result_is_printed_then_the_ranking_then_flags_to_paste(config, capsys):
    def compile_one(config, target):
        return (too_large if config.training.remat == "none" else compiled)(config, target)

    assert sweep(config, H200, compile_one) == 0
    said = capsys.readouterr().out
    assert re.search(r"^  1 .* remat none .* needs 999 GiB and has 132.5 GiB$", said, re.MULTILINE)
    assert re.search(r"remat dots .* 50.0 of 132.5 GiB .* s estimated", said)
    assert "ESTIMATE" in said and "max(matrix FLOPs / peak" in said
    last = said.splitlines()[-1]
    assert last == (
        "--config.training.accumulation=128 --config.training.remat=dots "
        "--config.parallel.model=1 --config.parallel.fsdp=False"
    )


def test_the_flags_make_the_config_that_was_compiled(config):
    config.parallel.data = 8
    best = candidates(config, parse_target("h200:1x8"))[0]
    flags = overrides(config, best).split()
    assert "--config.parallel.data=-1" in flags  # what the config says would not fit the mesh
    for flag in flags:
        name, value = re.fullmatch(r"--config\.([\w.]+)=(.*)", flag).groups()
        assert str(best.settings[name]) == value


def test_the_ranking_is_by_the_time_of_the_compiled_program(config, capsys):
    sweep(config, H200, compiled)
    table = capsys.readouterr().out.split("ESTIMATE")[1]
    seconds = [float(row.split("│")[-3]) for row in table.splitlines() if "ZeRO-1" in row]
    assert len(seconds) > 1 and seconds == sorted(seconds)


def test_nothing_fits_is_an_error_that_says_what_the_smallest_needs(config):
    with pytest.raises(DoesNotFit, match=r"nothing fits: of 48 ways .* use more devices"):
        sweep(config, H200, too_large)


def test_ctrl_c_prints_the_ranking_so_far(config, capsys):
    calls = []

    def compile_one(config, target):
        calls.append(config)
        if len(calls) > 1:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(30)  # a compiler that does not listen
        return compiled(config, target)

    started = time.monotonic()
    assert sweep(config, H200, compile_one) == INTERRUPTED
    assert time.monotonic() - started < 20
    said = capsys.readouterr()
    assert "--config.training.remat=none" in said.out.splitlines()[-1]
    assert "interrupted: 1 compiled" in said.err


def plan(*arguments):
    return subprocess.Popen(
        [sys.executable, "-u", "-m", "stablelm_jax.plan", *arguments],
        cwd=ROOT,
        env={**os.environ, "XLA_FLAGS": ""},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.parametrize(
    "arguments, said",
    [
        ((CONFIG, "--sweep"), "--sweep: needs the machine to compile for; write --target"),
        (("--all", "--sweep"), "--sweep: is of one config"),
        ((CONFIG, "--sweep", "--target=h200:1x1", "--mfu=0.4"), "--mfu: has no effect with"),
        ((CONFIG, "--sweep", "--target=h200:1x7"), "config.data.batch_size=2048: does not divide"),
    ],
)
def test_combinations_that_make_no_sense_are_one_line_and_exit_2(arguments, said):
    done = plan(*arguments)
    assert said in done.communicate(timeout=120)[1].splitlines()[-1]
    assert done.returncode == 2


TINY = (
    "--config.model.num_layers=1",
    "--config.model.width=64",
    "--config.model.num_heads=2",
    "--config.model.num_kv_heads=2",
    "--config.model.feed_forward_width=64",
    "--config.data.sequence_length=32",
    "--config.data.batch_size=1",
    "--config.training.accumulation=1",
)


@pytest.mark.aot
def test_a_small_model_is_swept_by_the_targets_own_compiler():
    done = plan(CONFIG, *TINY, "--sweep", "--target=a100-40gb:1x1")
    said, errors = done.communicate(timeout=280)
    assert done.returncode == 0, errors
    assert "ways to divide a step on a100-40gb:1x1; 0 need more" in said
    assert said.splitlines()[-1].startswith("--config.training.accumulation=")


@pytest.mark.aot
def test_ctrl_c_ends_the_verb_while_the_compiler_works():
    done = plan(CONFIG, "--sweep", "--target=a100-40gb:1x2")
    try:
        assert "ways to divide" in done.stdout.readline()
        time.sleep(5)
        done.send_signal(signal.SIGINT)
        _, errors = done.communicate(timeout=60)
    finally:
        done.kill()
    assert done.returncode == INTERRUPTED
    assert errors.splitlines()[-1].startswith("interrupted: 0 compiled")
