import json

import jax.numpy as jnp
import numpy as np
import pytest

from stablelm_jax.run.metrics import LossSums, MetricsFile


def step_sums(nll, tokens, skipped=0, grad_norm=1.0):
    return {
        "nll": jnp.array(nll, jnp.float32),
        "tokens": jnp.array(tokens, jnp.float32),
        "skipped": jnp.int32(skipped),
        "grad_norm": jnp.float32(grad_norm),
    }


def test_losses_are_means_over_tokens_and_unseen_sources_are_absent():
    sums = LossSums(["a", "b", "c"])
    sums.add(1, step_sums([6.0, 2.0, 0.0], [2.0, 1.0, 0.0]))
    sums.add(2, step_sums([0.0, 4.0, 0.0], [1.0, 1.0, 0.0]))
    assert sums.take() == {"loss": 12 / 5, "loss/a": 2.0, "loss/b": 3.0}
    assert sums.take() == {"loss": None}


def test_the_sums_survive_json_exactly():
    rng = np.random.default_rng(0)
    first, rest = LossSums(["a", "b"]), []
    for _ in range(20):
        nll, tokens = rng.random((2, 2), np.float32) * 1000
        rest.append(step_sums(nll, tokens))
    for step in rest[:10]:
        first.add(1, step)
    second = LossSums(["a", "b"], json.loads(json.dumps(first.state())))
    for step in rest[10:]:
        first.add(1, step)
        second.add(1, step)
    assert first.take() == second.take()


def test_updates_that_were_left_out_are_told_and_not_in_the_mean():
    sums = LossSums(["a", "b"])
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
    assert file.cut_back(2) == ([{"step": 1}, {"step": 2}], 1)
    assert file.path.read_text() == '{"step": 1}\n{"step": 2}\n'


def test_a_line_of_zeros_as_a_loss_of_power_leaves_it_is_repaired(tmp_path):
    file = MetricsFile(tmp_path / "metrics.jsonl")
    file.path.write_bytes(b'{"step": 1}\n' + b"\0" * 30 + b'\n{"step": 2}\n\0\0')
    assert file.cut_back(5) == ([{"step": 1}, {"step": 2}], 2)
    assert file.path.read_text() == '{"step": 1}\n{"step": 2}\n'


@pytest.mark.parametrize("content", ["", '{"st'])
def test_a_file_without_a_whole_line_is_empty(tmp_path, content):
    (tmp_path / "metrics.jsonl").write_text(content)
    assert MetricsFile(tmp_path / "metrics.jsonl").read() == []
