"""Step branches, later weights and changed configs: what goes on exactly, what is refused."""

import dataclasses
import os
import shutil

import pytest
from small_models import random_params, write_checkpoint
from tiny import bare_config, events, losses, metrics, train

from stablelm_jax import config as config_lib
from stablelm_jax.checkpoint.reading import read_run, state_hash
from stablelm_jax.config import ConfigError
from stablelm_jax.model.config import STABLELM_2_1_6B
from stablelm_jax.training.begin import ResumeOptions
from stablelm_jax.training.run import run_training
from stablelm_jax.training.same_run import check_same_run


@pytest.fixture(scope="module")
def parent(data, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("parent")
    return workdir, *train(bare_config(data), workdir)


def checkpoint(workdir, step):
    return workdir / f"checkpoints/global_step{step}"


def branch(data, parent, workdir, step=8, **overrides):
    path = str(checkpoint(parent[0], step))
    return train(bare_config(data, **{"branch.parent": path, **overrides}), workdir)


def test_a_branch_that_changes_nothing_is_its_parent_bit_for_bit_and_records_it(
    data, parent, tmp_path
):
    _, lines = branch(data, parent, tmp_path)
    after = {step: loss for step, loss in losses(parent[2]).items() if step > 8}
    assert losses(lines) == after
    last, original = (read_run(checkpoint(folder, 12)) for folder in (tmp_path, parent[0]))
    assert last["checksums"] == original["checksums"]
    assert last["tokens"] == original["tokens"]
    assert last["row_order"] == original["row_order"]
    saved = read_run(checkpoint(parent[0], 8))
    expected = state_hash(saved["checksums"])
    for step in (8, 12):
        origin = read_run(checkpoint(tmp_path, step))["origin"]
        assert (origin["parent_step"], origin["parent_hash"]) == (8, expected)
        assert origin["parent"] == str(checkpoint(parent[0], 8))
    assert events(tmp_path, "branch")[0]["hash"] == expected


def test_a_branch_goes_on_without_its_parent_once_it_has_begun(data, parent, tmp_path):
    copy = tmp_path / "parent"
    shutil.copytree(parent[0], copy)
    where = str(checkpoint(copy, 8))
    ten = {"branch.parent": where, "training.num_steps": 10}
    train(bare_config(data, **ten), tmp_path / "branch")
    shutil.rmtree(copy)
    _, lines = train(bare_config(data, **{"branch.parent": where}), tmp_path / "branch")
    after = {step: loss for step, loss in losses(parent[2]).items() if step > 8}
    assert losses(lines) == after


def test_a_cooldown_begins_at_its_parents_learning_rate_and_ends_at_zero(data, parent, tmp_path):
    cooldown = {
        "schedule.cooldown_start": 10,
        "schedule.cooldown_steps": 4,
        "training.num_steps": 14,
    }
    _, lines = branch(data, parent, tmp_path, step=12, **cooldown)
    rate = {line["step"]: line["learning_rate"] for line in lines}
    assert rate[13] == pytest.approx(rate[14] * 2)  # updates 12 and 13 of the cooldown 10..14
    before = {line["step"]: line["learning_rate"] for line in parent[2]}
    assert 0 < rate[13] < before[12]


def test_a_branch_with_other_weights_goes_on_in_each_source_where_it_was(data, parent, tmp_path):
    _, lines = branch(data, parent, tmp_path, **{"data.stages": "6:fibonacci=1,squares=1"})
    tokens = {line["step"]: line["tokens/squares"] for line in lines}
    # 8 rows a step: 2 of squares at first, 4 from the branch's step 8 on
    assert tokens[9] == 32 * (8 * 2 + 4) and tokens[12] == 32 * (8 * 2 + 4 * 4)
    stages = read_run(checkpoint(tmp_path, 12))["row_order"]["stages"]
    assert stages == [[0, {"fibonacci": 3, "squares": 1}], [64, {"fibonacci": 1, "squares": 1}]]


@pytest.mark.parametrize(
    ("override", "named"),
    [({"seed": 7}, "config.seed was 1234, now 7"), ({"model.num_layers": 3}, "num_layers")],
)
def test_a_parent_of_another_model_or_order_is_refused(data, parent, tmp_path, override, named):
    with pytest.raises(ValueError, match=named):
        branch(data, parent, tmp_path / "new", **override)


def test_a_parent_that_is_no_checkpoint_is_refused_before_anything_is_made(data, tmp_path):
    with pytest.raises(ConfigError, match="branch.parent=.* is not a checkpoint and"):
        train(bare_config(data, **{"branch.parent": str(tmp_path)}), tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_a_damaged_parent_is_refused(data, parent, tmp_path):
    copy = tmp_path / "global_step8"
    shutil.copytree(checkpoint(parent[0], 8), copy)
    for path in (copy / "params").rglob("d/*"):
        damage(path)
    with pytest.raises(ValueError, match="global_step8"):
        train(bare_config(data, **{"branch.parent": str(copy)}), tmp_path / "new")


def damage(path):
    """Many bytes: a file may hold copies of small leaves that no restore reads."""
    content = bytearray(path.read_bytes())
    for place in range(len(content) // 2, len(content), 97):
        content[place] ^= 16
    path.write_bytes(content)


def test_weights_of_a_later_stage_take_over_at_their_step(data, tmp_path):
    stages = {"data.stages": "4: squares=1; 8: fibonacci=1,squares=3"}
    _, lines = train(bare_config(data, **stages), tmp_path / "whole")
    tokens = {line["step"]: line["tokens/squares"] // 32 for line in lines}
    assert [tokens[step] for step in (4, 5, 8, 9, 12)] == [8, 16, 40, 46, 64]
    for steps in (3, 6, 10, 12):
        train(bare_config(data, **stages, **{"training.num_steps": steps}), tmp_path / "parted")
    assert losses(metrics(tmp_path / "parted")) == losses(lines)


def resumed(data, workdir, options=ResumeOptions(), **overrides):
    changed = bare_config(data, **overrides)
    code = run_training(changed, {}, str(workdir), options)
    return code, metrics(workdir)


@pytest.fixture
def half(data, tmp_path):
    train(bare_config(data, **{"training.num_steps": 8}), tmp_path)
    return tmp_path


def test_a_changed_config_is_refused_with_the_difference(data, half):
    with pytest.raises(ValueError, match="config.optimizer.b2 was 0.95, now 0.9;.*--accept-config"):
        resumed(data, half, **{"optimizer.b2": 0.9})
    with pytest.raises(ValueError, match="config.data.stages was '', now '9:squares"):
        resumed(data, half, **{"data.stages": "9:squares=1"})


def test_harmless_changes_pass(data, parent, half):
    harmless = {
        "checkpoint.every": 5,
        "name": "other",
        "training.log_every": 2,
        "data.batch_size": 8,
    }
    _, lines = resumed(data, half, **harmless)
    assert lines[-1]["grad_norm"] == parent[2][-1]["grad_norm"]
    assert not events(half, "config_changed")


@pytest.mark.by_hand
def test_an_accepted_change_is_recorded_in_events_and_checkpoints(data, half):
    options = ResumeOptions(accept_config_change=True)
    _, lines = resumed(data, half, options, **{"optimizer.b2": 0.9, "data.batch_size": 16})
    changes = {"optimizer.b2": [0.95, 0.9], "data.batch_size": [8, 16]}
    assert read_run(checkpoint(half, 12))["config_changes"] == [{"step": 8, "changes": changes}]
    assert events(half, "config_changed")[0]["optimizer.b2"] == [0.95, 0.9]
    assert lines[-1]["tokens_seen"] == 32 * (8 * 8 + 4 * 16)
    # and the next start takes it as it is
    assert resumed(data, half, **{"optimizer.b2": 0.9, "data.batch_size": 16})[0] == 0


def test_a_stage_that_comes_late_enough_may_be_added_to_a_run(data, half):
    options = ResumeOptions(accept_config_change=True)
    _, lines = resumed(data, half, options, **{"data.stages": "10:squares=1"})
    tokens = {line["step"]: line["tokens/squares"] // 32 for line in lines}
    assert [tokens[step] for step in (8, 10, 11, 12)] == [16, 20, 28, 36]


def of_a_checkpoint(**changed):
    """As much of an item `run` as says whose it is; `changed` by its keys, `a.b` within a part."""
    item = {
        "model_config": dataclasses.asdict(STABLELM_2_1_6B),
        "tokenizer_sha256": "0" * 64,
        "source_hashes": {"web": "1" * 64},
        "rows_consumed": 8,
        "row_order": {
            "seed": 1234,
            "sequence_length": 32,
            "loss_on_first_token": True,
            "stages": [[0, {"web": 1}]],
        },
    }
    for key, value in changed.items():
        part, _, name = key.partition("__")
        if value is None:
            del item[part][name]
        else:
            item[part][name] = value
    return item


def test_a_checkpoint_from_before_a_field_existed_belongs_to_the_run_with_its_default():
    old = of_a_checkpoint(model_config__qk_norm=None, row_order__loss_on_first_token=None)
    check_same_run(old, of_a_checkpoint())
    with pytest.raises(ValueError, match="config.model.qk_norm was False, now True;"):
        check_same_run(old, of_a_checkpoint(model_config__qk_norm=True))
    with pytest.raises(ValueError, match="data.loss_on_first_token was True, now False;"):
        check_same_run(old, of_a_checkpoint(row_order__loss_on_first_token=False))


def test_of_another_model_or_order_only_what_differs_is_shown():
    with pytest.raises(ValueError) as refused:
        check_same_run(of_a_checkpoint(model_config__width=64), of_a_checkpoint(row_order__seed=7))
    assert str(refused.value).startswith(
        "the checkpoint belongs to another run: config.model.width was 64, now 2048; "
        "config.seed was 1234, now 7; give back"
    )


def test_a_field_of_the_model_that_only_the_checkpoint_has_is_named():
    with pytest.raises(ValueError, match="sliding_window was 4, now None"):
        check_same_run(of_a_checkpoint(model_config__sliding_window=4), of_a_checkpoint())


def test_a_newest_checkpoint_whose_disk_is_gone_is_stepped_over_and_told(data, half, tmp_path):
    newest = checkpoint(half, 8)
    newest.rename(tmp_path / "moved")
    newest.symlink_to(tmp_path / "not_mounted")
    checkpoint(half, 0).rename(tmp_path / "moved0")
    checkpoint(half, 0).symlink_to(tmp_path / "moved0")
    code, lines = resumed(data, half, **{"training.num_steps": 8})
    assert code == 0 and losses(lines).keys() == set(range(1, 9))
    (told,) = events(half, "damaged_checkpoint")
    assert "not_mounted, which is not there" in told["text"]
    assert os.path.islink(half / "checkpoints/global_step8.damaged") and newest.is_dir()


def test_an_imported_checkpoint_among_those_of_a_run_is_told_for_what_it_is(data, tmp_path):
    model = config_lib.model_config(bare_config(data))
    path = tmp_path / "checkpoints/global_step5"
    write_checkpoint(path, model, random_params(model), data / "tokenizer.json")
    with pytest.raises(ValueError, match="was imported and holds weights alone"):
        train(bare_config(data), tmp_path)
