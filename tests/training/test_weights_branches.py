"""Branches that take their parent's weights alone: what begins anew, what may differ."""

import json
import shutil

import jax
import numpy as np
import pytest
from seeds import new_rng
from small_models import random_params, read_checkpoint, write_checkpoint
from tiny import (
    CHAT,
    TALKS,
    VOCAB,
    bare_config,
    events,
    losses,
    tiny_config,
    train,
    write_chats,
    write_data,
)

from stablelm_jax import config as config_lib
from stablelm_jax import evaluate
from stablelm_jax.checkpoint.reading import read_arrays, read_run, state_hash
from stablelm_jax.checkpoint.saved_model import SavedModel
from stablelm_jax.config import ConfigError
from stablelm_jax.tokenizer.chat import ChatTemplate
from stablelm_jax.tokenizer.tokenizer import load_tokenizer
from stablelm_jax.training.begin import position_of
from stablelm_jax.training.same_run import ResumeError, check_same_weights
from stablelm_jax.training.setup import prepare_run
from stablelm_jax.training.state import state_of_weights


@pytest.fixture(scope="module")
def parent(data, tmp_path_factory):
    """A checkpoint of a run, with moments and a place in its data."""
    workdir = tmp_path_factory.mktemp("parent")
    train(bare_config(data, **{"training.num_steps": 4}), workdir)
    return workdir / "checkpoints/global_step4"


@pytest.fixture(scope="module")
def imported(data, tmp_path_factory):
    """Random weights, as `convert from-hf` writes them."""
    path = tmp_path_factory.mktemp("imported") / "global_step0"
    model = config_lib.model_config(bare_config(data))
    params = random_params(model, int(new_rng().integers(2**32)))
    tuned = {"chat_template": "{{ messages }}", "end_ids": [VOCAB - 8]}
    return write_checkpoint(path, model, params, data / "tokenizer.json", **tuned)


def of_weights(data, parent, **overrides):
    """The config of a branch of four steps."""
    values = {"branch.parent": str(parent), "branch.state": "weights", "training.num_steps": 4}
    return bare_config(data, **{**values, **overrides})


def checkpoint(workdir, step):
    return workdir / f"checkpoints/global_step{step}"


@pytest.fixture(scope="module")
def whole(data, parent, tmp_path_factory):
    """The folder and the metrics of a branch of the weights of `parent`."""
    workdir = tmp_path_factory.mktemp("whole")
    return workdir, train(of_weights(data, parent), workdir)[1]


def test_all_but_the_weights_begins_anew(parent, whole):
    workdir, lines = whole
    first, taken = read_run(checkpoint(workdir, 0)), read_run(parent)
    mine = {k: v for k, v in first["checksums"].items() if k.startswith("params/")}
    assert mine == {k: v for k, v in taken["checksums"].items() if k.startswith("params/")}
    # All moments, the optimizer's count and the updates skipped are zero, and so are their sums.
    assert {v for k, v in first["checksums"].items() if k not in mine} == {0}
    assert (first["step"], first["rows_consumed"], first["train_seconds"]) == (0, 0, 0)
    assert set(first["tokens"].values()) == {0} and not first["config_changes"]
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert lines[0]["learning_rate"] == 0 < lines[1]["learning_rate"]  # it warms up again


def test_it_remembers_where_its_weights_are_from(parent, whole):
    expected = state_hash(read_run(parent)["checksums"])
    for step in (0, 4):
        origin = read_run(checkpoint(whole[0], step))["origin"]
        found = [origin[key] for key in ("step", "row", "parent", "parent_step", "parent_hash")]
        assert found == [0, 0, str(parent), 4, expected]
    (told,) = events(whole[0], "branch")
    assert (told["hash"], told["step"]) == (expected, 4)
    assert "fresh moments, from step 0 and the beginning of the data" in told["text"]


def test_it_goes_on_bit_for_bit_without_its_parent(data, parent, whole, tmp_path):
    copy = shutil.copytree(parent, tmp_path / "global_step4")
    train(of_weights(data, copy, **{"training.num_steps": 3}), tmp_path / "parted")
    shutil.rmtree(copy)
    _, again = train(of_weights(data, copy), tmp_path / "parted")
    assert losses(again) == losses(whole[1])
    ours, parted = (read_run(checkpoint(path, 4)) for path in (whole[0], tmp_path / "parted"))
    assert ours["checksums"] == parted["checksums"]


