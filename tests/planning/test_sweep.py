"""`plan --sweep`: which ways to divide a step are tried, what it prints, how it ends.

The compiler is a stand-in, but for the last tests.
"""

import os
import re
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import jax
import pytest

from stablelm_jax import config as config_lib
from stablelm_jax import configs_folder
from stablelm_jax.planning.compile import CompiledStep, DoesNotFit
from stablelm_jax.planning.estimate import divided
from stablelm_jax.planning.sweep import candidates, overrides, search, sweep
from stablelm_jax.planning.targets import parse_target

ROOT = Path(__file__).parents[2]
CONFIG = "--config=configs/stablelm_2_1_6b.py"
H200 = parse_target("h200:1x1")


@pytest.fixture
def config():
    return config_lib.load(configs_folder() / "stablelm_2_1_6b.py")


def key(candidate):
    layout = candidate.layout
    return layout.model, layout.fsdp, layout.remat, layout.rows


class Compiler:
    """Stands in for the target's: a step fits unless `refuses` says otherwise."""

    def __init__(self, refuses=lambda config: False):
        self.refuses = refuses
        self.configs = []

    def __call__(self, config, target):
        self.configs.append(config)
        if self.refuses(config):
            raise DoesNotFit("too much")
        return types.SimpleNamespace(collectives=[])


def run(config, target_name, compiler):
    target = parse_target(target_name)
    return list(search(config, target, candidates(config, target), compiler))


def test_rows_remat_model_and_fsdp_are_tried_in_every_combination_that_divides(config):
    found = {key(c) for c in candidates(config, parse_target("a100-40gb:64x8"))}
    # 2048 rows over 512 devices: 4 on a device, 8 where two share theirs, and so on
    for model, most in ((1, 4), (2, 8), (4, 16), (8, 32)):
        rows = {row for m, _, _, row in found if m == model}
        assert rows == {2**i for i in range(10) if 2**i <= most}
    assert {remat for _, _, remat, _ in found} == {"none", "dots", "attention", "full"}
    assert (1, True, "dots", 4) in found and (1, True, "none", 4) not in found


def test_sizes_of_model_divide_heads_and_stay_in_a_host(config):
    def sizes(target):
        return {key(c)[0] for c in candidates(config, parse_target(target))}

    assert sizes("v5p:4x4x4") == {1, 2, 4}  # hosts of 4
    config_lib.set_value(config, "model.num_kv_heads", 2)
    assert sizes("h100:1x8") == {1, 2}


def test_fsdp_is_not_tried_on_one_device_nor_without_zero1(config):
    assert not any(c.layout.fsdp for c in candidates(config, parse_target("h200:1x1")))
    config.parallel.zero1 = False
    assert not any(c.layout.fsdp for c in candidates(config, parse_target("h200:1x8")))


def test_the_least_estimated_time_comes_first(config):
    times = [sum(c.time) for c in candidates(config, parse_target("h100:8x8"))]
    assert times == sorted(times) and times[0] < times[-1]


def test_a_batch_that_no_mesh_divides_is_refused(config):
    with pytest.raises(config_lib.ConfigError, match="config.data.batch_size=2048: does not"):
        candidates(config, parse_target("h100:1x7"))


def test_what_cannot_fit_by_its_shapes_is_never_compiled(config):
    target = parse_target("h200:1x1")
    ordered = candidates(config, target)
    hopeless = {key(c) for c in ordered if c.needed > target.available_bytes}
    tried = run(config, "h200:1x1", Compiler(lambda config: True))
    assert hopeless and not hopeless & {key(c) for c in tried}


def test_what_needs_more_than_something_that_did_not_fit_is_not_compiled(config):
    tried = [key(c) for c in run(config, "h200:1x8", Compiler(lambda config: True))]
    order = ("full", "attention", "dots", "none")
    for i, (model, fsdp, remat, rows) in enumerate(tried):
        for other_model, other_fsdp, other_remat, other_rows in tried[i + 1 :]:
            more = other_rows >= rows and order.index(other_remat) >= order.index(remat)
            assert not (more and (model, fsdp) == (other_model, other_fsdp))
    assert (1, False, "full", 1) in tried  # the smallest is given its chance


def test_fewer_rows_than_what_fits_are_not_compiled(config):
    few = lambda config: config.training.accumulation < 64  # noqa: E731
    tried = run(config, "h200:1x8", Compiler(few))
    for model in (1, 2):
        fitting = (c for c in tried if c.step and key(c)[:3] == (model, False, "none"))
        rows = [c.layout.rows for c in fitting]
        assert rows == [4 * model]  # 2048 rows over 8 devices in 64 microbatches


