"""A run that goes on elsewhere, on other devices and another mesh, goes on with the same rows."""

import contextlib
import hashlib

import jax
import numpy as np
import pytest
from tiny import SOURCES, losses, tiny_config, train

from stablelm_jax.checkpoint.reading import read_run
from stablelm_jax.training.setup import Run

# Meshes are compared in tests/training/test_devices.py, processes in test_processes.py beside it.
pytestmark = pytest.mark.by_hand

EVERY_DEVICE = jax.devices()
QUIET = {"evaluation.every": 0, "samples.every": 0}

# Steps to reach, devices, and how they share the work.
PLACES = [
    (4, 4, {"parallel.data": 4}),
    (8, 2, {"parallel.data": 2, "training.accumulation": 4, "parallel.zero1": False}),
    (12, 4, {"parallel.data": 2, "parallel.model": 2, "training.accumulation": 2}),
]


@contextlib.contextmanager
def machine(num_devices: int, rows: list[str]):
    """A machine with the first of our devices; `rows` gets a hash of each batch that is used."""
    undisturbed = Run.batches

    def noted(run, step):
        with contextlib.closing(undisturbed(run, step)) as batches:
            for batch in batches:
                digest = hashlib.sha256()
                for name in sorted(batch):
                    digest.update(name.encode() + batch[name].tobytes())
                rows.append(digest.hexdigest())
                yield batch

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Run, "batches", noted)
        patch.setattr(jax, "devices", lambda: EVERY_DEVICE[:num_devices])
        patch.setattr(jax, "device_count", lambda: num_devices)
        yield


@pytest.fixture(scope="module")
def stayed(data, tmp_path_factory):
    """(rows, lines, checkpoint's item `run`) of a run that stays on four devices."""
    workdir, rows = tmp_path_factory.mktemp("stayed"), []
    with machine(4, rows):
        code, lines = train(tiny_config(data, **QUIET), workdir)
    assert code == 0
    return rows, lines, read_run(workdir / "checkpoints/global_step12")


@pytest.fixture(scope="module")
def moved(data, tmp_path_factory):
    """The same of one that moves twice."""
    workdir, rows = tmp_path_factory.mktemp("moved"), []
    for steps, num_devices, division in PLACES:
        config = tiny_config(data, **QUIET, **division, **{"training.num_steps": steps})
        with machine(num_devices, rows):
            code, lines = train(config, workdir)
        assert code == 0
    return rows, lines, read_run(workdir / "checkpoints/global_step12")


def test_a_run_that_moves_twice_reads_exactly_the_rows_of_one_that_stays(stayed, moved):
    assert len(moved[0]) == 12 and moved[0] == stayed[0]


def test_its_ledger_is_the_same_in_every_line_and_in_the_checkpoint(stayed, moved):
    keys = ["step", "tokens_seen", *(f"{kind}/{name}" for kind in ("tokens", "epochs")
                                     for name in SOURCES)]  # fmt: skip
    ledgers = [[[line[key] for key in keys] for line in lines] for _, lines, _ in (stayed, moved)]
    assert len(ledgers[0]) == 12 and ledgers[0] == ledgers[1]
    for key in ("step", "rows_consumed", "tokens", "data_hash", "row_order"):
        assert moved[2][key] == stayed[2][key]


def test_its_losses_are_the_same_to_the_rounding_of_other_sums(stayed, moved):
    one, other = losses(stayed[1]), losses(moved[1])
    assert list(one) == list(other)
    np.testing.assert_allclose(list(other.values()), list(one.values()), rtol=0, atol=2e-5)
    for name in SOURCES:
        of_source = [[line[f"loss/{name}"] for line in run[1]] for run in (stayed, moved)]
        np.testing.assert_allclose(*of_source, rtol=0, atol=5e-5)
