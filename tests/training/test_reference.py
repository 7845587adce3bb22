"""Runs of SFT and DPO: the contracts of pretraining hold, and the reference is what it must be."""

import errno
import functools
import json
import math
import os
import shutil
import signal
import threading

import jax
import numpy as np
import pytest
from small_models import random_params
from tiny import CHOICES, TALKS, events, losses, tiny_config, train, write_chats, write_parent

from stablelm_jax import config as config_lib
from stablelm_jax import evaluate
from stablelm_jax.checkpoint.reading import read_run
from stablelm_jax.model.parameters import nest
from stablelm_jax.model.transformer import logits
from stablelm_jax.run.signals import StopRequest
from stablelm_jax.training import reference as reference_module
from stablelm_jax.training.reference import BadReference, Reference
from stablelm_jax.training.setup import prepare_run


@pytest.fixture(scope="module")
def chats(tmp_path_factory):
    return write_chats(tmp_path_factory.mktemp("chats") / "sources")


@pytest.fixture(scope="module")
def weights(chats):
    """Those of `parent`."""
    return random_params(config_lib.model_config(tiny_config(chats)))


@pytest.fixture(scope="module")
def parent(chats, tmp_path_factory):
    return write_parent(tmp_path_factory.mktemp("parent") / "global_step0", chats)


def run_config(objective, chats, parent, **overrides):
    """8 steps from the weights of `parent`."""
    values = {
        "training.objective": objective,
        "training.num_steps": 8,
        "data.packing": "best_fit",
        "branch.parent": str(parent),
        "branch.state": "weights",
        "evaluation.every": 4,
        "samples.every": 0,
    }
    source = {"sft": TALKS, "dpo": CHOICES}[objective]
    return tiny_config(chats, {source: 1.0}, **{**values, **overrides})


@pytest.fixture(scope="module")
def undisturbed(chats, parent, tmp_path_factory):
    """f(objective) -> run folder and metrics lines of a run to its end."""

    @functools.cache
    def run(objective):
        workdir = tmp_path_factory.mktemp(objective)
        code, lines = train(run_config(objective, chats, parent), workdir, picture=True)
        assert code == 0
        return workdir, lines

    return run


both = pytest.mark.parametrize("objective", ["sft", "dpo"])


def checksums(workdir, step=8):
    return read_run(workdir / f"checkpoints/global_step{step}")["checksums"]


def tables(workdir):
    with np.load(workdir / "reference/tables.npz") as found:
        return {name: found[name] for name in found.files if name != "key"}


@both
def test_a_run_learns_what_it_is_shown(objective, undisturbed):
    workdir, lines = undisturbed(objective)
    seen = losses(lines)
    assert seen[8] < seen[1] and (workdir / "loss.png").stat().st_size > 0
    held_out = [line for line in lines if "eval/loss" in line]
    assert [line["step"] for line in held_out] == [0, 4, 8]
    assert held_out[2]["eval/loss"] < held_out[0]["eval/loss"]
    if objective == "dpo":
        assert seen[1] == pytest.approx(math.log(2), abs=1e-5)
        assert held_out[0]["eval/loss"] == pytest.approx(math.log(2), abs=1e-5)
        assert held_out[2]["eval/rewards/accuracy/choices"] > 0.5
        last = next(line for line in lines if line["step"] == 8 and "loss" in line)
        margin = last["rewards/chosen"] - last["rewards/rejected"]
        assert last["rewards/margin"] == pytest.approx(margin, abs=1e-5)
        assert last["answer_tokens/chosen"] >= 3
    else:
        assert "eval/bits_per_byte/talks" not in held_out[0]  # answers alone are scored
        assert held_out[0]["eval/documents"] == 9


@both
def test_a_run_that_is_stopped_goes_on_bit_for_bit(objective, undisturbed, chats, parent, tmp_path):
    workdir, lines = undisturbed(objective)
    train(run_config(objective, chats, parent, **{"training.num_steps": 4}), tmp_path)
    if objective == "dpo":  # lost, it is computed again from the parent, whatever was learnt since
        shutil.rmtree(tmp_path / "reference")
    code, resumed = train(run_config(objective, chats, parent), tmp_path)
    assert code == 0 and checksums(tmp_path) == checksums(workdir)
    assert losses(resumed) == losses(lines)
    if objective == "dpo":
        before, after = tables(workdir), tables(tmp_path)
        assert all(np.array_equal(before[name], after[name]) for name in before | after)


