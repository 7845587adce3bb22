import jax
import numpy as np
import pytest

from stablelm_jax.generation.sampler import sample
from stablelm_jax.model.config import ModelConfig
from stablelm_jax.model.transformer import init_params, logits

MODEL = ModelConfig(
    vocab_size=64,
    num_layers=2,
    width=32,
    num_heads=2,
    num_kv_heads=2,
    feed_forward_width=48,
    rotary_fraction=0.5,
    init_std=0.5,
)
EOD = 63
jitted_logits = jax.jit(logits, static_argnums=0)


@pytest.fixture(scope="module")
def params():
    return jax.jit(init_params, static_argnums=0)(MODEL, jax.random.key(1))


def next_logits(params, tokens):
    row = np.zeros((1, 12), np.int32)  # padded behind, which no earlier logit can see
    row[0, : len(tokens)] = tokens
    positions = np.arange(12, dtype=np.int32)[None]
    scores = jitted_logits(MODEL, params, row, np.ones_like(row), positions)
    return np.asarray(scores)[0, len(tokens) - 1]


def draw(params, prompts, **settings):
    settings = {"max_new_tokens": 6, "temperature": 0.0, "top_p": 1.0, "seed": 0} | settings
    return sample(MODEL, params, prompts, eod=EOD, **settings)


def test_temperature_zero_takes_the_likeliest_token_each_time(params):
    prompts = [[5, 9, 2], [7], [1, 2, 3, 4, 5]]
    for prompt, found in zip(prompts, draw(params, prompts)):
        tokens = list(prompt)
        for _ in range(6):
            tokens.append(int(next_logits(params, tokens).argmax()))
            if tokens[-1] == EOD:
                break
        expected = tokens[len(prompt) :]
        assert found == [t for t in expected if t != EOD]


def test_a_prompt_gets_the_same_text_alone_and_beside_others(params):
    together = draw(params, [[5, 9, 2], [7, 8], [3]])
    assert together == [draw(params, [p])[0] for p in ([5, 9, 2], [7, 8], [3])]


def test_the_same_seed_gives_the_same_text_and_another_seed_another(params):
    settings = {"temperature": 1.0, "max_new_tokens": 20}
    first = draw(params, [[5, 9]], seed=1, **settings)
    assert draw(params, [[5, 9]], seed=1, **settings) == first
    assert draw(params, [[5, 9]], seed=2, **settings) != first


def test_samples_follow_the_nucleus_of_the_distribution(params):
    scores = next_logits(params, [5, 9]).astype(np.float64) / 0.8
    probability = np.exp(scores - scores.max())
    probability /= probability.sum()
    order = np.argsort(-probability)
    before = np.cumsum(probability[order]) - probability[order]
    nucleus = order[before < 0.9]
    expected = np.zeros(64)
    expected[nucleus] = probability[nucleus] / probability[nucleus].sum()

    count = 4000
    drawn = draw(params, [[5, 9]] * count, temperature=0.8, top_p=0.9, max_new_tokens=1, seed=3)
    found = np.bincount([t[0] if t else EOD for t in drawn], minlength=64) / count
    assert set(np.flatnonzero(found)) <= set(nucleus)
    # four standard deviations of a binomial share, plus one draw
    np.testing.assert_array_less(
        np.abs(found - expected), 4 * np.sqrt(expected * (1 - expected) / count) + 1 / count
    )


@pytest.mark.parametrize(
    "prompts, settings, message",
    [
        ([[]], {}, "a prompt is empty"),
        ([], {}, "a prompt is empty"),
        ([[1]], {"max_new_tokens": 0}, "max_new_tokens is 0"),
        ([[1]], {"temperature": -1.0}, "temperature -1.0"),
        ([[1]], {"top_p": 0.0}, "top_p 0.0"),
    ],
)
def test_settings_out_of_range_are_refused(params, prompts, settings, message):
    with pytest.raises(ValueError, match=message):
        draw(params, prompts, **settings)
