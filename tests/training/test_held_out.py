import io
import json
import math

import jax
import numpy as np
import pytest
from jax.sharding import Mesh
from rich.console import Console
from tiny import SOURCES, TALKS, tiny_config, train, write_chats, write_data

from stablelm_jax.model.compute import Compute
from stablelm_jax.model.transformer import init_params, logits
from stablelm_jax.parallel.mesh import make_mesh
from stablelm_jax.reporting.console import show_evaluation
from stablelm_jax.training.held_out import (
    HeldOut,
    HeldOutError,
    evaluate_held_out,
    held_out_line,
    make_eval_step,
)
from stablelm_jax.training.setup import prepare_run

jitted_logits = jax.jit(logits, static_argnums=0)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    data = write_data(tmp_path_factory.mktemp("data") / "sources")
    return prepare_run(tiny_config(data, **{"evaluation.max_rows": 10_000}))


def sums_by_hand(run, params, name):
    """Nats and tokens of each held-out document of a source, [2, D].

    Each piece of a document within a row is run by itself; the first token of all is no target.
    """
    (shard,) = run.sources[name].manifest.held_out.shards
    tokens = np.fromfile(run.sources[name].directory / shard.file, np.int32)
    length = run.spec.sequence_length
    owner = np.cumsum(np.append(0, tokens[:-1] == run.spec.eod))  # document of each token
    sums = np.zeros((2, owner[-1] + 1))
    for start in range(0, len(tokens) - 1, length):
        row = tokens[start : start + length + 1]
        inputs, targets = row[:-1], row[1:]
        ends = np.flatnonzero(inputs == run.spec.eod)
        for piece in np.split(np.arange(len(inputs)), ends + 1):
            if len(piece):
                scores = forward(run, params, inputs[piece])
                nll = np.log(np.exp(scores).sum(-1)) - scores[np.arange(len(piece)), targets[piece]]
                np.add.at(sums, (slice(None), owner[start + 1 + piece]), [nll, np.ones_like(nll)])
    assert sums[1].sum() == len(tokens) - 1  # every token but the first is a target once
    return sums


def stderr_by_hand(nll, tokens):
    """Of the ratio sum(nll) / sum(tokens) over documents, linearised."""
    residuals = nll - nll.sum() / tokens.sum() * tokens
    count = len(nll)
    return math.sqrt(count / (count - 1) * (residuals**2).sum()) / tokens.sum()


def forward(run, params, tokens):
    """Logits of one document, float64; padded behind, which no earlier logit can see."""
    row = np.zeros((1, run.spec.sequence_length), np.int32)
    row[0, : len(tokens)] = tokens
    positions = np.arange(row.shape[1], dtype=np.int32)[None]
    scores = jitted_logits(run.model, params, row, np.ones_like(row), positions)
    return np.asarray(scores[0, : len(tokens)], np.float64)


def test_where_nothing_is_held_out_the_error_says_what_to_do(run):
    nothing = {name: HeldOut([], math.nan) for name in SOURCES}
    with pytest.raises(HeldOutError, match="nothing is held out in fibonacci, squares: prepare"):
        evaluate_held_out(None, {}, nothing, run.mesh, run.objective)


@pytest.mark.parametrize("data, model", [(1, 1), (8, 1), (2, 4)])
def test_held_out_loss_is_the_mean_over_every_token_on_any_mesh(run, data, model):
    mesh: Mesh = make_mesh(data, model, jax.devices()[: data * model])
    params = jax.jit(init_params, static_argnums=0)(run.model, jax.random.key(3))
    compute = Compute(attention="reference")
    step = make_eval_step(run.model, mesh, run.objective, eod=run.spec.eod, compute=compute)
    line = evaluate_held_out(step, params, run.held_out(), mesh, run.objective)
    for name in SOURCES:
        documents_2D = sums_by_hand(run, params, name)
        expected = documents_2D[0].sum() / documents_2D[1].sum()
        assert line[f"eval/loss/{name}"] == pytest.approx(expected, abs=2e-5)
        part = run.manifests[name].held_out
        bits = expected / math.log(2) * part.tokens / part.text_bytes
        assert line[f"eval/bits_per_byte/{name}"] == pytest.approx(bits, abs=2e-5)
        assert line[f"eval/documents/{name}"] == part.documents
        error = stderr_by_hand(*documents_2D)
        assert line[f"eval/loss_stderr/{name}"] == pytest.approx(error, abs=2e-5)


