import io
import shutil
import struct
import sys

import pytest
from rich.console import Console
from tiny import bare_config, events, tiny_config, train, write_data

from stablelm_jax.checkpoint.reading import read_run
from stablelm_jax.run.events import Events
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


class FakeWandb:
    """Only what the writer calls; `fails`: in which call it raises."""

    def __init__(self, fails=None):
        self.fails, self.starts, self.lines, self.finished = fails, [], [], None

    def _call(self, name):
        if name == self.fails:
            raise RuntimeError(f"{name} has no network")

    def init(self, **settings):
        self.starts.append(settings)
        self._call("init")
        return self

    def define_metric(self, name, step_metric):
        self.axis = (name, step_metric)

    def log(self, numbers):
        self._call("log")
        self.lines.append(numbers)

    def finish(self, exit_code):
        self._call("finish")
        self.finished = exit_code


@pytest.fixture
def wandb(monkeypatch):
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    return fake


def read_tensorboard(folder):
    """{tag: [(step, value)]} as TensorBoard shows it."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder.path / "tensorboard")).Reload()
    tags = events.Tags()["scalars"]
    found = {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in tags}
    return {tag: points for tag, points in found.items() if points}


def test_tensorboard_gets_the_numbers_of_a_line_at_its_step(tmp_path, folder):
    pytest.importorskip("tensorboard")
    writers = Writers(config(tmp_path, tensorboard=True), folder)
    writers.open()
    writers.write(LINE)
    writers.close()
    assert read_tensorboard(folder) == {"loss": [(7, 2.5)], "tokens_seen": [(7, 1024.0)]}


def test_tensorboard_is_cut_back_to_the_checkpoint_as_the_metrics_are(tmp_path, folder):
    """The first start is killed after step 6, its checkpoint is of step 4."""
    pytest.importorskip("tensorboard")
    settings = config(tmp_path, tensorboard=True)
    killed = Writers(settings, folder)
    killed.open()
    for step in range(1, 7):
        killed.write({"step": step, "loss": float(step)})
    killed.write({"step": 6, "eval/loss": 9.0})
    second = Writers(settings, folder)
    second.open(step=4, resumed=True)
    second.write({"step": 5, "loss": 50.0})
    assert read_tensorboard(folder) == {"loss": [(1, 1), (2, 2), (3, 3), (4, 4), (5, 50)]}
    second.close()
    killed.close()


def test_weights_and_biases_gets_the_numbers_of_a_line_at_its_step(tmp_path, folder, wandb):
    writers = Writers(config(tmp_path, wandb=True), folder)
    assert not wandb.starts  # a start that is refused leaves no trace there
    writers.open()
    writers.write(LINE)
    writers.close(failed=True)
    assert wandb.lines == [{"step": 7, "loss": 2.5, "tokens_seen": 1024}]
    assert wandb.axis == ("*", "step")
    assert wandb.starts[0]["name"] == "tiny" and wandb.finished == 1


def test_every_start_of_a_run_goes_on_with_one_run_of_weights_and_biases(tmp_path, folder, wandb):
    settings = config(tmp_path, wandb=True)
    first = Writers(settings, folder).open()
    assert Writers(settings, folder).open(step=4, wandb_id=first, resumed=True) == first
    # Killed before a checkpoint had it: the run folder has it too.
    assert Writers(settings, folder).open(step=4, resumed=True) == first
    # The run folder is new on this machine: the checkpoint has it.
    (folder.path / "wandb_id").unlink()
    assert Writers(settings, folder).open(step=4, wandb_id=first, resumed=True) == first
    assert {(start["id"], start["resume"]) for start in wandb.starts} == {(first, "allow")}
    # Begun anew in the same folder: another run.
    assert Writers(settings, folder).open() != first


def test_the_id_stays_in_the_checkpoints_of_a_start_without_weights_and_biases(tmp_path, folder):
    assert Writers(config(tmp_path), folder).open(step=4, wandb_id="abc", resumed=True) == "abc"


def test_a_run_that_goes_on_a_branch_and_a_writer_that_fails(data, tmp_path, wandb):
    """The id is in the run folder and in the checkpoints; a branch is a run of its own."""
    settings = {"writers.wandb": True, "training.num_steps": 4, "checkpoint.every": 2}
    workdir = tmp_path / "run"
    assert train(bare_config(data, **settings), workdir)[0] == 0
    (wandb_id,) = {start["id"] for start in wandb.starts}
    assert (workdir / "wandb_id").read_text() == f"{wandb_id}\n"
    newest = workdir / "checkpoints" / "global_step4"
    assert read_run(newest)["wandb_id"] == wandb_id
    # Killed before step 4 was saved: steps 3 and 4 are done, and written, again.
    shutil.rmtree(newest)
    (workdir / "wandb_id").unlink()
    wandb.fails = "finish"
    assert train(bare_config(data, **settings), workdir)[0] == 0
    assert [start["id"] for start in wandb.starts] == [wandb_id] * 2
    assert [line["step"] for line in wandb.lines if "loss" in line] == [1, 2, 3, 4, 3, 4]
    assert [event["writer"] for event in events(workdir, "writer_failed")] == ["Weights & Biases"]
    branch = bare_config(data, **settings | {"training.num_steps": 5, "branch.parent": str(newest)})
    assert train(branch, tmp_path / "branch")[0] == 0
    assert wandb.starts[-1]["id"] != wandb_id


@pytest.mark.parametrize("call", ["init", "log", "finish"])
def test_a_writer_that_fails_is_told_once_and_never_ends_the_run(tmp_path, folder, wandb, call):
    wandb.fails = call
    console = Console(file=io.StringIO(), width=200)
    writers = Writers(config(tmp_path, wandb=True), folder, Events(console, None))
    writers.open()
    writers.write(LINE)
    writers.write(LINE)
    writers.close()
    told = console.file.getvalue()
    assert told.count("Weights & Biases failed") == 1
    assert f"RuntimeError: {call} has no network" in told and "the run goes on" in told


def test_a_disk_that_takes_nothing_more_ends_tensorboard_alone(tmp_path, folder, wandb):
    pytest.importorskip("tensorboard")
    folder.path.mkdir()
    (folder.path / "tensorboard").write_text("in its way")
    writers = Writers(config(tmp_path, tensorboard=True, wandb=True), folder)
    writers.open()
    writers.write(LINE)
    writers.close()
    assert len(wandb.lines) == 1


def test_the_real_weights_and_biases_keeps_every_line_of_both_starts(tmp_path, folder, monkeypatch):
    """Offline: a part for each start, which `wandb sync` uploads as one run, in their order."""
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    wandb_id = None
    for begin in (0, 2):  # the second goes on from a checkpoint of step 2
        writers = Writers(config(tmp_path / str(begin), wandb=True), folder)
        wandb_id = writers.open(begin, wandb_id, resumed=begin > 0)
        for step in range(begin + 1, begin + 4):
            writers.write({"step": step, "loss": step / 2})
        writers.close()
    wandb.teardown()  # its own process has written all
    parts = sorted(folder.path.glob(f"wandb/offline-run-*-{wandb_id}/run-{wandb_id}.wandb"))
    assert [steps_in(part) for part in parts] == [[1, 2, 3], [3, 4, 5]]


def steps_in(path):
    """The values of `step` in a file of Weights & Biases: LevelDB's log format, after 7 bytes."""
    from wandb.proto.wandb_internal_pb2 import Record

    content, at, data, steps = path.read_bytes(), 7, b"", []
    while at + 7 <= len(content):
        if 32768 - at % 32768 < 7:  # no record begins in the last bytes of a block
            at += 32768 - at % 32768
            continue
        _, length, kind = struct.unpack_from("<IHB", content, at)
        data += content[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last piece
            items = Record.FromString(data).history.item
            steps += [int(item.value_json) for item in items if item.nested_key == ["step"]]
            data = b""
    return steps