@pytest.mark.by_hand
def test_its_held_out_text_is_evaluated_like_that_of_any_run(whole, capsys):
    assert evaluate.main(["--checkpoint", str(whole[0]), "--max-rows", "1"]) == 0
    assert json.loads(capsys.readouterr().out)["step"] == 4


def test_an_imported_parent_gives_the_weights_that_are_all_it_has(data, imported, tmp_path):
    taken_as_such = {"branch.state": "all", "training.num_steps": 3}
    train(of_weights(data, imported, **taken_as_such), tmp_path)
    ours = read_checkpoint(checkpoint(tmp_path, 0))
    for name, value in read_checkpoint(imported).items():
        np.testing.assert_array_equal(ours[name], value, err_msg=name)
    assert "which holds nothing else" in events(tmp_path, "branch")[0]["text"]
    # What it was tuned on stays with the weights: end_ids[0] is the end of a document here.
    expected = ChatTemplate("tokenizer", "{{ messages }}", ("<|endoftext|>",))
    assert SavedModel.open(tmp_path).chat == SavedModel.open(imported).chat == expected
    on = {"training.num_steps": 4}
    train(of_weights(data, imported, **taken_as_such | on), tmp_path)  # resumed
    assert read_run(checkpoint(tmp_path, 4))["chat"] == expected.to_json()


def test_the_template_of_a_runs_own_conversations_comes_before_its_parents(tmp_path, parent):
    chats = write_chats(tmp_path)
    inherited = {**read_run(parent), "chat": {**CHAT, "name": "the parent's"}}
    manifest = shutil.copytree(chats / TALKS, chats / "more") / "manifest.json"
    fields = json.loads(manifest.read_text())
    manifest.write_text(json.dumps(fields | {"source": "more"}))
    tuning = {"training.objective": "sft", "data.packing": "best_fit"}
    both = tiny_config(chats, sources={TALKS: 1.0, "more": 1.0}, **tuning)
    assert prepare_run(both, saved=inherited).chat == ChatTemplate.from_json(CHAT)
    other = {"source": "more", "chat": fields["chat"] | {"name": "another"}}
    manifest.write_text(json.dumps(fields | other))
    told = f"in several chat templates .more in another, talks in {CHAT['name']}."
    with pytest.raises(ConfigError, match=told):
        prepare_run(both)


def test_what_was_tuned_on_no_conversation_has_no_template(parent):
    assert "chat" not in read_run(parent) and SavedModel.open(parent).chat is None


def test_the_weights_lie_on_the_mesh_of_the_branch(data, imported):
    overrides = {"parallel.data": 4, "parallel.model": 2}
    run = prepare_run(of_weights(data, imported, **overrides))
    arrays = read_arrays(imported, {"params": run.abstract.params}, read_run(imported))
    state = state_of_weights(run.optimizer, run.abstract, arrays["params"])
    placed = jax.tree.map(lambda x, like: x.sharding == like.sharding, state, run.abstract)
    assert all(jax.tree.leaves(placed))


CHANGED = {
    "seed": 7,
    "data.sequence_length": 64,
    "data.batch_size": 16,
    "model.rotary_theta": 40_000.0,
    "model.init_std": 0.5,
    "training.num_valid_ids": VOCAB,
    "training.num_steps": 3,
    "schedule.kind": "cosine",
    "optimizer.b2": 0.99,
}


def test_length_seed_theta_data_and_valid_ids_may_differ(parent, tmp_path):
    config = of_weights(write_data(tmp_path / "data", seed=1), parent, **CHANGED)
    saved, run = read_run(parent), prepare_run(config, position_of(config))
    assert run.identity()["data_hash"] != saved["data_hash"]
    changes = check_same_weights(parent, saved, run.identity(), run.tokenizer)
    assert changes == {"model.rotary_theta": [1e4, 4e4], "model.init_std": [0.02, 0.5]}


