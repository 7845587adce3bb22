import math

import jax
import numpy as np
import pytest
from jax.sharding import Mesh
from tiny import SOURCES, tiny_config, write_data

from stablelm_jax.model.compute import Compute
from stablelm_jax.model.transformer import init_params, logits
from stablelm_jax.parallel.mesh import make_mesh
from stablelm_jax.training.held_out import (
    HeldOut,
    HeldOutError,
    evaluate_held_out,
    held_out_line,
    make_eval_step,
    mean_losses,
)
from stablelm_jax.training.setup import prepare_run

jitted_logits = jax.jit(logits, static_argnums=0)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    data = write_data(tmp_path_factory.mktemp("data") / "sources")
    return prepare_run(tiny_config(data, **{"evaluation.max_rows": 10_000}))


def loss_by_hand(run, params, name):
    """The held-out rows of one source, each document by itself, in float64 sums."""
    (shard,) = run.sources[name].manifest.held_out.shards
    tokens = np.fromfile(run.sources[name].directory / shard.file, np.int32)
    length, total, count = run.spec.sequence_length, 0.0, 0
    for start in range(0, len(tokens) - 1, length):
        row = tokens[start : start + length + 1]
        inputs, targets = row[:-1], row[1:]
        ends = np.flatnonzero(inputs == run.spec.eod)
        for piece in np.split(np.arange(len(inputs)), ends + 1):
            if len(piece):
                scores = forward(run, params, inputs[piece])
                log_sum = np.log(np.exp(scores).sum(-1))
                total += (log_sum - scores[np.arange(len(piece)), targets[piece]]).sum()
        count += len(inputs)
    assert count == len(tokens) - 1  # every token but the first is a target once
    return total / count


def forward(run, params, tokens):
    """Logits of one document, float64; padded behind, which no earlier logit can see."""
    row = np.zeros((1, run.spec.sequence_length), np.int32)
    row[0, : len(tokens)] = tokens
    positions = np.arange(row.shape[1], dtype=np.int32)[None]
    scores = jitted_logits(run.model, params, row, np.ones_like(row), positions)
    return np.asarray(scores[0, : len(tokens)], np.float64)


@pytest.mark.parametrize("data, model", [(1, 1), (8, 1), (2, 4)])
def test_held_out_loss_is_the_mean_over_every_token_on_any_mesh(run, data, model):
    mesh: Mesh = make_mesh(data, model, jax.devices()[: data * model])
    params = jax.jit(init_params, static_argnums=0)(run.model, jax.random.key(3))
    step = make_eval_step(run.model, mesh, num_sources=2, compute=Compute(attention="reference"))
    line = evaluate_held_out(step, params, run.held_out(), mesh)
    for name in SOURCES:
        expected = loss_by_hand(run, params, name)
        assert line[f"eval/loss/{name}"] == pytest.approx(expected, abs=2e-5)
        part = run.manifests[name].held_out
        bits = expected / math.log(2) * part.tokens / part.text_bytes
        assert line[f"eval/bits_per_byte/{name}"] == pytest.approx(bits, abs=2e-5)


def source(tokens_per_byte, language=None):
    return HeldOut([], tokens_per_byte, language)


def test_a_language_joins_its_sources_by_tokens_and_by_bytes():
    sources = {"a": source(0.5, "de"), "b": source(0.25, "de"), "c": source(1.0, "fr")}
    line = held_out_line(sources, np.array([30.0, 10.0, 6.0]), np.array([10, 10, 2]))
    assert line["eval/loss/language/de"] == 2.0
    assert line["eval/bits_per_byte/language/de"] == pytest.approx(40 / math.log(2) / (20 + 40))
    assert line["eval/loss/language/fr"] == line["eval/loss/c"] == 3.0
    assert line["eval/loss"] == pytest.approx(46 / 22)
    assert line["eval/perplexity/language/fr"] == pytest.approx(math.exp(3))
    assert line["eval/perplexity"] == pytest.approx(math.exp(46 / 22))


def test_a_source_of_no_one_language_and_one_without_tokens_have_no_such_keys():
    sources = {"code": source(0.5), "none": source(0.5, "de")}
    line = held_out_line(sources, np.array([4.0, 0.0]), np.array([2, 0]))
    assert set(line) == {
        *("eval/loss", "eval/perplexity"),
        *("eval/loss/code", "eval/perplexity/code", "eval/bits_per_byte/code"),
    }


def test_held_out_text_that_cannot_be_read_is_an_error_of_its_own(run):
    def unreadable():
        raise OSError("the disk is gone")
        yield

    sources = {"a": HeldOut(unreadable(), 0.5)}
    with pytest.raises(HeldOutError, match="cannot be read: the disk is gone"):
        evaluate_held_out(None, None, sources, run.mesh)


def test_means_weigh_tokens_and_leave_out_sources_without_any():
    line = mean_losses("eval/loss", ["a", "b", "c"], np.array([8.0, 3.0, 0.0]), np.array([2, 3, 0]))
    assert line == {"eval/loss": 2.2, "eval/loss/a": 4.0, "eval/loss/b": 1.0}