def test_what_is_far_behind_the_best_is_not_compiled(config):
    tried = {key(c): c for c in run(config, "a100-40gb:64x8", Compiler())}
    best = min(sum(c.time) for c in tried.values())
    everything = candidates(config, parse_target("a100-40gb:64x8"))
    assert all(sum(c.time) <= 1.5 * best for c in everything if key(c) in tried)
    assert max(sum(c.time) for c in everything) > 1.5 * best


def test_an_error_of_the_compiler_ends_no_sweep_and_says_nothing_of_memory(config):
    first = []

    def refuses(config):
        if not first:
            first.append(config)
            raise jax.errors.JaxRuntimeError("INTERNAL: no such layout\nmore")
        return False

    tried = run(config, "h200:1x1", Compiler(refuses))
    assert "no such layout" in str(tried[0].problem) and tried[0].step is None
    assert key(tried[1])[:3] == key(tried[0])[:3]  # would have been left out if it were


def test_what_is_compiled_is_the_config_divided_as_the_candidate_says(config):
    compiler = Compiler()
    tried = run(config, "h100:2x8", compiler)
    for candidate, compiled in zip(tried, compiler.configs, strict=True):
        layout = candidate.layout
        assert compiled.training.remat == layout.remat
        assert compiled.parallel.model == layout.model and compiled.parallel.fsdp == layout.fsdp
        data = 16 // layout.model
        assert layout.rows * compiled.training.accumulation * data == 2048
    assert config.parallel.model == 1  # the config given stays as it is


def test_a_division_is_applied_to_a_copy(config):
    changed = divided(config, {"parallel.model": 4})
    assert (changed.parallel.model, config.parallel.model) == (4, 1)


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
    raise DoesNotFit("h200:1x1: a device needs 999 GiB and has 132.5 GiB; try more microbatches")


def test_each_result_is_printed_then_the_ranking_then_flags_to_paste(config, capsys):
    def compile_one(config, target):
        return (too_large if config.training.remat == "none" else compiled)(config, target)

    sweep(config, H200, compile_one)
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
    flags = overrides(best).split()
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
            time.sleep(15)  # a compiler that does not listen
        return compiled(config, target)

    started = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        sweep(config, H200, compile_one)
    assert time.monotonic() - started < 12
    said = capsys.readouterr().out
    assert "--config.training.remat=none" in said.splitlines()[-1]
    assert "interrupted: 1 compiled" in said


@pytest.fixture
def tiny_sweep():
    """`plan --sweep` of a small model, by the target's own compiler."""
    sizes = ("num_layers=1", "width=64", "num_heads=2", "num_kv_heads=2", "feed_forward_width=64")
    tiny = [f"--config.model.{size}" for size in sizes]
    tiny += ["--config.data.sequence_length=32", "--config.data.batch_size=1"]
    tiny += ["--config.training.accumulation=1", "--sweep", "--target=a100-40gb:1x1"]
    done = subprocess.Popen(
        [sys.executable, "-u", "-m", "stablelm_jax.plan", CONFIG, *tiny],
        cwd=ROOT,
        env={**os.environ, "XLA_FLAGS": ""},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    yield done
    done.kill()


@pytest.mark.aot
@pytest.mark.by_hand
def test_ctrl_c_ends_the_verb_while_the_targets_own_compiler_works(tiny_sweep):
    assert "4 ways to divide a step on a100-40gb:1x1; 0 need" in tiny_sweep.stdout.readline()
    for line in tiny_sweep.stdout:
        if re.match(r"  1 .* GiB .* s estimated", line):
            break
    tiny_sweep.send_signal(signal.SIGINT)
    said, errors = tiny_sweep.communicate(timeout=60)
    assert tiny_sweep.returncode == 130
    assert errors.splitlines()[-1].startswith("plan: interrupted")
    assert said.splitlines()[-1].startswith("--config.training.accumulation=1")


@pytest.mark.aot
@pytest.mark.by_hand
def test_a_small_model_is_swept_by_the_targets_own_compiler(tiny_sweep):
    said, errors = tiny_sweep.communicate(timeout=280)
    assert tiny_sweep.returncode == 0, errors
    assert said.splitlines()[-1].startswith("--config.training.accumulation=")
