"""Each rule of sampling, held against transformers' processors of logits and against counting."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from stablelm_jax.generation.sampling import Sampling, choose, penalised, truncated

ROWS, VOCAB = 5, 200


@pytest.fixture(scope="module")
def logits_BV():
    return np.random.default_rng(0).normal(0, 4, (ROWS, VOCAB)).astype(np.float32)


@pytest.fixture(scope="module")
def prompts_BT():
    return np.random.default_rng(1).integers(0, VOCAB, (ROWS, 30))


@pytest.mark.parity
@pytest.mark.parametrize("penalty", [0.7, 1.3])
def test_the_repetition_penalty_is_that_of_transformers(logits_BV, prompts_BT, penalty):
    torch, process = _torch(), _processors()
    theirs = process.RepetitionPenaltyLogitsProcessor(penalty)
    expected = theirs(torch.tensor(prompts_BT), torch.tensor(logits_BV)).numpy()
    seen_BV = np.zeros((ROWS, VOCAB), bool)
    np.put_along_axis(seen_BV, prompts_BT, True, 1)
    np.testing.assert_array_equal(penalised(logits_BV, seen_BV, penalty), expected)


@pytest.mark.parity
@pytest.mark.parametrize("top_k, top_p", [(1, 1.0), (7, 1.0), (VOCAB + 9, 1.0), (VOCAB, 0.3)])
def test_top_k_or_top_p_keeps_the_tokens_that_transformers_keeps(logits_BV, top_k, top_p):
    torch, process = _torch(), _processors()
    theirs = torch.tensor(logits_BV)
    if top_k <= VOCAB:
        theirs = process.TopKLogitsWarper(top_k)(None, theirs)
    theirs = process.TopPLogitsWarper(top_p)(None, theirs)
    np.testing.assert_array_equal(truncated(logits_BV, top_k, top_p), theirs.numpy())


@pytest.mark.parity
def test_all_rules_together_have_the_order_of_transformers(logits_BV, prompts_BT, monkeypatch):
    torch, process = _torch(), _processors()
    settings = Sampling(temperature=0.6, top_p=0.8, top_k=40, repetition_penalty=1.2)
    theirs = torch.tensor(logits_BV)
    for rule in (
        process.RepetitionPenaltyLogitsProcessor(1.2),
        process.TemperatureLogitsWarper(0.6),
        process.TopKLogitsWarper(40),
        process.TopPLogitsWarper(0.8),
    ):
        theirs = rule(torch.tensor(prompts_BT), theirs)
    seen_BV = np.zeros((ROWS, VOCAB), bool)
    np.put_along_axis(seen_BV, prompts_BT, True, 1)
    drawn_from = []

    def draw(key, logits_V):
        jax.debug.callback(lambda x: drawn_from.append(np.asarray(x)), logits_V)
        return jnp.argmax(logits_V)

    monkeypatch.setattr(jax.random, "categorical", draw)
    rows = np.arange(ROWS)
    choose(settings.stages, settings.numbers(), logits_BV, seen_BV, rows, rows)
    jax.effects_barrier()
    found = np.array(sorted(drawn_from, key=lambda x: x.tolist()))
    expected = np.array(sorted(theirs.numpy(), key=lambda x: x.tolist()))
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_the_likeliest_token_stays_however_small_the_nucleus():
    kept = truncated(jnp.array([[0.0, 3.0, 1.0]]), 0, 1e-9)
    assert np.isfinite(kept).tolist() == [[False, True, False]]


def test_draws_follow_the_nucleus_of_the_distribution(logits_BV):
    count, settings = 4000, Sampling(temperature=2.0, top_p=0.9, seed=3)
    scores = logits_BV[0].astype(np.float64) / 2.0
    probability = np.exp(scores - scores.max()) / np.exp(scores - scores.max()).sum()
    order = np.argsort(-probability)
    before = np.cumsum(probability[order]) - probability[order]
    nucleus = order[before < 0.9]
    expected = np.zeros(VOCAB)
    expected[nucleus] = probability[nucleus] / probability[nucleus].sum()
    same_BV = np.broadcast_to(logits_BV[0], (count, VOCAB))
    rows = np.arange(count)
    drawn = choose(settings.stages, settings.numbers(), same_BV, None, rows, 0 * rows + 7)
    found = np.bincount(drawn, minlength=VOCAB) / count
    assert set(np.flatnonzero(found)) <= set(nucleus)
    # four standard deviations of a binomial share, plus one draw
    allowed = 4 * np.sqrt(expected * (1 - expected) / count) + 1 / count
    np.testing.assert_array_less(np.abs(found - expected), allowed)


@pytest.mark.parametrize(
    "settings, stages",
    [
        ({}, ()),
        ({"top_p": 0.5, "top_k": 3}, ()),  # the likeliest token is in every set
        ({"repetition_penalty": 1.1}, ("penalty",)),
        ({"temperature": 0.5}, ("draw",)),
        ({"temperature": 0.5, "top_p": 0.9}, ("draw", "top_p")),
        ({"temperature": 0.5, "top_k": 9}, ("draw", "top_k")),
    ],
)
def test_a_program_holds_only_what_its_settings_ask_for(settings, stages):
    assert Sampling(**settings).stages == stages


def _torch():
    return pytest.importorskip("torch")


def _processors():
    return pytest.importorskip("transformers").generation.logits_process


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": 1e-40},
        {"temperature": 1e-300, "top_p": 0.9, "top_k": 3},
        {"temperature": 1e-5, "top_k": 10**12},
        {"temperature": 1.0, "top_p": 1e-50},
        {"temperature": 1.0, "top_k": 1, "repetition_penalty": 1e-30},
    ],
)
def test_settings_at_the_edge_of_what_float32_holds_take_the_likeliest_token(logits_BV, settings):
    settings, rows = Sampling(**settings), np.arange(ROWS)
    seen_BV = np.zeros((ROWS, VOCAB), bool)
    chosen_B = choose(settings.stages, settings.numbers(), logits_BV, seen_BV, rows, rows)
    np.testing.assert_array_equal(chosen_B, logits_BV.argmax(1))


def test_at_the_largest_temperature_tokens_that_are_masked_stay_so(logits_BV):
    settings, rows = Sampling(temperature=1e30), np.arange(ROWS)
    masked_BV = np.where(np.arange(VOCAB) < 5, logits_BV, -np.inf)
    chosen_B = choose(settings.stages, settings.numbers(), masked_BV, None, rows, rows)
    assert chosen_B.max() < 5


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1e-9, 1e39, 1e300])
@pytest.mark.parametrize("name", ["temperature", "top_p", "repetition_penalty"])
def test_numbers_out_of_range_are_refused_by_name(name, value):
    with pytest.raises(ValueError, match=f"{name} is "):
        Sampling(**{name: value})
