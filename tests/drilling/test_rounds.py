"""Killed or stopped in any phase and started again, a run is the one that nobody disturbed."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
from tiny import tiny_config, write_config

from stablelm_jax.drill import conclude
from stablelm_jax.drilling import resolved, rounds
from stablelm_jax.drilling.phases import PHASES
from stablelm_jax.drilling.rounds import KILL, Drill, Fault, Start

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
    """A folder for drills with the config of all of them."""
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
    assert set(found["ends"].values()) == {None}
    rows = {(row["phase"], row["signal"]): row for row in found["summary"]}
    for key, least in wanted.items():
        assert rows[key]["came"] >= least, done.stdout
    for row in found["summary"]:
        assert row["as it should"] == row["came"]


@pytest.fixture(scope="module")
def disturbed(place):
    """Two trainings of two devices each, killed and stopped between them once in each phase."""
    return drill(place, "--devices=2", "--kills=11", "--signals=11", "--twice=1", "--jobs=2")


def test_killed_in_every_phase_a_run_ends_bit_for_bit_as_if_left_alone(disturbed):
    assert_all_went_well(*disturbed, {(phase, "SIGKILL"): 1 for phase in PHASES})
    assert disturbed[0].stdout.count("equal bit for bit") >= 2


def test_stopped_in_every_phase_a_run_exits_75_with_a_whole_checkpoint_and_goes_on(disturbed):
    assert_all_went_well(*disturbed, {(phase, "SIGTERM"): 1 for phase in PHASES})
    rows = disturbed[1]["summary"]
    assert sum(row["came"] for row in rows if row["signal"] == "two signals") >= 1
    assert all(row["most"] < 30 for row in rows)


def test_a_phase_that_there_is_not_is_refused(place):
    done, _ = drill(place, "--phases=daydreaming")
    assert done.returncode == 2 and "'daydreaming'" in done.stderr.strip().splitlines()[-1]


@pytest.mark.by_hand
def test_two_processes_killed_twice_end_as_if_left_alone(place):
    amounts = ("--kills=2", "--signals=0", "--twice=0", "--phases=stepping,writing")
    done, found = drill(place, "--processes=2", "--devices=1", *amounts, name="two_processes")
    assert_all_went_well(done, found, {(phase, "SIGKILL"): 1 for phase in ("stepping", "writing")})


@pytest.mark.by_hand
def test_two_processes_stopped_in_every_phase_exit_75_and_go_on(place):
    amounts = ("--kills=0", "--signals=22", "--twice=4")
    done, found = drill(place, "--processes=2", "--devices=1", *amounts, name="two_processes")
    assert_all_went_well(done, found, {(phase, "SIGTERM"): 2 for phase in PHASES})


class Pretence(Start):
    """A start that takes no time; the fault always comes."""

    code = 0

    def run(self):
        self.problem, self.codes = None, [self.code if self.fault is None else -9]
        self.hit = self.fault.phase if self.fault else None
        self._log = self._drill.folder / "output/pretence.txt"
        self._log.write_text("error: the newest checkpoint is damaged\n")
        return self


@pytest.fixture
def pretended(data, tmp_path, monkeypatch):
    """hold(end): a drill of three kills whose disturbed run differs by `end`, held."""
    monkeypatch.setattr(rounds, "Start", Pretence)

    def hold(end):
        monkeypatch.setattr(rounds, "first_difference", lambda one, other: end)
        held = Drill(tmp_path, tiny_config(data))
        held.train_undisturbed()
        held.lasted = dict.fromkeys(PHASES, 0.0)
        monkeypatch.setattr(Pretence, "code", 1 if end == "never" else 0)
        held.run({KILL: 3})
        assert len(held.hits) == 3
        return conclude(held)

    return hold


def test_a_drill_whose_ends_are_equal_exits_0(pretended, capsys):
    assert pretended(None) == 0
    assert capsys.readouterr().err == ""


def test_a_drill_whose_ends_differ_exits_1_and_says_where(pretended, tmp_path, capsys):
    assert pretended("step 3, loss: 1.0 undisturbed, 2.0 disturbed") == 1
    found = json.loads((tmp_path / "drill.json").read_text())["first_problem"]
    assert capsys.readouterr().err == f"drill: {found}\n"
    assert found == "step 3, loss: 1.0 undisturbed, 2.0 disturbed"


def test_a_run_that_nothing_disturbs_and_that_fails_nevertheless_fails_the_drill(pretended, capsys):
    assert pretended("never") == 1
    assert "exit codes [1]; error: the newest checkpoint is damaged" in capsys.readouterr().err


LEAVES_BADLY = """
import pathlib, signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: sys.exit("error: the disk is full"))
pathlib.Path(sys.argv[1], ".lock").touch()
time.sleep(60)
"""


def test_a_run_that_leaves_with_another_exit_code_fails_the_drill(data, tmp_path, monkeypatch):
    """The pretended training is seen to restore as soon as it has touched its lock."""
    works = subprocess.Popen
    command = [sys.executable, "-c", LEAVES_BADLY, tmp_path]
    monkeypatch.setattr(subprocess, "Popen", lambda _, **options: works(command, **options))
    (tmp_path / "output").mkdir()
    held = Drill(tmp_path, tiny_config(data))
    start = Start(held, tmp_path, Fault("restoring", "SIGTERM"), random.Random(0)).run()
    assert start.hit == "restoring" and start.codes == [1]
    assert "exit code 1 instead of 75; error: the disk is full" in start.problem
