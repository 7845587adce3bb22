"""Batches that change in a run: the same rows in the same order, counted, whatever stops it."""

import dataclasses

import numpy as np
import pytest
import tiny
from tiny import bare_config, events, losses, metrics, train

from stablelm_jax import config as config_lib
from stablelm_jax.checkpoint.reading import read_run
from stablelm_jax.data.position import DataPosition
from stablelm_jax.reporting.replay import replay
from stablelm_jax.training import programs
from stablelm_jax.training.begin import ResumeOptions
from stablelm_jax.training.setup import prepare_run

ROWS = [8] * 4 + [16] * 4 + [8] * 4  # of each step
STAGES = {"data.batch_stages": "4:16; 8:8", "data.stages": "6:squares=1"}
ACCEPT = ResumeOptions(accept_config_change=True)


def item(workdir, step):
    return read_run(workdir / f"checkpoints/global_step{step}")


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("whole")
    return workdir, train(bare_config(data, **STAGES), workdir)[1]


def test_a_step_begins_at_the_sum_of_the_batches_before_it():
    sizes = [(0, 8), (4, 16), (8, 8)]
    for start, row in ((0, 0), (3, 100), (4, 7), (9, 1)):
        position = DataPosition(step=start, row=row)
        for step in range(start, 12):
            assert position.first_row(step, sizes) == row + sum(ROWS[start:step])


def test_rows_and_tokens_are_counted_by_the_batches_that_there_were(whole):
    workdir, lines = whole
    seen = {line["step"]: line["tokens_seen"] for line in lines}
    assert seen == {step: 32 * sum(ROWS[:step]) for step in range(1, 13)}
    # 3 of 4 rows are fibonacci's up to step 6, where the weights change: row 64
    assert lines[-1]["tokens/fibonacci"] == 32 * 48
    assert item(workdir, 12)["rows_consumed"] == sum(ROWS)
    for line in lines:
        spent = line["step_seconds"] * line["tokens_per_second"]
        assert spent == pytest.approx(32 * ROWS[line["step"] - 1])


def test_a_run_stopped_at_before_and_after_a_change_is_the_undisturbed_one(data, whole, tmp_path):
    for steps in (3, 4, 6, 9, 12):
        train(bare_config(data, **STAGES, **{"training.num_steps": steps}), tmp_path)
    assert losses(metrics(tmp_path)) == losses(whole[1])
    ours, theirs = item(tmp_path, 12), item(whole[0], 12)
    for part in ("checksums", "tokens", "rows_consumed", "row_order", "loss_sums"):
        assert ours[part] == theirs[part]


def test_a_branch_goes_on_with_its_parents_batches(data, whole, tmp_path):
    parent = {"branch.parent": str(whole[0] / "checkpoints/global_step4")}
    _, lines = train(bare_config(data, **STAGES, **parent), tmp_path)
    assert losses(lines) == {s: loss for s, loss in losses(whole[1]).items() if s > 4}
    assert item(tmp_path, 12)["checksums"] == item(whole[0], 12)["checksums"]


@pytest.mark.by_hand  # in every run: of sequence stages
def test_the_mesh_and_accumulation_change_no_stage(data, whole, tmp_path):
    mesh = {"parallel.data": 4, "parallel.model": 2, "training.accumulation": 2}
    found, expected = losses(train(bare_config(data, **STAGES, **mesh), tmp_path)[1]), whole[1]
    np.testing.assert_allclose(
        list(found.values()), list(losses(expected).values()), rtol=0, atol=2e-5
    )


def test_every_batch_still_to_come_is_compiled_before_the_first_step(data, monkeypatch):
    run, compiled = prepare_run(bare_config(data, **STAGES)), []
    monkeypatch.setattr(
        programs, "compile_step", lambda own: compiled.append(own.config.data.batch_size)
    )
    for first, sizes in ((0, [8, 16]), (4, [16, 8]), (9, [8]), (12, [8])):
        programs.compile_steps(run, first)
        assert compiled == sizes
        compiled.clear()


@pytest.mark.parametrize(
    ("stages", "rows"),
    [("4:16; 8:8; 10:16", ROWS[:10] + [16] * 2), ("4:8; 6:16", ROWS[:6] + [16] * 6)],
    ids=["of later steps", "of steps done"],
)
def test_other_stages_are_taken_on_resuming_and_steps_done_stay_counted(
    data, tmp_path, stages, rows
):
    first = STAGES | {"training.num_steps": 6}
    train(bare_config(data, **first), tmp_path)
    changed = STAGES | {"data.batch_stages": stages}
    with pytest.raises(ValueError, match="data.batch_stages was .*--accept-config-change"):
        train(bare_config(data, **changed), tmp_path)
    _, lines = train(bare_config(data, **changed), tmp_path, options=ACCEPT)
    seen = {line["step"]: line["tokens_seen"] for line in lines}
    assert seen == {step: 32 * sum(rows[:step]) for step in range(1, 13)}
    assert events(tmp_path, "config_changed")
    moved = item(tmp_path, 12)["origin"]["step"]
    assert moved == (0 if stages.startswith("4:16") else 6)


def test_a_step_is_replayed_with_the_batch_that_it_had(whole, monkeypatch):
    monkeypatch.setattr(
        programs, "compile_step", lambda run: tiny.compiled_once("compile_step", run)
    )
    rows = []
    found = replay(str(whole[0]), 7, lambda place: rows.append(place.row), tell=lambda _: None)
    assert found.compared == [5, 6, 7] and not found.differences
    assert rows == list(range(64, 80))  # steps 5 and 6 had 16 rows each


def test_plans_count_all_batches_and_compile_the_largest(data):
    config = bare_config(data, **STAGES)
    assert config_lib.tokens_of_run(config) == 32 * sum(ROWS)
    largest = config_lib.largest_step(config)
    assert (largest.data.batch_size, largest.data.batch_stages) == (16, "")


def test_a_batch_that_does_not_divide_is_refused_by_its_stage(data):
    config = bare_config(data, **{"data.batch_stages": "4:16; 8:20"})
    with pytest.raises(config_lib.ConfigError, match="20 rows from step 8 on do not divide into"):
        config_lib.validate_mesh(config, 8)
    assert config_lib.validate_mesh(config, 4)["data"] == 4


def test_a_run_without_stages_has_the_program_of_before(data):
    run = prepare_run(bare_config(data))
    ((step, config),) = config_lib.batch_stages(run.config)
    assert step == 0 and config_lib.to_dict(config) == config_lib.to_dict(run.config)
    assert dataclasses.replace(run, config=config).spec == run.spec
