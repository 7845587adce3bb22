"""MT-Bench in FastChat's files: a model's answers, and what a judge gave for them.

Eighty questions of two turns (Zheng et al. 2023, arXiv 2306.05685). Beside question.jsonl lie
judge_prompts.jsonl and reference_answer/gpt-4.jsonl (launch/corpora/task_data.py fetches them);
model_answer/MODEL.jsonl and model_judgment/JUDGE_single.jsonl are written.
"""

from __future__ import annotations

import collections
import json
import re
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from stablelm_jax.checkpoint.reading import state_hash
from stablelm_jax.checkpoint.saved_model import SavedModel
from stablelm_jax.evaluation.answers import answer_all
from stablelm_jax.evaluation.judge import Judge
from stablelm_jax.evaluation.scores import published_mt_bench
from stablelm_jax.generation.generator import Generator
from stablelm_jax.reporting.evaluations import Told, bar, table_of_grades
from stablelm_jax.run.console import make_console
from stablelm_jax.storage.files import write_text
from stablelm_jax.tokenizer.chat import ChatTemplate, encode_chat
from stablelm_jax.tokenizer.tokenizer import Tokenizer

# FastChat's: the likeliest token where there is one right answer.
TEMPERATURES = {"writing": 0.7, "roleplay": 0.7, "stem": 0.1, "humanities": 0.1}
TEMPERATURES |= dict.fromkeys(("extraction", "math", "coding", "reasoning"), 0.0)
MAX_NEW_TOKENS = 1024  # FastChat's
_WITH_REFERENCE = ("math", "reasoning", "coding")
_IN_A_ROW = 3  # failures of the judge that end the work
_UNFIT = re.compile(r"[^\w.-]+")  # for the name of a file
_FETCH = (
    "python launch/corpora/task_data.py --output DIR --only mt_bench fetches MT-Bench's files, and "
    "--task-data DIR takes them from there"
)
Line = dict[str, Any]


def evaluate_mt_bench(
    saved: SavedModel,
    template: ChatTemplate,
    make_generator: Callable[[], Generator],
    questions: Path,
    folder: Path,
    *,
    model_id: str | None = None,
    max_new_tokens: int | None = None,
    judge: Judge | None = None,
) -> dict[str, Any]:
    """Answers the questions (a file) into `folder`, has them graded, and prints a table.

    Args:
      make_generator: called where something is to be answered.
      model_id: names the file of answers; by default the run and the step do.

    Returns what goes into the JSON: "mt_bench", and "failed" where turns have no grade. A
    ValueError where a file is missing or not MT-Bench's; other errors are those of the `judge`.
    """
    parent, most = saved.path.parent, max_new_tokens or MAX_NEW_TOKENS
    run = parent.parent.name if parent.name == "checkpoints" else parent.name
    path = folder / "model_answer" / _UNFIT.sub("_", f"{model_id or f'{run}-{saved.name}'}.jsonl")
    made_with = {"checkpoint": str(saved.path), "weights": state_hash(saved.run["checksums"])}
    made_with |= {"template": template.to_json(), "max_new_tokens": most}
    console, asked = make_console(stderr=True), read_lines(questions)
    found: dict[str, Any] = {"answers": str(path), "questions": len(asked)}
    try:
        files = _read_judges_files(questions) if judge else None
        if judge:  # what they lack shows here: the questions stand in for hours of answers
            _grades_wanted(asked, *files, [{"choices": [question]} for question in asked])
        with bar(console) as told:
            how = saved.tokenizer, template, make_generator
            answers = answer_questions(*how, asked, path, made_with, told)
            if judge:
                wanted = _grades_wanted(asked, *files, answers)
                found |= judge_answers(judge, wanted, folder, path.stem, told)
    except KeyError as error:
        raise ValueError(f"{questions}, or a file beside it, has no {error}; {_FETCH}") from error
    found["empty"] = sum(not all(line["choices"][0]["turns"]) for line in answers)
    console.print(f"{path}: {len(asked)} answers, {found['empty']} with an empty turn")
    if judge:
        console.print(table_of_grades(found, published_mt_bench()))
    failed = found.pop("failed", {})
    return {"mt_bench": found} | ({"failed": failed} if failed else {})


def read_lines(path: Path) -> list[Line]:
    """The objects of a .jsonl; a ValueError names the line that is none."""
    if not path.exists():
        raise ValueError(f"{path}: is not there; {_FETCH}")
    found = []
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), 1):
        try:
            found += [{**json.loads(line)}] if line.strip() else []
        except (ValueError, TypeError) as error:
            raise ValueError(f"{path}, line {number}: no JSON object ({error})") from None
    return found


def _write_lines(path: Path, lines: Sequence[Line]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, "".join(json.dumps(line) + "\n" for line in lines))


def answer_questions(
    tokenizer: Tokenizer,
    template: ChatTemplate,
    make_generator: Callable[[], Generator],
    questions: Sequence[Line],
    path: Path,
    made_with: Mapping[str, Any],
    told: Told,
) -> list[Line]:
    """All answers; what `path` has none for is answered now, and written after each batch.

    A ValueError where it has answers that were made with something else than `made_with`.
    """
    answers = {line["question_id"]: line for line in read_lines(path)} if path.exists() else {}
    had = [line.get("made_with") or {} for line in answers.values()]
    if other := [key for key in made_with if any(one.get(key) != made_with[key] for one in had)]:
        remedy = "give another --model-id, or remove the file"
        raise ValueError(f"{path}: has answers made with another {', '.join(other)}; {remedy}")
    groups = collections.defaultdict(list)
    for question in questions:
        if question["question_id"] not in answers:
            temperature = TEMPERATURES.get(question["category"], 0.7)
            groups[temperature, len(question["turns"])].append(question)
    told("answering", 0, len(questions))
    if answers:
        told("answering", len(answers), len(questions))
    generator = make_generator() if groups else None
    for (temperature, _), group in groups.items():
        while batch := group[: generator.batch_size]:
            del group[: generator.batch_size]
            settings = {"temperature": temperature, "seed": batch[0]["question_id"]}
            settings |= {"max_new_tokens": made_with["max_new_tokens"]}
            all_turns = _converse(generator, tokenizer, template, batch, **settings)
            for number, turns in zip([question["question_id"] for question in batch], all_turns):
                line = {"question_id": number, "answer_id": uuid.uuid4().hex}
                line |= {"model_id": path.stem, "choices": [{"index": 0, "turns": turns}]}
                answers[number] = line | {"tstamp": time.time(), "made_with": made_with}
            _write_lines(path, [answers[number] for number in sorted(answers)])
            told("answering", len(answers), len(questions))
    return [answers[question["question_id"]] for question in questions]


