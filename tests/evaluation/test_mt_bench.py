"""MT-Bench: answers in FastChat's files, graded by a server that speaks OpenAI's protocol."""

import dataclasses
import http.server
import json
import re
import threading
import types

import pytest
from small_models import random_params, write_checkpoint

from stablelm_jax import evaluate
from stablelm_jax.checkpoint.reading import state_hash
from stablelm_jax.checkpoint.saved_model import SavedModel
from stablelm_jax.evaluation import judge as judges
from stablelm_jax.evaluation import mt_bench
from stablelm_jax.evaluation.answers import Answer
from stablelm_jax.evaluation.scores import published_mt_bench
from stablelm_jax.model.config import ModelConfig
from stablelm_jax.storage import remote
from stablelm_jax.tokenizer.chat import ChatTemplate, chat_template
from stablelm_jax.tokenizer.train_tokenizer import train as train_tokenizer

MODEL = ModelConfig(
    vocab_size=320, num_layers=1, width=32, num_heads=2, num_kv_heads=2, feed_forward_width=32
)
QUESTIONS = [
    {"question_id": 81, "category": "writing", "turns": ["Write a poem.", "Make it {short}."]},
    {"question_id": 82, "category": "writing", "turns": ["Write a tale.", "End it."]},
    {"question_id": 101, "category": "math", "turns": ["Two and two?", "And three?"]},
]
# The judge's prompts are the package's; these stand in for them.
PROMPTS = {
    "single-v1": "Q {question} A {answer}",
    "single-v1-multi-turn": "Q1 {question_1} A1 {answer_1} Q2 {question_2} A2 {answer_2}",
    "single-math-v1": "Q {question} R {ref_answer_1} A {answer}",
    "single-math-v1-multi-turn": "{question_1} {ref_answer_1} {ref_answer_2} A2 {answer_2}",
}


def write_lines(path, lines):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def lines_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny_run")
    texts = ["<|user|>\nHello there, assistant<|assistant|>\n Fine, and you?"] * 9
    train_tokenizer(texts, 320).save(str(folder / "tokenizer.json"))
    path = folder / "checkpoints" / "global_step7"
    tokenizer = folder / "tokenizer.json"
    write_checkpoint(path, MODEL, random_params(MODEL, seed=3), tokenizer, max_positions=160)
    return SavedModel.open(path)


@pytest.fixture
def bench(tmp_path):
    """A folder of MT-Bench as task_data.py writes it."""
    folder = tmp_path / "mt_bench"
    write_lines(folder / "question.jsonl", QUESTIONS)
    reference = {"question_id": 101, "choices": [{"index": 0, "turns": ["four", "seven"]}]}
    write_lines(folder / "reference_answer/gpt-4.jsonl", [reference])
    prompts = [
        {"name": name, "system_prompt": f"You judge {name}.", "prompt_template": text}
        for name, text in PROMPTS.items()
    ]
    write_lines(folder / "judge_prompts.jsonl", prompts)
    return folder


def run_verb(saved, bench, *flags):
    names = ("--checkpoint", saved.path, "--chat", "zephyr", "--mt-bench", bench)
    return evaluate.main([str(flag) for flag in (*names, *flags)])


def test_answers_are_in_fastchats_format(saved, bench, capsys):
    write_lines(bench / "question.jsonl", [{**q, "category": "math"} for q in QUESTIONS])
    assert run_verb(saved, bench, "--max-new-tokens", 6) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["chat_template"]["name"] == "zephyr"
    run = saved.path.parent.parent.name
    path = bench / f"model_answer/{run}-global_step7.jsonl"
    assert found["mt_bench"] == {"answers": str(path), "questions": 3, "empty": 0}
    lines = lines_of(path)
    assert [line["question_id"] for line in lines] == [81, 82, 101]
    for line in lines:
        assert line["model_id"] == path.stem and isinstance(line["tstamp"], float)
        assert [c["index"] for c in line["choices"]] == [0]
        assert [type(turn) for turn in line["choices"][0]["turns"]] == [str, str]
    assert len({line["answer_id"] for line in lines}) == 3


@pytest.fixture
def seen(monkeypatch):
    """What is asked, as ([prompts], settings): one question at a time, and no model runs."""
    seen = []

    def answer_all(generator, tokenizer, template, prompts, **settings):
        seen.append((*[tokenizer.decode(prompt) for prompt in prompts], settings))
        return [Answer(f"answer {len(seen)}", 3, True) for _ in prompts]

    generator = types.SimpleNamespace(batch_size=1)
    monkeypatch.setattr(evaluate, "_generator", lambda *_: generator)
    monkeypatch.setattr(mt_bench, "answer_all", answer_all)
    return seen


