"""The verb as a user meets it; compiling is tested beside it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import fsspec
import pytest
from tiny import SOURCES, tiny_config, write_data

from stablelm_jax import config as config_lib
from stablelm_jax.data.manifest import read_manifest
from stablelm_jax.planning import report
from stablelm_jax.planning.compile import CompiledStep, DoesNotFit

ROOT = Path(__file__).parents[2]
CONFIG = "--config=configs/stablelm_2_1_6b.py"
CONFIGS = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "configs").glob("*.py"))

# A command line after the other, each in a fork of a process that has imported everything.
CHILD = """
import json, os, sys
from stablelm_jax import plan
from stablelm_jax.planning import sweep

for number, arguments in enumerate(json.loads(sys.argv[1])):
    sys.stdout.flush()
    if os.fork() == 0:
        for descriptor, name in (1, "out"), (2, "err"):
            os.dup2(os.open(f"{sys.argv[2]}/{number}.{name}", os.O_CREAT | os.O_WRONLY), descriptor)
        sys.argv = ["plan", *arguments]
        plan.main()
    print(os.waitstatus_to_exitcode(os.wait()[1]))
"""

BAD = {
    (CONFIG, "--target=v9:2x2"): "no chip 'v9'; known are",
    (CONFIG, "--target=v5p:4x4"): "v5p needs 3 sizes",
    (CONFIG, "--target=a100-40gb:3x8"): "config.data.batch_size=2048",
    (): "--config: is missing",
    ("--recipe=stablelm_2", "--target=h200:1x1"): "--target: has no effect with --recipe",
    ("--recipe=none_such",): "no such recipe; there are demo, stablelm_2",
    (CONFIG, "--sweep"): "--sweep: needs the machine to compile for; write --target",
    ("--all", "--sweep"): "--all: has no effect with --sweep",
    (CONFIG, "--sweep", "--target=h200:1x1", "--mfu=0.4"): "--mfu: has no effect with",
    (CONFIG, "--sweep", "--target=h200:1x7"): "config.data.batch_size=2048: does not divide",
}


def environment():
    return {**os.environ, "XLA_FLAGS": "", "JAX_PLATFORMS": "cpu"}


@pytest.fixture(scope="module")
def plans(tmp_path_factory):
    """{arguments: (exit code, stdout, stderr)} of every command line of this file."""
    folder = tmp_path_factory.mktemp("plans")
    cases = [*BAD, *((f"--config={path}",) for path in CONFIGS)]
    done = subprocess.run(
        [sys.executable, "-c", CHILD, json.dumps(cases), str(folder)],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    codes = map(int, done.stdout.split())
    return {
        case: (code, *((folder / f"{number}.{name}").read_text() for name in ("out", "err")))
        for number, (case, code) in enumerate(zip(cases, codes, strict=True))
    }


@pytest.mark.parametrize("arguments", BAD, ids=" ".join)
def test_bad_arguments_are_one_line_and_exit_2(plans, arguments):
    code, _, errors = plans[arguments]
    assert code == 2
    assert BAD[arguments] in errors.splitlines()[-1]


@pytest.mark.parametrize("path", CONFIGS)
def test_every_config_is_planned_without_data_and_without_a_tokenizer(plans, path):
    if path.endswith("_h200.py"):  # it names its target, whose compiler is then asked
        pytest.importorskip("jax_cuda13_plugin")
    code, said, errors = plans[f"--config={path}",]
    assert code == 0, errors
    assert "training FLOPs a token" in said and "its weights alone" in said


@pytest.mark.parametrize(
    "said",
    [
        "1,644,417,024",
        "11.048",  # GFLOP a token, full attention (shapes of the model)
        "9.840",  # causal
        "3,523,215,360,000 tokens in 420,000 steps",
        "refinedweb",
        "19.7",  # GB of a checkpoint: three float32 of each parameter
        "no --target: memory, communication, time and cost were left out",
    ],
)
def test_what_needs_no_compiler_is_printed_without_a_target(plans, said):
    assert said in plans[CONFIG,][1]


def test_a_model_split_over_two_devices_needs_no_target_either(plans):
    said = plans["--config=configs/stablelm_2_12b.py",][1]
    assert "12,142,976,000" in said and "data 1 x model 2" in said


def test_all_gives_a_line_for_each_launch_config_and_1_where_one_does_not_fit(monkeypatch, capsys):
    def compiled(config, target):
        if target.chip == "v4":
            raise DoesNotFit(f"{target}: a device needs 99 GiB")
        mesh = config_lib.validate_mesh(config, target.num_devices)
        return CompiledStep(target, mesh, 2, "chunked", 7.0, 1, 1, 5 * 2**30, [])

    monkeypatch.setattr(report, "compile_for", compiled)
    assert report.plan_all() == 1
    said = capsys.readouterr()
    table = said.out[said.out.index("┏") :]
    for path in (ROOT / "configs" / "launch").glob("*.py"):
        assert table.count(f" {path.stem} ") == (0 if "_v4_" in path.stem else 1), path.stem
    assert "stablelm_2_1_6b_v4_4x8x8: v4:4x8x8: a device needs 99 GiB" in said.out
    assert said.err.splitlines()[-1] == "error: 1 launch configs do not compile or do not fit"


def test_tokens_of_data_behind_a_url_are_counted_and_what_is_missing_is_said(tmp_path, capsys):
    root = write_data(tmp_path / "sources")
    fsspec.filesystem("memory").put(f"{root}/", "/plan_data/", recursive=True)
    config = tiny_config(root, **{"data.root": "memory://plan_data"})
    config.data.weights["absent"] = 1.0
    report.plan(config, None)
    said = capsys.readouterr().out
    cells = (line.split("│") for line in said.splitlines())
    epochs = {row[1].strip(): row[4].strip() for row in cells if len(row) == 6}
    tokens = config_lib.tokens_per_step(config) * config.training.num_steps
    weights = config_lib.mixture_weights(config)
    for name in SOURCES:
        share = tokens * weights[name] / sum(weights.values())
        assert epochs[name] == f"{share / read_manifest(root / name).train.tokens:.3g}"
    assert epochs["absent"] == "not prepared here"


def test_without_the_compiler_it_names_the_extra_after_all_the_rest():
    hidden = "import sys; sys.modules['libtpu'] = None; sys.argv[0] = 'plan'; "
    code = hidden + "from stablelm_jax.plan import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", code, CONFIG, "--target=v5p:4x4x4"],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 1
    assert "pip install -e '.[aot]'" in done.stderr.splitlines()[-1]
    assert "device-hours" in done.stdout
