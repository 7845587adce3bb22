from types import SimpleNamespace

import pytest

from stablelm_jax.reporting import page, picture
from stablelm_jax.run.goodput import Goodput
from stablelm_jax.run.metrics import MetricsFile, RunLog


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


def test_a_line_that_no_start_can_write_again_does_not_end_one(tmp_path):
    """Other software may write NaN, or nest without end."""
    file = MetricsFile(tmp_path / "metrics.jsonl")
    file.path.write_text('{"step": 1, "loss": NaN, "x": [1e999]}\n' + "[" * 99_999 + "\n")
    assert file.cut_back(5) == ([{"step": 1, "loss": None, "x": [None]}], 1)


@pytest.mark.parametrize("content", ["", '{"st'])
def test_a_file_without_a_whole_line_is_empty(tmp_path, content):
    (tmp_path / "metrics.jsonl").write_text(content)
    assert MetricsFile(tmp_path / "metrics.jsonl").read() == []


def test_a_picture_or_a_page_that_fails_is_told_once_and_ends_nothing(tmp_path, monkeypatch):
    told, folder = [], SimpleNamespace(path=tmp_path)
    events = SimpleNamespace(tell=lambda event, text, style: told.append(text))
    log = RunLog(folder, events, writers=None, goodput=Goodput())
    monkeypatch.setattr(picture, "draw_losses", lambda *_: 1 / 0)
    monkeypatch.setattr(page, "write_page", lambda *_: 1 / 0)
    for _ in range(2):
        log.draw({})
        log.write_page()
    why = "cannot be written (ZeroDivisionError: division by zero); the run goes on"
    assert told == [f"loss.png {why}", f"report.html {why}"]