def test_a_later_turn_sees_the_earlier_answer_at_fastchats_temperature(saved, bench, seen):
    assert run_verb(saved, bench) == 0
    assert [settings["temperature"] for _, settings in seen] == [0.7] * 4 + [0.0] * 2
    assert {settings["max_new_tokens"] for _, settings in seen} == {1024}
    assert seen[2][0] == "<|user|>\nWrite a tale.<|endoftext|>\n<|assistant|>\n"
    assert seen[3][0] == (
        "<|user|>\nWrite a tale.<|endoftext|>\n<|assistant|>\nanswer 3<|endoftext|>\n"
        "<|user|>\nEnd it.<|endoftext|>\n<|assistant|>\n"
    )
    (path,) = (bench / "model_answer").iterdir()
    assert lines_of(path)[1]["choices"][0]["turns"] == ["answer 3", "answer 4"]


def test_answers_that_are_there_are_kept_and_others_must_be_made_alike(
    saved, bench, seen, monkeypatch, capsys
):
    answer_all = mt_bench.answer_all

    def interrupted(*arguments, **settings):
        if len(seen) == 3:
            raise KeyboardInterrupt
        return answer_all(*arguments, **settings)

    monkeypatch.setattr(mt_bench, "answer_all", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run_verb(saved, bench)
    (path,) = (bench / "model_answer").iterdir()
    first = lines_of(path)
    assert [line["question_id"] for line in first] == [81]
    monkeypatch.setattr(mt_bench, "answer_all", answer_all)
    assert run_verb(saved, bench) == 0
    lines = lines_of(path)
    assert lines[0] == first[0] and [line["question_id"] for line in lines] == [81, 82, 101]
    assert run_verb(saved, bench, "--max-new-tokens", 7) == 1
    assert "has answers made with another max_new_tokens;" in capsys.readouterr().err
    assert lines_of(path) == lines


def test_answers_of_other_weights_or_another_template_at_the_same_place_are_refused(
    saved, bench, seen, tmp_path
):
    def answer(saved, jinja):
        template = ChatTemplate("t.jinja", jinja, ("<|endoftext|>",))
        how = saved, template, lambda: types.SimpleNamespace(batch_size=9)
        mt_bench.evaluate_mt_bench(*how, bench / "question.jsonl", tmp_path)

    jinja = chat_template("zephyr", saved.tokenizer).jinja
    answer(saved, jinja)
    retrained = {**saved.run, "checksums": {**saved.run["checksums"], "params/head/kernel": 1}}
    with pytest.raises(ValueError, match="made with another weights; give another --model-id"):
        answer(dataclasses.replace(saved, run=retrained), jinja)
    with pytest.raises(ValueError, match="made with another template;"):
        answer(saved, jinja.replace("user", "person") + " ")
    answer(saved, jinja)


class Stub(http.server.BaseHTTPRequestHandler):
    """A server that grades as `answers` says: a text, or a code of HTTP."""

    def do_GET(self):
        self.reply(200, {"data": [{"id": name} for name in self.server.models]})

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        assert self.headers["User-Agent"] == "stablelm_jax"
        self.server.asked.append((self.path, self.headers.get("Authorization"), body))
        answer = self.server.answers(body["messages"][-1]["content"], body)
        if isinstance(answer, int):
            self.reply(answer, {"error": {"message": f"code {answer} about max_tokens"}})
        else:
            self.reply(200, {"choices": [{"message": {"role": "assistant", "content": answer}}]})

    def reply(self, code, value):
        content = json.dumps(value).encode()
        self.send_response(code)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_):
        pass


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr(remote, "_WAITS", (0.0, 0.0))
    monkeypatch.setenv("OPENAI_API_KEY", "a key\r")
    monkeypatch.setenv("no_proxy", "*")
    found = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Stub)
    found.asked, found.models = [], ["org/judge 1"]
    found.answers = lambda prompt, body: "Fine. Rating: [[7]]"
    found.url = f"http://127.0.0.1:{found.server_port}"
    thread = threading.Thread(target=found.serve_forever, daemon=True)
    thread.start()
    yield found
    found.shutdown()
    found.server_close()
    thread.join()


@pytest.fixture
def answered(saved, bench):
    """The folder with answers to all questions, so that no model runs."""
    made_with = {"checkpoint": str(saved.path), "weights": state_hash(saved.run["checksums"])}
    template = chat_template("zephyr", saved.tokenizer).to_json()
    made_with |= {"template": template, "max_new_tokens": 1024}
    lines = [
        {"question_id": q["question_id"], "answer_id": "a", "model_id": "m", "made_with": made_with}
        | {"choices": [{"index": 0, "turns": [f"{q['question_id']} one", "{two}"]}]}
        for q in QUESTIONS
    ]
    write_lines(bench / "model_answer/m.jsonl", lines)
    return bench


