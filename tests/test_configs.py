"""The shipped configs: their resolved text is held by golden files.

After a change that is meant: STABLELM_UPDATE_GOLDEN=1 pytest tests/test_configs.py, read the diff.
"""

import ast
import math
import os
import re
import shlex
from pathlib import Path

import pytest

from stablelm_jax import config as config_lib
from stablelm_jax.model import config as named_sizes
from stablelm_jax.model.parameters import count_parameters
from stablelm_jax.planning.targets import parse_target

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
GOLDEN = Path(__file__).parent / "golden"
TEXT = {
    "own_chat": "dpo:mine=0.7,other=0.3",
    "own_text": "mine=0.7,other=0.3",
    "recipe_150m": "web=0.9,code=0.1",
    "stablelm_3b_4e1t": "web=0.75,code=0.25",
}
STAGES = {name: ("sft", "dpo", "self_knowledge") for name in ("zephyr_1_6b", "demo_chat")}
STAGES["demo_chat"] += ("random",)
STAGES["ladder"] = ("20m", "300m")  # the least and the largest of its rungs
FILES = sorted(p.relative_to(CONFIGS).with_suffix("").as_posix() for p in CONFIGS.rglob("*.py"))
# Of a file with stages, each of them.
NAMES = [f"{f}:{stage}" if stage else f for f in FILES for stage in STAGES.get(f, ("",))]
LAUNCHES = [name for name in NAMES if name.startswith("launch/")]


def load(name):
    file, colon, text = name.partition(":")
    text = TEXT.get(name, text)
    config = config_lib.load(f"{CONFIGS / file}.py{text and ':' + text}")
    if name == "stablelm_3b_4e1t":
        config.data.tokenizer = "tokenizer.json"
    return config


def test_the_configs_of_the_project_are_there():
    assert set(NAMES) >= {
        "smoke", "demo_multilingual", "own_text", "recipe_150m",
        "stablelm_2_1_6b", "stablelm_2_12b", "stablelm_3b_4e1t",
    }  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_the_resolved_config_is_the_golden_one(name):
    fields = (
        (key, "not set" if v is None else repr(v)) for key, v in config_lib.flatten(load(name))
    )
    text = "".join(f"{key} = {value}\n" for key, value in fields)
    golden = GOLDEN / f"config_{re.sub('[/:]', '_', name)}.txt"
    if os.environ.get("STABLELM_UPDATE_GOLDEN"):
        golden.write_text(text)
    assert text == golden.read_text()


@pytest.mark.parametrize("name", NAMES)
def test_a_shipped_config_is_valid_and_named_after_its_file(name):
    config = load(name)
    config_lib.validate(config)
    assert config.name == name.rpartition("/")[2].replace(":", "_")


@pytest.mark.parametrize("name", FILES)
def test_the_command_in_a_config_file_trains_that_config(name):
    docstring = ast.get_docstring(ast.parse((CONFIGS / f"{name}.py").read_text()))
    given = re.search(rf"\bconfigs/{name}\.py(:[\w=.,:]+)?", docstring)
    config = config_lib.load(CONFIGS.parent / given[0])
    for key, value in re.findall(r"^ .*--config\.([\w.]+)=(\S+)$", docstring, re.MULTILINE):
        config_lib.set_value(config, key, value)
    config_lib.validate(config)
    assert config.name == Path(name).name + (given[1] or "").replace(":", "_") * (name in STAGES)


@pytest.mark.parametrize(
    ("name", "devices", "tokens_per_step"),
    [
        ("stablelm_2_1_6b", 512, 8_388_608),
        ("stablelm_2_12b", 384, 6_291_456),
        ("stablelm_3b_4e1t", 256, 4_194_304),
    ],
)
def test_a_published_run_fits_its_machine_with_its_tokens_a_step(name, devices, tokens_per_step):
    config = load(name)
    assert config_lib.tokens_per_step(config) == tokens_per_step
    assert math.prod(config_lib.validate_mesh(config, devices).values()) == devices


