"""launch/Dockerfile as far as it can be held to account without building it."""

import fnmatch
import json
import os
import re
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "launch" / "Dockerfile").read_text()
INSTRUCTIONS = [
    tuple(line.split(None, 1))
    for line in re.sub(r"\\\n\s*", "", re.sub(r"(?m)^#.*\n", "", TEXT)).splitlines()
    if line
]
IGNORED = [
    line
    for line in (ROOT / ".dockerignore").read_text().splitlines()
    if line and not line.startswith("#")
]
PYTHON = """#!/bin/sh
printf '%s\\n' "$XLA_FLAGS" "$XLA_PYTHON_CLIENT_MEM_FRACTION" "$@"
exit 75
"""


def given(instruction):
    return [rest for name, rest in INSTRUCTIONS if name == instruction]


def is_ignored(path):
    """A pattern counts from the top, `**/` at any depth; what lies in an ignored folder is too."""
    parts = Path(path).parts
    heads = ["/".join(parts[: n + 1]) for n in range(len(parts))]
    return any(
        fnmatch.fnmatchcase(head, pattern)
        or (pattern.startswith("**/") and fnmatch.fnmatchcase(Path(head).name, pattern[3:]))
        for head in heads
        for pattern in IGNORED
    )


def test_what_is_copied_exists_and_is_not_ignored():
    sources = [source for rest in given("COPY") for source in rest.split()[:-1]]
    assert sources[-1] == "."
    for source in sources[:-1]:
        assert (ROOT / source).exists() and not is_ignored(source), source


def test_all_that_a_run_needs_goes_into_the_image_and_no_run_data_or_history_does():
    code = [*(ROOT / "stablelm_jax").rglob("*.py"), *(ROOT / "configs").rglob("*.py")]
    for path in [*code, *(ROOT / "launch").glob("*.sh")]:
        assert not is_ignored(path.relative_to(ROOT)), path
    for left_out in (
        ".git",
        ".venv/bin/python",
        "data/wiki/a.bin",
        "runs/a",
        "configs/__pycache__/a",
    ):
        assert is_ignored(left_out), left_out


def extra_for(driver, folder):
    """What the scripts install on a machine with that driver (launch/environment.sh)."""
    (folder / "nvidia-smi").write_text(f"#!/bin/sh\necho {driver}.12\n")
    (folder / "nvidia-smi").chmod(0o755)
    script = 'source "$1/launch/environment.sh"; cuda_extra'
    done = subprocess.run(
        ["bash", "-c", script, "bash", str(ROOT)],
        env={"PATH": f"{folder}:{os.environ['PATH']}"}, capture_output=True, text=True,
    )  # fmt: skip
    return done.stdout.strip()


def test_the_extras_it_names_are_the_packages_and_its_drivers_those_of_the_scripts(tmp_path):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    comment = " ".join(re.findall(r"(?m)^# ?(.*)$", TEXT))
    said = re.findall(r"(\d+) or newer (?:for |with --build-arg CUDA=)(\w+)", comment)
    drivers = {extra: int(driver) for driver, extra in said}
    assert drivers.keys() == {"cuda12", "cuda13"} <= project["optional-dependencies"].keys()
    assert given("ARG") == [f"CUDA={extra_for(max(drivers.values()), tmp_path)}"]
    for extra, oldest in drivers.items():
        assert extra_for(oldest, tmp_path) == extra != extra_for(oldest - 1, tmp_path)


def test_the_first_installation_has_what_building_the_package_reads():
    """Its layer is made before the rest of the code is there."""
    first = next(n for n, (name, rest) in enumerate(INSTRUCTIONS) if "pip install" in rest)
    there = " ".join(rest for name, rest in INSTRUCTIONS[:first] if name == "COPY")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    hatch = project["tool"]["hatch"]
    needed = [project["project"]["readme"], *project["project"]["license-files"]]
    needed += [hatch["version"]["path"], *hatch["build"]["targets"]["wheel"]["force-include"]]
    for path in needed:
        assert path in there, path


def test_no_flag_is_written_here_that_settings_sh_holds():
    assert "XLA" not in TEXT and "NCCL_" not in TEXT


def test_the_entry_point_is_a_script_of_the_image_and_the_user_is_not_root():
    bash, script = json.loads(given("ENTRYPOINT")[0])
    (workdir,) = given("WORKDIR")
    assert bash == "bash" and (ROOT / Path(script).relative_to(workdir)).exists()
    assert given("USER") == ["stablelm"]


@pytest.fixture
def container(tmp_path):
    """A way to run the entry point from elsewhere, with a python that only shows what it got."""
    shutil.copytree(ROOT / "launch", tmp_path / "launch")
    (tmp_path / "python").write_text(PYTHON)
    (tmp_path / "python").chmod(0o755)

    def run(*arguments):
        path = f"{tmp_path}:{os.environ['PATH']}"
        return subprocess.run(
            ["bash", str(tmp_path / "launch" / "container.sh"), *arguments],
            env={"PATH": path}, capture_output=True, text=True,
        )  # fmt: skip

    return run


def test_a_verb_gets_the_settings_for_gpus_its_arguments_and_gives_its_exit_code(container):
    done = container("train", "--config.name=two words")
    flags, memory, *arguments = done.stdout.splitlines()
    assert "--xla_gpu_enable_latency_hiding_scheduler=true" in flags and memory == "0.94"
    assert arguments == ["-m", "stablelm_jax", "train", "--config.name=two words"]
    assert done.returncode == 75
