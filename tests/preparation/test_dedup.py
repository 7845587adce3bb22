"""prepare --dedup: of copies one stays, and what is held out anywhere is trained on nowhere."""

import contextlib
import dataclasses
import hashlib
import json
import os
import pathlib
import random
import re
import signal
import subprocess
import sys
import time
from pydoc_data.topics import topics

import fsspec
import numpy as np
import pytest
from prepared import check_contents, write_source

from stablelm_jax import prepare
from stablelm_jax.data import manifest
from stablelm_jax.data.manifest import TokenizerInfo, open_sources
from stablelm_jax.data.shards import Shard
from stablelm_jax.preparation import copies, dedup
from stablelm_jax.tokenizer.tokenizer import load_tokenizer

ROOT = pathlib.Path(prepare.__file__).parents[1]


@pytest.fixture(scope="module")
def tokenizer(tokenizer_file):
    return load_tokenizer(tokenizer_file)


class InThisProcess:
    """In place of the executors: does the tasks here, and stops before the one of number `stop`."""

    def __init__(self, stop=None):
        self.left = stop

    def run(self, step, tasks, logs):
        logs.mkdir(parents=True, exist_ok=True)
        for rank in range(tasks):
            if not (logs / f"{rank}").exists():
                if self.left == 0:
                    raise KeyboardInterrupt
                self.left = self.left and self.left - 1
                step.run(None, rank, tasks)
                (logs / f"{rank}").touch()


@pytest.fixture
def call(monkeypatch, capsys, tokenizer_file):
    """Calls `prepare`; (exit code, what was said, errors)."""

    def run(*arguments, stop=None):
        monkeypatch.setattr(prepare.Executor, "of", lambda flags: InThisProcess(stop))
        code = prepare.main([str(argument) for argument in arguments])
        return code, *capsys.readouterr()

    return run


def write(root, tokenizer, name, train, held_out, **options):
    """A source of texts, its train documents in two shards."""

    def ids(texts):
        return [[*tokenizer.encode(text), tokenizer.eod] for text in texts]

    names = tokenizer.name, tokenizer.sha256, tokenizer.vocab_size, tokenizer.eod
    half = (len(train) + 1) // 2
    shards = [ids(part) for part in (train[:half], train[half:]) if part]
    source = write_source(root, name, shards, ids(held_out), TokenizerInfo(*names), **options)
    made = source.manifest
    for split, texts in (("train", train), ("held_out", held_out)):
        size = sum(len(text.encode()) for text in texts)
        made = dataclasses.replace(
            made, **{split: dataclasses.replace(getattr(made, split), text_bytes=size)}
        )
    made = dataclasses.replace(made, licence="MIT", provenance={"inputs": ["a.jsonl"]})
    manifest.write_manifest(root / name, made)


def texts_of(root, name, tokenizer):
    """(train texts, held-out texts) of a source, in order."""
    made = manifest.read_manifest(root / name)
    check_contents(root / name, made)
    found = []
    for split in (made.train, made.held_out):
        found.append([])
        for info in split.shards:
            shard = Shard(root / name / info.file)
            for first, last in zip(shard.document_offsets, shard.document_offsets[1:]):
                found[-1].append(tokenizer.decode(shard.read(first, last - 1).tolist()))
    return found


def listed(root, name):
    rows = (root / name / "duplicates.jsonl").read_text().splitlines()
    return [json.loads(row) for row in rows]


def digests(directory):
    return {
        str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    }


# exact copies


