import json

import jax.numpy as jnp
import numpy as np

from stablelm_jax.training.metrics import LossSums
from stablelm_jax.training.objectives import TokenObjective


def step_sums(nll, tokens, skipped=0, grad_norm=1.0):
    return {
        "nll": jnp.array(nll, jnp.float32),
        "tokens": jnp.array(tokens, jnp.float32),
        "skipped": jnp.int32(skipped),
        "grad_norm": jnp.float32(grad_norm),
    }


def test_losses_are_means_over_tokens_and_unseen_sources_are_absent():
    sums = LossSums(TokenObjective(3), ["a", "b", "c"])
    sums.add(1, step_sums([6.0, 2.0, 0.0], [2.0, 1.0, 0.0]))
    sums.add(2, step_sums([0.0, 4.0, 0.0], [1.0, 1.0, 0.0]))
    assert sums.take() == {"loss": 12 / 5, "loss/a": 2.0, "loss/b": 3.0}
    assert sums.take() == {"loss": None}


def test_the_sums_survive_json_exactly():
    rng = np.random.default_rng(0)
    first, rest = LossSums(TokenObjective(3), ["a", "b"]), []
    for _ in range(20):
        nll, tokens = rng.random((2, 2), np.float32) * 1000
        rest.append(step_sums(nll, tokens))
    for step in rest[:10]:
        first.add(1, step)
    second = LossSums(TokenObjective(3), ["a", "b"], json.loads(json.dumps(first.state())))
    for step in rest[10:]:
        first.add(1, step)
        second.add(1, step)
    assert first.take() == second.take()


def test_updates_that_were_left_out_are_told_and_not_in_the_mean():
    sums = LossSums(TokenObjective(3), ["a", "b"])
    sums.add(1, step_sums([6.0, 0.0], [2.0, 0.0]))
    before = sums.state()
    sums.add(2, step_sums([float("nan"), 0.0], [2.0, 0.0], skipped=1, grad_norm=float("inf")))
    sums.add(3, step_sums([8.0, 3.0], [2.0, 1.0], skipped=2))
    assert json.loads(json.dumps(sums.state()))["before_row"] == before
    first, second = sums.take_skipped()
    assert (first.step, first.why, first.sources, first.in_a_row) == (2, 1, {"a": None}, 1)
    assert (second.step, second.why, second.sources) == (3, 2, {"a": 4.0, "b": 3.0})
    assert sums.in_a_row == 2 and not sums.take_skipped()
    sums.add(4, step_sums([2.0, 1.0], [2.0, 1.0]))
    assert sums.take() == {"loss": 9 / 5, "loss/a": 2.0, "loss/b": 1.0}
    assert sums.in_a_row == 0 and sums.before_row is None
