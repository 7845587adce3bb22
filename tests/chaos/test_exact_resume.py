"""Killed or stopped in any phase and started again, a run is the one that nobody disturbed."""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console
from tiny import tiny_config, train, write_config

from stablelm_jax.checkpoint.reading import sealed
from stablelm_jax.drill import conclude
from stablelm_jax.drilling import resolved, rounds
from stablelm_jax.drilling.comparison import first_difference
from stablelm_jax.drilling.plan import PHASES, Fault
from stablelm_jax.drilling.rounds import Results
from stablelm_jax.drilling.starts import Ended, Setup
from stablelm_jax.drilling.verdict import damage, problem

# Steps are quick and starts are not: with many saves, a phase is still ahead when its turn comes.
STEPS = {
    "training.num_steps": 36,
    "training.accumulation": 2,
    "schedule.total_steps": 80,
    "checkpoint.every": 4,
    "evaluation.every": 12,
    "samples.every": 6,
}


@pytest.fixture(scope="module")
def place(data, tmp_path_factory):
    """A drill's folder with the config beside it; its tests share the undisturbed run."""
    folder = tmp_path_factory.mktemp("drill")
    write_config(tiny_config(data, **STEPS), folder)
    return folder


def drill(place: Path, *more: str, name: str = "two_devices"):
    """Holds a drill as a user would; returns the ended process and drill.json."""
    command = [sys.executable, "-m", "stablelm_jax.drill"]
    command += [f"--config={resolved.__file__}:{place / 'config.json'}"]
    command += [f"--workdir={place / name}", *more]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    report = place / name / "drill.json"
    return done, json.loads(report.read_text()) if report.exists() else None


def assert_all_went_well(done, found, wanted: dict[tuple[str, str], int]):
    assert done.returncode == 0, done.stdout + done.stderr
    assert set(found["differences"].values()) == {None}
    rows = {(row["phase"], row["kind"]): row for row in found["summary"]}
    for key, least in wanted.items():
        assert rows[key]["injected"] >= least, done.stdout
    for row in found["summary"]:
        assert row["as_it_should"] == row["injected"] and row["equal"]


@pytest.fixture(scope="module")
def disturbed(place):
    """Two trainings of two devices each, killed ten times and stopped eleven times between them."""
    return drill(place, "--devices=2", "--kills=10", "--signals=10", "--twice=1", "--jobs=2")


def test_killed_in_every_phase_a_run_ends_bit_for_bit_as_if_left_alone(disturbed):
    assert_all_went_well(*disturbed, {(phase, "SIGKILL"): 1 for phase in PHASES})
    assert disturbed[0].stdout.count("equal bit for bit") >= 2


def test_stopped_in_every_phase_a_run_exits_75_with_a_whole_checkpoint_and_goes_on(disturbed):
    assert_all_went_well(*disturbed, {(phase, "SIGTERM"): 1 for phase in PHASES})
    rows = disturbed[1]["summary"]
    assert sum(row["injected"] for row in rows if row["kind"] == "two signals") >= 1
    assert all(row["max_seconds"] < 30 for row in rows if row["kind"] != "SIGKILL")


def test_a_phase_that_a_run_does_not_have_is_refused(place):
    done, _ = drill(place, "--phases=daydreaming")
    assert done.returncode == 2 and "'daydreaming'" in done.stderr.strip().splitlines()[-1]


@pytest.mark.by_hand
def test_two_processes_killed_twice_end_as_if_left_alone(place):
    amounts = ("--kills=2", "--signals=0", "--twice=0", "--phases=stepping,writing")
    done, found = drill(place, "--processes=2", "--devices=1", *amounts, name="two_processes")
    assert_all_went_well(done, found, {(phase, "SIGKILL"): 1 for phase in ("stepping", "writing")})


@pytest.mark.by_hand
def test_two_processes_stopped_in_every_phase_exit_75_and_go_on(place):
    amounts = ("--kills=0", "--signals=20", "--twice=4")
    done, found = drill(place, "--processes=2", "--devices=1", *amounts, name="two_processes")
    assert_all_went_well(done, found, {(phase, "SIGTERM"): 2 for phase in PHASES})


def one_bit_off(value: float) -> float:
    """The next float64: the last bit of the mantissa."""
    return math.nextafter(value, math.inf)


@pytest.fixture(scope="module")
def two_runs(data, tmp_path_factory):
    """The same tiny run twice, in this process."""
    folders = [tmp_path_factory.mktemp(name) for name in ("one", "other")]
    for folder in folders:
        train(tiny_config(data, **{"training.num_steps": 4, "samples.every": 0}), folder)
    return folders


def test_two_equal_runs_have_no_difference(two_runs):
    assert first_difference(*two_runs) is None


@pytest.mark.parametrize("key", ["grad_norm", "tokens/squares", "eval/loss", "updates_skipped"])
def test_the_comparison_sees_one_altered_value_of_one_line(two_runs, tmp_path, key):
    one, other = two_runs
    lines = [json.loads(line) for line in (other / "metrics.jsonl").read_text().splitlines()]
    line = [line for line in lines if key in line][-1]
    line[key] = one_bit_off(line[key]) if isinstance(line[key], float) else line[key] + 1
    altered = copied(other, tmp_path, lines)
    found = first_difference(one, altered)
    assert found.startswith(f"step {line['step']}, {key}: ")


