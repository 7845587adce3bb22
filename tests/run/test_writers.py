import sys

import pytest
from tiny import tiny_config, write_data

from stablelm_jax.run.folder import RunFolder
from stablelm_jax.run.metrics import Writers

LINE = {"step": 7, "time": 1.5, "loss": 2.5, "loss/squares": None, "tokens_seen": 1024}


@pytest.fixture
def folder(tmp_path):
    return RunFolder(tmp_path / "run")


def config(tmp_path, **switches):
    data = write_data(tmp_path / "sources")
    return tiny_config(data, **{f"writers.{name}": value for name, value in switches.items()})


def test_without_a_switch_nothing_is_written(tmp_path, folder):
    writers = Writers(config(tmp_path), folder)
    writers.write(LINE)
    writers.close()
    assert not folder.path.exists()


@pytest.mark.parametrize("name", ["tensorboard", "wandb"])
def test_a_writer_that_is_not_installed_is_refused_with_the_remedy(
    tmp_path, folder, monkeypatch, name
):
    for module in [m for m in sys.modules if m.split(".")[0] == name]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ValueError, match=f"writers.{name} is on.*pip install {name}"):
        Writers(config(tmp_path, **{name: True}), folder)


def test_tensorboard_gets_the_numbers_of_a_line_at_its_step(tmp_path, folder):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    writers = Writers(config(tmp_path, tensorboard=True), folder)
    writers.open()
    writers.write(LINE)
    writers.close()
    events = EventAccumulator(str(folder.path / "tensorboard")).Reload()
    assert set(events.Tags()["scalars"]) == {"loss", "tokens_seen"}
    (event,) = events.Scalars("loss")
    assert (event.step, event.value) == (7, 2.5)


def test_weights_and_biases_gets_the_numbers_of_a_line_at_its_step(tmp_path, folder, monkeypatch):
    class FakeWandb:
        """Only what the writer calls; the real one wants a server."""

        def init(self, **settings):
            self.settings, self.lines, self.finished = settings, [], None
            return self

        def log(self, numbers, step):
            self.lines.append((step, numbers))

        def finish(self, exit_code):
            self.finished = exit_code

    wandb = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    writers = Writers(config(tmp_path, wandb=True), folder)
    assert not hasattr(wandb, "settings")  # a start that is refused leaves no trace there
    writers.open()
    writers.write(LINE)
    writers.close(failed=True)
    assert wandb.lines == [(7, {"loss": 2.5, "tokens_seen": 1024})]
    assert wandb.settings["name"] == "tiny" and wandb.finished == 1
