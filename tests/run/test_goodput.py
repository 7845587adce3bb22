"""Every second of a run has one cause, over all its starts. The clock is a number of ours."""

import json

import pytest

from stablelm_jax.run import goodput as goodput_lib
from stablelm_jax.run.goodput import CAUSES, Goodput


@pytest.fixture
def clock(monkeypatch):
    class Clock:
        now = 1000.0

        def sleep(self, seconds):
            self.now += seconds

    clock = Clock()
    monkeypatch.setattr(goodput_lib.time, "time", lambda: clock.now)
    monkeypatch.setattr(goodput_lib.time, "monotonic", lambda: clock.now - 700)
    return clock


def spent(goodput):
    return {cause: s for cause, s in goodput.seconds().items() if s}


def start(clock, file, saved, causes):
    """One start of a run from `saved`, after 2 s of which the process is 1 s old, up to a kill."""
    clock.sleep(2)
    goodput = Goodput(age=1)
    with pytest.raises(KeyboardInterrupt), goodput.kept_in(file):
        goodput.go_on(saved)
        for cause, seconds in causes:
            with goodput.cause(cause):
                clock.sleep(seconds)
        raise KeyboardInterrupt
    return goodput


def test_inner_causes_are_not_charged_to_the_outer_ones(clock):
    goodput = Goodput(age=3)
    clock.sleep(1)
    with goodput.phase("stepping"):
        clock.sleep(5)
        with goodput.cause("data_wait"):
            clock.sleep(2)
        with goodput.phase("reading the parent"):  # no phase of its own
            clock.sleep(10)
        with goodput.phase("evaluating"):
            clock.sleep(4)
    assert spent(goodput) == {"start": 4, "data_wait": 2, "step": 15, "evaluation": 4}
    assert set(CAUSES) <= goodput.seconds().keys()
    assert goodput.line()["seconds/step"] == 15
    assert str(goodput).startswith("goodput 60.0%: steps, of 25.0 s since the first start (start")


def test_what_came_after_the_checkpoint_is_done_again_and_the_rest_is_kept(clock, tmp_path):
    file, began = tmp_path / "goodput.json", clock.now
    first = start(clock, file, {}, [("compile", 8), ("step", 10), ("save", 1)])
    saved = json.loads(json.dumps(first.record()))
    after = [("save", 2), ("step", 6), ("data_wait", 1), ("evaluation", 3), ("samples", 0.5)]
    start(clock, file, saved, [("restore", 4), ("compile", 5), *after])
    last = start(clock, file, saved, [("step", 7)])
    assert spent(last) == {
        **{"start": 3, "compile": 13, "restore": 4, "step": 17, "save": 3},
        **{"redone": 10.5, "between": 2},
    }
    assert sum(spent(last).values()) == clock.now - began - 1  # the process is 1 s old


def test_a_run_killed_before_its_first_checkpoint_has_done_nothing_that_lasts(clock, tmp_path):
    start(clock, tmp_path / "file", {}, [("compile", 8), ("step", 10)])
    again = start(clock, tmp_path / "file", {}, [])
    assert spent(again) == {"start": 2, "compile": 8, "redone": 10, "between": 1}


def test_on_another_machine_and_with_an_older_file_the_checkpoint_counts(clock, tmp_path):
    file = tmp_path / "file"
    saved = start(clock, file, {}, [("step", 10)]).record()
    clock.sleep(100)
    elsewhere = start(clock, tmp_path / "other", saved, [("step", 5)])
    assert spent(elsewhere) == {"start": 2, "step": 15, "between": 101}
    back = start(clock, file, elsewhere.record(), [])
    assert spent(back) == {"start": 3, "step": 15, "between": 102}


def test_a_checkpoint_of_an_older_version_goes_on_from_its_train_seconds(clock, tmp_path):
    goodput = start(clock, tmp_path / "file", {"seconds": {"step": 60.0}}, [("step", 1)])
    assert spent(goodput) == {"start": 1, "step": 61}


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"time": 3}', '{"time": 3, "seconds": [1]}'])
def test_a_file_that_is_not_whole_counts_as_none(clock, tmp_path, text):
    (tmp_path / "file").write_text(text)
    assert spent(start(clock, tmp_path / "file", {}, [])) == {"start": 1}


def test_a_run_that_cannot_begin_leaves_no_file_and_a_full_disk_ends_none(clock, tmp_path):
    goodput = Goodput()
    with goodput.kept_in(tmp_path / "file"), goodput.phase("restoring"):
        pass
    assert not (tmp_path / "file").exists()
    start(clock, tmp_path / "no folder" / "file", {}, [])


def test_a_long_stretch_of_steps_shows_signs_of_life(clock, tmp_path):
    file = tmp_path / "file"
    goodput = Goodput()
    with goodput.kept_in(file):
        goodput.go_on({})
        with goodput.phase("stepping"):
            for _ in range(30):
                clock.sleep(1)
                with goodput.cause("data_wait"):
                    pass
            assert json.loads(file.read_text())["seconds"]["step"] >= 20