def test_the_comparison_sees_a_line_that_is_missing_or_comes_twice(two_runs, tmp_path):
    one, other = two_runs
    lines = [json.loads(line) for line in (other / "metrics.jsonl").read_text().splitlines()]
    missing = copied(other, tmp_path / "missing", lines[:-1])
    assert "no line of step 4" in first_difference(one, missing)
    twice = copied(other, tmp_path / "twice", [*lines[:2], lines[1], *lines[2:]])
    assert "a line of step 1 where step 2's should be" in first_difference(one, twice)


def test_the_comparison_sees_one_altered_checksum_and_a_missing_checkpoint(two_runs, tmp_path):
    one, other = two_runs
    altered = copied(other, tmp_path)
    path = altered / "checkpoints/global_step4/run/metadata"
    run = json.loads(path.read_text())
    name = next(name for name in run["checksums"] if name.startswith("optimizer/m/"))
    run["checksums"][name] ^= 1
    path.write_text(json.dumps(sealed(run)))
    found = first_difference(one, altered)
    assert found.startswith(f"global_step4, checksum of, {name}: ")
    (altered / "checkpoints/global_step4").rename(altered / "elsewhere")
    assert "global_step4 is not a checkpoint" in first_difference(one, altered)


class Pretence:
    """Stands for the processes of a drill: each start leaves a copy of a run made before."""

    def __init__(self, undisturbed: Path, disturbed: Path):
        self.folders = {"undisturbed": undisturbed, "disturbed-1": disturbed}

    def __call__(self, setup, workdir, fault, *, cold=False):
        if fault is None:
            workdir.mkdir()
            copied(self.folders[workdir.name], workdir)
        hit = None if fault is None else {"phase": fault.phase, "phases": {}, "time": 0.0}
        codes = [0 if fault is None else -signal.SIGKILL]
        phases = [(phase, 0.1) for phase in PHASES]
        return Ended(codes, set(), hit, 0.1, phases, hung=False, logs=[])


def pretended(data, folder, monkeypatch, *folders) -> Results:
    monkeypatch.setattr(rounds, "run_start", Pretence(*folders))
    config = tiny_config(data, **{"training.num_steps": 4, "samples.every": 0})
    drilled = rounds.Drill(config, Setup(folder), seed=0, say=print)
    drilled.train_undisturbed()
    drilled.run({"SIGKILL": 3}, drilled.phases([]))
    return drilled.results


def test_a_drill_whose_ends_differ_in_one_bit_exits_1_and_says_where(
    data, two_runs, tmp_path, monkeypatch, capsys
):
    lines = [json.loads(line) for line in (two_runs[1] / "metrics.jsonl").read_text().splitlines()]
    (line,) = (line for line in lines if line["step"] == 3)
    right = line["loss/squares"]
    line["loss/squares"] = wrong = one_bit_off(right)
    altered = copied(two_runs[1], tmp_path / "altered", lines)
    results = pretended(data, tmp_path / "drill", monkeypatch, two_runs[0], altered)
    assert len(results.injected) == 3 and all(one.problem is None for one in results.injected)
    assert conclude(Console(), tmp_path, results, {}) == 1
    difference = f"step 3, loss/squares: {right} undisturbed, {wrong} disturbed"
    assert capsys.readouterr().err.strip() == f"drill: {difference}"
    assert json.loads((tmp_path / "drill.json").read_text())["first_problem"] == difference


def test_a_drill_whose_ends_are_equal_exits_0(data, two_runs, tmp_path, monkeypatch, capsys):
    results = pretended(data, tmp_path / "drill", monkeypatch, *two_runs)
    assert conclude(Console(), tmp_path, results, {}) == 0
    assert capsys.readouterr().err == ""


def test_a_run_that_leaves_with_another_exit_code_fails_the_drill(data, two_runs, tmp_path):
    fault = Fault("stepping", "SIGTERM", 1, 0.0, 0.0, process=0, everyone=False)
    log = tmp_path / "output.txt"
    log.write_text("error: the disk is full\n")
    hit = {"phase": "stepping", "phases": {}, "time": 0.0}
    ended = Ended([1], set(), hit, 0.1, [], hung=False, logs=[log])
    found = problem(fault, ended, two_runs[0], before=0, last=4)
    assert "exit code 1 instead of 75; error: the disk is full" in found


def test_a_checkpoint_with_one_flipped_bit_fails_the_drill(two_runs, tmp_path):
    checkpoint = copied(two_runs[0], tmp_path) / "checkpoints/global_step4"
    assert damage(checkpoint) is None
    largest = max(checkpoint.rglob("d/*"), key=lambda path: path.stat().st_size)
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 1
    largest.write_bytes(content)
    assert str(checkpoint) in damage(checkpoint)


def copied(folder: Path, to: Path, lines: list[dict] | None = None) -> Path:
    """A copy of a run folder's metrics and checkpoints, with other lines."""
    to.mkdir(exist_ok=True)
    shutil.copytree(folder / "checkpoints", to / "checkpoints")
    if lines is None:
        shutil.copy(folder / "metrics.jsonl", to)
    else:
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (to / "metrics.jsonl").write_text(text)
    return to