def grade(saved, folder, server, *flags):
    return run_verb(saved, folder, "--model-id", "m", "--judge", server.url, *flags)


def test_each_turn_is_graded_by_itself_and_shown_beside_published_grades(
    saved, answered, server, capsys
):
    server.answers = lambda prompt, body: f"Rating: [[{4 if prompt.startswith('Q ') else 8.5}]]"
    assert grade(saved, answered, server) == 0
    out, err = capsys.readouterr()
    found = json.loads(out)["mt_bench"]
    assert found["judge"] == "org/judge 1" and found["graded"] == 6
    assert (found["turn_1"], found["turn_2"], found["mean"]) == (4.0, 8.5, 6.25)
    assert found["writing"] == found["math"] == 6.25
    for name, value in published_mt_bench().items():
        assert re.search(rf"published: {re.escape(name)}\s.*{value:.2f}", err), err
    path, key, body = server.asked[0]
    assert path == "/v1/chat/completions" and key == "Bearer a key"
    assert body["model"] == "org/judge 1" and body["temperature"] == 0
    assert [m["role"] for m in body["messages"]] == ["system", "user"]
    assert body["messages"][0]["content"] == "You judge single-v1."
    asked = [body["messages"][1]["content"] for _, _, body in server.asked]
    assert asked[0] == "Q Write a poem. A 81 one"
    assert asked[1] == "Q1 Write a poem. A1 81 one Q2 Make it {short}. A2 {two}"
    assert asked[4] == "Q Two and two? R four A 101 one"
    assert asked[5] == "Two and two? four seven A2 {two}"
    lines = lines_of(answered / "model_judgment/org_judge_1_single.jsonl")
    assert [line["score"] for line in lines] == [4, 8.5] * 3
    fields = {"question_id", "model", "judge", "user_prompt", "judgment", "score", "turn", "tstamp"}
    assert fields <= set(lines[0])
    assert lines[4]["judge"] == ["org/judge 1", "single-math-v1"]
    # Once more: nothing is asked again, and another model's grades stay.
    path = answered / "model_judgment/org_judge_1_single.jsonl"
    write_lines(path, [*lines, {**lines[0], "model": "other"}])
    server.asked.clear()
    assert grade(saved, answered, server) == 0 and server.asked == []
    assert len(lines_of(path)) == 7


def test_an_answer_without_a_grade_is_counted_and_asked_for_again(saved, answered, server, capsys):
    server.answers = lambda prompt, body: "I cannot." if "101 one" in prompt else "[[5]]"
    assert grade(saved, answered, server) == 1
    out, err = capsys.readouterr()
    found = json.loads(out)
    assert found["mt_bench"]["graded"] == 5 and list(found["failed"]) == ["question 101, turn 1"]
    assert "question 101, turn 1: no [[grade]]" in err.splitlines()[-1]
    path = answered / "model_judgment/org_judge_1_single.jsonl"
    assert [line["score"] for line in lines_of(path)].count(-1) == 1  # FastChat's sign
    server.answers, server.asked = lambda prompt, body: "[[6]]", []
    assert grade(saved, answered, server) == 0
    assert len(server.asked) == 1
    assert [line["score"] for line in lines_of(path)].count(-1) == 0


@pytest.mark.parametrize(
    ("code", "told"),
    [(401, "set OPENAI_API_KEY"), (404, "--judge-model"), (503, "does not answer.*503")],
)
def test_a_judge_that_refuses_ends_the_work_with_the_reason(
    saved, answered, server, capsys, code, told
):
    server.answers = lambda prompt, body: code
    assert grade(saved, answered, server, "--judge-model", "j") == 1
    assert re.search(told, capsys.readouterr().err.splitlines()[-1])


def test_failures_between_grades_are_named_and_three_in_a_row_end_it(
    saved, answered, server, capsys
):
    server.answers = lambda prompt, body: 503 if "tale" in prompt else "[[5]]"
    assert grade(saved, answered, server) == 1
    failed = json.loads(capsys.readouterr().out)["failed"]
    assert list(failed) == ["question 82, turn 1", "question 82, turn 2"]
    server.answers = lambda prompt, body: 503
    (answered / "model_judgment/org_judge_1_single.jsonl").unlink()
    server.answers = lambda prompt, body: "[[5]]" if "poem. A 81" in prompt else 503
    assert grade(saved, answered, server) == 1
    assert "does not answer" in capsys.readouterr().err.splitlines()[-1]
    # The grade before is kept.
    assert len(lines_of(answered / "model_judgment/org_judge_1_single.jsonl")) == 1


