"""A checkpoint on lm-eval's tasks by our model class, and its export by lm-eval's own.

    python benchmarks/lm_eval_agreement.py --checkpoint C --export DIR --task-data D --limit 500

`DIR` is what `convert to-hf C DIR --dtype float32` wrote. Both run in float32 on the CPU. Prints a
line for each task and metric, with the largest difference of two log-likelihoods, or the number of
texts that are equal.
"""

from __future__ import annotations

import argparse
import json
import time
from typing import Any

TASKS = "arc_challenge,arc_easy,hellaswag,piqa,sciq,winogrande,lambada_openai,mmlu,gsm8k"
MMLU_SUBJECTS = 57


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", required=True)
    parser.add_argument("--export", required=True)
    parser.add_argument("--task-data", required=True)
    parser.add_argument("--tasks", default=TASKS)
    parser.add_argument("--limit", type=int, default=500, help="of mmlu: over all its subjects")
    parser.add_argument("--batch-size", type=int, default=16, help="of lm-eval's class")
    arguments = parser.parse_args()
    for task in arguments.tasks.split(","):
        compare(arguments, task)


def compare(arguments: argparse.Namespace, task: str) -> None:
    """Prints the table's lines of one task."""
    from stablelm_jax.evaluation.suite import load_tasks, run_tasks

    limit = arguments.limit
    if task == "mmlu":
        limit = -(-limit // MMLU_SUBJECTS)
    found = {}
    for name, model in (("ours", ours(arguments)), ("theirs", theirs(arguments))):
        answers = remembered(model)
        began = time.monotonic()
        asked = load_tasks([task], arguments.task_data)
        scores = run_tasks(model, asked, limit=limit, failed=end_all)
        found[name] = scores, answers, time.monotonic() - began
    (our_scores, our_answers, our_time), (scores, answers, their_time) = found.values()
    compared = difference(our_answers, answers)
    for ours_, theirs_ in zip(our_scores, scores):
        if ours_.task == task:
            line = {
                "task": task,
                "metric": f"{ours_.metric},{ours_.how}",
                "ours": ours_.value,
                "theirs": theirs_.value,
                "requests": len(our_answers),
                **compared,
                "seconds": [round(our_time, 1), round(their_time, 1)],
            }
            print(json.dumps(line), flush=True)


def end_all(name: str, error: Exception) -> None:
    raise error


def difference(ours: list[Any], theirs: list[Any]) -> dict[str, Any]:
    """The largest difference of log-likelihoods, or the number of equal texts."""
    pairs = list(zip(ours, theirs))
    if pairs and isinstance(pairs[0][0], str):
        return {"equal_texts": sum(a == b for a, b in pairs)}
    return {"log_likelihoods_apart": max(abs(a[0] - b[0]) for a, b in pairs)}


def ours(arguments: argparse.Namespace) -> Any:
    from stablelm_jax.checkpoint.saved_model import SavedModel
    from stablelm_jax.evaluation.checkpoint_tasks import lm_of_checkpoint
    from stablelm_jax.parallel.mesh import make_mesh

    saved = SavedModel.open(arguments.checkpoint)
    return lm_of_checkpoint(saved, make_mesh(), dtype="float32", batch_tokens=4096)


def theirs(arguments: argparse.Namespace) -> Any:
    from lm_eval.models.huggingface import HFLM

    return HFLM(arguments.export, device="cpu", dtype="float32", batch_size=arguments.batch_size)


def remembered(model: Any) -> list[Any]:
    """The list that every later answer of `model` is added to."""
    answers: list[Any] = []

    def remember(method: Any) -> Any:
        def answering(*arguments: Any, **options: Any) -> Any:
            found = method(*arguments, **options)
            answers.extend(found)
            return found

        return answering

    for name in ("loglikelihood", "generate_until"):
        setattr(model, name, remember(getattr(model, name)))
    return answers


if __name__ == "__main__":
    main()
