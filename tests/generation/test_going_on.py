"""A text that goes on turn by turn gets the tokens that reading all of it anew gives."""

import types

import jax
import numpy as np
import pytest
from small_models import GENERATES as MODEL
from small_models import random_tensors

from stablelm_jax.generation import generator as generators
from stablelm_jax.generation import programs
from stablelm_jax.generation.generator import Generator
from stablelm_jax.model.transformer import logits
from stablelm_jax.parallel.mesh import make_mesh

# What each turn adds: one piece, more than one, a single token, several pieces.
TURNS = [list(range(1, 21)), list(range(50)), [7], [3, 9] * 40]
jitted_logits = jax.jit(logits, static_argnums=0)


@pytest.fixture(scope="module")
def params():
    return random_tensors()


@pytest.fixture
def small_pieces(monkeypatch):
    """Pieces of 32 tokens, so that a short text has several and outgrows its cache twice."""
    monkeypatch.setattr(generators, "PIECE", 32)


@pytest.fixture
def generator(compiled, params, small_pieces):
    """One for all tests, whose programs are compiled once; it knows no text yet."""
    compiled.load(params)
    return compiled


@pytest.fixture(scope="module")
def compiled(params):
    return make_generator(params)


def make_generator(params, **more):
    return Generator(MODEL, params, **{"batch_size": 1, "max_length": 256, "chunk": 5, **more})


def conversation(generator, turns=TURNS[:2], **settings):
    """[(history of each turn, tokens of its answer)]"""
    history, found = [], []
    for turn in turns:
        history = history + turn
        answer = sum(generator.stream(history, go_on=True, **settings), [])
        found.append((history, answer))
        history = history + answer
    return found


def likeliest(params, history, count):
    """By the whole forward pass for every token."""
    row = np.zeros((1, 256), np.int32)  # padded behind, which no earlier logit can see
    positions = np.arange(256, dtype=np.int32)[None]
    length = len(history)
    row[0, :length] = history
    for end in range(length, length + count):
        scores = jitted_logits(MODEL, params, row, np.ones_like(row), positions)
        row[0, end] = int(np.asarray(scores)[0, end - 1].argmax())
    return row[0, length : length + count].tolist()


def counted(monkeypatch):
    """How many tokens are read, piece by piece."""
    read, piece = [], Generator._piece

    def noted(self, tokens, begin, stages):
        read.append(min(len(tokens) - begin, generators.PIECE))
        return piece(self, tokens, begin, stages)

    monkeypatch.setattr(Generator, "_piece", noted)
    return read


def test_every_turn_gets_the_tokens_of_the_whole_forward_pass_and_reads_only_what_is_new(
    params, generator, monkeypatch
):
    read = counted(monkeypatch)
    found = conversation(generator, TURNS, max_new_tokens=8)
    for history, answer in found:
        assert answer == likeliest(params, history, 8)
    # The last token of an answer was written and never read.
    assert read == [20, 32, 19, 2, 32, 32, 17]


def test_an_answer_that_a_stop_token_ends_goes_on_alike(params, generator):
    free = conversation(generator, max_new_tokens=8)
    stop = free[0][1][3]
    stopped = conversation(generator, max_new_tokens=8, stop_tokens=[stop])
    assert any(len(answer) < 8 for _, answer in stopped)
    for history, answer in stopped:
        whole = likeliest(params, history, 8)
        assert answer == (whole[: whole.index(stop)] if stop in whole else whole)


def test_drawn_tokens_are_those_of_the_whole_history_with_the_same_seed(params, generator):
    settings = {"max_new_tokens": 8, "temperature": 1.0, "repetition_penalty": 1.3, "seed": 11}
    history, answer = conversation(generator, [TURNS[0], [7]], **settings)[1]
    assert generator.generate([history], **settings) == [answer]


def test_a_history_that_changed_is_read_from_where_it_changed(params, generator, monkeypatch):
    history, answer = conversation(generator, max_new_tokens=8)[1]
    read = counted(monkeypatch)
    changed = [*history[:10], 63, *history[20:]]  # as where the oldest turns were dropped
    new = sum(generator.stream(changed, go_on=True, max_new_tokens=8), [])
    assert new == likeliest(params, changed, 8) and sum(read) == len(changed) - 10
    read.clear()
    assert sum(generator.stream(changed, go_on=True, max_new_tokens=8), []) == new
    assert read == [1]


def test_an_answer_that_is_broken_off_leaves_what_was_shown(params, generator, monkeypatch):
    chunks = generator.stream(TURNS[0], go_on=True, max_new_tokens=20)
    shown = next(chunks) + next(chunks)
    chunks.close()
    read = counted(monkeypatch)
    history = TURNS[0] + shown + [5, 6]
    new = sum(generator.stream(history, go_on=True, max_new_tokens=8), [])
    assert new == likeliest(params, history, 8) and read == [3]


def test_an_interrupt_while_the_buffers_are_reused_costs_no_more_than_reading_anew(
    params, generator, monkeypatch
):
    chunks = generator.stream(TURNS[0], go_on=True, max_new_tokens=20)
    next(chunks)

    def interrupted(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(generators.jax, "device_get", interrupted)
        with pytest.raises(KeyboardInterrupt):
            next(chunks)
    read = counted(monkeypatch)
    assert sum(generator.stream(TURNS[0], go_on=True, max_new_tokens=8), []) == likeliest(
        params, TURNS[0], 8
    )
    assert read == [20]


def test_other_weights_share_no_cache(params, generator, monkeypatch):
    list(generator.stream(TURNS[0], go_on=True, max_new_tokens=8))
    others = jax.tree.map(lambda x: x[::1] * 1.5, params)
    generator.load(others)
    new = sum(generator.stream(TURNS[0], go_on=True, max_new_tokens=8), [])
    assert new == likeliest(others, TURNS[0], 8)


@pytest.mark.by_hand
def test_the_mesh_changes_no_token_of_a_text_that_goes_on(params, small_pieces):
    mesh = make_mesh(2, 2, jax.devices()[:4])
    found = conversation(make_generator(params, mesh=mesh), max_new_tokens=8)
    for history, answer in found:
        assert answer == likeliest(params, history, 8)


def test_what_differs_on_a_gpu_gives_the_same_tokens(params, small_pieces, monkeypatch):
    """A loop that turns a fixed number of times writes behind an answer's end."""
    gpu = types.SimpleNamespace(platform="gpu")
    monkeypatch.setattr(programs, "traced_device", lambda: gpu)
    found = conversation(make_generator(params), max_new_tokens=8)
    for history, answer in found:
        assert answer == likeliest(params, history, 8)


def test_a_prompt_too_long_is_refused_and_what_was_kept_stays(params, generator, monkeypatch):
    list(generator.stream(TURNS[0], go_on=True, max_new_tokens=8))
    with pytest.raises(ValueError, match="more than 256"):
        list(generator.stream([1] * 250, go_on=True, max_new_tokens=8))
    read = counted(monkeypatch)
    list(generator.stream(TURNS[0], go_on=True, max_new_tokens=8))
    assert read == [1]
