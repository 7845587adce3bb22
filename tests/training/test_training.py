import json
import shutil
import subprocess
import sys

import pytest
from tiny import SOURCES, losses, tiny_config, train, write_data

from stablelm_jax import convert
from stablelm_jax.checkpoint.reading import read_run
from stablelm_jax.checkpoint.saved_model import load_own_tokenizer
from stablelm_jax.kernels.check import WrongKernel
from stablelm_jax.run.folder import git_commit
from stablelm_jax.run.goodput import CAUSES
from stablelm_jax.training import programs
from stablelm_jax.training.run import run_training


def final_checksums(workdir, step=12):
    return read_run(workdir / f"checkpoints/global_step{step}")["checksums"]


@pytest.fixture(scope="module")
def undisturbed(data, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("undisturbed")
    return workdir, *train(tiny_config(data), workdir, picture=True)


def test_a_run_learns_and_leaves_a_folder_that_explains_itself(undisturbed):
    workdir, code, lines = undisturbed
    assert code == 0
    seen = losses(lines)
    assert seen[12] < seen[1] - 0.3
    for name in ("config.json", "environment.json", "metrics.jsonl", "loss.png", "report.html"):
        assert (workdir / name).stat().st_size > 0
    assert (workdir / "samples/global_step12.txt").read_text().count("w1 w3") == 1
    steps = sorted(p.name for p in (workdir / "checkpoints").iterdir())
    assert steps == ["global_step12", "global_step4", "global_step8"]


def test_a_checkpoint_can_be_used_and_exported_where_the_data_and_its_tokenizer_are_gone(
    data, undisturbed, tmp_path
):
    workdir, _, _ = undisturbed
    run_folder = shutil.copytree(workdir, tmp_path / "moved")
    run = read_run(run_folder / "checkpoints/global_step12")
    run["config"]["data"]["tokenizer"] = "gone/tokenizer.json"
    found = load_own_tokenizer(run_folder / "checkpoints/global_step12", run)
    assert found.name == str(run_folder / "tokenizer.json")
    out = tmp_path / "hf"
    assert convert.main(["to-hf", str(run_folder), str(out), "--no-verify"]) == 0
    assert (out / "tokenizer.json").read_bytes() == (data / "tokenizer.json").read_bytes()
    card = (out / "README.md").read_text()
    assert "| `squares` | 768 | 25.00% |" in card and "global_step12" in card
    assert run["git_commit"] in (None, git_commit()) and f"{run['git_commit']}" in card


def test_a_metrics_line_has_every_key_of_the_design(undisturbed):
    _, _, lines = undisturbed
    line = next(line for line in lines if line["step"] == 12 and "loss" in line)
    keys = {
        "step",
        "time",
        "loss",
        "learning_rate",
        "grad_norm",
        "param_norm",
        "tokens_seen",
        "tokens_per_second",
        "tokens_per_second_per_device",
        "mfu",
        "mfu_causal",
        "data_wait_seconds",
        "step_seconds",
        "updates_skipped",
    }
    by_source = {f"{key}/{s}" for s in SOURCES for key in ("loss", "tokens", "epochs")}
    assert set(line) == keys | by_source | {f"seconds/{cause}" for cause in CAUSES}
    assert line["mfu"] is None and line["updates_skipped"] == 0
    assert line["tokens_seen"] == 12 * 8 * 32
    assert line["tokens/fibonacci"] == 12 * 6 * 32  # weight 3/4 of 8 rows a step
    evaluated = [line["step"] for line in lines if "eval/loss" in line]
    assert evaluated == [0, 6, 12]
    last = lines[-1]
    assert {f"eval/{key}/{s}" for s in SOURCES for key in ("loss", "bits_per_byte")} < set(last)


def test_the_loss_of_a_step_is_the_token_weighted_mean_of_its_sources(undisturbed):
    _, _, lines = undisturbed
    line = next(line for line in lines if line["step"] == 5 and "loss" in line)
    mean = 0.75 * line["loss/fibonacci"] + 0.25 * line["loss/squares"]
    assert line["loss"] == pytest.approx(mean, rel=1e-6)


def test_a_run_stopped_at_a_checkpoint_goes_on_bit_for_bit(data, undisturbed, tmp_path):
    workdir, _, lines = undisturbed
    train(tiny_config(data, **{"training.num_steps": 8}), tmp_path)
    code, resumed = train(tiny_config(data), tmp_path)
    assert code == 0
    assert losses(resumed) == losses(lines)
    assert final_checksums(tmp_path) == final_checksums(workdir)


def test_lines_past_the_checkpoint_are_cut_and_a_torn_line_is_repaired(data, undisturbed, tmp_path):
    _, _, lines = undisturbed
    train(tiny_config(data, **{"training.num_steps": 8}), tmp_path)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 9, "loss": 0.0}\n{"step": 10, "lo')
    _, resumed = train(tiny_config(data), tmp_path)
    assert losses(resumed) == losses(lines)
    assert [line["step"] for line in resumed] == sorted(line["step"] for line in resumed)


@pytest.mark.by_hand
def test_the_mean_between_two_lines_survives_a_restart_between_them(data, tmp_path):
    every_five = {"training.log_every": 5, "samples.every": 0}
    _, whole = train(tiny_config(data, **every_five), tmp_path / "whole")
    parted = tmp_path / "parted"
    train(tiny_config(data, **every_five), parted)
    for step in (8, 12):
        shutil.rmtree(parted / f"checkpoints/global_step{step}")
    _, resumed = train(tiny_config(data, **every_five), parted)
    assert losses(resumed) == losses(whole)


def test_a_checkpoint_of_another_run_is_refused_and_nothing_is_changed(data, tmp_path):
    train(tiny_config(data, **{"training.num_steps": 4}), tmp_path)
    before = (tmp_path / "metrics.jsonl").read_text()
    for override, named in (
        ({"seed": 7}, "config.seed was"),
        ({"model.num_layers": 3}, "num_layers"),
    ):
        with pytest.raises(ValueError, match=f"belongs to another run.*{named}"):
            train(tiny_config(data, **override), tmp_path)
    assert (tmp_path / "metrics.jsonl").read_text() == before
    assert json.loads((tmp_path / "config.json").read_text())["config"]["seed"] == 1234


def test_a_kernel_that_is_wrong_here_ends_the_run_before_its_first_step(
    data, tmp_path, monkeypatch
):
    def wrong(run):
        raise WrongKernel("attention 'pallas_gpu' is wrong on this chip")

    monkeypatch.setattr(programs, "try_attention", wrong)
    with pytest.raises(ValueError, match="'pallas_gpu' is wrong"):
        run_training(tiny_config(data), {}, str(tmp_path / "run"))
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == ""


def test_norms_of_another_device_end_the_run_before_its_first_step(data, tmp_path):
    config = tiny_config(data, **{"training.norms": "pallas_gpu"})
    with pytest.raises(ValueError, match="run on GPUs, not on a cpu: use 'xla'"):
        run_training(config, {}, str(tmp_path / "run"))


def test_a_folder_in_which_another_process_trains_is_refused(data, tmp_path):
    holder = (
        "import fcntl, sys\n"
        "file = open(sys.argv[1], 'w')\n"
        "fcntl.flock(file, fcntl.LOCK_EX)\n"
        "print('held', flush=True)\n"
        "sys.stdin.read()\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", holder, str(tmp_path / ".lock")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as other:
        assert other.stdout.readline() == b"held\n"
        with pytest.raises(ValueError, match="another process trains in"):
            run_training(tiny_config(data), {}, str(tmp_path))
        other.kill()
    assert not (tmp_path / "metrics.jsonl").exists()
    assert train(tiny_config(data, **{"training.num_steps": 4}), tmp_path)[0] == 0


def test_data_that_changed_under_a_run_is_refused(tmp_path):
    root = write_data(tmp_path / "sources", seed=1)
    train(tiny_config(root, **{"training.num_steps": 4}), tmp_path / "run")
    shutil.rmtree(root)
    write_data(root, seed=2)
    with pytest.raises(ValueError, match="data_hash of source 'fibonacci' was"):
        train(tiny_config(root), tmp_path / "run")


def test_a_missing_shard_is_refused_before_the_first_step_and_named(tmp_path):
    root = write_data(tmp_path / "sources")
    shard = next((root / "squares").glob("train-*.bin"))
    shard.unlink()
    with pytest.raises(ValueError, match=str(shard)):
        train(tiny_config(root), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_an_evaluation_already_in_the_metrics_is_not_repeated(data, tmp_path):
    train(tiny_config(data), tmp_path)
    shutil.rmtree(tmp_path / "checkpoints/global_step12")
    _, lines = train(tiny_config(data), tmp_path)
    evaluated = [line["step"] for line in lines if "eval/loss" in line]
    assert evaluated == [0, 6, 12]


def test_config_json_says_where_each_value_was_set(undisturbed):
    workdir, _, _ = undisturbed
    written = json.loads((workdir / "config.json").read_text())
    assert written["set_by"]["model.width"] == "file"
    assert written["set_by"]["optimizer.b1"] == "default"
    assert written["config"]["model"]["width"] == 64
