"""A faster engine of the tokenizer changes no byte of a source, or is not used."""

import json

import numpy as np
import pytest

from stablelm_jax import prepare
from stablelm_jax.data.shards import Shard
from stablelm_jax.preparation import tokenize_chunk
from stablelm_jax.preparation.job import job_of
from stablelm_jax.preparation.prepare_source import Preparation
from stablelm_jax.tokenizer.tokenizer import load_tokenizer

TEXTS = [f"Page {i} of {i % 7} says: it's Ünïted, {'x' * (i % 50)} \n\n done." for i in range(1500)]


class Wrong:
    """tiktoken's ids, but for a text that comes late in the source."""

    name = "an engine with a fault"

    def __init__(self, plain):
        self._plain = plain

    def encode(self, texts, end):
        found = [np.append(self._plain.encode_document(text), end) for text in texts]
        return [ids + ("Page 1030 " in text) for text, ids in zip(texts, found)]


@pytest.fixture(scope="module")
def plain():
    return load_tokenizer("arcade100k")


@pytest.fixture
def prepared(tmp_path, plain, monkeypatch):
    """prepared(engine, tokens of a shard): the tokens, the manifest, what is said of the engine."""
    lines = [json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in TEXTS]
    (tmp_path / "a.jsonl").write_text("".join(lines), encoding="utf-8")

    def make(engine, shard_tokens=1 << 20):
        tokenizer = load_tokenizer("arcade100k")
        if engine == "fast":
            tokenizer.use_fast_engine()
        elif engine:
            tokenizer._fast, tokenizer.engine = engine, engine.name
        monkeypatch.setattr(tokenize_chunk, "_tokenizer", lambda name, ranks: tokenizer)
        output = tmp_path / f"data_{len(list(tmp_path.iterdir()))}"
        flags = ["--source", "a", "--input", str(tmp_path / "a.jsonl"), "--output", str(output)]
        flags += ["--shard-tokens", str(shard_tokens)]
        preparation = Preparation(job_of(prepare.make_parser().parse_args(flags), "a"))
        monkeypatch.setattr(Preparation, "run", lambda *_: None)  # it is done in this process
        with preparation.locked():
            preparation.begin()
            for chunk in range(len(preparation.plan.chunks)):
                preparation.step().run(rank=chunk)
            outputs = preparation.tokenize(prepare.Executor("local", 1))
            made = preparation.collate(outputs)
        shards = [Shard(output / "a" / shard.file) for shard in made.shards]
        tokens = np.concatenate([shard.read(0, shard.num_tokens) for shard in shards])
        return tokens, made, {each.engine_problem for each in outputs}

    return make


def test_quicktok_gives_the_shards_of_tiktoken_and_the_manifest_names_it(prepared):
    pytest.importorskip("quicktok")
    expected, slow, _ = prepared(None)
    tokens, fast, problems = prepared("fast")
    np.testing.assert_array_equal(tokens, expected)
    assert [shard.sha256 for shard in fast.shards] == [shard.sha256 for shard in slow.shards]
    assert [name.split()[0] for name in slow.provenance["engines"]] == ["tiktoken"]
    assert [name.split()[0] for name in fast.provenance["engines"]] == ["quicktok"]
    assert problems == {""}


@pytest.mark.parametrize("shard_tokens", [1 << 20, 4000])
def test_an_engine_that_errs_on_a_later_text_costs_its_chunk_and_is_named(
    prepared, plain, shard_tokens
):
    expected, _, _ = prepared(None, shard_tokens)
    tokens, made, problems = prepared(Wrong(plain), shard_tokens)
    np.testing.assert_array_equal(tokens, expected)
    (problem,) = problems
    assert "an engine with a fault gave other ids at" in problem and "line 1,031" in problem
    assert [name.split()[0] for name in made.provenance["engines"]] == ["tiktoken"]