def _converse(
    generator: Generator,
    tokenizer: Tokenizer,
    template: ChatTemplate,
    questions: Sequence[Line],
    **settings: Any,
) -> list[list[str]]:
    """The answers to all turns of each question; a later turn sees the earlier ones."""
    chats: list[list[dict[str, str]]] = [[] for _ in questions]
    for turn in range(len(questions[0]["turns"])):
        for chat, question in zip(chats, questions):
            chat.append({"role": "user", "content": question["turns"][turn]})
        prompts = [encode_chat(tokenizer, chat, template) for chat in chats]
        answers = answer_all(generator, tokenizer, template, prompts, **settings)
        for chat, answer in zip(chats, answers):
            chat.append({"role": "assistant", "content": answer.text})
    return [[message["content"] for message in chat[1::2]] for chat in chats]


def judge_answers(
    judge: Judge, wanted: Sequence[Line], folder: Path, model: str, told: Told
) -> dict[str, Any]:
    """Has each turn of each answer (`_grades_wanted`) graded by itself, and writes each at once.

    Grades that `folder` has for the same texts by the same judge are kept, and other models' too.
    Errors are those of the judge, where it fails from the start or several times in a row.

    Returns:
      "judge", "graded" (how many there are), "mean", "turn_1", "turn_2", a mean for each category,
      and "failed": {turn without a grade: reason}.
    """
    path = folder / "model_judgment" / _UNFIT.sub("_", f"{judge.model}_single.jsonl")
    texts = {one["user_prompt"] for one in wanted}
    lines = [
        line
        for line in (read_lines(path) if path.exists() else [])
        if line["model"] != model or (line["score"] != -1 and line["user_prompt"] in texts)
    ]
    grades = {line["user_prompt"]: line["score"] for line in lines if line["model"] == model}
    means, failed = collections.defaultdict(list), {}
    in_a_row = 0 if grades else _IN_A_ROW - 1  # a judge that never graded fails from the start
    for number, one in enumerate(wanted):
        told("judging", number, len(wanted))
        text, where = one["user_prompt"], f"question {one['question_id']}, turn {one['turn']}"
        if text not in grades:
            try:
                grades[text], said = judge.grade(one.pop("system"), text)
            except (OSError, ValueError) as error:
                in_a_row += 1
                if in_a_row == _IN_A_ROW:
                    raise
                failed[where] = str(error)
                continue
            in_a_row = 0
            named = {"model": model, "judge": [judge.model, one["name"]], "judgment": said}
            lines.append({**one, **named, "score": grades[text], "tstamp": time.time()})
            _write_lines(path, lines)
        if grades[text] == -1:
            failed[where] = f"no [[grade]] in the judge's answer: {lines[-1]['judgment'][:80]!r}"
        else:
            for what in ("mean", f"turn_{one['turn']}", one["category"]):
                means[what].append(grades[text])
    told("judging", len(wanted), len(wanted))
    found = {"judge": judge.model, "graded": len(means["mean"]), "failed": failed}
    return found | {what: fmean(values) for what, values in means.items() if values}


def _read_judges_files(questions: Path) -> tuple[dict[str, Line], dict[int, list[str]]]:
    """The judge's prompts by name, and the turns of the reference answers by question."""
    folder = questions.absolute().parent
    near, above = (place / "judge_prompts.jsonl" for place in (folder, folder.parent))
    prompts = {line["name"]: line for line in read_lines(near if near.exists() else above)}
    references = {
        line["question_id"]: line["choices"][0]["turns"]
        for line in read_lines(folder / "reference_answer/gpt-4.jsonl")
    }
    return prompts, references


def _grades_wanted(
    questions: Sequence[Line],
    prompts: Mapping[str, Line],
    references: Mapping[int, Sequence[str]],
    answers: Sequence[Line],
) -> list[Line]:
    """What the judge is asked about each turn: "system" and "user_prompt", and of what they are."""
    wanted = []
    for question, answer in zip(questions, answers):
        number, category = question["question_id"], question["category"]
        turns = {"question": question["turns"], "answer": answer["choices"][0]["turns"]}
        kind = "single-v1"
        if category in _WITH_REFERENCE:
            kind, turns["ref_answer"] = "single-math-v1", references[number]
        fields = {f"{k}_{i}": text for k, texts in turns.items() for i, text in enumerate(texts, 1)}
        fields |= {"question": fields["question_1"], "answer": fields["answer_1"]}
        for turn in range(1, len(question["turns"]) + 1):
            prompt = prompts[kind if turn == 1 else f"{kind}-multi-turn"]
            one = {"question_id": number, "category": category, "turn": turn}
            one |= {"name": prompt["name"], "system": prompt["system_prompt"]}
            wanted.append(one | {"user_prompt": prompt["prompt_template"].format(**fields)})
    return wanted