@pytest.mark.by_hand
def test_a_branch_in_which_all_of_these_differ_trains_and_says_so(parent, tmp_path):
    other = write_data(tmp_path / "data", seed=1)
    code, lines = train(of_weights(other, parent, **CHANGED), tmp_path / "run")
    assert code == 0 and lines[-1]["tokens_seen"] == 3 * 16 * 64
    text = events(tmp_path / "run", "branch")[0]["text"]
    assert "config.model.rotary_theta was 10000.0, now 40000.0" in text


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ({"model.width": 128}, "config.model.width was 64, now 128"),
        ({"model.num_layers": 3}, "config.model.num_layers was 2, now 3"),
        ({"model.num_kv_heads": 2}, "config.model.num_kv_heads was 4, now 2"),
        ({"model.vocab_size": 256}, "config.model.vocab_size was 128, now 256"),
        ({"model.block_norm_bias": True}, "config.model.block_norm_bias was False, now True"),
        ({"model.norm_epsilon": 1e-6}, "config.model.norm_epsilon was 1e-05, now 1e-06"),
    ],
)
def test_weights_of_another_model_are_refused_by_name(data, parent, tmp_path, override, named):
    with pytest.raises(ConfigError, match=named):
        train(of_weights(data, parent, **override), tmp_path / "new")
    assert not (tmp_path / "new").exists()


def other_file(data, folder, change=lambda spec: spec):
    """A tokenizer of another sha256 than that of the data; `change`: what it says, altered."""
    file = folder / "other.json"
    file.write_text(json.dumps(change(json.loads((data / "tokenizer.json").read_bytes()))))
    return load_tokenizer(file)


def of_this_model(parent, tokenizer):
    return {**read_run(parent), "tokenizer_sha256": tokenizer.sha256}


def test_another_file_with_the_same_ids_is_the_same_tokenizer(data, parent, tmp_path):
    own = other_file(data, tmp_path)
    assert own.sha256 != read_run(parent)["tokenizer_sha256"]
    assert check_same_weights(parent, read_run(parent), of_this_model(parent, own), own) == {}


def test_a_tokenizer_of_other_ids_is_refused_with_some_of_them(data, parent, tmp_path):
    def swap(spec):
        spec["model"]["vocab"] |= {"w3": 5, "w5": 3}
        return spec

    own = other_file(data, tmp_path, swap)
    with pytest.raises(ConfigError, match="2 tokens have other ids.*'w3' was 3, now 5"):
        check_same_weights(parent, read_run(parent), of_this_model(parent, own), own)


def test_where_the_parents_tokenizer_is_gone_its_ids_cannot_be_compared(data, parent, tmp_path):
    saved, own = read_run(parent), other_file(data, tmp_path)
    saved["config"]["data"]["tokenizer"] = "gone.json"
    with pytest.raises(ConfigError, match="not to be found.*put its tokenizer.json into"):
        check_same_weights(tmp_path / "global_step4", saved, of_this_model(parent, own), own)


def test_a_run_or_an_import_stands_for_its_newest_checkpoint(data, parent, imported):
    for folder, newest in ((parent.parents[1], parent), (imported.parent, imported)):
        position = position_of(of_weights(data, folder))
        assert (position.parent, position.parent_step) == (str(newest), int(newest.name[11:]))


def test_a_branch_keeps_the_whole_path_of_its_parent(data, parent, monkeypatch):
    monkeypatch.chdir(parent.parent)
    assert position_of(of_weights(data, parent.name)).parent == str(parent)


def test_a_damaged_or_unfinished_or_missing_parent_is_refused(data, parent, tmp_path):
    damaged = shutil.copytree(parent, tmp_path / "global_step4")
    for path in (damaged / "params").rglob("d/*"):
        content = bytearray(path.read_bytes())
        for place in range(len(content) // 2, len(content), 97):
            content[place] ^= 16
        path.write_bytes(content)
    with pytest.raises(ValueError, match="global_step4 (is damaged|cannot be read)"):
        train(of_weights(data, damaged), tmp_path / "run")
    for missing in (tmp_path / "global_step7", tmp_path / "nothing"):
        with pytest.raises(ValueError, match=f"{missing} is not a checkpoint"):
            train(of_weights(data, missing), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_branch_of_all_that_has_other_data_is_told_to_take_the_weights_alone(parent, tmp_path):
    config = of_weights(write_data(tmp_path / "data", seed=1), parent, **{"branch.state": "all"})
    with pytest.raises(ResumeError, match="data_hash.*alone, with --config.branch.state=weights"):
        train(config, tmp_path / "run")


def test_weights_need_a_parent(data):
    with pytest.raises(
        ConfigError, match="branch.state=.weights.: .* without config.branch.parent"
    ):
        config_lib.validate(bare_config(data, **{"branch.state": "weights"}))


def test_the_place_in_the_data_of_a_branch_that_has_not_begun_is_its_beginning(data, parent):
    assert position_of(of_weights(data, parent)).first_row(0, [(0, 8)]) == 0
