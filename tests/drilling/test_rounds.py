"""Killed or stopped in any phase and started again, a run is the one that nobody disturbed."""

import json
import os
import signal
import subprocess
import sys

import pytest
from tiny import CHOICES, TALKS, tiny_config, write_chats, write_config, write_parent

from stablelm_jax.drill import report
from stablelm_jax.drilling import rounds
from stablelm_jax.drilling.phases import PHASES
from stablelm_jax.drilling.rounds import Drill, Fault, Start

# Steps are quick and starts are not: with many saves, a phase is still ahead when its turn comes.
STEPS = {
    "training.num_steps": 24,
    "training.accumulation": 2,
    "schedule.total_steps": 80,
    "checkpoint.every": 4,
    "evaluation.every": 8,
    "samples.every": 6,
}


# Beside the loop, where most can go wrong; all of them by hand.
SOME = ("writing",)
OF_PRETRAINING = tuple(phase for phase in PHASES if phase != "reference")


@pytest.fixture
def drill(data, tmp_path):
    """drill({signal: phases}, flags): a drill as a user holds it, which has to go well."""

    def hold(wanted, *more: str, config=None):
        config = config or tiny_config(data, **STEPS)
        command = [sys.executable, "-m", "stablelm_jax.drill", f"--workdir={tmp_path / 'drill'}"]
        command += [f"--config={write_config(config, tmp_path)}"]
        command += ["--config.samples.prompts=('w1 w3', 'w2')", "--config.evaluation.every=8"]
        command += more
        environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        assert done.returncode == 0, done.stdout + done.stderr
        print(done.stdout)
        found = json.loads((tmp_path / "drill/drill.json").read_text())
        assert found["problems"] == []
        assert done.stdout.count("equal bit for bit") == found["runs"] > 0
        assert len(list((tmp_path / "drill/undisturbed/samples").iterdir())) > 1
        for kind, phases in wanted.items():
            assert all(found["came"][phase][kind] for phase in phases), done.stdout
        assert all(came["longest_wait"] < 30 for came in found["came"].values())

    return hold


def test_killed_and_stopped_in_any_phase_a_run_ends_bit_for_bit_as_if_left_alone(drill):
    """Stopped, it exits with 75 and a whole checkpoint, from which it goes on."""
    amounts = (f"--phases={','.join(SOME)}", "--kills=1", "--signals=1")
    drill({"SIGKILL": SOME, "SIGTERM": SOME}, "--devices=2", *amounts)


@pytest.mark.by_hand
def test_killed_and_stopped_in_every_phase_a_run_ends_bit_for_bit_as_if_left_alone(drill):
    amounts = ("--kills=20", "--signals=20")
    drill({"SIGKILL": OF_PRETRAINING, "SIGTERM": OF_PRETRAINING}, "--devices=2", *amounts)


@pytest.mark.by_hand
@pytest.mark.parametrize("objective, source", [("sft", TALKS), ("dpo", CHOICES)])
def test_runs_of_sft_and_dpo_end_as_if_left_alone(drill, tmp_path, objective, source):
    chats = write_chats(tmp_path / "chats", items=4000)  # the reference takes a while
    tuning = {
        "training.objective": objective,
        "data.packing": "best_fit",
        "branch.parent": str(write_parent(tmp_path / "parent/global_step0", chats)),
        "branch.state": "weights",
    }
    config = tiny_config(chats, {source: 1.0}, **{**STEPS, **tuning})
    phases = PHASES if objective == "dpo" else OF_PRETRAINING
    amounts = ("--kills=12", "--signals=12")
    drill({"SIGKILL": phases, "SIGTERM": phases}, "--devices=2", *amounts, config=config)


@pytest.mark.by_hand
def test_two_processes_killed_twice_end_as_if_left_alone(drill):
    amounts = ("--phases=stepping,writing", "--kills=2", "--signals=0")
    drill({"SIGKILL": ("stepping", "writing")}, "--processes=2", "--devices=1", *amounts)


@pytest.mark.by_hand
def test_two_processes_stopped_in_every_phase_exit_75_and_go_on(drill):
    amounts = ("--kills=0", "--signals=22")
    drill({"SIGTERM": OF_PRETRAINING}, "--processes=2", "--devices=1", *amounts)


@pytest.mark.parametrize(
    ("flag", "named"),
    [("--phases=daydreaming", "'daydreaming'"), ("--workdir=gs://b/d", "gs://b/d")],
)
def test_a_phase_that_there_is_not_and_a_bucket_are_refused(data, tmp_path, capsys, flag, named):
    config = f"--config={write_config(tiny_config(data), tmp_path)}"
    command = [sys.executable, "-m", "stablelm_jax.drill", config, f"--workdir={tmp_path}", flag]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and named in done.stderr.strip().splitlines()[-1]


class Pretence(Start):
    """A start that takes no time; the fault always comes."""

    code = 0

    def run(self):
        self.codes, self.seconds = [self.code if self.fault is None else -9], 0.0
        self.hit = self.fault.phase if self.fault else None
        self._log = self._drill.folder / "output/pretence.txt"
        self._log.write_text("error: the newest checkpoint is damaged\n")
        return self

    def find_problem(self):
        return None


@pytest.fixture
def pretended(data, tmp_path, monkeypatch):
    """hold(end): a drill of three kills whose disturbed run differs by `end`, held."""
    monkeypatch.setattr(rounds, "Start", Pretence)

    def hold(end):
        monkeypatch.setattr(rounds, "first_difference", lambda one, other: end)
        monkeypatch.setattr(rounds, "unaccounted", lambda workdir, began: None)
        held = Drill(tmp_path, tiny_config(data))
        held.train_undisturbed()
        held.lasted = dict.fromkeys(PHASES, 0.0)
        monkeypatch.setattr(Pretence, "code", 1 if end == "never" else 0)
        held.run(kills=3, signals=0)
        assert len(held.hits) == 3
        return report(held)

    return hold


def test_a_drill_whose_ends_are_equal_exits_0(pretended, capsys):
    assert pretended(None) == 0
    assert capsys.readouterr().err == ""


def test_a_drill_whose_ends_differ_exits_1_and_says_where(pretended, tmp_path, capsys):
    assert pretended("step 3, loss: 1.0 undisturbed, 2.0 disturbed") == 1
    [found] = json.loads((tmp_path / "drill.json").read_text())["problems"]
    assert capsys.readouterr().err == f"drill: {found}\n"
    assert found == "disturbed-1: step 3, loss: 1.0 undisturbed, 2.0 disturbed"


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
    start = Start(held, tmp_path, Fault("restoring", signal.SIGTERM)).run()
    assert start.hit == "restoring" and start.codes == [1]
    assert "exit code 1 instead of 75; error: the disk is full" in start.find_problem()