@pytest.mark.parametrize("name", LAUNCHES)
def test_a_launch_config_names_its_machine_and_divides_its_batch_over_it(name):
    config = load(name)
    target = parse_target(config.parallel.target)
    sizes = config_lib.validate_mesh(config, target.num_devices)
    assert math.prod(sizes.values()) == target.num_devices
    parent = load("stablelm_2_12b" if "12b" in name else "stablelm_2_1_6b")
    assert config_lib.tokens_per_step(config) == config_lib.tokens_per_step(parent)


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("stablelm_2_1_6b", named_sizes.STABLELM_2_1_6B),
        ("stablelm_2_12b", named_sizes.STABLELM_2_12B),
        ("stablelm_3b_4e1t", named_sizes.STABLELM_3B_4E1T),
    ],
)
def test_a_published_run_trains_the_named_size(name, size):
    assert config_lib.model_config(load(name)) == size


@pytest.mark.parametrize(
    ("stage", "reported"), [("sft", 826_938), ("dpo", 63_169 + 12_859), ("self_knowledge", 20_000)]
)
def test_the_sets_of_zephyr_have_their_reported_samples(stage, reported):
    config = load(f"zephyr_1_6b:{stage}")
    assert sum(config_lib.mixture_weights(config).values()) == reported
    samples_a_step = config.data.batch_size * {"sft": 8, "dpo": 4, "self_knowledge": 1}[stage]
    epochs = {"sft": 3, "dpo": 1, "self_knowledge": 6}[stage]
    assert config.training.num_steps == round(epochs * reported / samples_a_step)
    assert config_lib.model_config(config) == named_sizes.STABLELM_2_1_6B


@pytest.mark.parametrize("name, first", [("zephyr_1_6b", "sft"), ("demo_chat", "random")])
def test_a_stage_takes_the_weights_of_the_one_before_it(name, first):
    for before, stage in ((first, "dpo"), ("dpo", "self_knowledge")):
        assert load(f"{name}:{stage}").branch.parent == f"runs/{name}/{before}"
    stages = [load(f"{name}:{stage}") for stage in STAGES[name]]
    assert all(config.branch.state == "weights" for config in stages)
    objectives = [config.training.objective for config in stages]
    assert objectives == ["dpo" if stage == "dpo" else "sft" for stage in STAGES[name]]


@pytest.mark.parametrize("size", ["20m", "45m", "90m", "150m", "300m", "1600m"])
def test_a_rung_of_the_ladder_follows_its_rule(size):
    config = load(f"ladder:{size}")
    model, schedule = config_lib.model_config(config), config.schedule
    parameters = count_parameters(model)
    assert parameters == pytest.approx(1e6 * int(size[:-1]), rel=0.35 if size == "20m" else 0.1)
    assert model.head_size == 64 and model.width == 32 * model.num_layers
    tokens = config.training.num_steps * config_lib.tokens_per_step(config)
    assert tokens == pytest.approx(20 * parameters, rel=1e-3)
    assert config_lib.mixture_weights(config) == config_lib.mixture_weights(load("stablelm_2_1_6b"))
    end = config.training.num_steps
    assert schedule.cooldown_start + schedule.cooldown_steps == end and schedule.cooldown_end == 0
    assert schedule.warmup_steps == round(0.018 * schedule.total_steps)
    recipe = load("recipe_150m")
    if size == "150m":
        assert model == config_lib.model_config(recipe)


@pytest.mark.parametrize("size", ["", "10m", "2000m", "20", "web=1"])
def test_what_is_no_rung_is_refused(size):
    with pytest.raises(config_lib.ConfigError, match="no size from 20m to 1600m; write 20m, or"):
        load(f"ladder:{size},web=1")


