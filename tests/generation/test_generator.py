import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_models import GENERATES as MODEL
from small_models import random_tensors

from stablelm_jax.generation import programs
from stablelm_jax.generation.generator import Generator, padded_length
from stablelm_jax.model.parameters import parameter_table
from stablelm_jax.model.transformer import logits
from stablelm_jax.parallel import sharding
from stablelm_jax.parallel.mesh import make_mesh

PROMPTS = [[5, 9, 2], [7], [1, 2, 3, 4, 5], list(range(1, 31)), [60, 61]]
jitted_logits = jax.jit(logits, static_argnums=0)


@pytest.fixture(scope="module")
def params():
    return random_tensors()


@pytest.fixture(scope="module")
def generator(params):
    return Generator(MODEL, params, batch_size=3, max_length=128, chunk=5)


def next_logits(params, tokens):
    row = np.zeros((1, 64), np.int32)  # padded behind, which no earlier logit can see
    row[0, : len(tokens)] = tokens
    positions = np.arange(64, dtype=np.int32)[None]
    scores = jitted_logits(MODEL, params, row, np.ones_like(row), positions)
    return np.asarray(scores)[0, len(tokens) - 1]


def likeliest(params, prompt, count):
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(int(next_logits(params, tokens).argmax()))
    return tokens[len(prompt) :]


@pytest.fixture(scope="module")
def expected(params):
    return [likeliest(params, prompt, 12) for prompt in PROMPTS]


def test_the_cache_gives_the_tokens_of_the_whole_forward_pass(generator, expected):
    assert len({tuple(tokens) for tokens in expected}) == len(PROMPTS)
    assert generator.generate(PROMPTS, max_new_tokens=12) == expected


def test_a_prompt_gets_the_same_text_alone_and_beside_others(generator):
    drawn = {"max_new_tokens": 12, "temperature": 1.0, "seed": 3}
    for settings in ({"max_new_tokens": 12}, drawn):
        together = generator.generate(PROMPTS, **settings)
        assert generator.generate(PROMPTS[:1], **settings) == together[:1]
        assert generator.generate(PROMPTS[:4], **settings) == together[:4]


def test_equal_prompts_are_drawn_apart_and_the_seed_decides(generator):
    settings = {"max_new_tokens": 12, "temperature": 1.0}
    first = generator.generate([[5, 9]] * 2, seed=1, **settings)
    assert first[0] != first[1]
    assert generator.generate([[5, 9]] * 2, seed=1, **settings) == first
    assert generator.generate([[5, 9]] * 2, seed=2, **settings) != first


def test_a_row_ends_before_its_stop_token_and_the_others_go_on(generator, expected):
    stop = {expected[0][3], expected[1][0]}
    found = generator.generate(PROMPTS, max_new_tokens=12, stop_tokens=stop)
    for row, whole in zip(found, expected):
        ends = [i for i, token in enumerate(whole) if token in stop]
        assert row == whole[: ends[0] if ends else None]
    assert found[1] == []


def test_more_stop_tokens_than_a_program_has_places_for(generator, expected):
    unused = [token for token in range(64) if token not in expected[0]]
    stop = [*unused, expected[0][4]]
    whole = expected[0]
    found = generator.generate(PROMPTS[:1], max_new_tokens=12, stop_tokens=stop)
    assert found == [whole[: whole.index(expected[0][4])]]


def test_a_row_ends_when_the_caller_says_so_after_a_chunk(generator, expected):
    asked = []

    def stopped(index, tokens):
        asked.append((index, len(tokens)))
        return index == 1

    found = generator.generate(PROMPTS[:3], max_new_tokens=12, stopped=stopped)
    assert found == [expected[0], expected[1][:1], expected[2]]
    assert [n for index, n in asked if index == 0] == [1, 6, 11, 12]
    assert [n for index, n in asked if index == 1] == [1]


def test_a_stream_gives_the_same_tokens_chunk_by_chunk(generator, expected):
    chunks = list(generator.stream(PROMPTS[0], max_new_tokens=12))
    assert [len(chunk) for chunk in chunks] == [1, 5, 5, 1]
    assert sum(chunks, []) == expected[0]


def test_what_differs_on_a_gpu_gives_the_same_tokens(params, expected, monkeypatch):
    """More rows than there are, and a loop that turns a fixed number of times."""
    gpu = types.SimpleNamespace(platform="gpu")
    monkeypatch.setattr(programs, "traced_device", lambda: gpu)
    generator = Generator(MODEL, params, batch_size=2, max_length=64, chunk=5)
    stop = {expected[1][7]}
    whole = expected[0]
    ends = whole.index(expected[1][7]) if expected[1][7] in whole else None
    both = generator.generate(PROMPTS[:2], max_new_tokens=12, stop_tokens=stop)
    assert both == [whole[:ends], expected[1][: expected[1].index(expected[1][7])]]
    alone = Generator(MODEL, params, batch_size=1, max_length=64, chunk=8)
    assert alone.generate(PROMPTS[:1], max_new_tokens=12) == expected[:1]


