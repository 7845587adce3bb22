import json

import jax.numpy as jnp
import numpy as np
import pytest

from stablelm_jax.training.metrics import LossSums, MetricsFile


def test_losses_are_means_over_tokens_and_unseen_sources_are_absent():
    sums = LossSums(["a", "b", "c"])
    sums.add({"nll": jnp.array([6.0, 2.0, 0.0]), "tokens": jnp.array([2.0, 1.0, 0.0])})
    sums.add({"nll": jnp.array([0.0, 4.0, 0.0]), "tokens": jnp.array([1.0, 1.0, 0.0])})
    assert sums.take() == {"loss": 12 / 5, "loss/a": 2.0, "loss/b": 3.0}
    assert sums.take() == {"loss": None}


def test_the_sums_survive_json_exactly():
    rng = np.random.default_rng()
    first, rest = LossSums(["a", "b"]), []
    for _ in range(20):
        nll, tokens = rng.random((2, 2), np.float32) * 1000
        rest.append({"nll": jnp.asarray(nll), "tokens": jnp.asarray(tokens)})
    for step in rest[:10]:
        first.add(step)
    second = LossSums(["a", "b"], json.loads(json.dumps(first.state())))
    for step in rest[10:]:
        first.add(step)
        second.add(step)
    assert first.take() == second.take()


def test_a_value_that_is_not_finite_is_written_as_null(tmp_path):
    file = MetricsFile(tmp_path / "metrics.jsonl")
    file.append({"step": 1, "loss": float("nan"), "grad_norm": float("inf"), "x": 2.5})
    assert file.read() == [{"step": 1, "loss": None, "grad_norm": None, "x": 2.5}]


def test_cutting_back_keeps_whole_lines_up_to_the_step(tmp_path):
    file = MetricsFile(tmp_path / "metrics.jsonl")
    for step in (1, 2, 3):
        file.append({"step": step})
    with file.path.open("a") as torn:
        torn.write('{"step": 2, "lo')
    assert file.cut_back(2) == [{"step": 1}, {"step": 2}]
    assert file.path.read_text() == '{"step": 1}\n{"step": 2}\n'


@pytest.mark.parametrize("content", ["", '{"st'])
def test_a_file_without_a_whole_line_is_empty(tmp_path, content):
    (tmp_path / "metrics.jsonl").write_text(content)
    assert MetricsFile(tmp_path / "metrics.jsonl").read() == []
