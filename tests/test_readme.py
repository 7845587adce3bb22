"""The README's commands are run as they stand there; only what takes minutes is cut short."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")

# Appended to the command of that verb: the same run, for two steps on a narrower model.
SHORTER = {
    "stablelm_jax.train": [
        "--config.training.num_steps=2",
        "--config.schedule.warmup_steps=1",
        "--config.model.num_layers=1",
        "--config.model.width=64",
        "--config.model.num_heads=1",
        "--config.model.num_kv_heads=1",
        "--config.data.sequence_length=64",
        "--config.data.batch_size=2",
        "--config.evaluation.max_rows=2",
        "--config.samples.max_new_tokens=2",
    ],
    "stablelm_jax.generate": ["--max-new-tokens=2"],
    "stablelm_jax.convert": ["--no-verify"],  # tests/interop looks at what is in these files
}


def shell_blocks():
    return re.findall(r"```bash\n(.*?)```", README, re.DOTALL)


def commands_with(text):
    """Those of the one block that holds this text."""
    (block,) = [block for block in shell_blocks() if text in block]
    return [shlex.split(line) for line in block.strip().splitlines()]


def own_text_commands():
    return commands_with("own_text.py")


def test_every_shell_block_is_run_by_a_test_or_is_one_of_the_two_scripts():
    run = ("stablelm_jax.prepare", "stablelm_jax.convert")
    others = [b.strip() for b in shell_blocks() if not any(verb in b for verb in run)]
    assert others == ["bash launch/smoke.sh", "bash launch/test.sh --all"]


def test_ci_runs_the_test_command_of_the_readme():
    script = (ROOT / ".ci/run").read_text()
    assert "launch/test.sh" in script and "--all" in script


def run(command, folder):
    command = [sys.executable, *command[1:], *SHORTER.get(command[2], [])]
    done = subprocess.run(
        [part.replace("global_step300", "global_step2") for part in command],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done


def write_chats(folder):
    """Forty conversations and as many preference pairs."""
    for name in ("my_chats", "my_pairs"):
        (folder / name).mkdir()
    chats, pairs = [], []
    for number in range(40):
        asked = {"role": "user", "content": f"Which number follows {number}?"}
        right, wrong = f"It is {number + 1}.", f"Perhaps {number}?"
        chats.append({"messages": [asked, {"role": "assistant", "content": right}]})
        pairs.append({"prompt": asked["content"], "chosen": right, "rejected": wrong})
    for name, records in (("my_chats", chats), ("my_pairs", pairs)):
        text = "\n".join(map(json.dumps, records))
        (folder / name / "all.jsonl").write_text(text, encoding="utf-8")


def test_commands_train_on_ones_own_text_take_it_elsewhere_and_make_a_chat_model(tmp_path):
    texts = tmp_path / "my_texts"
    texts.mkdir()
    for number in range(40):
        words = " ".join(f"word{(number * 7 + i) % 50}" for i in range(1500))
        (texts / f"{number}.txt").write_text(words)
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    commands = own_text_commands()
    assert [c[2].split(".")[1] for c in commands] == ["prepare", "train", "generate"]
    for command in commands + commands_with("from-hf"):
        done = run(command, tmp_path)
    assert done.stdout.startswith("The")
    for written in ("runs/mine/loss.png", "exported/model.safetensors", "mine.gguf"):
        assert (tmp_path / written).exists()
    write_chats(tmp_path)
    for command in commands_with("own_chat.py"):
        done = run(command, tmp_path)
    assert (tmp_path / "chat.gguf").exists()


def test_the_checkpoint_it_generates_from_is_the_last_step_of_that_config():
    from stablelm_jax import config as config_lib

    config = config_lib.load(f"{ROOT}/configs/own_text.py:mine")
    generate = " ".join(own_text_commands()[2])
    assert f"global_step{config.training.num_steps} " in generate


NAMED = re.findall(r"`((?:stablelm_jax|configs|benchmarks)/[\w/.]+)`", README)


@pytest.mark.parametrize("path", NAMED)
def test_every_file_it_names_exists(path):
    assert (ROOT / path).exists()


@pytest.mark.parametrize("link", re.findall(r"\]\(((?!http)[^)]+)\)", README))
def test_every_link_into_the_project_leads_somewhere(link):
    path, _, heading = link.partition("#")
    assert (ROOT / path).exists()
    if heading:
        titles = re.findall(r"^#+ (.+)$", (ROOT / path).read_text(encoding="utf-8"), re.MULTILINE)
        assert heading in {title.lower().replace(" ", "-") for title in titles}
