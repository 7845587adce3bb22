"""A small task for lm-eval, with data of its own."""

from __future__ import annotations

import json
from pathlib import Path

import yaml

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


# What a task says instead: text is written, and the answer's beginning is given.
WRITES = """
output_type: generate_until
description: "Answer briefly."
doc_to_target: "{{choices[0]}}"
doc_to_choice: null
gen_prefix: "It is"
metric_list: [{metric: exact_match}]
generation_kwargs: {until: ["\\n\\n"], max_gen_toks: 6}
"""


def write_task(folder: Path, name: str, items: int, shots: int = 2, instead: str = "") -> Path:
    """`folder/NAME.yaml`: which of three words comes next? The words are those of tiny.py.

    `instead`: lines of YAML that take the place of the task's own.
    """
    data = folder / f"{name}.jsonl"
    with data.open("w") as file:
        for i in range(items):
            choices = [f"w{2 * i + 4}", f"w{i + 30}", f"w{i + 9} w1"]
            item = {"question": f"w{2 * i} w{2 * i + 2}", "choices": choices, "answer": 0}
            file.write(json.dumps(item) + "\n")
    path = folder / f"{name}.yaml"
    path.write_text(TASK.format(name=name, data=data, shots=shots))
    if instead:
        path.write_text(json.dumps(yaml.safe_load(path.read_text()) | yaml.safe_load(instead)))
    return path
