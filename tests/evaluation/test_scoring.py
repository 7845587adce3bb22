"""Log-likelihoods against plain logits, on meshes of all kinds."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from stablelm_jax.evaluation.scoring import Scorer
from stablelm_jax.model.compute import Compute
from stablelm_jax.model.config import ModelConfig
from stablelm_jax.model.parameters import nest, parameter_table
from stablelm_jax.model.transformer import logits
from stablelm_jax.parallel.mesh import make_mesh

MODEL = ModelConfig(
    vocab_size=96, num_layers=2, width=32, num_heads=4, num_kv_heads=4, feed_forward_width=64
)
LENGTH = 80


@pytest.fixture(scope="module")
def params():
    rng = np.random.default_rng(5)
    return nest(
        {
            row.name: jnp.asarray(rng.normal(row.init_std == "ones", 0.3, row.shape), jnp.float32)
            for row in parameter_table(MODEL)
        }
    )


@pytest.fixture(scope="module")
def requests():
    """Short and long ones, some of one input, in no order."""
    rng = np.random.default_rng(6)
    found = []
    for length, scored in [(3, 1), (70, 70), (40, 4), (1, 1)]:
        tokens = rng.integers(0, 96, length).tolist()
        found += [(tokens, rng.integers(0, 96, scored).tolist()) for _ in range(3)]
    return [found[i] for i in rng.permutation(len(found))]


@pytest.fixture(scope="module")
def expected(params, requests):
    return [by_hand(params, *request) for request in requests]


@jax.jit
def plain_logits(params, row):
    positions = jnp.arange(LENGTH, dtype=jnp.int32)[None]
    return logits(MODEL, params, row, jnp.ones_like(row), positions)[0]


def by_hand(params, tokens, targets):
    row = np.zeros((1, LENGTH), np.int32)
    row[0, : len(tokens)] = tokens
    scores = np.asarray(plain_logits(params, row), np.float64)
    scores = scores[len(tokens) - len(targets) : len(tokens)]
    logprobs = scores - np.log(np.exp(scores).sum(-1, keepdims=True))
    picked = logprobs[np.arange(len(targets)), targets]
    return picked.sum(), bool((scores.argmax(-1) == targets).all())


def scored(params, requests, mesh, on_answers=lambda count: None, **compute):
    scorer = Scorer(
        MODEL, mesh, max_length=LENGTH, compute=Compute(**compute), batch_tokens=2 * LENGTH
    )
    return scorer.score(scorer.compute_copy(params), requests, on_answers)


@pytest.mark.parametrize("data, model", [(8, 1), (2, 4)])
def test_log_likelihoods_are_those_of_plain_logits_on_any_mesh(
    params, requests, expected, data, model
):
    seen = []
    mesh = make_mesh(data, model, jax.devices()[: data * model])
    found = scored(params, requests, mesh, seen.append)
    np.testing.assert_allclose([f[0] for f in found], [e[0] for e in expected], atol=2e-4)
    assert [f[1] for f in found] == [e[1] for e in expected]
    assert seen == sorted(seen) and seen[-1] == len(requests)


def test_what_greedy_choice_says_is_called_greedy(params, requests):
    tokens = requests[0][0]
    row = np.zeros((1, LENGTH), np.int32)
    row[0, : len(tokens)] = tokens
    best = int(np.asarray(plain_logits(params, row))[len(tokens) - 1].argmax())
    pairs = [(tokens, [best]), (tokens, [(best + 1) % 96]), (tokens, [])]
    found = scored(params, pairs, make_mesh(1, 1, jax.devices()[:1]))
    assert [greedy for _, greedy in found] == [True, False, True]
    assert found[2][0] == 0.0


def test_rows_of_the_vocabulary_that_stand_for_nothing_get_no_probability(params):
    mesh = make_mesh(1, 1, jax.devices()[:1])
    found = scored(params, [([4, 5], [t]) for t in range(90)], mesh, num_valid_ids=90)
    assert np.exp([logprob for logprob, _ in found]).sum() == pytest.approx(1, abs=1e-5)
