"""Greedy text equals transformers' greedy text, token for token, in float32."""

import importlib
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from stablelm_jax.generation.generator import Generator
from stablelm_jax.model.parameters import nest

pytestmark = pytest.mark.parity
torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

NEW = 24


@pytest.fixture(scope="module")
def parity():
    """The peer of tests/model, which names our weights as transformers does."""
    path = str(Path(__file__).parents[1] / "model")
    sys.path.insert(0, path)
    yield importlib.import_module("test_transformers_parity")
    sys.path.remove(path)


@pytest.mark.parametrize("kind", ["1.6b", "12b"])
def test_greedy_tokens_equal_those_of_transformers(parity, kind):
    model = parity.KINDS[kind]
    params = parity.random_params(model, np.random.default_rng(5))
    rng = np.random.default_rng(6)
    prompts = [rng.integers(0, model.vocab_size, n).tolist() for n in (3, 17, 30)]
    generator = Generator(
        model, jax.tree.map(np.asarray, nest(params)), batch_size=2, max_length=80, chunk=NEW
    )
    peer = parity.peer(model, params)
    theirs = [greedy(peer, prompt) for prompt in prompts]
    assert len({token for tokens in theirs for token in tokens}) > 10  # it is about something
    assert generator.generate(prompts, max_new_tokens=NEW) == theirs


def greedy(peer, prompt):
    with torch.no_grad():
        whole = peer.generate(
            torch.tensor([prompt]), max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False
        )
    return whole[0, len(prompt) :].tolist()