def test_programs_compiled_ahead_from_shapes_are_the_ones_that_run(params, expected):
    place = jax.tree.leaves(params)[0].sharding
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), params)
    ahead = Generator(MODEL, shapes, batch_size=2, max_length=64, chunk=12)
    with pytest.raises(ValueError, match="holds no weights"):
        ahead.generate(PROMPTS[:2], max_new_tokens=12)
    ahead.compile(PROMPTS[:2], max_new_tokens=12)
    ahead.load(params)
    with jax.transfer_guard("disallow"):
        assert ahead.generate(PROMPTS[:2], max_new_tokens=12) == expected[:2]


@pytest.mark.parametrize(
    "data, model",
    [(4, 2), *(pytest.param(*mesh, marks=pytest.mark.by_hand) for mesh in ((4, 1), (1, 2)))],
)
def test_the_mesh_changes_no_token(params, expected, data, model):
    """From float32 masters that ZeRO-1 splits over `data`."""
    mesh = make_mesh(data, model, jax.devices()[: data * model])
    specs = sharding.master_specs(parameter_table(MODEL), mesh, zero1=True)
    masters = jax.device_put(params, sharding.named(mesh, specs))
    split = Generator(MODEL, masters, batch_size=3, max_length=64, chunk=12)
    assert split.batch_size == (4 if data == 4 else 3)
    stop = expected[0][3]
    found = split.generate(PROMPTS, max_new_tokens=12, stop_tokens=[stop])
    assert found == [w[: w.index(stop)] if stop in w else w for w in expected]


def test_the_copy_is_cast_once_and_the_cache_is_of_the_compute_type(params):
    generator = Generator(MODEL, params, dtype="bfloat16", batch_size=1, max_length=64)
    assert {x.dtype for x in jax.tree.leaves(generator._weights)} == {jnp.dtype("bfloat16")}
    generator.compile([[1]], max_new_tokens=1)
    first, _ = generator._compiled.values()
    state, _ = first.out_info
    assert {x.dtype for x in jax.tree.leaves(state.cache)} == {jnp.dtype("bfloat16")}


def test_lengths_are_padded_to_few_sizes_and_never_by_more_than_a_fourth_of_a_long_one():
    sizes = [padded_length(n) for n in range(1, 5000)]
    assert all(n <= size for n, size in enumerate(sizes, 1))
    assert all(size <= 1.25 * n for n, size in enumerate(sizes, 1) if n > 512)
    assert len(set(sizes)) == 20
    assert not [size for size in sizes if size > 128 and size % 128]


@pytest.mark.parametrize(
    "prompts, settings, message",
    [
        ([[]], {}, "a prompt is empty"),
        ([], {}, "a prompt is empty"),
        ([[1]], {"max_new_tokens": 0}, "max_new_tokens is 0"),
        ([[1] * 100], {"max_new_tokens": 29}, "100 tokens and 29 new ones are more than 128"),
        ([[1]], {"temperature": -1.0}, "temperature is -1.0"),
        ([[1]], {"top_p": 0.0}, "top_p is 0.0"),
        ([[1]], {"top_k": -1}, "top_k is -1"),
        ([[1]], {"repetition_penalty": 0.0}, "repetition_penalty is 0.0"),
    ],
)
def test_settings_out_of_range_are_refused(generator, prompts, settings, message):
    with pytest.raises(ValueError, match=message):
        generator.generate(prompts, **{"max_new_tokens": 6, **settings})


def test_more_devices_than_key_heads_are_refused(params):
    mesh = make_mesh(1, 4, jax.devices()[:4])
    with pytest.raises(ValueError, match="2 key heads cannot be split over 4"):
        Generator(MODEL, params, mesh=mesh, batch_size=1, max_length=8)


def test_rows_of_the_vocabulary_that_stand_for_nothing_are_never_chosen(params):
    def tokens(num_valid_ids):
        sizes = {"batch_size": 1, "max_length": 64, "chunk": 12}
        generator = Generator(MODEL, params, num_valid_ids=num_valid_ids, **sizes)
        return generator.generate([[1, 2, 3]], max_new_tokens=24, temperature=1.0)[0]

    assert max(tokens(None)) >= 20 > max(tokens(20))