@both
@pytest.mark.by_hand  # tests/training/test_objectives.py has it of one gradient
def test_the_mesh_and_accumulation_change_nothing_but_rounding(
    objective, undisturbed, chats, parent, tmp_path
):
    other = {"parallel.model": 2, "training.accumulation": 2}
    config = run_config(objective, chats, parent, **{**other, "evaluation.every": 0})
    _, lines = train(config, tmp_path)
    expected = losses(undisturbed(objective)[1])
    for step, loss in losses(lines).items():
        assert loss == pytest.approx(expected[step], rel=1e-4)


def test_the_reference_is_the_log_probability_of_each_answer_by_itself(
    undisturbed, chats, parent, weights
):
    run = prepare_run(run_config("dpo", chats, parent))
    found = tables(undisturbed("dpo")[0])
    for split in ("train", "held_out"):
        (name,) = (key for key in found if key.endswith(split))
        expected = by_itself(run, weights, split)
        np.testing.assert_allclose(found[name], expected, rtol=2e-5, atol=1e-4)


def by_itself(run, weights, split):
    """The log-probabilities of what is trained in the documents of the shards, [pairs, 2]."""
    from stablelm_jax.data.manifest import open_shard
    from stablelm_jax.data.shards import read_spans

    score, sums = jax.jit(logits, static_argnums=0), []
    source = run.sources[CHOICES]
    for info in getattr(source.manifest, split).shards:
        path = source.directory / info.file
        shard, spans = open_shard(path, info), read_spans(path, info)
        for number, start in enumerate(shard.document_offsets[:-1]):
            ids = shard.read(start, shard.document_offsets[number + 1])
            row = np.zeros((1, 32), np.int32)
            row[0, : len(ids)] = ids
            positions = np.arange(32, dtype=np.int32)[None]
            out = score(run.model, nest(weights), row, np.ones_like(row), positions)
            logps = jax.nn.log_softmax(out[0])
            (_, first, last), *_ = spans[spans[:, 0] == number]
            places = np.arange(first, last)
            sums.append(float(logps[places - 1, ids[places]].sum()))
    return np.reshape(sums, (-1, 2))


class Interrupted(Exception):
    pass


def interrupted_after(count, monkeypatch, action):
    """`action()` is called in the reference pass after so many batches; returns what was scored."""
    score, scored = reference_module._score, []

    def counted(run, eval_step, params, name, batch):
        score(run, eval_step, params, name, batch)
        scored.append(name)
        if len(scored) == count:
            action()

    monkeypatch.setattr(reference_module, "_score", counted)
    return scored


def test_a_pass_that_was_killed_goes_on_where_it_was_saved(chats, parent, tmp_path, monkeypatch):
    config = run_config("dpo", chats, parent, **{"evaluation.every": 0, "training.num_steps": 3})
    monkeypatch.setattr(reference_module, "SAVE_SECONDS", -1.0)

    def fail():
        raise Interrupted

    with monkeypatch.context() as patch:
        scored = interrupted_after(2, patch, fail)
        with pytest.raises(Interrupted):
            train(config, tmp_path)
    assert json.loads((tmp_path / "reference/key.json").read_text())["done"] > 0
    with monkeypatch.context() as patch:
        rest = interrupted_after(1, patch, lambda: os.kill(os.getpid(), signal.SIGTERM))
        assert train(config, tmp_path)[0] == 75
    with monkeypatch.context() as patch:
        last = interrupted_after(-1, patch, fail)
        assert train(config, tmp_path)[0] == 0
    # What the exception cost was the batch after the last save; the signal cost nothing.
    assert len(scored) + len(rest) + len(last) <= 1 + number_of_batches(config)
    assert not np.isnan(np.concatenate(list(tables(tmp_path).values()))).any()


