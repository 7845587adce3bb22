"""The table of the demonstration, from files as the steps write them."""

import json

import demo_chat_table
import pytest


@pytest.fixture
def runs(tmp_path, monkeypatch):
    monkeypatch.setattr(demo_chat_table, "detector_errors", lambda pages: (1, 200))
    folder = tmp_path / "runs"
    (folder / "dpo").mkdir(parents=True)
    lines = [{"step": 0, "eval/rewards/accuracy": 0.0}, {"step": 5, "loss": 0.5}]
    lines += [{"step": 9, "eval/rewards/accuracy": 0.75}, {"step": 10, "loss": 0.4}]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / "dpo" / "metrics.jsonl").write_text(text)
    sample = {
        "question": "<|user|>\nWie?<|endoftext|>\n<|assistant|>\n",
        "greedy": "So.\n\nGenau.",
        "greedy_ended": False,
    }
    answers = {"chat/greedy/language": 0.5, "chat/greedy/ended": 1, "chat/samples": [sample]}
    (folder / "dpo.json").write_text(json.dumps({"eval/loss": 2.34567, **answers}))
    names = {"right": 9, "questions": 12, "answers": [{"question": "Who?", "answer": "Me."}]}
    (folder / "self_knowledge_names.json").write_text(json.dumps(names))
    return folder


def test_each_number_stands_under_its_run_and_what_was_not_measured_is_a_dash(runs, capsys):
    assert demo_chat_table.main(["--runs", str(runs), "--pages", "pages"]) == 0
    text = (runs / "table.md").read_text(encoding="utf-8")
    assert capsys.readouterr().out == text
    rows = {line.split(" | ")[0]: line.split(" | ")[1:] for line in text.splitlines()}
    assert rows["| loss of the held-out answers, nats a token"] == ["–", "–", "2.346", "– |"]
    assert rows["| answers in the language of the question"] == ["–", "–", "50.0%", "– |"]
    assert rows["| held-out pairs preferred rightly (chance 50 %)"] == ["–", "–", "75.0%", "– |"]
    assert rows["| right names, of identity questions left out"] == ["–", "–", "–", "9 of 12 |"]
    assert "wrong on 1 of 200 pages" in text


def test_samples_are_one_line_each_and_say_where_an_answer_did_not_end(runs):
    assert demo_chat_table.main(["--runs", str(runs), "--pages", "pages"]) == 0
    text = (runs / "table.md").read_text(encoding="utf-8")
    assert "* then DPO: **Wie?** So. / Genau. ... (no end)" in text
    assert "* then self-knowledge: **Who?** Me." in text


def test_runs_of_which_nothing_was_measured_are_an_error(tmp_path, capsys):
    assert demo_chat_table.main(["--runs", str(tmp_path), "--pages", str(tmp_path)]) == 1
    assert "launch/demo_chat.sh" in capsys.readouterr().err


def test_the_detector_is_tried_on_pages_of_known_languages(tmp_path):
    pytest.importorskip("py3langid")
    texts = {"de": "Wählen Sie die Zelle aus, die Sie einfärben möchten.", "en": "Choose the cell."}
    for language, text in texts.items():
        record = {"messages": [{"role": "assistant", "content": text}]}
        path = tmp_path / f"howto_{language}.jsonl"
        path.write_text(json.dumps(record) + "\n", encoding="utf-8")
    assert demo_chat_table.detector_errors(tmp_path) == (0, 2)
