"""Evaluation inside training: by interval, and never the end of the run."""

import json

import jax
import pytest
from task_files import write_task
from tiny import losses, tiny_config, train

from stablelm_jax.checkpoint.reading import read_run
from stablelm_jax.data import shards
from stablelm_jax.model.transformer import init_params
from stablelm_jax.reporting import page, picture
from stablelm_jax.training.setup import prepare_run

FEW = {"evaluation.every": 0, "samples.every": 0, "training.num_steps": 6, "checkpoint.every": 6}


@pytest.fixture(scope="module")
def undisturbed(data, tmp_path_factory):
    """(losses, checksums) of a run that is never evaluated."""
    workdir = tmp_path_factory.mktemp("undisturbed")
    _, lines = train(tiny_config(data, **FEW), workdir)
    return end_of(workdir, lines)


def end_of(workdir, lines):
    return losses(lines), read_run(workdir / "checkpoints/global_step6")["checksums"]


def events(workdir, name):
    lines = (workdir / "events.jsonl").read_text().splitlines()
    return [event for event in map(json.loads, lines) if event["event"] == name]


def test_scores_of_tasks_are_metrics_and_change_nothing(data, undisturbed, tmp_path):
    pytest.importorskip("lm_eval")
    task = write_task(tmp_path, "which_word", items=4)
    settings = {"evaluation.tasks": (str(task),), "evaluation.tasks_every": 3}
    code, lines = train(tiny_config(data, **FEW, **settings), tmp_path / "run")
    assert code == 0 and end_of(tmp_path / "run", lines) == undisturbed
    scores = {
        line["step"]: line["eval/tasks/which_word/acc"] for line in lines if "loss" not in line
    }
    assert set(scores) == {0, 3, 6}
    assert all(0 <= score <= 1 for score in scores.values())
    code, lines = train(tiny_config(data, **FEW, **settings), tmp_path / "run")  # nothing is left
    assert len([line for line in lines if "eval/tasks/which_word/acc" in line]) == 3


@pytest.mark.parametrize("every, at", [(None, [0, 6, 6]), (4, [0, 4, 6, 6]), (0, [])])
def test_the_page_of_a_run_is_written_at_evaluations_or_at_its_own_interval(
    data, tmp_path, monkeypatch, every, at
):
    """After the last step too: once more than it was evaluated, with the last save in it."""
    steps = []
    monkeypatch.setattr(picture, "draw_losses", lambda *_: None)
    monkeypatch.setattr(page, "write_page", lambda _, path, c: steps.append(c.last("step") or 0))
    settings = FEW | {"evaluation.every": 6, "report.every": every}
    assert train(tiny_config(data, **settings), tmp_path / "run", picture=True)[0] == 0
    assert steps == at


def test_tasks_are_left_without_scores_where_a_signal_was_heard(data, tmp_path):
    pytest.importorskip("lm_eval")
    from stablelm_jax.evaluation import checkpoint_tasks as tasks

    task = write_task(tmp_path, "too_late", items=2)
    settings = {"evaluation.tasks": (str(task),), "evaluation.tasks_every": 3}
    run = prepare_run(tiny_config(data, **FEW, **settings))
    params = jax.jit(init_params, static_argnums=0)(run.model, jax.random.key(0))
    left = tasks.TrainingTasks(run, left=lambda: True)
    assert left.evaluate(params, 3, console=None, failed=None) is None


def test_a_task_that_is_missing_is_told_and_the_run_goes_on(data, undisturbed, tmp_path):
    pytest.importorskip("lm_eval")
    settings = {"evaluation.tasks": (str(tmp_path / "none.yaml"),), "evaluation.tasks_every": 3}
    code, lines = train(tiny_config(data, **FEW, **settings), tmp_path / "run")
    assert code == 0 and end_of(tmp_path / "run", lines) == undisturbed
    (event,) = events(tmp_path / "run", "evaluation_failed")
    assert "none.yaml" in event["text"]


def test_a_task_that_fails_half_way_is_told_and_the_run_goes_on(
    data, undisturbed, tmp_path, monkeypatch
):
    pytest.importorskip("lm_eval")
    scoring = pytest.importorskip("stablelm_jax.evaluation.scoring")

    def out_of_memory(*_, **__):
        raise RuntimeError("RESOURCE_EXHAUSTED: out of memory")

    monkeypatch.setattr(scoring.Scorer, "score", out_of_memory)
    task = write_task(tmp_path, "too_large", items=2)
    settings = {"evaluation.tasks": (str(task),), "evaluation.tasks_every": 6}
    code, lines = train(tiny_config(data, **FEW, **settings), tmp_path / "run")
    assert code == 0 and end_of(tmp_path / "run", lines) == undisturbed
    failed = events(tmp_path / "run", "evaluation_failed")
    assert [event["step"] for event in failed] == [0, 6]
    assert "RESOURCE_EXHAUSTED" in failed[0]["text"]


def test_too_little_memory_for_held_out_text_is_told_and_the_run_goes_on(
    data, undisturbed, tmp_path, monkeypatch
):
    from stablelm_jax.training import intervals

    def out_of_memory(*_, **__):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory")

    monkeypatch.setattr(intervals, "evaluate_held_out", out_of_memory)
    settings = FEW | {"evaluation.every": 6}
    code, lines = train(tiny_config(data, **settings), tmp_path / "run")
    assert code == 0 and end_of(tmp_path / "run", lines) == undisturbed
    failed = events(tmp_path / "run", "evaluation_failed")
    assert [event["step"] for event in failed] == [0, 6]


def test_held_out_text_that_cannot_be_read_is_told_and_the_run_goes_on(
    data, undisturbed, tmp_path, monkeypatch
):
    from stablelm_jax.training import setup

    def unreadable(*_, **__):
        raise shards.ShardError("held_out-00000.bin: Input/output error")

    monkeypatch.setattr(setup, "held_out_batches", unreadable)
    settings = FEW | {"evaluation.every": 3}
    code, lines = train(tiny_config(data, **settings), tmp_path / "run")
    assert code == 0 and end_of(tmp_path / "run", lines) == undisturbed
    failed = events(tmp_path / "run", "evaluation_failed")
    assert [event["step"] for event in failed] == [0, 3, 6]
    assert "Input/output error" in failed[0]["text"]
