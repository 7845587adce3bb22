"""The numbers that pictures and pages are drawn from."""

import json

import numpy as np
import pytest

from stablelm_jax.reporting.curves import Curves, smooth
from stablelm_jax.run.metrics import MetricsFile


def columns(curves, keys=("loss", "eval/loss")):
    return {key: [part.tolist() for part in curves[key]] for key in keys}


def test_reading_on_gives_what_reading_the_whole_file_gives(tmp_path):
    """Also where a line was half written, and where a start has cut the file back."""
    file, grown = MetricsFile(tmp_path / "metrics.jsonl"), Curves()
    grown.update(file.path)  # it is not there yet
    for step in range(1, 7):
        file.append({"step": step, "loss": 1 / step})
        grown.update(file.path)
    with file.path.open("a") as torn:
        torn.write('{"step": 7, "lo')
    grown.update(file.path)
    assert columns(grown) == columns(Curves.of(file.path)) and len(grown["loss"].steps) == 6
    file.cut_back(4)
    file.append({"step": 5, "loss": 9.0, "eval/loss": 8.0})
    grown.update(file.path)
    assert columns(grown) == columns(Curves.of(file.path)) == columns(Curves(file.read()))
    assert grown.last("loss") == 9.0 and grown.names("eval/") == ["loss"]


def test_damaged_lines_and_values_are_left_out(tmp_path):
    path = tmp_path / "metrics.jsonl"
    whole = {"step": 2, "loss": 2.0, "grad_norm": None, "text": "a", "more": [1]}
    path.write_bytes(
        b'{"step": 1, "loss": NaN}\n' + b"\0" * 9 + b'\n{"loss": 3}\n[1]\n' + b"\xff\n"
        b'{"step": "x", "loss": 4}\n' + json.dumps(whole).encode() + b'\n{"step": 3, "lo'
    )
    curves = Curves.of(path)
    assert columns(curves, ["loss", "grad_norm", "text"]) == {
        "loss": [[2], [2.0]],
        "grad_norm": [[], []],
        "text": [[], []],
    }
    assert curves.last("grad_norm") is None and not Curves.of(tmp_path / "none.jsonl")


@pytest.mark.parametrize("count", [0, 1, 19, 20, 21, 300])
def test_a_smoothed_value_is_the_mean_of_the_last_twenty(count):
    values = np.random.default_rng(count).normal(size=count)
    expected = [values[max(0, i - 19) : i + 1].mean() for i in range(count)]
    np.testing.assert_allclose(smooth(values), expected, rtol=1e-12, atol=1e-12)


def test_errors_stand_beside_the_points_of_their_steps():
    lines = [{"step": 1, "loss": 3}, {"step": 2, "loss": 2, "error": 0.1}, {"step": 3, "error": 7}]
    curves = Curves(lines)
    np.testing.assert_array_equal(curves.errors("error", curves["loss"]), [np.nan, 0.1])
