"""The phase of a training is read from its run folder alone."""

import json
import os

import pytest
from tiny import tiny_config

from stablelm_jax.drilling.phases import phase_of

LAUNCHED = 1_000  # seconds; what was written before is of an earlier start
LINE, HELD_OUT = {"step": 6, "loss": 1.0}, {"step": 6, "eval/loss": 1.0}


@pytest.fixture
def folder(tmp_path):
    """The run folder of a start that steps on: (path, write(name, second, text))."""

    def write(name, second, text=""):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        os.utime(path, (second, second))

    write(".lock", LAUNCHED + 1)
    write("environment.json", LAUNCHED + 2)
    write("metrics.jsonl", LAUNCHED + 3, lines({"step": 5}))
    for step in (0, 4):
        (tmp_path / f"checkpoints/global_step{step}").mkdir(parents=True)
    return tmp_path, write


def lines(*some, unfinished=""):
    return "".join(json.dumps(line) + "\n" for line in some) + unfinished


def phase(data, folder, **overrides):
    return phase_of(folder[0], tiny_config(data, **overrides), LAUNCHED * 10**9)


def test_a_start_begins_restores_compiles_and_steps(data, folder):
    path, write = folder
    assert phase(data, folder) == "stepping"
    write("environment.json", LAUNCHED + 4)
    assert phase(data, folder) == "compiling"
    write("environment.json", LAUNCHED - 1)
    assert phase(data, folder) == "restoring"
    write(".lock", LAUNCHED - 2)
    assert phase(data, folder) == "starting"
    for name in (".lock", "environment.json", "metrics.jsonl"):
        (path / name).unlink()
    assert phase(data, folder) == "starting"


def test_the_reference_of_dpo_is_computed_before_the_first_line(data, folder):
    _, write = folder
    write("environment.json", LAUNCHED + 4)
    write("reference/key.json", LAUNCHED + 3, '{"pairs": 9, "done": 3}')
    assert phase(data, folder) == "compiling"  # as an earlier start left it
    write("reference/key.json", LAUNCHED + 5, '{"pairs": 9, "done": 3}')
    assert phase(data, folder) == "reference"
    write("reference/key.json", LAUNCHED + 6, '{"pairs": 9, "done": 9}')
    assert phase(data, folder) == "compiling"


def test_an_evaluation_then_samples_then_a_save_are_seen_coming(data, folder):
    every = {"evaluation.every": 6, "samples.every": 6, "checkpoint.every": 6}
    path, write = folder
    write("metrics.jsonl", LAUNCHED + 3, lines({"step": 5}, LINE, unfinished='{"step": 6, "eval/l'))
    assert phase(data, folder, **every) == "evaluating"
    write("metrics.jsonl", LAUNCHED + 4, lines(LINE, HELD_OUT))
    write("samples/global_step6.txt", LAUNCHED + 3)  # of an earlier start that came as far
    assert phase(data, folder, **every) == "sampling"
    write("samples/global_step6.txt", LAUNCHED + 5)
    assert phase(data, folder, **every) == "saving"
    (path / "checkpoints/global_step6").mkdir()
    assert phase(data, folder, **every) == "stepping"


def test_a_checkpoint_is_written_finalised_and_an_old_one_deleted(data, folder):
    checkpoints = folder[0] / "checkpoints"
    half = checkpoints / "global_step4.orbax-checkpoint-tmp"
    (half / "params.orbax-checkpoint-tmp").mkdir(parents=True)
    assert phase(data, folder) == "writing"
    (half / "params.orbax-checkpoint-tmp").rename(half / "params")
    assert phase(data, folder) == "finalising"
    half.rename(checkpoints / "global_step8")
    (checkpoints / "global_step0").rename(checkpoints / "global_step0.deleting")
    assert phase(data, folder) == "deleting"


def test_after_its_last_step_and_what_is_due_there_a_run_is_finishing(data, folder):
    path, write = folder
    (path / "checkpoints/global_step12.orbax-checkpoint-tmp").mkdir()
    write("metrics.jsonl", LAUNCHED + 4, lines({"step": 12, "loss": 1.0}))
    assert phase(data, folder) == "evaluating"
    write("metrics.jsonl", LAUNCHED + 5, lines({"step": 12, "eval/loss": 1.0}))
    write("samples/global_step12.txt", LAUNCHED + 6)
    assert phase(data, folder) == "finishing"
