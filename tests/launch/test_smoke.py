"""launch/smoke.sh: the order of its steps, what it repeats, what it hands on.

Python is replaced by one that takes notes (fake_python.py); the real run is the README's.
"""

import os
import signal
import subprocess
import time

import pytest

from stablelm_jax import config as config_lib

STEPS = [
    "venv", "pip", "pip",
    "launch/corpora/smoke_corpus.py", "stablelm_jax.train_tokenizer",
    "stablelm_jax.prepare", "stablelm_jax.prepare", "stablelm_jax.train", "stablelm_jax.evaluate",
    "stablelm_jax.generate",
]  # fmt: skip


def value(call, flag):
    return call[call.index(flag) + 1]


def test_it_installs_prepares_trains_evaluates_and_samples_in_this_order(checkout):
    done = checkout.run("launch/smoke.sh")
    assert done.returncode == 0, done.stderr
    assert [call[0] for call in checkout.calls()] == STEPS
    assert "English in form, not in sense" in done.stdout


def test_every_folder_it_names_at_the_end_is_the_one_the_steps_used(checkout):
    done = checkout.run("launch/smoke.sh", FAKE_STEPS="0 90 100")
    workdir = checkout.root / "runs" / "smoke"
    (train,) = checkout.calls("stablelm_jax.train")
    assert value(train, "--workdir") == f"{workdir}/run"
    assert f"--config.data.root={workdir}/data" in train
    for call in checkout.calls("stablelm_jax.prepare"):
        assert value(call, "--output") == f"{workdir}/data"
        assert value(call, "--input") == f"{workdir}/corpus/{value(call, '--source')}.jsonl"
        assert value(call, "--tokenizer") == f"{workdir}/corpus/tokenizer.json"
    assert f"--config.data.tokenizer={workdir}/corpus/tokenizer.json" in train
    (trained,) = checkout.calls("stablelm_jax.train_tokenizer")
    assert value(trained, "--output") == f"{workdir}/corpus/tokenizer.json"
    (corpus,) = checkout.calls("launch/corpora/smoke_corpus.py")
    assert value(corpus, "--output") == f"{workdir}/corpus"
    for path in ("corpus", "data", "run", "run/checkpoints/global_step100", "held_out.json"):
        assert f" {workdir}/{path}" in done.stdout.split("Everything lies here")[1]
    assert (workdir / "held_out.json").exists()


def test_evaluation_and_samples_take_the_newest_finished_checkpoint(checkout):
    checkout.run("launch/smoke.sh", FAKE_STEPS="0 90 100 200.orbax-checkpoint-tmp")
    for verb in ("evaluate", "generate"):
        (call,) = checkout.calls(f"stablelm_jax.{verb}")
        assert value(call, "--checkpoint").endswith("/global_step100")


def test_its_sources_are_those_of_its_config(checkout):
    checkout.run("launch/smoke.sh")
    prepared = {value(call, "--source") for call in checkout.calls("stablelm_jax.prepare")}
    root = os.path.dirname(config_lib.__file__) + "/../.."
    assert prepared == set(config_lib.load(f"{root}/configs/smoke.py").data.weights)


def test_a_workdir_is_taken_from_the_callers_folder_and_overrides_reach_train(checkout):
    override = "--config.training.num_steps=7"
    done = checkout.run("launch/smoke.sh", "--workdir", "my run", "--", override)
    assert done.returncode == 0, done.stderr
    (train,) = checkout.calls("stablelm_jax.train")
    assert value(train, "--workdir") == str(checkout.elsewhere / "my run" / "run")
    assert train[-1] == override


@pytest.mark.parametrize("wrong", ["--wrokdir", "--config.training.num_steps=7"])
def test_an_unknown_argument_is_refused_before_anything_is_installed(checkout, wrong):
    done = checkout.run("launch/smoke.sh", wrong)
    assert done.returncode == 1
    assert wrong in done.stderr and "usage" in done.stderr
    assert not checkout.log.exists()


def test_run_again_it_installs_nothing_unless_what_it_needs_has_changed(checkout):
    checkout.run("launch/smoke.sh")
    assert checkout.installed() == [["--requirement", "requirements.txt"]]
    done = checkout.run("launch/smoke.sh")
    assert len(checkout.installed()) == 1 and "Installed already" in done.stdout
    with open(checkout.root / "pyproject.toml", "a") as file:
        file.write("# another dependency\n")
    checkout.run("launch/smoke.sh")
    assert len(checkout.installed()) == 2


def test_an_installation_that_failed_is_tried_again(checkout):
    assert checkout.run("launch/smoke.sh", FAKE_PIP_FAILS="1").returncode == 1
    assert checkout.run("launch/smoke.sh").returncode == 0
    assert checkout.calls()[-1][0] == "stablelm_jax.generate"


def test_a_venv_killed_while_it_was_made_is_made_anew(checkout):
    checkout.run("launch/smoke.sh")
    (checkout.root / ".venv" / "bin" / "python").unlink()
    assert checkout.run("launch/smoke.sh").returncode == 0
    assert len(checkout.calls("venv")) == 2


@pytest.mark.parametrize(
    ("reported", "extra"),
    [("580.65.06", "cuda13"), ("1000.1", "cuda13"), ("550.90", "cuda12"), ("470.2", None),
     ("No devices were found", None)],
)  # fmt: skip
def test_the_driver_at_hand_chooses_the_cuda_extra(checkout, reported, extra):
    checkout.add_program("nvidia-smi", f"#!/bin/sh\nprintf '{reported}\\n{reported}\\n'\n")
    assert checkout.run("launch/smoke.sh").returncode == 0
    with_extra = ["--editable", f".[{extra}]"] if extra else []
    assert checkout.installed() == [["--requirement", "requirements.txt", *with_extra]]


@pytest.mark.parametrize(("code", "resumes"), [("75", True), ("137", True), ("2", False)])
def test_the_exit_code_of_train_is_handed_on_and_a_stop_says_how_to_resume(checkout, code, resumes):
    done = checkout.run("launch/smoke.sh", FAKE_TRAIN_EXIT=code)
    assert done.returncode == int(code)
    assert ("it resumes" in done.stdout.splitlines()[-1]) == resumes
    assert checkout.calls()[-1][0] == "stablelm_jax.train"


@pytest.mark.parametrize(
    ("number", "whole_group"),
    [(signal.SIGTERM, False), (signal.SIGTERM, True), (signal.SIGINT, True)],
    ids=["kill", "timeout", "ctrl-c"],
)
def test_a_signal_reaches_train_and_its_saving_is_awaited(checkout, number, whole_group):
    script = subprocess.Popen(
        checkout.command("launch/smoke.sh"), cwd=checkout.elsewhere, start_new_session=True,
        env=checkout.environment(FAKE_TRAIN_EXIT="signal"), stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    wait_for(checkout, ["training"], script)
    (os.killpg if whole_group else os.kill)(script.pid, number)
    out, _ = script.communicate(timeout=30)
    assert script.returncode == 75
    assert ["signal", number.name] in checkout.calls()
    assert "it resumes" in out.splitlines()[-1]


def wait_for(checkout, call, script):
    for _ in range(1500):
        if checkout.log.exists() and call in checkout.calls():
            return
        assert script.poll() is None, script.communicate()
        time.sleep(0.02)
    raise AssertionError(f"{call} did not come in 30 s")