def test_of_copies_the_first_source_of_the_order_keeps_one_and_in_a_source_the_first_stays(
    tmp_path, tokenizer, call
):
    write(tmp_path / "in", tokenizer, "a", ["x", "y", "y", "only a"], ["h a"])
    write(tmp_path / "in", tokenizer, "b", ["only b", "x", "y", "x"], ["h b"])
    before = digests(tmp_path / "in")
    code, said, _ = call("--dedup", tmp_path / "in", "--output", tmp_path / "by_name")
    assert code == 0
    assert "of copies the first of these keeps one: a, b" in said
    assert texts_of(tmp_path / "by_name", "a", tokenizer) == [["x", "y", "only a"], ["h a"]]
    assert texts_of(tmp_path / "by_name", "b", tokenizer) == [["only b"], ["h b"]]
    copy_of_x = {"source": "a", "split": "train", "document": 0}
    assert listed(tmp_path / "by_name", "b") == [
        {"split": "train", "document": 1, "kind": "exact", "of": copy_of_x},
        {"split": "train", "document": 2, "kind": "exact", "of": copy_of_x | {"document": 1}},
        {"split": "train", "document": 3, "kind": "exact", "of": copy_of_x},
    ]
    code, _, _ = call("--dedup", tmp_path / "in", "--output", tmp_path / "b", "--order", "b")
    assert code == 0
    assert texts_of(tmp_path / "b", "a", tokenizer)[0] == ["only a"]
    assert texts_of(tmp_path / "b", "b", tokenizer)[0] == ["only b", "x", "y"]
    assert digests(tmp_path / "in") == before


def test_random_roots_come_out_as_the_rule_says(tmp_path, tokenizer, call, monkeypatch):
    """Held out goes before trained on, then the order of sources, then that of documents."""
    rng = random.Random(3)
    pool = [f"text {number}" for number in range(40)]
    sides = [(name, split) for split in (1, 0) for name in ("c", "a", "b")]
    given = {side: rng.choices(pool, k=rng.randint(8, 20)) for side in sides}
    for name in "abc":
        write(tmp_path / "in", tokenizer, name, given[name, 0], given[name, 1])
    seen, expected = set(), {}
    for side in sides:
        expected[side] = [t for t in dict.fromkeys(given[side]) if t not in seen]
        seen |= set(expected[side])
    assert all(expected.values())
    for ranges in (1000, 7):  # all hashes at once, and a few at a time
        monkeypatch.setattr(dedup, "_RANGE_DOCUMENTS", ranges)
        out = tmp_path / str(ranges)
        call("--dedup", tmp_path / "in", "--output", out, "--order", *"cab")
        for name in "abc":
            assert texts_of(out, name, tokenizer) == [expected[name, 0], expected[name, 1]]
    assert digests(tmp_path / "7") == digests(tmp_path / "1000")


def test_what_is_held_out_is_in_no_train_shard_whatever_the_order(tmp_path, tokenizer, call):
    write(tmp_path / "in", tokenizer, "a", ["x", "secret", "y"], ["h a"])
    write(tmp_path / "in", tokenizer, "b", ["z"], ["secret"])
    for order in (["a", "b"], ["b", "a"]):
        out = tmp_path / order[0]
        call("--dedup", tmp_path / "in", "--output", out, "--order", *order)
        assert texts_of(out, "a", tokenizer) == [["x", "y"], ["h a"]]
        assert texts_of(out, "b", tokenizer) == [["z"], ["secret"]]


def test_a_source_holds_something_out_even_if_an_earlier_one_holds_out_the_same(
    tmp_path, tokenizer, call
):
    write(tmp_path / "in", tokenizer, "a", ["x"], ["h", "i"])
    write(tmp_path / "in", tokenizer, "b", ["y", "i"], ["h", "i"])
    call("--dedup", tmp_path / "in", "--output", tmp_path / "out")
    assert texts_of(tmp_path / "out", "a", tokenizer) == [["x"], ["h", "i"]]
    assert texts_of(tmp_path / "out", "b", tokenizer) == [["y"], ["h"]]


