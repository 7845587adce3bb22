"""The command line, through a verb of a few lines in a process of its own."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
SMOKE = str(CONFIGS / "smoke.py")
VERB = """
import json
from absl import flags
from stablelm_jax import config as config_lib

def run(argv):
    config = config_lib.config_from_flags()
    config_lib.validate_mesh(config, flags.FLAGS.devices)
    set_by = config_lib.set_by(config, config_lib.overrides_from_flags())
    print(json.dumps({"config": config_lib.to_dict(config), "set_by": set_by}))
    return 75

config_lib.define_flags()
flags.DEFINE_integer("devices", 1, "how many")
config_lib.run(run)
"""


@pytest.fixture(scope="module")
def verb(tmp_path_factory):
    script = tmp_path_factory.mktemp("verb") / "verb.py"
    script.write_text(VERB)
    root = str(CONFIGS.parent)

    def call(*arguments):
        command = [sys.executable, str(script), *arguments]
        return subprocess.run(
            command, capture_output=True, text=True, env={"PYTHONPATH": root, "PATH": ""}
        )

    return call


def test_overrides_reach_the_config_and_mains_exit_code_the_shell(verb):
    done = verb(
        "--config", SMOKE,
        "--config.data.weights.python_docs=2.0",
        "--config.checkpoint.keep_every", "400",
        "--noconfig.parallel.zero1",
        "--config.samples.prompts=('a', 'b')",
        "--config.schedule.peak=1",
    )  # fmt: skip
    assert done.returncode == 75, done.stderr
    out = json.loads(done.stdout)
    config, set_by = out["config"], out["set_by"]
    assert config["data"]["weights"] == {"python_docs": 2.0, "package_docs": 0.7}
    assert config["checkpoint"]["keep_every"] == 400
    assert config["parallel"]["zero1"] is False
    assert config["samples"]["prompts"] == ["a", "b"]
    assert config["schedule"]["peak"] == 1.0
    assert set_by["data.weights.python_docs"] == set_by["parallel.zero1"] == "command line"
    assert set_by["data.weights.package_docs"] == "file"
    assert set_by["optimizer.b1"] == "default"


def test_sources_of_ones_own_come_after_the_colon(verb):
    done = verb("--config", f"{CONFIGS / 'own_text.py'}:mine=0.7,other=0.3")
    assert done.returncode == 75, done.stderr
    weights = json.loads(done.stdout)["config"]["data"]["weights"]
    assert weights == {"mine": 0.7, "other": 0.3}


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "--config: is missing; write --config configs/smoke.py"),
        (["--config=configs/no_such_file.py"], "there is no such file"),
        (["--config=configs/no_such_file.py", "--config.seed=3"], "there is no such file"),
        (["--config", SMOKE, "--config.data.batchsize=3"], "did you mean config.data.batch_size?"),
        (["--config", SMOKE, "--config.modle.width", "3"], "did you mean config.model.width?"),
        (["--config", SMOKE, "--config.data.weights.new=1"], "configs/own_text.py:mine=1"),
        (["--config", SMOKE, "--config.data.batch_size=many"], "of type int, like 16"),
        (["--config", SMOKE, "--config.data.batch_size", "1.5"], "of type int, like 16"),
        (["--config", SMOKE, "--config.checkpoint.keep_every=x"], "give a value of type int"),
        (["--config", SMOKE, "--config.data.batch_size=none"], "config.data.batch_size=not set"),
        (["--config", SMOKE, "--config.learning_rate=1"], "did you mean config.schedule.peak?"),
        (["--config", SMOKE, "--config.model=3"], "--config.model.FIELD=VALUE"),
        (["--config", SMOKE, "--config.schedule={'peak': 1.0}"], "is missing"),
        (["--config", SMOKE, "--config.training.num_steps=20"], "fewer warmup steps (here 2)"),
        (["--config", SMOKE, "--devices=3"], "use a multiple of 3"),
        (["--config", SMOKE, "--device=3"], "Did you mean: devices"),
        (["--config", SMOKE, "stray"], "argument 'stray'"),
        (["--config.seed=3", "--config", SMOKE], "write --config FILE.py first"),
        (["--config", f"{CONFIGS / 'own_text.py'}"], "no source to train on"),
        (["--config", f"{CONFIGS / 'own_text.py'}:mine=x"], "write them as mine=0.7,other=0.3"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(verb, arguments, says):
    done = verb(*arguments)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1, done.stderr
    assert says in done.stderr


def test_a_file_that_fails_under_flags_is_one_line_with_its_line_number(verb, tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(
        "from stablelm_jax.config import default_config\n"
        "def get_config():\n    c = default_config()\n    c.seed = 'x'\n    return c\n"
    )
    done = verb("--config", str(path))
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "line 4: TypeError" in done.stderr


def test_a_weight_written_as_a_whole_number_in_the_file_says_so_when_overridden(verb, tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(
        "from stablelm_jax.config import load\n"
        f"def get_config():\n    c = load({SMOKE!r})\n    c.data.weights = {{'mine': 1}}\n"
        "    return c\n"
    )
    assert verb("--config", str(path)).returncode == 75
    done = verb("--config", str(path), "--config.data.weights.mine=0.5")
    assert done.returncode == 2
    assert "write the weight as a float" in done.stderr


def test_help_is_no_failure(verb):
    done = verb("--help")
    assert done.returncode == 0
    assert "--config" in done.stdout


def test_none_unsets_what_the_file_has_set(verb, tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(
        "from stablelm_jax.config import load\n"
        f"def get_config():\n    c = load({SMOKE!r})\n    c.checkpoint.keep_every = 400\n"
        "    c.parallel.target = 'h200:1x1'\n    c.training.num_valid_ids = 4000\n"
        "    return c\n"
    )
    assert json.loads(verb("--config", str(path)).stdout)["config"]["parallel"]["target"]
    flags = ["--config.checkpoint.keep_every=none", "--config.parallel.target", "none"]
    flags += ["--config.training.num_valid_ids=None", "--config.name=none"]
    done = verb("--config", str(path), *flags)
    assert done.returncode == 75, done.stderr
    out = json.loads(done.stdout)
    config = out["config"]
    assert config["checkpoint"]["keep_every"] is None and config["parallel"]["target"] is None
    assert config["training"]["num_valid_ids"] is None
    assert config["name"] == "none"  # which cannot be unset: a text like others
    assert out["set_by"]["checkpoint.keep_every"] == "command line"
