"""The time of a run that is killed again and again adds up, and shows what was done again."""

import json
import shutil
import time

import jax
import pytest
from tiny import bare_config, train

from stablelm_jax.checkpoint.reading import read_run
from stablelm_jax.training import intervals


@pytest.fixture(scope="module")
def killed(data, tmp_path_factory):
    """(folder, seconds of its last line, wall clock, seconds that kills took, arrays ready?)"""
    workdir, waited = tmp_path_factory.mktemp("killed"), []
    config = bare_config(data, **{"evaluation.every": 6, "training.log_every": 5})
    held_out, began, lost = intervals.evaluate_held_out, time.time(), 0.0

    def evaluate(step, params, *rest):
        waited.append(all(leaf.is_ready() for leaf in jax.tree.leaves(params)))
        return held_out(step, params, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(intervals, "evaluate_held_out", evaluate)
        for kill in range(3):
            code, lines = train(config, workdir)
            assert code == 0
            if kill < 2:
                lost += lose_last_checkpoint(workdir)
    seconds = {k.removeprefix("seconds/"): v for k, v in lines[-1].items() if "seconds/" in k}
    return workdir, seconds, lines[-1]["time"] - began, lost, waited


def lose_last_checkpoint(workdir):
    """As a kill before it leaves the run; returns the seconds that were spent since the last."""
    shutil.rmtree(workdir / "checkpoints/global_step12")
    ended = json.loads((workdir / "goodput.json").read_text())["seconds"]
    kept = read_run(workdir / "checkpoints/global_step8")["timers"]["seconds"]
    return sum(ended[cause] - kept[cause] for cause in ("step", "data_wait", "evaluation"))


def test_the_causes_of_a_run_that_is_killed_add_up_to_the_wall_clock(killed):
    workdir, seconds, wall, lost, _ = killed
    assert sum(seconds.values()) == pytest.approx(wall, rel=0.01)
    assert seconds["redone"] == pytest.approx(lost, abs=0.01) and lost > 0
    assert not seconds["samples"]
    for cause in ("start", "compile", "restore", "data_wait", "step", "evaluation", "save"):
        assert seconds[cause] > 0, cause
    run = read_run(workdir / "checkpoints/global_step12")
    spent = run["timers"]["seconds"]
    assert run["train_seconds"] == spent["step"] + spent["data_wait"]
    assert spent["step"] == pytest.approx(seconds["step"], abs=0.01)


def test_steps_in_flight_are_not_charged_to_the_evaluation_that_waits_for_them(killed):
    *_, waited = killed
    assert waited and all(waited)
