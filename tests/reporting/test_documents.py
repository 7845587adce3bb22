"""Looking at a prepared source: what is drawn, what is odd, what the source is made of."""

import json
import subprocess
import sys

import numpy as np
import pytest
from absl import flags
from prepared import write_source
from tiny import CHOICES, SOURCES, VOCAB, write_chats, write_tokenizer

from stablelm_jax import config, inspect_data
from stablelm_jax.data.manifest import TokenizerInfo
from stablelm_jax.data.shards import Shard
from stablelm_jax.reporting import documents
from stablelm_jax.reporting.documents import choose, open_source, repeated_share, sample, statistics
from stablelm_jax.reporting.picture import draw_documents
from stablelm_jax.tokenizer.tokenizer import load_tokenizer

SHARDS, EACH = 6, 20


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Six shards of 20 documents; number 47 is long, number 65 repeats itself, 90 is 10 again."""
    root, rng = tmp_path_factory.mktemp("looked_at"), np.random.default_rng(2)
    own = load_tokenizer(write_tokenizer(root / "tokenizer.json"))
    texts = [rng.integers(0, VOCAB - 9, rng.integers(20, 90)).tolist() for _ in range(120)]
    texts[47] = rng.integers(0, VOCAB - 9, 700).tolist()
    texts[65] = texts[65][:10] * 9
    texts[90] = texts[10]
    shards = [
        [[*text, own.eod] for text in texts[first : first + EACH]] for first in range(0, 120, EACH)
    ]
    made_by = TokenizerInfo("tokenizer.json", own.sha256, own.vocab_size, own.eod)
    write_source(root, "words", shards, tokenizer=made_by)
    return root


def test_documents_of_every_shard_are_found_under_their_number_in_the_source(root):
    source, tokenizer = open_source(str(root), "words", None)  # its tokenizer lies beside it
    seen = sample(source, 60, 3, seed=1)
    assert len({document.number for document in seen.drawn}) == 60 and seen.shards == SHARDS
    assert [d.number for d in seen.drawn] == [d.number for d in sample(source, 60, 3, 1).drawn]
    assert [d.number for d in seen.drawn] != [d.number for d in sample(source, 60, 3, 2).drawn]
    for document in seen.drawn:
        shard = Shard(source.directory / document.info.file)
        start, stop = shard.document_offsets[document.within : document.within + 2]
        assert document.number == int(document.info.file[6:11]) * EACH + document.within
        assert document.ids.tolist() == shard.read(start, stop).tolist()
        shown = document.shown(source, tokenizer, "")
        assert shown.item == f"words:documents:{document.number}" and shown.tokens == stop - start


def test_the_longest_and_the_most_repetitive_come_first(root):
    source, _ = open_source(str(root), "words", None)
    seen = sample(source, 120, 3, seed=0)
    assert choose("longest", seen, 3, source, None)[0][0].number == 47
    lengths = [document.tokens for document, _ in choose("longest", seen, 3, source, None)]
    assert lengths == sorted((d.tokens for d in seen.drawn), reverse=True)[:3]
    (first, note), (second, _) = choose("repetitive", seen, 2, source, None)
    assert first.number == 65 and "86.9% of its runs of 8 tokens" in note
    assert repeated_share(first.ids) > 10 * repeated_share(second.ids)


def test_the_share_of_repeated_runs_is_that_of_a_slow_count():
    rng = np.random.default_rng(0)
    for size in (3, 16, 40, 200):
        ids = rng.integers(0, 2, size).astype(np.int32)
        runs = [tuple(ids[n : n + 8].tolist()) for n in range(size - 7)]
        expected = 1 - len(set(runs)) / len(runs) if size >= 16 else 0
        assert repeated_share(ids) == pytest.approx(expected)


def test_statistics_count_what_is_there(root, tmp_path):
    source, tokenizer = open_source(str(root), "words", None)
    found = statistics(source, tokenizer, sample(source, 1000, 3, seed=0))
    lengths = np.diff(np.concatenate([[0], *(o for o in offsets_of(source))]))
    expected = {2**n: int(((lengths >= 2**n) & (lengths < 2 ** (n + 1))).sum()) for n in range(12)}
    histogram = found["tokens_a_document"]["histogram"]
    assert histogram == {least: count for least, count in expected.items() if count}
    assert found["sample"] == found["documents"] == 120 and found["shards"] == [6, 6]
    assert found["copies"] == 1
    assert found["tokens_a_document"]["most"] == 701
    assert sum(found["bytes_a_token"]["histogram"].values()) == 120
    assert 2 < found["bytes_a_token"]["median"] < 4  # words of two to four letters, and a space
    assert sum(found["languages"].values()) == 120
    draw_documents(found, tmp_path / "words.png")
    assert (tmp_path / "words.png").read_bytes().startswith(b"\x89PNG")


def offsets_of(source):
    """The ends of all documents, over the shards one after the other."""
    start = 0
    for info in source.manifest.train.shards:
        yield Shard(source.directory / info.file).document_offsets[1:] + start
        start += info.tokens


def test_of_a_large_source_some_shards_are_opened_and_the_table_says_so(root, monkeypatch):
    monkeypatch.setattr(documents, "MAX_SHARDS", 2)
    monkeypatch.setattr(documents, "MAX_TOKENS", 16)
    source, tokenizer = open_source(str(root), "words", None)
    seen = sample(source, 1000, 3, seed=0)
    assert len({document.info.file for document in seen.drawn}) == 2 and len(seen.drawn) == 2 * EACH
    assert max(len(document.ids) for document in seen.drawn) == 16
    first = next(documents.tables(statistics(source, tokenizer, seen)))
    assert "text; documents to train: 120, tokens: " in first
    assert "into shards: 2 of 6; into random documents: 40, up to" in first


def test_conversations_show_which_of_their_tokens_are_trained(tmp_path):
    root = write_chats(tmp_path / "chats")
    source, tokenizer = open_source(str(root), CHOICES, str(root / "tokenizer.json"))
    for document in sample(source, 10, 1, seed=0).drawn:
        shown = document.shown(source, tokenizer, "")
        assert [trained for _, trained in shown.parts] == [False, True]
        assert " ".join(text for text, _ in shown.parts).split() == shown.text.split()


def test_a_tokenizer_that_is_gone_or_another_one_is_told(root, tmp_path):
    with pytest.raises(ValueError, match="gone.json"):
        open_source(str(root), "words", "gone.json")
    other = write_tokenizer(tmp_path / "tokenizer.json")
    other.write_text(other.read_text().replace("w100", "w999"))
    with pytest.raises(ValueError, match="prepared with tokenizer"):
        open_source(str(root), "words", str(other))


def shown(*arguments):
    command = [sys.executable, "-m", "stablelm_jax.inspect_data", *arguments]
    return subprocess.run(command, capture_output=True, text=True)


def test_the_verb_prints_the_documents_of_a_source(root):
    done = shown("--source=words", f"--data={root}", "--show=longest", "--documents=2", "--json")
    found = json.loads(done.stdout)
    assert done.returncode == 0, done.stderr
    assert [d["item"] for d in found["shown"]][0] == "words:documents:47" and found["copies"] == 1


def test_the_verb_says_what_is_missing(data):
    for arguments, message in (
        ((), "--config: is missing; write --config configs/smoke.py"),
        (("--loss", "--step=3"), "--workdir: is missing; write --workdir runs/NAME"),
        ((f"--data={data}",), "--source: is missing; write --source NAME"),
    ):
        done = shown(*arguments)
        assert done.returncode == 2 and message in done.stderr


@pytest.fixture(scope="module")
def verb():
    """The verb, in this process: its flags are defined, and to be parsed."""
    before, found = set(flags.FLAGS), []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(config, "run", found.append)
        inspect_data.main()
    yield found[0]
    for name in set(flags.FLAGS) - before:
        delattr(flags.FLAGS, name)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--source=cubes --data={data}", "--source cubes: {data} has " + ", ".join(SOURCES)),
        ("--source=cubes --data={data}/no", "--data {data}/no: cannot be listed (No such file"),
        ("--source=a --data={data} --step=3 --rows=1", "--step --rows: not with the documents"),
        ("--source=a --step=3 --workdir=runs", "--workdir --step: not with the documents"),
        (
            "--loss --workdir=runs --step=3 --picture=a.png",
            "--picture: only with --source and --data",
        ),
        ("--source=a --data={data} --checkpoint=c", "--checkpoint: only with --show loss"),
        ("--source=a --data={data} --picture=x.txt", "--picture x.txt: it will be a PNG; name"),
        ("--source=a --data={data} --picture={data}/no/x.png", "--picture {data}/no/x.png: No"),
    ],
)
def test_what_is_asked_of_documents_wrongly_is_refused_at_once(data, verb, arguments, message):
    flags.FLAGS(["inspect_data", *arguments.format(data=data).split()])
    try:
        with pytest.raises(config.ConfigError) as error:
            verb([])
    finally:
        flags.FLAGS.unparse_flags()
    assert message.format(data=data) in str(error.value)
