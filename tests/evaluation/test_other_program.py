"""A GGUF file is judged on the rows, masks and documents that its checkpoint is judged on."""

import json
import types

import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from edge_files import config_of, write_files
from scipy.special import log_softmax, rel_entr, softmax

from stablelm_jax import convert, evaluate
from stablelm_jax.checkpoint.saved_model import SavedModel
from stablelm_jax.evaluation.other_program import Differences, GgufScorer, held_out_run, nll
from stablelm_jax.evaluation.scoring import Scorer
from stablelm_jax.interop import llama_cpp
from stablelm_jax.interop.llama_cpp import LlamaCpp
from stablelm_jax.interop.verify import our_logits
from stablelm_jax.model.compute import Compute
from stablelm_jax.parallel.mesh import make_mesh

pytest.importorskip("cyllama")
# Each source's documents are 5 to 59 tokens, rows 32: a row holds several, or a part of one.
ROWS = {
    "cut rows, first tokens not counted, fewer ids": {
        "data.loss_on_first_token": False,
        "training.num_valid_ids": 300,
    },
    "whole documents in a row": {"data.packing": "best_fit", "data.sequence_length": 64},
}


@pytest.fixture(autouse=True)
def one_thread(monkeypatch):
    """llama.cpp's threads spin while they wait, and other tests run beside."""
    monkeypatch.setattr(llama_cpp, "num_processors", lambda: 1)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """(data, checkpoint of random weights, its float32 file)."""
    data, checkpoint = write_files(tmp_path_factory.mktemp("files"))
    out = checkpoint.parent / "model.gguf"
    assert convert.main(["to-gguf", str(checkpoint), str(out), "--type=f32", "--no-verify"]) == 0
    return data, checkpoint, out


@pytest.mark.parametrize("rows", ROWS)
def test_a_float32_file_has_the_held_out_numbers_of_its_checkpoint(files, tmp_path, capsys, rows):
    data, checkpoint, out = files
    config = tiny.write_config(config_of(data, **ROWS[rows]), tmp_path)
    ours = evaluated(capsys, "--checkpoint", checkpoint, "--config", config)
    theirs = evaluated(capsys, "--gguf", out, "--config", config)
    keys = {key for key in ours if key.startswith("eval/")}
    assert theirs.keys() == keys | {"gguf"} and "eval/bits_per_byte/squares" in keys
    assert ours["eval/loss"] > 5 and ours["eval/documents"] == 16
    assert {key: theirs[key] for key in keys} == pytest.approx({k: ours[k] for k in keys}, rel=2e-5)


def evaluated(capsys, *arguments):
    code = evaluate.main([str(argument) for argument in arguments])
    out, err = capsys.readouterr()
    assert code == 0, err
    return json.loads(out)


def test_what_the_file_does_not_fit_is_said(files, tmp_path, capsys):
    data, checkpoint, out = files
    assert evaluate.main(["--gguf", str(out)]) == 1
    assert "names no held-out text: give --config" in capsys.readouterr().err
    other = tiny.write_config(config_of(data, **{"model.vocab_size": 384}), tmp_path)
    assert evaluate.main(["--gguf", str(out), "--config", other]) == 1
    assert "a vocabulary of 320 rows, the data's model 384" in capsys.readouterr().err
    for flags in (["--mt-bench=x"], ["--tasks=piqa"], ["--dtype=bfloat16"]):
        with pytest.raises(SystemExit):
            evaluate.main(["--gguf", str(out), *flags])
        assert "--gguf" in capsys.readouterr().err.splitlines()[-1]


