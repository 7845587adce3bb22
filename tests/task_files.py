"""A small task for lm-eval, with data of its own."""

from __future__ import annotations

import json
from pathlib import Path

TASK = """
task: {name}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
    validation: {data}
test_split: test
validation_split: validation
output_type: multiple_choice
num_fewshot: {shots}
doc_to_text: "{{{{question}}}}"
doc_to_target: answer
doc_to_choice: "{{{{choices}}}}"
metric_list:
  - metric: acc
  - metric: acc_norm
metadata:
  version: 1.0
"""


def write_task(folder: Path, name: str, items: int, shots: int = 2) -> Path:
    """`folder/NAME.yaml`: which of three words comes next? The words are those of tiny.py."""
    data = folder / f"{name}.jsonl"
    with data.open("w") as file:
        for i in range(items):
            choices = [f"w{2 * i + 4}", f"w{i + 30}", f"w{i + 9} w1"]
            item = {"question": f"w{2 * i} w{2 * i + 2}", "choices": choices, "answer": 0}
            file.write(json.dumps(item) + "\n")
    path = folder / f"{name}.yaml"
    path.write_text(TASK.format(name=name, data=data, shots=shots))
    return path
