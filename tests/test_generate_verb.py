"""`generate` from the command line, with a small random model in place of a checkpoint.

tests/test_readme.py and launch/smoke.sh run it on checkpoints.
"""

import io
import re
from pathlib import Path

import jax
import pytest
from tiny import VOCAB, write_tokenizer

from stablelm_jax import generate
from stablelm_jax.checkpoint.saved_model import SavedModel
from stablelm_jax.generation.generator import Generator
from stablelm_jax.model.config import ModelConfig
from stablelm_jax.model.transformer import init_params
from stablelm_jax.tokenizer.tokenizer import load_tokenizer

MODEL = ModelConfig(
    vocab_size=-(-VOCAB // 128) * 128,
    num_layers=1,
    width=32,
    num_heads=2,
    num_kv_heads=2,
    feed_forward_width=32,
    rotary_fraction=0.5,
)


@pytest.fixture
def run(tmp_path, monkeypatch):
    tokenizer = load_tokenizer(write_tokenizer(tmp_path / "tokenizer.json"))
    params = jax.jit(init_params, static_argnums=0)(MODEL, jax.random.key(0))
    saved = SavedModel(Path("global_step4"), {"imported": {"max_positions": 64}}, MODEL, tokenizer)
    monkeypatch.setattr(SavedModel, "load", lambda self, mesh: params)
    monkeypatch.setattr(generate, "_open", lambda arguments: (saved, None))
    flags = ["--checkpoint", "global_step4", "--max-new-tokens", "5"]
    return lambda *more: generate.main([*flags, *more])


def test_a_prompt_is_printed_with_its_text_as_it_comes_and_the_speed_apart(run, capsys):
    assert run("--prompt", "w1 w3", "--temperature", "0") == 0
    first = capsys.readouterr()
    assert first.out.startswith("w1 w3") and first.out.endswith("\n")
    assert "tokens: 2 read, 5 written in" in first.err and "tokens/s" in first.err
    both = ["--prompt", "w1 w3", "--prompt", "w2 w4 w6"]
    assert run(*both, "--temperature", "0") == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 and lines[1].startswith("w2 w4 w6")


def test_a_prompt_may_come_from_standard_input(run, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("w5 w7"))
    assert run("--prompt", "-", "--temperature", "0") == 0
    assert capsys.readouterr().out.startswith("w5 w7")


def test_a_message_longer_than_the_context_is_one_line_and_the_conversation_goes_on(
    run, capsys, monkeypatch
):
    asked = iter([" ".join(["w1"] * 50), "w1 w2"])

    def read(prompt):
        try:
            return next(asked)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr("builtins.input", read)
    assert run("--chat", "zephyr", "--context", "32", "--temperature", "0") == 0
    out, err = capsys.readouterr()
    assert "more than 32" in err and len(out.strip()) > 0


def test_a_conversation_ends_with_ctrl_d(run, capsys, monkeypatch):
    asked = iter(["w1 w2", " "])

    def read(prompt):
        try:
            return next(asked)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr("builtins.input", read)
    assert run("--chat", "zephyr", "--context", "32", "--temperature", "0") == 0
    assert capsys.readouterr().out.count("\n") == 2


OWN = "{% for m in messages %}{{ m.role + ' ' + m.content }}<|endoftext|>{% endfor %}"


def test_chat_alone_takes_the_template_that_came_with_the_model(run, capsys, monkeypatch):
    own = {"name": "own", "jinja": OWN, "enders": ["<|endoftext|>"]}
    saved, _ = generate._open(None)
    saved.run["chat"] = own
    read = []
    stream = Generator.stream
    noted = lambda self, ids, **more: read.append(ids) or stream(self, ids, **more)  # noqa: E731
    monkeypatch.setattr(Generator, "stream", noted)
    assert run("--chat", "--prompt", "w1 w2", "--temperature", "0") == 0
    unknown = saved.tokenizer.unknown_id
    assert read == [[unknown, 1, 2, saved.tokenizer.eod]]  # user w1 w2 <|endoftext|>


def test_a_template_that_takes_no_system_turn_is_told_before_the_weights_are_read(
    run, capsys, monkeypatch, tmp_path
):
    refuses = "{% if messages[0].role == 'system' %}{{ raise_exception('no system turns') }}"
    (tmp_path / "file.jinja").write_text(refuses + "{% endif %}" + OWN)
    monkeypatch.setattr(SavedModel, "load", lambda *_: pytest.fail("weights were read"))
    chat = ["--chat", str(tmp_path / "file.jinja")]
    assert run(*chat, "--system", "Be brief.", "--prompt", "w1") == 1
    assert "refuses it: no system turns" in capsys.readouterr().err


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--chat"], "came with no chat template: name one, --chat zephyr, --chat chatml or"),
        (["--prompt", "w1", "--chat", "alpaca"], "choose one of zephyr, chatml, tokenizer, or"),
        (["--chat", "zephyr", "--top-p", "0"], "top_p is 0.0"),
        (["--prompt", "w1", "--context", "5"], "are more than 5"),
        (["--prompt", "w1", "--chat", "chatml"], "has no special token in '<|im_end|>"),
        (["--prompt", "w1", "--stop-token", "<|im_end|>"], "has no special token <|im_end|>"),
        (["--prompt", "w1", "--top-p", "0"], "top_p is 0.0"),
        (["--prompt", "w1", "--temperature", "nan"], "temperature is nan"),
        (["--prompt", "w1", "--max-new-tokens", "0"], "max_new_tokens is 0"),
        (["--prompt", ""], "a prompt is empty"),
    ],
)
def test_what_cannot_be_is_one_line_and_exit_code_1(run, capsys, flags, message):
    assert run(*flags) == 1
    error = capsys.readouterr().err
    assert message in error and error.startswith("generate: ") and error.count("\n") == 1


@pytest.mark.parametrize(
    "flags, message",
    [
        ([], "give a --prompt, or --chat"),
        (["--prompt", "w1", "--system", "Be brief."], "give --chat too"),
        (["--prompt", "w1", "--model", "0"], "'0' is no number from 1 on"),
        (["--prompt", "w1", "--context", "0"], "'0' is no number from 1 on"),
        (["--prompt", "w1 \udce9"], "invalid _utf_8 value"),
    ],
)
def test_flags_that_mean_nothing_are_exit_code_2(run, capsys, flags, message):
    with pytest.raises(SystemExit) as left:
        run(*flags)
    assert left.value.code == 2
    assert message in capsys.readouterr().err


def test_the_example_of_the_page_runs(run, tmp_path, monkeypatch, capsys):
    page = (Path(__file__).parents[1] / "docs" / "generation.md").read_text(encoding="utf-8")
    (example,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    saved, _ = generate._open(None)
    monkeypatch.setattr(SavedModel, "open", lambda path: saved)
    exec(example, {})
    assert len(capsys.readouterr().out.split()) > 3 * 20
