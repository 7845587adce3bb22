"""Manifests: nothing is lost on the way, and what does not hold is refused with the file named."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
from prepared import CHAT, EOD, TOKENIZER, write_source

from stablelm_jax.data.manifest import (
    ManifestError,
    SourceManifest,
    Split,
    data_hash,
    open_sources,
    read_manifest,
    unigram_entropy,
    write_manifest,
)
from stablelm_jax.data.shards import ShardError, ShardWriter

DOCUMENTS = [[8, 9, 10, EOD], [11, EOD], [12, 13, EOD]]


@pytest.fixture
def source(tmp_path):
    return write_source(tmp_path, "books", [DOCUMENTS, DOCUMENTS[:1]])


def edit(source, change):
    """Applies `change` to the JSON of the manifest on disk."""
    path = source.directory / "manifest.json"
    fields = json.loads(path.read_text())
    change(fields)
    path.write_text(json.dumps(fields))


def test_a_manifest_comes_back_as_it_was_written(source):
    manifest = dataclasses.replace(
        source.manifest,
        licence="CC-BY-4.0",
        provenance={"url": "somewhere", "files": [1, 2]},
        rejected=3,
        languages=("en", "pt"),
    )
    write_manifest(source.directory, manifest)
    assert read_manifest(source.directory) == manifest
    assert not list(source.directory.glob("*.partial"))


def test_the_file_holds_the_fields_that_scripts_rely_on(source):
    fields = json.loads((source.directory / "manifest.json").read_text())
    assert fields["format_version"] == 1 and fields["source"] == "books"
    assert set(fields["tokenizer"]) == {"name", "sha256", "vocab_size", "eod"}
    assert set(fields["train"]) == {"shards", "documents", "tokens", "text_bytes"}
    assert fields["train"]["shards"][1]["file"] == "train-00001.bin"
    assert set(fields["held_out"]["shards"][0]) == {
        "file",
        "documents",
        "tokens",
        "bytes",
        "sha256",
        "spans_sha256",
    }


def test_a_manifest_of_before_there_were_conversations_is_read(source):
    def remove_what_is_new(fields):
        del fields["kind"], fields["chat"]
        for split in ("train", "held_out"):
            for shard in fields[split]["shards"]:
                del shard["spans_sha256"]

    edit(source, remove_what_is_new)
    assert read_manifest(source.directory) == source.manifest
    assert source.manifest.kind == "text" and source.manifest.chat == {}


@pytest.fixture
def chats(tmp_path):
    def spans(document):
        return [(0, len(document))]

    return write_source(tmp_path, "chats", [DOCUMENTS], kind="conversations", spans=spans)


def test_a_source_of_conversations_opens_with_its_template(chats, tmp_path):
    opened = open_sources(tmp_path, ["chats"])["chats"]
    assert opened == chats and opened.manifest.chat == CHAT


@pytest.mark.parametrize("damage", [os.unlink, lambda path: os.truncate(path, 130)])
def test_spans_that_are_missing_or_damaged_are_refused_and_named(chats, tmp_path, damage):
    path = chats.directory / "train-00000.spans.npy"
    damage(path)
    with pytest.raises(ShardError, match="missing|sha256 .* where the manifest says") as caught:
        open_sources(tmp_path, ["chats"])
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("kind", ["text", "tunes"])
def test_a_kind_that_the_shards_contradict_or_that_is_unknown_is_refused(chats, kind):
    edit(chats, lambda fields: fields.update(kind=kind))
    with pytest.raises(ManifestError, match=f"kind '{kind}' is unknown, or its shards have spans"):
        read_manifest(chats.directory)


def test_the_data_hash_sees_the_spans(chats, tmp_path):
    def fewer(document):
        return [(1, len(document))]

    other = write_source(tmp_path / "2", "chats", [DOCUMENTS], kind="conversations", spans=fewer)
    assert data_hash({"chats": chats.manifest}) != data_hash({"chats": other.manifest})


def test_a_manifest_with_a_value_that_json_lacks_is_not_written(source):
    before = (source.directory / "manifest.json").read_bytes()
    with pytest.raises(ValueError, match="JSON"):
        write_manifest(
            source.directory, dataclasses.replace(source.manifest, unigram_entropy=math.nan)
        )
    assert (source.directory / "manifest.json").read_bytes() == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.update(format_version=2), "format_version 2"),
        (lambda m: m.pop("format_version"), "format_version None"),
        (lambda m: m.update(langauges=[]), "unknown field 'langauges', 'languages'?"),
        (lambda m: m.pop("train"), "field 'train' is missing"),
        (lambda m: m["train"].pop("shards"), "train: field 'shards' is missing"),
        (lambda m: m["train"].update(shards={}), "train.shards is {}, which is no tuple"),
        (lambda m: m.update(languages=[3]), "languages is 3, which is no str"),
        (lambda m: m.pop("licence"), "field 'licence' is missing"),
        (lambda m: m["tokenizer"].pop("eod"), "tokenizer: field 'eod' is missing"),
        (lambda m: m["tokenizer"].update(eod="7"), "tokenizer.eod is '7'"),
        (lambda m: m["train"].update(tokens=True), "train.tokens is True"),
        (lambda m: m["train"].update(tokens=14), "not the sums"),
        (lambda m: m["held_out"].update(documents=2), "not the sums"),
        (lambda m: m["train"]["shards"][0].pop("sha256"), "field 'sha256' is missing"),
        (lambda m: m.update(source="Books"), "lower case"),
        (lambda m: m.update(source="../books"), "lower case"),
    ],
)
def test_a_manifest_that_does_not_hold_is_refused_and_named(source, change, message):
    edit(source, change)
    with pytest.raises(ManifestError, match=message.replace("?", r"\?")) as caught:
        read_manifest(source.directory)
    assert str(source.directory / "manifest.json") in str(caught.value)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"a": "\udcff"}'])
def test_a_manifest_that_is_no_json_object_is_refused_and_named(source, text):
    path = source.directory / "manifest.json"
    path.write_text(text, errors="surrogateescape")
    with pytest.raises(ManifestError) as caught:
        read_manifest(source.directory)
    assert str(path) in str(caught.value)


def test_a_source_that_was_not_prepared_is_refused_with_the_remedy(tmp_path):
    with pytest.raises(ManifestError, match=r"missing; prepare this source first") as caught:
        open_sources(tmp_path, ["poems"])
    assert str(tmp_path / "poems" / "manifest.json") in str(caught.value)


def test_sources_open_in_the_order_of_their_names(source, tmp_path):
    write_source(tmp_path, "arxiv", [DOCUMENTS])
    sources = open_sources(tmp_path, ["books", "arxiv"], tokenizer=TOKENIZER)
    assert list(sources) == ["arxiv", "books"]
    assert sources["books"] == source and sources["books"].name == "books"


@pytest.mark.parametrize("file", ["train-00001.bin", "train-00001.idx", "held_out-00000.bin"])
def test_a_missing_shard_is_refused_and_named(source, tmp_path, file):
    (source.directory / file).unlink()
    with pytest.raises(ShardError, match="missing") as caught:
        open_sources(tmp_path, ["books"])
    assert str(source.directory / file) in str(caught.value)


@pytest.mark.parametrize("more", [4, -4, 1])
def test_a_changed_byte_count_is_refused_and_names_the_file(source, tmp_path, more):
    path = source.directory / "train-00000.bin"
    os.truncate(path, path.stat().st_size + more)
    with pytest.raises(ShardError, match="bytes where") as caught:
        open_sources(tmp_path, ["books"])
    assert str(path) in str(caught.value)


def test_a_whole_shard_of_another_preparation_is_refused_and_named(source, tmp_path):
    with ShardWriter(source.directory / "train-00000") as writer:
        writer.add_many(np.array([8, 9, EOD]), [3])
    with pytest.raises(ShardError, match="12 bytes where the manifest says 36") as caught:
        open_sources(tmp_path, ["books"])
    assert "train-00000.bin" in str(caught.value)


def test_shards_of_equal_bytes_but_other_documents_are_refused(source, tmp_path):
    with ShardWriter(source.directory / "train-00000") as writer:
        writer.add_many(np.arange(9), [9])
    with pytest.raises(ShardError, match="1 documents where the manifest says 3"):
        open_sources(tmp_path, ["books"])


@pytest.mark.parametrize("change", [{"sha256": "b" * 64}, {"eod": 8}])
def test_a_manifest_of_another_tokenizer_is_refused_and_named(source, tmp_path, change):
    tokenizer = dataclasses.replace(TOKENIZER, **change)
    with pytest.raises(ManifestError, match="tokenizer 'letters'.*prepare the source again") as e:
        open_sources(tmp_path, ["books"], tokenizer=tokenizer)
    assert str(source.directory / "manifest.json") in str(e.value)


def test_sources_of_two_tokenizers_are_refused_even_where_the_run_names_none(source, tmp_path):
    other = dataclasses.replace(TOKENIZER, name="other", sha256="b" * 64)
    write_source(tmp_path, "code", [DOCUMENTS], tokenizer=other)
    with pytest.raises(ManifestError, match="'other'"):
        open_sources(tmp_path, ["books", "code"])


def test_a_source_in_the_directory_of_another_is_refused(source, tmp_path):
    shutil.move(source.directory, tmp_path / "novels")
    with pytest.raises(ManifestError, match="source 'books'"):
        open_sources(tmp_path, ["novels"])


def test_the_data_hash_sees_contents_and_order_of_shards_and_nothing_else(tmp_path):
    one, two = DOCUMENTS, [[20, EOD]]
    first = write_source(tmp_path / "1", "books", [one, two]).manifest
    again = write_source(tmp_path / "2", "books", [one, two]).manifest
    described = dataclasses.replace(
        again, licence="MIT", provenance={"date": "today"}, languages=(), rejected=9
    )
    renamed = dataclasses.replace(
        first,
        train=Split.of(
            [dataclasses.replace(info, file="x" + info.file) for info in first.train.shards], 0
        ),
    )
    same = data_hash({"books": first})
    assert same == data_hash({"books": described}) == data_hash({"books": renamed})
    swapped = write_source(tmp_path / "3", "books", [two, one]).manifest
    held_out = write_source(tmp_path / "4", "books", [one, two], [[9, EOD]]).manifest
    others = [{"books": swapped}, {"books": held_out}, {"novels": first}]
    others.append({"books": first, "novels": again})
    assert len({same, *(data_hash(other) for other in others)}) == 5
    pair = {"a": first, "b": swapped}
    assert data_hash(pair) == data_hash(dict(reversed(pair.items())))


def test_unigram_entropy_is_in_nats_and_ignores_tokens_that_never_occur():
    assert unigram_entropy(np.full(100, 3)) == pytest.approx(math.log(100))
    assert unigram_entropy([0, 5, 0]) == 0
    assert unigram_entropy([1, 0, 3]) == pytest.approx(
        -0.25 * math.log(0.25) - 0.75 * math.log(0.75)
    )
    with pytest.raises(ValueError, match="no token"):
        unigram_entropy([0, 0])


def test_totals_of_a_split_are_the_sums_of_its_shards(source):
    assert isinstance(source.manifest, SourceManifest)
    assert (source.manifest.train.documents, source.manifest.train.tokens) == (4, 13)


def test_shards_manifest_and_mixture_load_without_jax_or_grain():
    code = (
        "import sys; from stablelm_jax.data import manifest, mixture, shards;"
        'print([name for name in ("jax", "grain", "torch") if name in sys.modules])'
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