def test_a_source_of_nothing_but_copies_is_left_out_and_said(tmp_path, tokenizer, call):
    write(tmp_path / "in", tokenizer, "a", ["x", "y"], ["h"])
    write(tmp_path / "in", tokenizer, "b", ["y", "x"], ["i"])
    arguments = "--dedup", tmp_path / "in", "--output", tmp_path / "out"
    for expected in ("deduplicated", "already deduplicated"):
        code, said, _ = call(*arguments)
        assert code == 0
        assert expected in said
        assert "b: nothing is left to train on, take it out of data.weights" in said
        assert "documents that no other source has, gone with it: 1" in said
    assert not (tmp_path / "out" / "b").exists()
    summary = json.loads((tmp_path / "out" / "dedup.json").read_text())
    assert summary["sources"]["b"]["train"]["exact"]["documents"] == 2
    assert summary["sources"]["b"]["only_here"] == 1


@pytest.mark.parametrize("near", [[], ["--near"]])
def test_what_a_source_of_nothing_but_copies_holds_out_stays_where_else_it_is(
    tmp_path, tokenizer, call, near
):
    x, y, z, h = real_texts(4, words=60)
    other = edited(x, 1, random.Random(0)) if near else x
    write(tmp_path / "in", tokenizer, "a", [x, y, z], [h])
    write(tmp_path / "in", tokenizer, "b", ["in b", y], [z])
    write(tmp_path / "in", tokenizer, "c", [other, z], [y, h])
    flags = "--dedup", tmp_path / "in", *near, "--output"
    _, said, _ = call(*flags, tmp_path / "out")
    assert "c: nothing is left to train on; begun again without it" in said
    assert "no other source has" not in said
    assert texts_of(tmp_path / "out", "a", tokenizer) == [[x, y], [h]]
    assert texts_of(tmp_path / "out", "b", tokenizer) == [["in b"], [z]]
    assert not (tmp_path / "out" / "c").exists()
    for stop in range(1, 60, 4):
        with contextlib.suppress(KeyboardInterrupt):
            call(*flags, tmp_path / "stopped", stop=stop)
    assert digests(tmp_path / "stopped") == digests(tmp_path / "out")


def test_of_sources_that_would_empty_each_other_one_stays_whole(tmp_path, tokenizer, call):
    write(tmp_path / "in", tokenizer, "a", ["x"], ["y"])
    write(tmp_path / "in", tokenizer, "b", ["y"], ["x"])
    call("--dedup", tmp_path / "in", "--output", tmp_path / "out")
    assert texts_of(tmp_path / "out", "a", tokenizer) == [["x"], ["y"]]
    assert not (tmp_path / "out" / "b").exists()


def test_samples_are_left_out_and_said(tmp_path, tokenizer, call):
    sampled = tmp_path / "in" / "a_sample"
    write(tmp_path / "in", tokenizer, "a_sample", ["x"], ["y"])
    made = manifest.read_manifest(sampled)
    provenance = made.provenance | {"settings": {"sample": 2}}
    manifest.write_manifest(sampled, dataclasses.replace(made, provenance=provenance))
    flags = "--dedup", tmp_path / "in", "--output", tmp_path / "out"
    code, _, error = call(*flags)
    assert code == 2
    assert "no source of texts but samples (a_sample)" in error
    write(tmp_path / "in", tokenizer, "a", ["x", "y", "z"], ["h"])
    _, said, _ = call(*flags)
    assert "a_sample: left out: a sample" in said
    assert texts_of(tmp_path / "out", "a", tokenizer) == [["x", "y", "z"], ["h"]]
    assert not (tmp_path / "out" / "a_sample").exists()