def test_held_out_loss_of_packed_rows_is_that_of_their_documents_one_by_one(tmp_path):
    root = write_chats(write_data(tmp_path / "data"))
    settings = {"data.packing": "best_fit", "evaluation.max_rows": 10_000}
    settings["training.objective"] = "sft"
    run = prepare_run(tiny_config(root, {TALKS: 1.0, "squares": 1.0, "fibonacci": 1.0}, **settings))
    params = jax.jit(init_params, static_argnums=0)(run.model, jax.random.key(3))
    line = evaluate_held_out(run.eval_step, params, run.held_out(), run.mesh, run.objective)
    for name in run.sources:
        rows = run.packed[name, "held_out"]
        sums = []
        for row in range(len(rows)):
            for tokens, counts, _ in rows.segments(row):
                scores = forward(run, params, tokens[:-1])
                nll = np.log(np.exp(scores).sum(-1)) - scores[np.arange(len(counts)), tokens[1:]]
                sums.append((nll[counts].sum(), counts.sum()))
        nll, tokens = np.array(sums, np.float64).T
        assert tokens.sum() == rows.trained
        assert line[f"eval/loss/{name}"] == pytest.approx(nll.sum() / tokens.sum(), abs=2e-5)
        assert line[f"eval/documents/{name}"] == len(sums)
        error = stderr_by_hand(nll, tokens)
        assert line[f"eval/loss_stderr/{name}"] == pytest.approx(error, abs=2e-5)
        assert (f"eval/bits_per_byte/{name}" in line) == (name != TALKS)
    file = io.StringIO()
    show_evaluation(Console(file=file, width=200), run, 0, line)
    assert "all of it" in file.getvalue() and file.getvalue().count("±") == 3


def line_of(documents, languages, tokens_per_byte):
    """The metrics of sources a, b, ... with these (nats, tokens) of their documents."""
    sources = {
        name: HeldOut([], ratio, language)
        for name, ratio, language in zip("abc", tokens_per_byte, languages)
    }
    documents = [np.array(found, float).reshape(-1, 2).T for found in documents]
    nll, tokens = np.array([found.sum(axis=1) for found in documents]).T
    return held_out_line(sources, nll, tokens, documents)


def test_a_language_joins_its_sources_by_tokens_and_by_bytes():
    documents = [[(20, 5), (10, 5)], [(4, 4), (6, 6)], [(4, 1), (2, 1)]]
    line = line_of(documents, ("de", "de", "fr"), (0.5, 0.25, 1.0))
    assert line["eval/loss/language/de"] == 2.0
    assert line["eval/bits_per_byte/language/de"] == pytest.approx(40 / math.log(2) / (20 + 40))
    assert line["eval/loss/language/fr"] == line["eval/loss/c"] == 3.0
    assert line["eval/loss"] == pytest.approx(46 / 22)
    assert line["eval/perplexity/language/fr"] == pytest.approx(math.exp(3))
    assert line["eval/perplexity"] == pytest.approx(math.exp(46 / 22))
    assert line["eval/documents/language/de"] == 4 and line["eval/documents"] == 6


def test_standard_errors_of_several_sources_join_as_of_independent_samples():
    documents = [[(20, 5), (10, 5)], [(4, 4), (7, 6)], [(4, 1), (2, 1)]]
    line = line_of(documents, ("de", "de", None), (1.0, 1.0, 1.0))
    error = {name: line[f"eval/loss_stderr/{name}"] for name in "abc"}
    assert error["a"] == pytest.approx(stderr_by_hand(np.array([20, 10]), np.array([5, 5])))
    joined = math.hypot(10 * error["a"], 10 * error["b"]) / 20
    assert line["eval/loss_stderr/language/de"] == pytest.approx(joined)
    everything = math.hypot(10 * error["a"], 10 * error["b"], 2 * error["c"]) / 22
    assert line["eval/loss_stderr"] == pytest.approx(everything)


def test_one_document_has_no_standard_error_and_its_sum_with_others_has_none_either():
    line = line_of([[(4, 2)], [(1, 1), (2, 1)]], (None, None), (1.0, 1.0))
    assert line["eval/documents/a"] == 1 and line["eval/documents"] == 3
    assert {key for key in line if "stderr" in key} == {"eval/loss_stderr/b"}


def test_a_source_of_no_one_language_and_one_without_tokens_have_no_such_keys():
    line = line_of([[(4, 2)], []], (None, "de"), (0.5, 0.5))
    assert set(line) == {
        *("eval/loss", "eval/perplexity", "eval/documents"),
        *("eval/loss/a", "eval/perplexity/a", "eval/bits_per_byte/a", "eval/documents/a"),
    }


def test_held_out_text_that_cannot_be_read_is_an_error_of_its_own(run):
    def unreadable():
        raise OSError("the disk is gone")
        yield

    sources = {"a": HeldOut(unreadable(), 0.5)}
    with pytest.raises(HeldOutError, match="cannot be read: the disk is gone"):
        evaluate_held_out(None, None, sources, run.mesh, run.objective)


def test_a_run_keeps_the_losses_of_each_document_that_its_metrics_are_of(data, tmp_path):
    settings = {"training.num_steps": 3, "evaluation.every": 3, "samples.every": 0}
    _, lines = train(tiny_config(data, **settings), tmp_path)
    (last,) = [line for line in lines if line["step"] == 3 and "eval/loss" in line]
    kept = json.loads((tmp_path / "held_out/global_step3.json").read_text())
    assert list(kept) == list(SOURCES)
    for name, found in kept.items():
        nll, tokens = np.array([found["nll"], found["tokens"]])
        nll, tokens = nll[tokens > 0], tokens[tokens > 0]
        assert nll.sum() / tokens.sum() == pytest.approx(last[f"eval/loss/{name}"], abs=1e-6)
        assert len(tokens) == last[f"eval/documents/{name}"]
        assert stderr_by_hand(nll, tokens) == pytest.approx(last[f"eval/loss_stderr/{name}"])
