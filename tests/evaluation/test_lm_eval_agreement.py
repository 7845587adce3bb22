"""A checkpoint through our class and its export through lm-eval's own: the same answers.

The model is random, its tokens are words: what is compared is how text becomes requests and how
these are answered. benchmarks/lm_eval_agreement.py does it with a trained one and real tasks.
"""

import copy
import dataclasses

import jax
import numpy as np
import pytest
from small_models import random_params, write_checkpoint
from task_files import WRITES, write_task

from stablelm_jax import convert
from stablelm_jax.checkpoint.saved_model import SavedModel
from stablelm_jax.model.config import ModelConfig
from stablelm_jax.parallel.mesh import make_mesh
from stablelm_jax.tokenizer.chat import chat_template
from stablelm_jax.tokenizer.train_tokenizer import train as train_tokenizer

for library in ("torch", "transformers", "accelerate", "lm_eval"):
    pytest.importorskip(library)
Instance = pytest.importorskip("lm_eval.api.instance").Instance
HFLM = pytest.importorskip("lm_eval.models.huggingface").HFLM
of_checkpoint = pytest.importorskip("stablelm_jax.evaluation.checkpoint_tasks").lm_of_checkpoint
suite = pytest.importorskip("stablelm_jax.evaluation.suite")

pytestmark = pytest.mark.parity
MODEL = ModelConfig(
    vocab_size=320, num_layers=2, width=32, num_heads=4, num_kv_heads=4, feed_forward_width=64
)

