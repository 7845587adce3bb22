"""A run whose data and folder are in a bucket is the run of local files, bit for bit."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import fsspec
import pytest
from tiny import losses, metrics, tiny_config, write_config, write_data

from stablelm_jax import evaluate, generate
from stablelm_jax.reporting.page import show_page
from stablelm_jax.run.mirror import RemoteMirror

STEPS = 40
ROOT, WORKDIR = "gs://training/some/data", "gs://training/runs/tiny"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("bucket-run")


@pytest.fixture(scope="module")
def config_file(folder):
    config = tiny_config(
        write_data(folder / "data"),
        **{
            "data.cache": str(folder / "shards"),
            "training.num_steps": STEPS,
            "checkpoint.every": 10,
            "checkpoint.keep_latest": 2,
            "evaluation.every": 20,
            "samples.every": 20,
        },
    )
    return write_config(config, folder)


def start(config_file, workdir, host: Path, *more):
    """A training on a machine whose disk is `host`."""
    flags = [f"--config={config_file}", f"--workdir={workdir}", *more]
    return subprocess.Popen(
        [sys.executable, "-m", "stablelm_jax.train", *flags],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"XLA_FLAGS": "", "XDG_CACHE_HOME": str(host)},
    )


def finish(process):
    out, err = process.communicate(timeout=180)
    assert process.returncode == 0, err
    return out


def stored_metrics(gcs) -> list[dict]:
    """The lines in the bucket."""
    return [
        json.loads(line) for line in gcs.objects["training/runs/tiny/metrics.jsonl"].splitlines()
    ]


@pytest.fixture(scope="module")
def run(gcs, config_file, folder):
    """Killed on one host after its second checkpoint, ended on another; and a local twin."""
    fs = fsspec.filesystem("gs")
    for file in (folder / "data").rglob("*-*.*"):
        fs.pipe_file(f"{ROOT}/{file.relative_to(folder / 'data')}", file.read_bytes())
    for file in (folder / "data").rglob("manifest.json"):
        fs.pipe_file(f"{ROOT}/{file.relative_to(folder / 'data')}", file.read_bytes())
    local = start(config_file, folder / "local", folder / "host-0")
    flag = f"--config.data.root={ROOT}"
    process = start(config_file, WORKDIR, folder / "host-1", flag)
    for _ in range(30_000):  # minutes where many tests run beside it
        if "training/runs/tiny/checkpoints/global_step20/commit_success.txt" in gcs.objects:
            break
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    shutil.rmtree(folder / "shards")
    killed_at = max(line["step"] for line in stored_metrics(gcs))
    gcs.fail("uploadType=media&name=runs/tiny/checkpoints/global_step40", 2)
    gcs.fail("uploadType=multipart", 1)  # of gcsfs; those above are of tensorstore
    out = finish(start(config_file, WORKDIR, folder / "host-2", flag))
    finish(local)
    return folder, out, killed_at


def test_killed_on_one_host_and_ended_on_another_it_gives_the_losses_of_local_files(run, gcs):
    folder, out, killed_at = run
    resumed = int(re.search(r"resuming from gs://training/.*global_step(\d+)", out)[1])
    assert 20 <= resumed < STEPS and killed_at >= 20
    ours, theirs = stored_metrics(gcs), metrics(folder / "local")
    assert losses(ours) == losses(theirs) and len(losses(ours)) == STEPS
    evaluated = [[line for line in lines if "eval/loss" in line] for lines in (ours, theirs)]
    assert [line["eval/loss"] for line in evaluated[0]] == [
        line["eval/loss"] for line in evaluated[1]
    ]
    assert [line["step"] for line in ours] == [line["step"] for line in theirs]
    assert gcs.faults_left() == 0


def test_the_bucket_holds_what_a_local_run_folder_holds(run, gcs):
    folder, _, _ = run
    prefix = "training/runs/tiny/"
    there = {key.removeprefix(prefix) for key in gcs.objects if key.startswith(prefix)}
    here = {path.relative_to(folder / "local").as_posix() for path in here_files(folder / "local")}
    # shards.json is of local data; events.jsonl may tell of a save that the kill cut short
    there_only, here_only = {"events.jsonl"}, {".lock", "shards.json"}
    named = {name for name in there if not name.startswith("checkpoints")}
    assert named - there_only == {n for n in here if not n.startswith("checkpoints")} - here_only
    steps = {name.split("/")[1] for name in there if name.startswith("checkpoints/")}
    assert steps == {"global_step30", "global_step40"}
    starts = json.loads(gcs.objects[f"{prefix}environment.json"])
    assert len(starts) == 2 and all(WORKDIR in " ".join(s["command"]) for s in starts)


def test_a_run_in_a_bucket_has_a_page_too(run):
    path = run[0] / "page.html"
    show_page([WORKDIR], str(path), [])
    text = path.read_text()
    assert f"{STEPS} of {STEPS}" in text and "<h2>Samples" in text and "cannot be read" not in text


def here_files(folder: Path):
    return (path for path in folder.rglob("*") if path.is_file())


def test_the_final_weights_are_those_of_the_local_run(run):
    from stablelm_jax.checkpoint.reading import read_run

    folder, _, _ = run
    name = f"checkpoints/global_step{STEPS}"
    ours, theirs = read_run(f"{WORKDIR}/{name}"), read_run(folder / "local" / name)
    assert ours["checksums"] == theirs["checksums"]


@pytest.mark.by_hand
def test_evaluate_and_generate_read_a_checkpoint_in_the_bucket(run, capsys):
    folder, _, _ = run
    printed = []
    for where in (WORKDIR, str(folder / "local")):
        checkpoint = f"{where}/checkpoints/global_step{STEPS}"
        assert evaluate.main(["--checkpoint", checkpoint]) == 0
        scores = json.loads(capsys.readouterr().out)
        assert scores.pop("checkpoint") == checkpoint
        more = ["--prompt", "w1 w3", "--max-new-tokens", "4", "--temperature", "0"]
        assert generate.main(["--checkpoint", checkpoint, *more]) == 0
        printed.append((scores, capsys.readouterr().out))
    assert printed[0] == printed[1]


@pytest.mark.by_hand
def test_a_finished_run_started_again_has_nothing_to_do(run, gcs, config_file):
    before = stored_metrics(gcs)
    finish(start(config_file, WORKDIR, run[0] / "host-3", f"--config.data.root={ROOT}"))
    assert stored_metrics(gcs) == before
    assert RemoteMirror(WORKDIR).folder.name in os.listdir(
        run[0] / "host-3" / "stablelm_jax" / "runs"
    )
