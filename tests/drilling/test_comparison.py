"""Two run folders are compared bit for bit."""

import json
import math
import shutil
from pathlib import Path

import pytest
from tiny import tiny_config, train

from stablelm_jax.checkpoint.reading import CheckpointError, sealed
from stablelm_jax.drilling.comparison import first_difference, unaccounted


@pytest.fixture(scope="module")
def two_runs(data, tmp_path_factory):
    """The same tiny run twice, in this process."""
    folders = [tmp_path_factory.mktemp(name) for name in ("one", "other")]
    for folder in folders:
        train(tiny_config(data, **{"training.num_steps": 4, "samples.every": 0}), folder)
    return folders


def lines_of(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def copied(folder: Path, to: Path, lines: list[dict]) -> Path:
    """A copy of a run folder's checkpoints, with these lines of metrics."""
    to.mkdir(exist_ok=True)
    shutil.copytree(folder / "checkpoints", to / "checkpoints")
    (to / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return to


def test_seconds_without_a_cause_are_told(two_runs, tmp_path):
    *others, last = lines_of(two_runs[0])
    began = last["time"] - sum(value for key, value in last.items() if "seconds/" in key)
    assert unaccounted(two_runs[0], began) is None
    last["seconds/step"] += 0.02 * (last["time"] - began)
    altered = copied(two_runs[0], tmp_path, [*others, last])
    assert "the seconds by cause are" in unaccounted(altered, began)


def test_two_equal_runs_have_no_difference(two_runs):
    assert first_difference(*two_runs) is None


@pytest.mark.parametrize(
    "key", ["loss/squares", "grad_norm", "tokens/squares", "eval/loss", "updates_skipped"]
)
def test_the_comparison_sees_one_altered_value_of_one_line(two_runs, tmp_path, key):
    one, other = two_runs
    lines = lines_of(other)
    line = [line for line in lines if key in line][-1]
    right = line[key]
    line[key] = math.nextafter(right, math.inf) if isinstance(right, float) else right + 1
    found = first_difference(one, copied(other, tmp_path, lines))
    assert found == f"step {line['step']}, {key}: {right} undisturbed, {line[key]} disturbed"


def test_the_comparison_sees_a_line_that_is_missing_or_comes_twice(two_runs, tmp_path):
    one, other = two_runs
    lines = lines_of(other)
    missing = copied(other, tmp_path / "missing", lines[:-1])
    assert "undisturbed, nothing disturbed" in first_difference(one, missing)
    twice = copied(other, tmp_path / "twice", [*lines[:2], lines[1], *lines[2:]])
    assert first_difference(one, twice).startswith("step 2, ")


def test_the_comparison_sees_one_altered_checksum_and_a_missing_checkpoint(two_runs, tmp_path):
    one, other = two_runs
    altered = copied(other, tmp_path, lines_of(other))
    path = altered / "checkpoints/global_step4/run/metadata"
    run = json.loads(path.read_text())
    name = next(name for name in run["checksums"] if name.startswith("optimizer/m/"))
    run["checksums"][name] ^= 1
    path.write_text(json.dumps(sealed(run)))
    found = first_difference(one, altered)
    assert found.startswith(f"global_step4, checksum of, {name}: ")
    (altered / "checkpoints/global_step4").rename(altered / "elsewhere")
    with pytest.raises(CheckpointError, match="global_step4 is not a checkpoint"):
        first_difference(one, altered)