def test_continuations_are_as_likely_as_to_the_checkpoint(files):
    _, checkpoint, out = files
    saved, mesh = SavedModel.open(checkpoint), make_mesh(devices=None)
    rng = np.random.default_rng(5)
    inputs = [rng.integers(0, 257, length).tolist() for length in (9, 4, 30)]
    requests = [(inputs[0], [7]), (inputs[1], [9, 30, 2]), (inputs[2], []), (inputs[0], [8, 7])]
    requests.append(([], []))
    compute = Compute(dtype=jnp.dtype("float32"), num_valid_ids=300)  # of 320 rows
    scorer = Scorer(saved.model, mesh, max_length=32, compute=compute, batch_tokens=128)
    ours = scorer.score(scorer.compute_copy(saved.load(mesh)), requests, lambda done: None)
    llama, read = LlamaCpp(out, 48), []
    logits = llama.logits
    llama.logits = lambda *given: read.append(given) or logits(*given)
    theirs = GgufScorer(llama, 32, 300).score(None, requests, lambda done: None)
    assert [last for _, last in read] == [2, 3]  # an input once, where there are targets
    assert [greedy for _, greedy in ours] == [greedy for _, greedy in theirs]
    np.testing.assert_allclose(*([nats for nats, _ in found] for found in (ours, theirs)), 1e-5)
    assert len({nats for nats, _ in ours}) == 4
    every_NV, some_NV = logits(inputs), logits(inputs, 3)
    np.testing.assert_array_equal(some_NV, every_NV[[6, 7, 8, 10, 11, 12, 40, 41, 42]])


def test_differences_are_of_the_counted_places_in_float64(files):
    data, checkpoint, _ = files
    saved = SavedModel.open(checkpoint)
    run = types.SimpleNamespace(model=saved.model, compute=Compute(num_valid_ids=300))
    rng = np.random.default_rng(6)
    differences, length, width = Differences(run), 6, 300
    ours_NV, theirs_NV = rng.normal(0, 3, (2, length, width)).astype(np.float32)
    differences._ours = lambda params, *row: np.pad(ours_NV, ((0, 0), (0, 20)))[None]
    row = {name: np.ones(length, np.int32) for name in ("tokens", "segment_ids", "positions")}
    row["loss_mask"] = np.array([1, 0, 1, 1, 1, 1], np.float32)
    differences.add(None, row, np.arange(5), theirs_NV[:5])
    p_NV, q_NV = (softmax(x.astype(np.float64), -1) for x in (ours_NV, theirs_NV))
    expected = rel_entr(p_NV, q_NV).sum(-1)[[0, 2, 3, 4]]
    np.testing.assert_allclose(differences.kl, expected, rtol=1e-9)
    assert differences.same == (ours_NV.argmax(-1) == theirs_NV.argmax(-1))[[0, 2, 3, 4]].tolist()
    targets = rng.integers(0, width, length)
    logs_NV = log_softmax(theirs_NV.astype(np.float64), -1)
    np.testing.assert_allclose(nll(theirs_NV, targets), -logs_NV[np.arange(length), targets])


def test_our_logits_are_no_distance_from_themselves(files, tmp_path):
    data, checkpoint, out = files
    config = tiny.write_config(config_of(data), tmp_path)
    saved = SavedModel.open(checkpoint)
    run = held_out_run(saved, config=config, max_rows=4)
    batch = next(iter(run.held_out()["squares"].batches))
    several = np.ptp(batch["segment_ids"], axis=1) > 0  # documents in a row
    row = {name: values[several.argmax()] for name, values in batch.items()}
    params, differences = saved.load(run.mesh), Differences(run)
    found = []
    assert several.any()
    for number in np.unique(row["segment_ids"]):  # each by itself, so that no mask is needed
        ids = row["tokens"][row["segment_ids"] == number]
        padded = np.pad(ids, (0, 32 - len(ids)))
        found.append(our_logits(saved.model, params, padded)[: len(ids)])
    differences.add(params, row, np.arange(32), np.concatenate(found))
    assert len(differences.kl) == 32 and np.abs(differences.kl).max() < 1e-9
    assert all(differences.same)


def test_a_file_of_a_short_context_is_timed_with_the_prompt_of_all(files, capsys):
    _, _, out = files
    llama_cpp.main(str(out))
    found = json.loads(capsys.readouterr().out)
    assert found["prompt_tokens"] == 448 and found["cores"] == 1
    assert found["read_tokens_per_second"] > 0 < found["write_tokens_per_second"]