def test_the_manifest_says_what_went_and_keeps_the_rest_and_a_run_takes_it(
    tmp_path, tokenizer, call
):
    write(tmp_path / "in", tokenizer, "a", ["grün", "y", "yy"], ["h"])
    write(tmp_path / "in", tokenizer, "b", ["grün", "z", "grün", "w"], ["i"])
    (tmp_path / "in" / "b" / "rejected.jsonl").write_text("{}\n")
    call("--dedup", tmp_path / "in", "--output", tmp_path / "out")
    old, new = (manifest.read_manifest(tmp_path / root / "b") for root in ("in", "out"))
    tokens = [tokenizer.encode(text) + [tokenizer.eod] for text in ("z", "w")]
    assert (new.train.documents, new.train.tokens, new.train.text_bytes) == (2, 4, 2)
    assert new.unigram_entropy == pytest.approx(
        manifest.unigram_entropy(np.bincount(np.concatenate(tokens)))
    )
    found = new.provenance["dedup"]
    nothing = {"documents": 0, "text_bytes": 0, "tokens": 0}
    size = len("grün".encode())
    gone = {"documents": 2, "text_bytes": 2 * size, "tokens": 2 * size + 2}
    assert found["train"] == {"exact": gone, "near": nothing}
    assert found["held_out"] == {"exact": nothing, "near": nothing}
    assert found["copies_of"] == {"a": 2}
    assert found["settings"]["order"] == ["a", "b"]
    assert found["settings"]["near"] is None
    assert new.provenance["inputs"] == old.provenance["inputs"]
    for field in ("tokenizer", "licence", "languages", "rejected", "kind", "held_out"):
        assert getattr(new, field) == getattr(old, field)
    assert (tmp_path / "out" / "b" / "rejected.jsonl").exists()
    assert open_sources(tmp_path / "out", ["a", "b"]).keys() == {"a", "b"}


def test_conversations_are_copied_as_they_are_and_said(tmp_path, tokenizer, call):
    write(tmp_path / "in", tokenizer, "a", ["x", "x"], ["h"])
    write(
        tmp_path / "in", tokenizer, "chats", ["xx", "xx"], ["yy"],
        kind="conversations", spans=lambda document: [(0, 1)],
    )  # fmt: skip
    _, said, _ = call("--dedup", tmp_path / "in", "--output", tmp_path / "out")
    assert "chats: copied as it is, copies of conversations are not looked for" in said
    before, after = digests(tmp_path / "in" / "chats"), digests(tmp_path / "out" / "chats")
    del before["manifest.json"], after["manifest.json"]
    assert before == after
    made = manifest.read_manifest(tmp_path / "out" / "chats")
    assert made.provenance["dedup"]["left_as_it_is"] == "conversations"
    open_sources(tmp_path / "out", ["a", "chats"])


# near copies


def shingles(text):
    words = text.split()
    return {tuple(words[at : at + 5]) for at in range(len(words) - 4)}


def real_texts(count, words=300):
    """Texts of real English, the words of Python's own manual, that share next to nothing."""
    texts, seen = [], set()
    for topic in sorted(topics.values(), key=len, reverse=True):
        found = re.findall("[a-z]+", topic.lower())
        for at in range(0, len(found) - words, words):
            text = " ".join(found[at : at + words])
            if len(texts) < count and len(shingles(text) & seen) < 10:
                texts.append(text)
                seen |= shingles(text)
    assert len(texts) == count
    return texts