def test_what_was_not_read_in_the_original_is_marked():
    text = (CONFIGS / "zephyr_1_6b.py").read_text()
    for value in ("4096", "512", "5e-5", "606", "61", "0.01", "4e-6"):
        lines = [line for line in text.splitlines() if re.search(rf"= {re.escape(value)}\b", line)]
        before = text[: text.index(lines[0])].splitlines()[-4:]
        assert "NOT RE-VERIFIED" in " ".join([*before, lines[0]]), value


def test_a_longer_context_follows_from_its_parents():
    """NTK-aware: the slowest pair of the rotated dims turns as far over the whole row as before."""
    longer, parent = load("stablelm_2_1_6b_32k"), load("stablelm_2_1_6b")
    assert config_lib.tokens_per_step(longer) == config_lib.tokens_per_step(parent)
    model, factor = config_lib.model_config(parent), 32_768 / parent.data.sequence_length
    size = model.rotary_size
    derived = model.rotary_theta * factor ** (size / (size - 2))
    assert longer.model.rotary_theta == pytest.approx(derived, abs=0.5)
    turns = [
        length / theta ** ((size - 2) / size)
        for length, theta in ((32_768, derived), (4_096, model.rotary_theta))
    ]
    assert turns[0] == pytest.approx(turns[1])
    steps = longer.training.num_steps
    assert steps == round(5e9 / config_lib.tokens_per_step(longer)) == longer.schedule.total_steps
    changed = config_lib.differing(*(dict(config.model.items()) for config in (parent, longer)))
    assert changed.keys() == {"rotary_theta"} and longer.branch.state == "weights"


def test_the_weights_of_the_1_6b_are_28_and_add_up_as_reported():
    weights = config_lib.mixture_weights(load("stablelm_2_1_6b"))
    assert len(weights) == 28
    assert sum(weights.values()) == pytest.approx(1.0001, abs=1e-9)
    other_languages = [w for s, w in weights.items() if s[:9] == "culturax_" and s[9:] != "en"]
    assert sum(other_languages) == pytest.approx(0.0697, abs=1e-9)


@pytest.mark.parametrize(
    ("name", "share"),
    [("stablelm_2_1_6b", 0.018), ("stablelm_2_12b", 0.0065), ("stablelm_3b_4e1t", 0.005)],
)
def test_the_published_share_of_warmup_gives_its_steps(name, share):
    schedule = load(name).schedule
    assert schedule.warmup_steps == round(share * schedule.total_steps)


def test_the_3b_asks_for_the_weights_and_the_tokenizer_it_cannot_know():
    config = config_lib.load(CONFIGS / "stablelm_3b_4e1t.py")
    config_lib.validate(config, data=False)  # `plan` reads none
    with pytest.raises(config_lib.ConfigError, match=r"config\.data\.tokenizer=not set"):
        config_lib.validate(config)
    config.data.tokenizer = "tokenizer.json"
    with pytest.raises(config_lib.ConfigError, match=r"no source to train on"):
        config_lib.validate(config)


def test_the_commands_of_the_page_of_chats_take_what_those_before_them_made():
    page, made, prepared = (CONFIGS.parent / "docs/chat.md").read_text(), set(), set()
    for line in re.findall("^    (.+)", page, re.MULTILINE):
        words = shlex.split(line.partition(" #")[0].replace("'", ""))
        flags = dict(zip(words, words[1:]))
        if len(words) == 3 and words[1].isdecimal():
            prepared.add(words[0])  # a line of those that a loop reads
        prepared |= {flags["--source"]} if "--source" in flags else set()
        if "stablelm_jax.convert" in words:
            taken, out = words[4:6]
            assert taken in made
            made.add(out)
        if "hf" in words:
            made.add(flags["--local-dir"])
        if "stablelm_jax.train" in words and "zephyr" in line:
            config = load(flags["--config"].removeprefix("configs/").replace(".py", ""))
            assert config.branch.parent in made
            assert set(config_lib.mixture_weights(config)) <= prepared
        assert {flags[f] for f in ("--checkpoint", "--parent") if f in flags} <= made
        made |= {flags["--workdir"]} if "stablelm_jax.train" in words else set()