def test_a_turn_that_is_refused_for_good_costs_the_other_grades_nothing(
    saved, answered, server, capsys, monkeypatch
):
    server.answers = lambda prompt, body: 400 if "A 101 one" in prompt else "[[5]]"
    monkeypatch.chdir(answered)  # and the questions are named as they lie there
    for _ in range(2):
        assert grade(saved, answered, server, "--questions", "question.jsonl") == 1
        out, err = capsys.readouterr()
        assert json.loads(out)["mt_bench"]["graded"] == 5 and "org/judge 1" in err
        assert list(json.loads(out)["failed"]) == ["question 101, turn 1"]


def test_a_judge_that_is_not_there_or_silent_is_told(saved, answered, server, capsys, monkeypatch):
    release = threading.Event()
    server.answers = lambda prompt, body: release.wait(20) and "[[5]]"
    flags = ("--judge-model", "j", "--judge-timeout", 1)
    assert grade(saved, answered, server, *flags) == 1
    release.set()
    assert "timed out" in capsys.readouterr().err.splitlines()[-1]
    server.url = "http://127.0.0.1:1"
    assert grade(saved, answered, server) == 1
    line = capsys.readouterr().err.splitlines()[-1]
    assert "refused" in line and "is the server running" in line


def test_a_judge_of_many_models_is_to_be_named_and_odd_options_are_left_out(server):
    server.models = ["one", "two"]
    with pytest.raises(ValueError, match="one, two: choose one by --judge-model"):
        judges.Judge(server.url)
    server.answers = lambda prompt, body: 400 if "max_tokens" in body else "[[3]]"
    judge = judges.Judge(f"{server.url}/v1/chat/completions/", "two")
    assert judge.grade("s", "p") == (3, "[[3]]")
    server.models, server.answers = [], lambda prompt, body: None
    judge = judges.Judge(f"{server.url}/v1")
    assert judge.grade("s", "p") == (-1, "")
    server.answers = lambda prompt, body: [{"type": "text", "text": "[[3]]"}]
    with pytest.raises(ValueError, match="no answer in the reply"):
        judge.grade("s", "p")
    with pytest.raises(ValueError, match="begins with http"):
        judges.Judge("localhost:80")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        *(("Rating: [[8]]", 8), ("[[7.5]] or [[2]]", 7.5), ("as [3] says, [[9]]", 9)),
        *(("Rating: [6]", 6), ("Rating: 6", -1), ("[[0]]", -1), ("[[11]]", -1), ("", -1)),
    ],
)
def test_a_grade_is_read_as_fastchat_reads_it(text, expected):
    assert judges.grade_in(text) == expected


def test_missing_files_are_named_with_what_fetches_them(saved, tmp_path, capsys):
    assert run_verb(saved, tmp_path) == 1
    line = capsys.readouterr().err.splitlines()[-1]
    assert f"{tmp_path}/question.jsonl: is not there" in line and "task_data.py" in line


def test_a_file_that_is_not_mt_benchs_is_named(saved, bench, answered, server, capsys):
    write_lines(bench / "reference_answer/gpt-4.jsonl", [])
    assert grade(saved, bench, server) == 1
    assert "question.jsonl, or a file beside it, has no 101" in capsys.readouterr().err
    (bench / "judge_prompts.jsonl").unlink()
    (bench / "model_answer/m.jsonl").unlink()  # nothing is answered before the files are found
    assert grade(saved, bench, server) == 1
    err = capsys.readouterr().err
    assert "judge_prompts.jsonl: is not there" in err and "task_data.py --output" in err
    (bench / "question.jsonl").write_text('{"question_id": 1}\n[1]\n')
    assert run_verb(saved, bench) == 1
    assert "question.jsonl, line 2: no JSON object" in capsys.readouterr().err


@pytest.mark.parametrize("flag", ["--questions", "--model-id", "--judge", "--judge-model"])
def test_a_flag_of_mt_bench_alone_is_a_bad_argument(flag, capsys):
    with pytest.raises(SystemExit) as left:
        evaluate.main(["--checkpoint", "c", flag, "x"])
    assert left.value.code == 2
    assert f"{flag}: only with --mt-bench" in capsys.readouterr().err.splitlines()[-1]


def test_a_model_without_a_template_asks_for_one(saved, bench, capsys):
    flags = ["--checkpoint", str(saved.path), "--mt-bench", str(bench)]
    assert evaluate.main(flags) == 1
    assert "came with no chat template" in capsys.readouterr().err.splitlines()[-1]
    assert chat_template("zephyr", saved.tokenizer).enders == ("<|endoftext|>",)