def edited(text, edits, rng):
    """The text with so many words replaced, each far from the others."""
    words = text.split()
    for place in range(edits):
        low, high = (len(words) * (place + part) // edits for part in (0, 1))
        words[rng.randrange(low, high)] = f"edit{rng.randrange(10**6)}"
    return " ".join(words)


def jaccard(a, b):
    return len(shingles(a) & shingles(b)) / len(shingles(a) | shingles(b))


def test_near_copies_of_similarity_95_are_found_and_of_half_are_not(tmp_path, tokenizer, call):
    """By MinHash's own formula all of the first are found, and of the second 1 of 20."""
    rng = random.Random(0)
    texts = real_texts(40)
    near = [edited(text, 1, rng) for text in texts[:20]]
    half = [edited(text, 20, rng) for text in texts[20:]]
    assert all(jaccard(*pair) > 0.95 for pair in zip(texts, near))
    assert all(0.45 < jaccard(*pair) < 0.58 for pair in zip(texts[20:], half))
    write(tmp_path / "in", tokenizer, "a", texts, ["held out in a"])
    write(tmp_path / "in", tokenizer, "b", [*near, *half], ["held out in b"])
    code, _, _ = call("--dedup", tmp_path / "in", "--output", tmp_path / "out", "--near")
    assert code == 0
    assert texts_of(tmp_path / "out", "a", tokenizer)[0] == texts
    rows = listed(tmp_path / "out", "b")
    found = {row["document"]: row for row in rows}
    assert set(range(20)) <= found.keys()
    assert len(found) <= 24
    for number, row in found.items():
        assert row["kind"] == "near"
        assert row["of"] == {"source": "a", "split": "train", "document": number}
        pair = texts[number], [*near, *half][number]
        assert row["similarity"] == pytest.approx(jaccard(*pair), abs=0.002)
    made = manifest.read_manifest(tmp_path / "out" / "b").provenance["dedup"]
    assert made["settings"]["near"] == {"ngram": 5, "bands": 14, "rows": 8, "seed": 1}
    assert made["train"]["near"]["documents"] == len(found)
    assert made["compared"] == 40  # what is held out has too few words


def test_of_a_cluster_the_first_stays_and_held_out_goes_before_trained_on(
    tmp_path, tokenizer, call, monkeypatch
):
    """However large the cluster is, and however many tasks compare a band."""
    rng = random.Random(1)
    first, second, other = real_texts(3)
    many = [edited(first, 1, rng) for _ in range(6)]
    write(tmp_path / "in", tokenizer, "a", ["in a", *many[:5]], [other])
    train = ["in b", many[5], first, edited(second, 1, rng)]
    write(tmp_path / "in", tokenizer, "b", train, [second])
    for order, left in (("ab", (["in a", many[0]], ["in b"])), ("ba", (["in a"], train[:2]))):
        out = tmp_path / order
        call("--dedup", tmp_path / "in", "--output", out, "--near", "--order", *order)
        assert texts_of(out, "a", tokenizer) == [left[0], [other]]
        assert texts_of(out, "b", tokenizer) == [left[1], [second]]
        monkeypatch.setattr(dedup, "_BAND_DOCUMENTS", 1)


GOODBYE = [
    "Opens the file that the function printf() writes to. If the file is not there, it is made. "
    "The value is 0 when all went well, and -1 when an error came; errno says which.",
    "Öffnet die Datei, in die die Funktion printf() schreibt. Fehlt die Datei, wird sie angelegt. "
    "Der Wert ist 0, wenn alles gut ging, und -1 bei einem Fehler; errno sagt, bei welchem.",
    "Ouvre le fichier dans lequel la fonction printf() écrit. Si le fichier manque, il est créé. "
    "La valeur est 0 quand tout va bien, et -1 en cas d'erreur; errno dit laquelle.",
    "Abre el fichero en el que escribe la función printf(). Si el fichero no existe, se crea. "
    "El valor es 0 cuando todo va bien, y -1 cuando hay un error; errno dice cuál.",
]


def test_the_same_page_in_several_languages_is_no_copy(tmp_path, tokenizer, call):
    for name, page in zip(("en", "de", "fr", "es"), GOODBYE):
        write(tmp_path / "in", tokenizer, name, [page, page.upper()], [f"held out in {name}"])
    call("--dedup", tmp_path / "in", "--output", tmp_path / "out", "--near")
    for name, page in zip(("en", "de", "fr", "es"), GOODBYE):
        assert texts_of(tmp_path / "out", name, tokenizer)[0] == [page]  # case does not count


def test_sources_named_exact_only_keep_their_near_copies(tmp_path, tokenizer, call):
    text, held_out = real_texts(2)
    other = edited(text, 1, random.Random(0))
    write(tmp_path / "in", tokenizer, "a", [text], [held_out])
    write(tmp_path / "in", tokenizer, "b", [other, text, other], [edited(held_out, 1, random)])
    flags = "--near", "--exact-only", "b"
    call("--dedup", tmp_path / "in", "--output", tmp_path / "out", *flags)
    assert texts_of(tmp_path / "out", "b", tokenizer)[0] == [other]


RECIPE_OF_OURS = """
from stablelm_jax.preparation.recipes import Recipe, RecipeSource
RECIPE = Recipe("ours", (
    RecipeSource("not_prepared", ()),
    RecipeSource("b", (), unfiltered="code"),
    RecipeSource("a", ()),
))
"""


def test_a_recipe_gives_the_order_and_names_what_is_compared_exactly_alone(
    tmp_path, tokenizer, call
):
    recipe = tmp_path / "ours.py"
    recipe.write_text(RECIPE_OF_OURS)
    text, held_out = real_texts(2)
    other = edited(text, 1, random.Random(0))
    write(tmp_path / "in", tokenizer, "a", [text, "x"], [held_out])
    write(tmp_path / "in", tokenizer, "b", [other, text, "y"], ["h b"])
    flags = "--dedup", tmp_path / "in", "--output", tmp_path / "out", "--near"
    code, said, _ = call(*flags, "--recipe", recipe)
    assert code == 0
    assert "of copies the first of these keeps one: b, a" in said
    assert texts_of(tmp_path / "out", "a", tokenizer)[0] == ["x"]
    assert texts_of(tmp_path / "out", "b", tokenizer)[0] == [other, text, "y"]
    code, _, error = call(*flags, "--recipe", recipe, "--order", "a")
    assert code == 2
    assert "--order: not with --recipe" in error


# stopped, begun again, refused


@pytest.fixture
def small_root(tmp_path, tokenizer):
    rng, texts = random.Random(0), real_texts(6, words=60)
    near = [edited(text, 1, rng) for text in texts]
    write(tmp_path / "in", tokenizer, "a", [*texts[:4], near[0], texts[1]], [texts[4]])
    write(
        tmp_path / "in", tokenizer, "b", ["in b", near[1], texts[3], near[4], near[5]], [texts[5]]
    )
    return tmp_path / "in"


def test_stopped_before_any_task_or_rename_it_goes_on_and_gives_the_same_bytes(
    small_root, tmp_path, call, monkeypatch
):
    flags = "--dedup", small_root, "--near", "bands=5,rows=3", "--output"
    call(*flags, tmp_path / "undisturbed")
    for stop in range(0, 30, 3):
        try:
            call(*flags, tmp_path / "out", stop=stop)
        except KeyboardInterrupt:
            assert not (tmp_path / "out" / "dedup.json").exists()
    rename = os.rename

    def stopped(source, target):
        rename(source, target)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", stopped)
        with pytest.raises(KeyboardInterrupt):
            call(*flags, tmp_path / "twice")
    code, said, _ = call(*flags, tmp_path / "twice")
    assert code == 0
    assert "going on with what was begun" in said
    expected = digests(tmp_path / "undisturbed")
    assert len(expected) > 10
    assert digests(tmp_path / "out") == digests(tmp_path / "twice") == expected


def test_a_root_behind_a_url_gives_the_same_bytes(small_root, tmp_path, call):
    (small_root / "a" / "rejected.jsonl").write_text("{}\n")
    call("--dedup", small_root, "--output", tmp_path / "local", "--near")
    fs, path = fsspec.core.url_to_fs("memory://deduplicated")
    fs.put(str(small_root), path, recursive=True)
    code, _, _ = call("--dedup", "memory://deduplicated", "--output", tmp_path / "out", "--near")
    assert code == 0
    assert digests(tmp_path / "out") == digests(tmp_path / "local")


def test_what_cannot_be_done_is_refused_by_name(small_root, tmp_path, tokenizer, call):
    out = tmp_path / "out"
    good = "--dedup", small_root, "--output", out
    for arguments, message in [
        (["--dedup", small_root], "--output: is missing"),
        (["--dedup", small_root, "--output", small_root / "clean"], "lies in"),
        (
            ["--dedup", tmp_path / "nowhere", "--output", out],
            f"--dedup {tmp_path / 'nowhere'}: cannot be listed (No such file or directory)\n",
        ),
        (["--dedup", small_root, "--output", "memory://clean"], "a folder of this machine"),
        ([*good, "--order", "c"], "no source c in"),
        ([*good, "--source", "a"], "--source: not with --dedup"),
        (
            [*good, "--licence", "MIT", "--held-out", "0.1"],
            "--held-out --licence: not with --dedup",
        ),
        (["--source", "a", "--output", out, "--near"], "--near: only with --dedup"),
        ([*good, "--exact-only", "a"], "--exact-only: only with --near"),
    ]:
        code, _, error = call(*arguments)
        assert code == 2
        assert message in error
        assert error.count("\n") == 1
    for near in ("bands=0", "buckets=14", "rows", "rows=8.5"):
        with pytest.raises(SystemExit) as left:
            call(*good, "--near", near)
        assert left.value.code == 2
    assert not out.exists()
    other = dataclasses.replace(manifest.read_manifest(small_root / "b"))
    info = dataclasses.replace(other.tokenizer, sha256="f" * 64)
    manifest.write_manifest(small_root / "b", dataclasses.replace(other, tokenizer=info))
    code, _, error = call(*good)
    assert code == 2
    assert "b/manifest.json: prepared with tokenizer" in error


def test_the_same_command_is_done_already_and_another_is_refused(small_root, tmp_path, call):
    good = "--dedup", small_root, "--output", tmp_path / "out"
    call(*good)
    before = digests(tmp_path / "out")
    code, said, _ = call(*good)
    assert code == 0
    assert "already deduplicated" in said
    for arguments, message in [
        ([*good, "--near"], "was made with other near"),
        ([*good, "--order", "b"], "was made with other order (['a', 'b'], not ['b', 'a'])"),
        (["--dedup", tmp_path / "out", "--output", tmp_path / "out"], "lies in"),
    ]:
        code, _, error = call(*arguments)
        assert code
        assert message in error
    assert digests(tmp_path / "out") == before
    (tmp_path / "other" / "c").mkdir(parents=True)
    (tmp_path / "other" / "c" / "manifest.json").touch()
    code, _, error = call("--dedup", small_root, "--output", tmp_path / "other")
    assert code == 1
    assert "c lies there already" in error


@pytest.mark.by_hand
def test_killed_at_any_moment_and_with_other_workers_the_bytes_are_the_same(
    small_root, tmp_path, call
):
    """In processes of its own, by datatrove's local executor."""
    flags = ["--dedup", str(small_root), "--near", "--output"]
    call(*flags, tmp_path / "undisturbed")
    start = [sys.executable, "-m", "stablelm_jax.prepare", *flags, str(tmp_path / "out")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    work, kills = tmp_path / "out" / ".work", 0
    for seen in ("hashes/000001.npy", "signatures/bucket_003/00001.minhash.sig",
                 "pairs/00007_00.dups", "clusters", "records/000002.json", "../a"):  # fmt: skip
        process = subprocess.Popen(
            [*start, "--workers", str(kills % 3 + 1)], env=environment, start_new_session=True
        )
        while not (work / seen).exists() and process.poll() is None:
            time.sleep(0.005)
        os.killpg(process.pid, signal.SIGKILL)
        kills += process.wait() == -signal.SIGKILL
    subprocess.run([*start, "--workers", "3"], env=environment, check=True)
    assert kills >= 4
    assert digests(tmp_path / "out") == digests(tmp_path / "undisturbed")


def test_a_document_of_any_length_is_signed_as_datatrove_would_in_pieces(tmp_path, monkeypatch):
    config = copies.minhash.MinhashConfig(hash_config=copies.HashConfig(64, "sha1"))
    signatures = [
        kind(str(tmp_path), config, copies._Spaces())
        for kind in (copies._Signature, copies.minhash.MinhashDedupSignature)
    ]
    monkeypatch.setattr(copies, "_SHINGLES", 16)
    for words in (5, 16, 20, 21, 300):
        text = real_texts(1, words)[0]
        ours, theirs = (each.get_signature(each.get_shingles(text)) for each in signatures)
        assert ours == theirs
