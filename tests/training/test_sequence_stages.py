"""Rows that grow in a run: no token is skipped or read twice, whatever stops it."""

import numpy as np
import pytest
import tiny
from tiny import bare_config, losses, metrics, train

from stablelm_jax import config as config_lib
from stablelm_jax.checkpoint.reading import read_run
from stablelm_jax.model.flops import train_flops_per_token
from stablelm_jax.reporting.replay import replay
from stablelm_jax.training import programs
from stablelm_jax.training.setup import prepare_run

STAGES = {"data.sequence_stages": "0:16; 6:32"}


def item(workdir, step):
    return read_run(workdir / f"checkpoints/global_step{step}")


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("whole")
    return workdir, train(bare_config(data, **STAGES), workdir)[1]


def test_every_step_reads_the_tokens_that_it_reads_uncut(data):
    cut, uncut = (prepare_run(bare_config(data, **changed)) for changed in (STAGES, {}))
    for step, (made, plain) in enumerate(zip(cut.batches(4), uncut.batches(4)), 4):
        assert made["tokens"].shape == ((16, 16) if step < 6 else (8, 32))
        for name in ("tokens", "targets", "loss_mask"):
            np.testing.assert_array_equal(made[name].ravel(), plain[name].ravel())
        if step == 7:
            break


def test_the_ledger_is_that_of_a_run_without_stages(data, whole):
    run, saved = prepare_run(bare_config(data)), item(whole[0], 12)
    assert saved["rows_consumed"] == 12 * 8
    assert saved["tokens"] == run.tokens_by_source(12 * 8)
    assert saved["row_order"] == run.identity()["row_order"]
    assert [line["tokens_seen"] for line in whole[1]] == [256 * n for n in range(1, 13)]


def test_a_run_stopped_at_before_and_after_a_change_is_the_undisturbed_one(data, whole, tmp_path):
    for steps in (5, 6, 8, 12):
        train(bare_config(data, **STAGES, **{"training.num_steps": steps}), tmp_path)
    assert losses(metrics(tmp_path)) == losses(whole[1])
    assert item(tmp_path, 12)["checksums"] == item(whole[0], 12)["checksums"]


@pytest.mark.by_hand  # a piece of a row is a row to the mesh: tests/training/test_devices.py
def test_the_mesh_and_accumulation_change_no_stage(data, whole, tmp_path):
    mesh = {"parallel.data": 4, "parallel.model": 2, "training.accumulation": 2}
    found = losses(train(bare_config(data, **STAGES, **mesh), tmp_path)[1])
    expected = list(losses(whole[1]).values())
    np.testing.assert_allclose(list(found.values()), expected, rtol=0, atol=2e-5)


def test_documents_of_a_cut_step_are_found_in_its_replay(whole, monkeypatch):
    once = tiny.compiled_once
    monkeypatch.setattr(programs, "compile_step", lambda run: once("compile_step", run))
    found = replay(str(whole[0]), 6, tell=lambda _: None)
    assert found.compared == [5, 6] and not found.differences
    assert sum(share.part for share in found.shares) == pytest.approx(found.loss, rel=1e-5)
    assert sum(share.tokens for share in found.shares) == 256


def test_plans_count_tokens_once_and_the_work_of_each_length(data):
    config = bare_config(data, **STAGES)
    shapes = [
        (step, own.data.batch_size, own.data.sequence_length)
        for step, own in config_lib.batch_stages(config)
    ]
    assert shapes == [(0, 16, 16), (6, 8, 32)]
    assert config_lib.tokens_of_run(config) == 12 * 256
    assert config_lib.largest_step(config).data.sequence_length == 32
    model = config_lib.model_config(config)
    work = [
        tokens * train_flops_per_token(model, own.data.sequence_length, causal=False)
        for tokens, own in config_lib.stage_tokens(config)
    ]
    assert work[0] < work[1]  # of as many tokens


def test_packed_rows_are_not_cut(data):
    config = bare_config(data, **STAGES, **{"data.packing": "best_fit"})
    with pytest.raises(config_lib.ConfigError, match="keeps documents whole, which this cuts"):
        config_lib.validate(config)