TEXTS = (
    "The quick brown fox jumps over the lazy dog. Question: What jumps? Answer: the fox",
    "Pack my box with five dozen liquor jugs, and then, 12 345 more\n\nof them; they're heavy.",
    "Frère Jacques, dormez-vous? Straße, mañana, coração.",
)
LENGTH = 48  # tokens that the model reads


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A random model with a byte-level tokenizer, written as a checkpoint."""
    folder = tmp_path_factory.mktemp("run")
    train_tokenizer(TEXTS * 3, 320).save(str(folder / "tokenizer.json"))
    params = random_params(MODEL, seed=3)
    path = folder / "checkpoints" / "global_step7"
    tokenizer = folder / "tokenizer.json"
    return write_checkpoint(path, MODEL, params, tokenizer, max_positions=LENGTH)


@pytest.fixture(scope="module")
def theirs(checkpoint, tmp_path_factory):
    export = tmp_path_factory.mktemp("export") / "hf"
    arguments = ["to-hf", str(checkpoint), str(export), "--dtype", "float32", "--no-verify"]
    assert convert.main(arguments) == 0
    return HFLM(str(export), device="cpu", dtype="float32", batch_size=4)


@pytest.fixture(scope="module")
def ours(checkpoint):
    mesh = make_mesh(1, 1, jax.devices()[:1])  # other meshes: test_scoring.py
    saved = SavedModel.open(checkpoint)
    return of_checkpoint(saved, mesh, dtype="float32", batch_tokens=2 * LENGTH)


def requests(kind, *arguments):
    return [Instance(kind, {}, given, number) for number, given in enumerate(arguments)]


def test_log_likelihoods_are_those_of_lm_evals_own_class(ours, theirs):
    asked = requests(
        "loglikelihood",
        ("The quick brown", " fox"),
        ("The quick brown ", "fox jumps"),  # the space is moved
        ("", "Pack my box"),
        ("Question: What jumps?\nAnswer:", " A"),
        ("Question: What jumps?\nAnswer:", " B"),
        ("Stop here<|endoftext|>", "Straße"),
        (TEXTS[1] * 3, " they're heavy."),  # longer than the model reads
        (TEXTS[2], TEXTS[0]),
    )
    found, expected = ours.loglikelihood(asked), theirs.loglikelihood(asked)
    np.testing.assert_allclose([f[0] for f in found], [e[0] for e in expected], atol=1e-4)
    assert [f[1] for f in found] == [e[1] for e in expected]
    assert ours.cut == 2


def test_rolling_log_likelihoods_are_those_of_lm_evals_own_class(ours, theirs):
    texts = [(text,) for text in (*TEXTS, "".join(TEXTS) * 2)]
    found = ours.loglikelihood_rolling(requests("loglikelihood_rolling", *texts))
    expected = theirs.loglikelihood_rolling(requests("loglikelihood_rolling", *texts))
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-4)


@pytest.mark.by_hand  # those of a chat are compared in every run
def test_texts_are_those_of_lm_evals_own_class(ours, theirs):
    settings = {"until": ["e", "\n\n"], "do_sample": False, "max_gen_toks": 12}
    asked = requests(
        "generate_until",
        ("Pack", settings),
        (TEXTS[1] * 2, settings),  # its beginning is cut
        ("Frère", settings),
    )
    copies = requests("generate_until", *[instance.args for instance in asked])
    before = ours.cut
    found = ours.generate_until(asked)
    assert found == theirs.generate_until(copies)
    assert any(found) and ours.cut == before + 1


def test_a_task_file_gives_the_same_scores_through_both(ours, theirs, tmp_path):
    path = write_task(tmp_path, "pick_a_word", items=6)
    failed = []
    found, expected = (
        suite.run_tasks(
            model, suite.load_tasks([str(path)]), failed=lambda *why: failed.append(why)
        )
        for model in (ours, theirs)
    )
    assert not failed
    assert [(s.key, s.items, s.shots) for s in found][0] == ("pick_a_word/acc", 6, 2)
    assert [s.value for s in found] == [s.value for s in expected]
    assert 0 <= found[0].value <= 1 and found[0].stderr is not None


@pytest.fixture(scope="module")
def template(checkpoint):
    return chat_template("zephyr", SavedModel.open(checkpoint).tokenizer)


@pytest.fixture(scope="module")
def ours_in_chat(checkpoint, template):
    mesh = make_mesh(1, 1, jax.devices()[:1])
    options = dict(dtype="float32", batch_tokens=512, max_length=256, chat=template)
    return of_checkpoint(SavedModel.open(checkpoint), mesh, **options)


@pytest.fixture(scope="module")
def theirs_in_chat(theirs, template):
    theirs.tokenizer.chat_template = template.jinja
    theirs._max_length = 256
    return theirs


@pytest.mark.parametrize("instead", ["", WRITES], ids=["multiple_choice", "generate_until"])
def test_a_chat_is_asked_and_answered_as_by_lm_evals_own_class(
    ours_in_chat, theirs_in_chat, template, tmp_path, instead
):
    from lm_eval.evaluator import evaluate

    path = write_task(tmp_path, f"chat_{bool(instead)}", items=4, instead=instead)

    def samples(model):
        loaded = suite.load_tasks([str(path)])[0].loaded
        (task,) = loaded["tasks"].values()
        task.set_fewshot_seed(seed=suite.SEED)
        chat = dict(apply_chat_template=True, fewshot_as_multiturn=True)
        (found,) = evaluate(lm=model, task_dict=loaded, **chat)["samples"].values()
        return found

    found, expected = samples(ours_in_chat), samples(theirs_in_chat)
    for sample, other in zip(found, expected, strict=True):
        assert sample["arguments"] == other["arguments"]
        prompt = sample["arguments"][0][0]
        assert prompt.count("<|user|>\n") == prompt.count("<|assistant|>\n") == 3
        assert prompt.endswith("<|assistant|>\nIt is" if instead else "<|assistant|>\n")
        if instead:
            assert sample["resps"] == other["resps"] and prompt.startswith("<|system|>\nAnswer b")
        else:
            logprobs, greedy = np.array(sample["filtered_resps"], float).T
            their_logprobs, their_greedy = np.array(other["filtered_resps"], float).T
            np.testing.assert_allclose(logprobs, their_logprobs, atol=1e-4)
            assert (greedy == their_greedy).all()
    assert ours_in_chat.chat_template(True) == theirs_in_chat.chat_template(True) == template.jinja


def test_a_template_that_refuses_a_system_message_goes_without(ours_in_chat, template):
    refusing = "{% if messages[0].role == 'system' %}{{ raise_exception('no') }}{% endif %}"
    model = copy.copy(ours_in_chat)
    model._chat = dataclasses.replace(template, jinja=refusing + template.jinja)
    history = [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]
    assert model.apply_chat_template(history) == ours_in_chat.apply_chat_template(history[1:])


def test_an_evaluation_is_left_when_somebody_asks(ours, tmp_path, monkeypatch):
    def leave(*_):
        raise suite.Left

    asked = suite.load_tasks([str(write_task(tmp_path, "never_done", items=2))])
    monkeypatch.setattr(ours, "_told", leave)
    with pytest.raises(suite.Left):
        suite.run_tasks(ours, asked, failed=lambda *_: None)
