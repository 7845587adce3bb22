"""What the steps of launch/demo_chat.sh changed: a table and samples, in Markdown.

    python launch/corpora/demo_chat_table.py --runs DIR --pages DIR

Reads what `evaluate` and `self_knowledge.py check` wrote into the folder of the runs, and the
metrics of the DPO; writes table.md there and prints it. What was not measured is a dash. --pages:
the folder of chat_corpus.py, on whose pages the language detector is tried. It needs py3langid
(extra `demo`).
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from stablelm_jax.storage.files import write_text

# Column -> the run; in the order of launch/demo_chat.sh.
RUNS = {
    "SFT": "sft",
    "SFT, answers in random languages": "random",
    "then DPO": "dpo",
    "then self-knowledge": "self_knowledge",
}
_SAMPLES = 4
Found = Mapping[str, Any]


def _number(key: str, form: str = ".3f") -> Callable[[Found], str]:
    return lambda found: format(found[key], form) if key in found else "–"


def _names(found: Found) -> str:
    names = found.get("names")
    return f"{names['right']} of {names['questions']}" if names else "–"


ROWS: dict[str, Callable[[Found], str]] = {
    "loss of the held-out answers, nats a token": _number("eval/loss"),
    "answers that end by themselves": _number("chat/greedy/ended", ".1%"),
    "answers that end by themselves, sampled": _number("chat/sampled/ended", ".1%"),
    "answers in the language of the question": _number("chat/greedy/language", ".1%"),
    "answers in the language of the question, sampled": _number("chat/sampled/language", ".1%"),
    "length of an answer, tokens": _number("chat/greedy/tokens", ".0f"),
    "held-out pairs preferred rightly (chance 50 %)": _number("eval/rewards/accuracy", ".1%"),
    "right names, of identity questions left out": _names,
}


def read_run(runs: Path, name: str) -> dict[str, Any]:
    """What was measured of a run; of one that is not there, nothing."""
    found: dict[str, Any] = {}
    metrics = runs / name / "metrics.jsonl"
    if metrics.exists():
        for line in map(json.loads, metrics.read_text(encoding="utf-8").splitlines()):
            accuracy = {k: v for k, v in line.items() if k == "eval/rewards/accuracy"}
            found |= accuracy  # the last one stays
    if (path := runs / f"{name}.json").exists():
        found |= json.loads(path.read_text(encoding="utf-8"))
    if (path := runs / f"{name}_names.json").exists():
        found["names"] = json.loads(path.read_text(encoding="utf-8"))
    return found


def table(found: Mapping[str, Found]) -> str:
    """A column a run, a row a measurement."""
    lines = [f"| | {' | '.join(found)} |", "|---" * (len(found) + 1) + "|"]
    for what, value in ROWS.items():
        lines.append(f"| {what} | {' | '.join(value(run) for run in found.values())} |")
    return "\n".join(lines)


def samples(found: Mapping[str, Found]) -> str:
    """The first answers of each run to the same questions, by the likeliest tokens."""
    lines = []
    for number in range(_SAMPLES):
        for column, run in found.items():
            given = run.get("chat/samples", [])[number : number + 1]
            for sample in given:
                answer = " / ".join(sample["greedy"].split("\n\n"))
                end = "" if sample["greedy_ended"] else " ... (no end)"
                question = " ".join(re.sub(r"<\|\w+\|>", " ", sample["question"]).split())
                lines.append(f"* {column}: **{question}** {answer}{end}")
    for column, run in found.items():
        for one in run.get("names", {}).get("answers", []):
            lines.append(f"* {column}: **{one['question']}** {one['answer']}")
    return "\n".join(lines)


def detector_errors(pages: Path) -> tuple[int, int]:
    """(pages whose language py3langid gets wrong, pages): of how-to answers as people wrote them.

    Raises:
      ImportError: py3langid is missing.
    """
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    identifier = LanguageIdentifier.from_model_file(MODEL_FILE)
    files = {path.stem.rpartition("_")[2]: path for path in sorted(pages.glob("howto_*.jsonl"))}
    identifier.set_languages(sorted(files))
    wrong = total = 0
    for language, path in files.items():
        for record in map(json.loads, path.read_text(encoding="utf-8").splitlines()):
            wrong += identifier.classify(record["messages"][-1]["content"])[0] != language
            total += 1
    return wrong, total


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0, 1 on failure, 2 for bad arguments (argparse)."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=Path, required=True, help="folder of the runs")
    parser.add_argument("--pages", type=Path, required=True, help="folder of chat_corpus.py")
    arguments = parser.parse_args(argv)
    try:
        found = {column: read_run(arguments.runs, name) for column, name in RUNS.items()}
        if not any(found.values()):
            raise ValueError(f"{arguments.runs} holds nothing measured; run launch/demo_chat.sh")
        wrong, total = detector_errors(arguments.pages)
        told = f"The language detector (py3langid, of seven) is wrong on {wrong} of {total} pages."
        text = "\n\n".join([table(found), told, samples(found)]) + "\n"
        write_text(arguments.runs / "table.md", text)
    except (ValueError, OSError) as error:
        print(f"demo_chat_table: {error}", file=sys.stderr)
        return 1
    except ImportError:
        print("demo_chat_table: needs py3langid; pip install -e '.[demo]'", file=sys.stderr)
        return 1
    print(text, end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