def number_of_batches(config):
    run = prepare_run(config)
    return sum(-(-len(rows) // run.spec.batch_size) for rows in run.packed.values())


@pytest.fixture
def stopped(undisturbed, chats, parent, tmp_path):
    """A copy of the DPO run, which has its last four steps to go; and f(**overrides) to go on."""
    workdir = shutil.copytree(undisturbed("dpo")[0], tmp_path / "run")
    shutil.rmtree(workdir / "checkpoints/global_step8")
    return workdir, lambda **more: train(run_config("dpo", chats, parent, **more), workdir)


def test_a_parent_that_is_gone_is_named_where_the_reference_is_lost(stopped, tmp_path):
    workdir, go_on = stopped
    shutil.rmtree(workdir / "reference")
    with pytest.raises(BadReference, match="gone.*give back WORKDIR/reference"):
        go_on(**{"branch.parent": str(tmp_path / "gone/global_step0")})


def test_another_parent_is_refused(stopped, tmp_path):
    workdir, go_on = stopped
    shutil.rmtree(workdir / "reference")
    other = workdir / "checkpoints/global_step4"
    with pytest.raises(BadReference, match="not the one that this run began with"):
        go_on(**{"branch.parent": str(other)})


def test_what_was_damaged_is_computed_again_to_the_same_bits(stopped, undisturbed):
    workdir, go_on = stopped
    path = workdir / "reference/tables.npz"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    go_on()
    assert "cannot be read" in events(workdir, "reference")[0]["text"]
    assert checksums(workdir) == checksums(undisturbed("dpo")[0])


def test_a_signal_while_the_parent_is_read_ends_the_process_at_once(stopped, monkeypatch):
    workdir, go_on = stopped
    shutil.rmtree(workdir / "reference")
    left = threading.Event()

    def read(*_):
        os.kill(os.getpid(), signal.SIGTERM)
        assert left.wait(10)
        raise Interrupted

    monkeypatch.setattr(StopRequest, "_leave_at_once", lambda stop: left.set())
    monkeypatch.setattr(reference_module, "read_weights", read)
    with pytest.raises(Interrupted):
        go_on()


def test_too_little_memory_for_a_whole_batch_is_told_with_what_helps(chats, parent, tmp_path):
    def too_large(params, batch):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to")

    run = prepare_run(run_config("dpo", chats, parent))
    (batch, *_) = run.packed_batches(CHOICES, "train")
    with pytest.raises(BadReference, match="config.data.batch_size=8: .* use a smaller batch"):
        reference_module._score(run, too_large, {}, (CHOICES, "train"), batch)


def test_a_disk_that_refuses_the_reference_is_told_once_and_the_run_goes_on(
    stopped, undisturbed, monkeypatch
):
    workdir, go_on = stopped
    shutil.rmtree(workdir / "reference")

    def full(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(np, "savez", full)
    assert go_on()[0] == 0
    (told,) = events(workdir, "disk")
    assert "does not take the reference" in told["text"] and "No space left" in told["text"]
    assert checksums(workdir) == checksums(undisturbed("dpo")[0])


def test_a_table_of_other_weights_is_found_out_before_the_first_update(
    undisturbed, chats, parent, tmp_path
):
    shutil.copytree(undisturbed("dpo")[0] / "reference", tmp_path / "reference")
    with np.load(tmp_path / "reference/tables.npz") as found:
        arrays = dict(found)
    for name in arrays.keys() - {"key"}:
        arrays[name] = arrays[name] * np.float32(1.001)
    np.savez(tmp_path / "reference/tables.npz", **arrays)
    with pytest.raises(BadReference, match="before the first update the loss is .* of choices"):
        train(run_config("dpo", chats, parent), tmp_path)


def test_another_key_means_another_reference_and_a_file_cut_short_none(tmp_path):
    pairs = {("a", "train"): 3, ("a", "held_out"): 1}
    full = Reference(pairs, {"parent": "x", "dtype": "float32"})
    for table in full.tables.values():
        table[:] = np.arange(table.size).reshape(table.shape)
    assert full.load(tmp_path) == "" and full.missing == 0  # nothing is there
    full.save(tmp_path)
    same = Reference(pairs, {"parent": "x", "dtype": "float32"})
    assert same.load(tmp_path) == "" and same.missing == 0
    more = Reference(pairs | {("b", "train"): 2}, {"parent": "x", "dtype": "float32"})
    assert more.load(tmp_path) == "" and more.missing == 2
    other = Reference(pairs, {"parent": "y", "dtype": "float32"})
    assert "another parent" in other.load(tmp_path) and other.missing == 4
    path = tmp_path / "tables.npz"
    path.write_bytes(path.read_bytes()[:-40])
    assert "cannot be read" in same.load(tmp_path) and same.missing == 4


def test_values_are_found_by_source_and_number_and_are_zero_without_a_pair():
    reference = Reference({("a", "train"): 2, ("b", "train"): 3}, {})
    reference.tables["a", "train"][:] = [[1, 2], [3, 4]]
    reference.tables["b", "train"][:] = [[5, 6], [7, 8], [9, 10]]
    batch = {"pair_ids": np.array([[1, -1], [2, 0]]), "source_ids": np.array([0, 1])}
    expected = [[[3, 4], [0, 0]], [[9, 10], [5, 6]]]
    np.testing.assert_array_equal(reference.of(batch, "train"), expected)
    reference.tables["b", "held_out"] = np.float32([[11, 12]])  # of a, nothing is held out
    batch = {"pair_ids": np.array([[0, -1]]), "source_ids": np.array([1])}
    np.testing.assert_array_equal(reference.of(batch, "held_out"), [[[11, 12], [0, 0]]])


def test_dpo_without_a_parent_is_refused(chats, tmp_path):
    config = run_config("dpo", chats, "", **{"branch.state": "all"})
    with pytest.raises(config_lib.ConfigError, match="DPO starts from a model"):
        train(config, tmp_path)


def test_a_branch_of_all_of_a_dpo_run_is_refused(undisturbed, chats, tmp_path):
    half_trained = undisturbed("dpo")[0] / "checkpoints/global_step4"
    config = run_config("dpo", chats, half_trained, **{"branch.state": "all"})
    with pytest.raises(config_lib.ConfigError, match="compares with the weights that it began"):
        train(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def evaluated(workdir, tmp_path, *more):
    """What the verb says of the newest checkpoint."""
    found = tmp_path / "found.json"
    more = ("--batch-tokens", "32", *more)
    assert evaluate.main(["--checkpoint", str(workdir), "--output", str(found), *more]) == 0
    return json.loads(found.read_text())


def test_the_verb_evaluate_says_of_held_out_pairs_what_the_run_said(
    undisturbed, tmp_path, monkeypatch
):
    workdir, lines = undisturbed("dpo")
    last = [line for line in lines if "eval/loss" in line][-1]
    monkeypatch.setattr(reference_module, "_score", None)  # the run's own table has them all
    said = evaluated(workdir, tmp_path)
    for key in ("eval/loss", "eval/rewards/margin/choices", "eval/rewards/accuracy"):
        assert said[key] == pytest.approx(last[key], rel=1e-3, abs=1e-4)


def test_without_its_table_evaluate_computes_the_pairs_it_is_asked_for_and_no_other(
    stopped, undisturbed, tmp_path, monkeypatch
):
    workdir, score, scored = stopped[0], reference_module._score, []
    shutil.rmtree(workdir / "reference")

    def counted(run, eval_step, params, name, batch):
        score(run, eval_step, params, name, batch)
        scored.append((name[1], int((batch["pair_ids"] >= 0).sum())))

    monkeypatch.setattr(reference_module, "_score", counted)
    said = evaluated(workdir, tmp_path)
    last = [line for line in undisturbed("dpo")[1] if "eval/loss" in line][1]
    assert said["eval/loss"] == pytest.approx(last["eval/loss"], rel=1e-3)
    evaluated(workdir, tmp_path, "--max-rows", "1")
    (everything, (split, few)) = scored
    assert everything == ("held_out", 9) and split == "held_out" and 0 < few < 9


def test_without_table_and_parent_evaluate_leaves_out_loss_and_rewards_and_goes_on(
    stopped, parent, tmp_path, capsys
):
    workdir, gone = stopped[0], parent.rename(parent.with_name("gone"))
    shutil.rmtree(workdir / "reference")
    try:
        said = evaluated(workdir, tmp_path)
    finally:
        gone.rename(parent)
    assert said["eval/logps/chosen"] < 0 < said["eval/answer_tokens/chosen"]
    assert not [key for key in said if key.startswith(("eval/loss", "eval/rewards"))]
    told = capsys.readouterr().err
    assert f"loss and rewards are left out: the reference is computed from {parent}" in told
    assert "Give it back" in told and "--config.branch.parent" not in told
