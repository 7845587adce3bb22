"""The picture of a run."""

from unittest import mock

import numpy as np
import pytest
from matplotlib.axes import Axes

from stablelm_jax.reporting.curves import Curves
from stablelm_jax.reporting.picture import draw_losses, draw_runs

LINES = [
    {"step": 1, "loss/books": 3.0, "loss/code": 4.0},
    {"step": 2, "loss/books": None, "loss/code": 3.5},
    {"step": 2, "eval/loss/books": 3.1, "eval/loss/code": 3.6, "eval/bits_per_byte/books": 1.2},
]
ENTROPY = {"books": 5.0, "code": 5.5}


def test_held_out_losses_get_bars_where_their_standard_error_is_known(tmp_path):
    lines = [*LINES, {"step": 4, "eval/loss/books": 2.8, "eval/loss_stderr/books": 0.2}]
    with mock.patch.object(Axes, "errorbar", autospec=True, side_effect=Axes.errorbar) as bars:
        draw_losses(Curves(lines), ENTROPY, tmp_path / "loss.png")
    books, code = bars.call_args_list
    np.testing.assert_array_equal(books.args[1:], [[2, 4], [3.1, 2.8]])
    np.testing.assert_array_equal(books.kwargs["yerr"], [np.nan, 0.2])  # NaN draws no bar
    np.testing.assert_array_equal(code.kwargs["yerr"], [np.nan])


def test_a_picture_that_fails_leaves_the_one_before(tmp_path):
    path = tmp_path / "loss.png"
    draw_losses(Curves(LINES), ENTROPY, path)
    before = path.read_bytes()
    full = mock.patch("matplotlib.figure.Figure.savefig", side_effect=OSError("disk full"))
    with full, pytest.raises(OSError, match="disk full"):
        draw_losses(Curves(LINES), ENTROPY, path)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def test_names_of_runs_are_text_in_a_picture(tmp_path):
    runs = {name: Curves(LINES) for name in ("lr$1e-3$", "a$\\frac$", "_old/run", "x[/y]")}
    with mock.patch.object(Axes, "legend", autospec=True, side_effect=Axes.legend) as legend:
        draw_runs(runs, tmp_path / "runs.png")
    labels = legend.call_args.args[0].get_legend_handles_labels()[1]
    assert [label.strip() for label in labels] == list(runs)
