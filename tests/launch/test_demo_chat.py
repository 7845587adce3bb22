"""launch/demo_chat.sh, with apt-get, dpkg and Python replaced by ones that take notes."""

from pathlib import Path

import pytest

from stablelm_jax import config as config_lib

ROOT = Path(__file__).parents[2]
APT = """#!/bin/sh
printf '["apt-get", "%s"]\\n' "$*" >>"$FAKE_LOG"
for last; do :; done
case "$*" in *' download '*) touch "${last}_11.1_all.deb" ;; esac
"""
DPKG = '#!/bin/sh\nmkdir -p "$3/usr/share"\n'
STAGES = ("sft", "random", "dpo", "self_knowledge")


def prepare(checkout):
    """Makes it a Debian whose multilingual demo was prepared and trained."""
    checkout.add_program("apt-get", APT)
    checkout.add_program("dpkg", DPKG)
    (checkout.root / "data").mkdir()
    (checkout.root / "data" / "tokenizer.json").touch()
    (checkout.root / "runs" / "demo").mkdir(parents=True)
    return checkout


@pytest.fixture
def prepared(checkout):
    return prepare(checkout)


@pytest.fixture(scope="module")
def done(checkout_of_module):
    """After one whole run, whose output is `done.output`."""
    checkout = prepare(checkout_of_module)
    ended = checkout.run("launch/demo_chat.sh", "--", "--config.training.num_steps=4")
    assert ended.returncode == 0, ended.stderr
    checkout.output = ended.stdout
    return checkout


def value(call, flag):
    return (
        next((c.partition("=")[2] for c in call if c.startswith(flag + "=")), None)
        or (call[call.index(flag) + 1])
    )


def test_it_prepares_the_sources_of_its_config_whole_topics_held_out(done):
    calls = {value(call, "--source"): call for call in done.calls("stablelm_jax.prepare")}
    loaded = [config_lib.load(f"{ROOT}/configs/demo_chat.py:{stage}") for stage in STAGES]
    assert set(calls) == {source for config in loaded for source in config.data.weights}
    for source, call in calls.items():
        assert value(call, "--template") == "zephyr"
        if source != "self_knowledge":
            assert value(call, "--language") == source[-2:]
            assert value(call, "--held-out-by") == "topic"


def test_each_stage_goes_on_from_the_one_that_its_config_names(done):
    calls = done.calls("stablelm_jax.train")
    assert [value(c, "--config").rpartition(":")[2] for c in calls] == list(STAGES)
    for stage, call in zip(STAGES, calls):
        config = config_lib.load(f"{ROOT}/configs/demo_chat.py:{stage}")
        parent = str(done.root / config.branch.parent)
        assert value(call, "--config.branch.parent") == parent
        assert call[-1] == "--config.training.num_steps=4"


def test_every_stage_is_evaluated_and_the_names_are_asked_before_and_after(done):
    evaluated = [Path(value(c, "--output")).stem for c in done.calls("stablelm_jax.evaluate")]
    assert evaluated == list(STAGES)
    asked = done.calls("launch/corpora/self_knowledge.py")
    verbs = [(call[0], Path(value(call, "--checkpoint")).name) for call in asked]
    assert verbs == [("check", "dpo"), ("answer", "dpo"), ("check", "self_knowledge")]


def test_it_prints_the_commands_that_it_runs(done):
    printed = [line for line in done.output.splitlines() if line.startswith("$ ")]
    assert len(printed) == len([c for c in done.calls() if c[0] not in ("venv", "pip")]) - 7
    assert any("demo_chat.py:dpo" in line and "a\\ checkout/runs" in line for line in printed)


def test_what_was_done_is_not_done_again(done):
    for stage in STAGES:
        (done.root / "runs" / "demo_chat" / f"{stage}.json").touch()
    assert done.run("launch/demo_chat.sh").returncode == 0
    assert len(done.calls("stablelm_jax.evaluate")) == len(STAGES)
    assert len(done.calls("launch/corpora/chat_corpus.py")) == 1
    downloads = [call for call in done.calls("apt-get") if "download" in call[0].split()]
    assert len(downloads) == 6


def test_a_stopped_training_ends_it_with_75_and_says_what_to_do(prepared):
    done = prepared.run("launch/demo_chat.sh", FAKE_TRAIN_EXIT="75")
    assert done.returncode == 75
    assert "Run the same command again" in done.stdout
    assert len(prepared.calls("stablelm_jax.train")) == 1


@pytest.mark.parametrize(
    "missing, remedy",
    [("data/tokenizer.json", "demo_corpus.sh"), ("runs/demo", "demo_multilingual")],
)
def test_without_the_multilingual_demo_it_says_what_to_run_first(prepared, missing, remedy):
    path = prepared.root / missing
    path.rmdir() if path.is_dir() else path.unlink()
    done = prepared.run("launch/demo_chat.sh")
    assert done.returncode == 1 and remedy in done.stderr.splitlines()[-1]
