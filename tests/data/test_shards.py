"""Token shards: what is written comes back, damage is named, other people's readers agree."""

from __future__ import annotations

import hashlib
import os

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stablelm_jax.data import shards
from stablelm_jax.data.shards import Shard, ShardError, ShardWriter, read_spans
from stablelm_jax.storage.remote import RemotePath

DOCUMENTS = st.lists(st.lists(st.integers(0, 2**31 - 1), min_size=1, max_size=9), max_size=9)


def write(path, documents):
    with ShardWriter(path) as writer:
        for document in documents:
            writer.add_many(np.array(document), [len(document)])
    return writer.info


def documents_of(shard):
    """Each document as a list of tokens."""
    offsets = shard.document_offsets.tolist()
    return [shard.read(*pair).tolist() for pair in zip(offsets, offsets[1:])]


@settings(max_examples=50, deadline=None)
@given(one_by_one=DOCUMENTS, together=DOCUMENTS)
def test_documents_come_back_as_they_were_added(tmp_path_factory, one_by_one, together):
    path = tmp_path_factory.mktemp("shard") / "train.v1-00000"
    with ShardWriter(path) as writer:
        for document in one_by_one:
            writer.add_many(np.array(document, np.int64), [len(document)])
        flat = np.array([token for document in together for token in document], np.int32)
        writer.add_many(flat, [len(document) for document in together])
    documents = one_by_one + together
    shard = Shard(path)
    shard.check()
    assert documents_of(shard) == documents
    assert shard.num_tokens == writer.info.tokens == sum(map(len, documents))
    assert shard.num_documents == writer.info.documents == len(documents)


def test_the_info_describes_the_file_that_lies_there(tmp_path):
    info = write(tmp_path / "train-00000", [[1, 2, 0], [3, 0]])
    data = (tmp_path / info.file).read_bytes()
    assert info.file == "train-00000.bin"
    assert (info.documents, info.tokens, info.bytes) == (2, 5, len(data))
    assert (
        info.sha256 == hashlib.sha256(data).hexdigest() == shards.file_sha256(tmp_path / info.file)
    )


def test_a_shard_has_no_name_before_it_is_closed(tmp_path):
    writer = ShardWriter(tmp_path / "train-00000")
    writer.add_many(np.array([1, 0]), [2])
    assert not list(tmp_path.glob("*.bin")) and not list(tmp_path.glob("*.idx"))
    assert writer.close() == writer.close()
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "train-00000.bin",
        "train-00000.idx",
    ]


def test_an_exception_while_writing_leaves_no_file(tmp_path):
    with pytest.raises(KeyError), ShardWriter(tmp_path / "train-00000") as writer:
        writer.add_many(np.array([1, 0]), [2])
        raise KeyError
    assert not list(tmp_path.iterdir())


def test_a_shard_written_again_replaces_both_files(tmp_path):
    write(tmp_path / "a", [[1, 2, 3, 0]])
    write(tmp_path / "a", [[5, 0], [6, 0]])
    assert documents_of(Shard(tmp_path / "a")) == [[5, 0], [6, 0]]


def test_an_older_index_never_lies_beside_newer_tokens(tmp_path, monkeypatch):
    """Killed between the two renames, of all places, with shards of equal size."""
    write(tmp_path / "a", [[1, 2, 3, 0]])
    writer = ShardWriter(tmp_path / "a")
    writer.add_many(np.array([5, 0, 6, 0]), [2, 2])
    rename = os.replace

    def only_tokens(old, new):
        if str(new).endswith(".idx"):
            raise KeyboardInterrupt
        rename(old, new)

    monkeypatch.setattr(os, "replace", only_tokens)
    with pytest.raises(KeyboardInterrupt):
        writer.close()
    with pytest.raises(ShardError, match="missing"):
        Shard(tmp_path / "a")


@pytest.mark.parametrize(
    ("tokens", "lengths"),
    [([1, -1], [2]), ([1, 2**31], [2]), ([1.5, 2.0], [2]), ([[1, 2]], [2]), ([1, 2], [2, 0]),
     ([1, 2], [1])],
)  # fmt: skip
def test_what_is_no_list_of_documents_is_not_written(tmp_path, tokens, lengths):
    with pytest.raises(AssertionError), ShardWriter(tmp_path / "a") as writer:
        writer.add_many(np.array(tokens), lengths)
    assert not list(tmp_path.iterdir())


def test_spans_come_back_counted_by_the_documents_of_the_shard(tmp_path):
    with ShardWriter(tmp_path / "a") as writer:
        writer.add_many(np.array([1, 2, 3, 0]), [4], np.array([[0, 1, 2], [0, 3, 4]]))
        writer.add_many(np.array([4, 0]), [2], np.zeros((0, 3), np.int64))
        writer.add_many(np.array([5, 0, 6, 7, 0]), [2, 3], np.array([[1, 1, 3]]))
    path = tmp_path / "a.bin"
    spans = read_spans(path, writer.info)
    assert spans.dtype == np.int32 and spans.tolist() == [[0, 1, 2], [0, 3, 4], [3, 1, 3]]
    remote = read_spans(RemotePath(f"file://{tmp_path}") / "a.bin", writer.info)
    assert remote.tolist() == spans.tolist()
    assert writer.info.spans_sha256 == shards.file_sha256(tmp_path / "a.spans.npy")


@pytest.mark.parametrize("span", [[1, 0, 1], [0, 1, 1], [0, -1, 1], [0, 0, 3], [-1, 0, 1]])
def test_spans_outside_of_their_documents_are_not_written(tmp_path, span):
    with pytest.raises(AssertionError), ShardWriter(tmp_path / "a") as writer:
        writer.add_many(np.array([1, 0]), [2], np.array([span]))
    assert not list(tmp_path.iterdir())


def test_spans_that_are_missing_or_others_are_refused_and_named(tmp_path):
    with ShardWriter(tmp_path / "a") as writer:
        writer.add_many(np.array([1, 0]), [2], np.array([[0, 1, 2]]))
    sidecar = tmp_path / "a.spans.npy"
    _set_byte(-1, 1)(sidecar)
    with pytest.raises(ShardError, match=r"a\.spans\.npy: sha256 .* the manifest says"):
        read_spans(tmp_path / "a.bin", writer.info)
    sidecar.unlink()
    for folder in (tmp_path, RemotePath(f"file://{tmp_path}")):
        with pytest.raises(ShardError, match=r"a\.spans\.npy: missing"):
            read_spans(folder / "a.bin", writer.info)


def _cut(path):
    os.truncate(path, path.stat().st_size - 4)


def _lengthen(path):
    path.write_bytes(path.read_bytes() + b"\0\0\0\0")


def _set_byte(position, value):
    def change(path):
        data = bytearray(path.read_bytes())
        data[position] = value
        path.write_bytes(data)

    return change


@pytest.mark.parametrize(
    ("suffix", "damage", "message"),
    [
        (".bin", os.unlink, "missing"),
        (".idx", os.unlink, "missing"),
        (".bin", _cut, "16 bytes where its index asks for 20"),
        (".bin", _lengthen, "24 bytes where its index asks for 20"),
        (".idx", _cut, "header asks for"),
        (".idx", _lengthen, "header asks for"),
        (".idx", lambda path: os.truncate(path, 20), "wrong first bytes"),
        (".idx", lambda path: os.truncate(path, 0), "wrong first bytes"),
        (".idx", _set_byte(3, 0), "wrong first bytes"),
        (".idx", _set_byte(9, 2), "version 2"),
        (".idx", _set_byte(17, 6), "token type 6"),
        (".idx", _set_byte(-8, 1), "do not cover"),
    ],
)
def test_a_damaged_shard_is_refused_and_the_file_named(tmp_path, suffix, damage, message):
    write(tmp_path / "a", [[1, 2, 0], [3, 0]])
    path = (tmp_path / "a").with_suffix(suffix)
    damage(path)
    with pytest.raises(ShardError, match=message) as caught:
        Shard(tmp_path / "a")
    assert str(path) in str(caught.value)


def test_check_finds_an_index_that_contradicts_itself(tmp_path):
    write(tmp_path / "a", [[1, 2, 0], [3, 0]])
    _set_byte(34, 2)(tmp_path / "a.idx")  # length of the first document, 3 -> 2
    shard = Shard(tmp_path / "a")
    with pytest.raises(ShardError, match="one after the other"):
        shard.check()


def _megatron():
    pytest.importorskip("torch")
    return pytest.importorskip("megatron.core.datasets.indexed_dataset")


theirs_too = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")


@pytest.mark.parity
def test_megatron_core_reads_our_shards(tmp_path):
    megatron = _megatron()
    rng = np.random.default_rng(0)
    documents = [rng.integers(0, 100_352, n).tolist() for n in rng.integers(1, 300, 40)]
    write(tmp_path / "ours", documents)
    for mmap in (True, False):
        dataset = megatron.IndexedDataset(str(tmp_path / "ours"), mmap=mmap)
        assert len(dataset) == 40 and dataset.index.dtype is np.int32
        assert [dataset[i].tolist() for i in range(40)] == documents
        assert dataset.document_indices.tolist() == list(range(41))
        assert dataset.get(3, offset=1).tolist() == documents[3][1:]


@pytest.mark.parity
@theirs_too
@pytest.mark.parametrize("dtype", ["int32", "uint16", "int64", "uint8"])
def test_we_read_the_shards_that_megatron_core_writes(tmp_path, dtype):
    megatron = _megatron()
    import torch

    rng = np.random.default_rng(1)
    builder = megatron.IndexedDatasetBuilder(str(tmp_path / "theirs.bin"), dtype=getattr(np, dtype))
    documents = []
    for sequences in ([5], [3, 4, 2], [1], [7, 1]):  # several sequences make one document
        parts = [rng.integers(0, 200, n).tolist() for n in sequences]
        documents.append([token for part in parts for token in part])
        builder.add_document(torch.tensor(documents[-1]), sequences)
    builder.add_item(torch.tensor([9, 8]))
    builder.add_item(torch.tensor([7]))
    builder.end_document()
    documents.append([9, 8, 7])
    builder.finalize(str(tmp_path / "theirs.idx"))

    shard = Shard(tmp_path / "theirs")
    shard.check()
    flat = [token for document in documents for token in document]
    assert (shard.num_documents, shard.num_sequences) == (5, 9)
    assert shard.dtype == np.dtype(dtype) and documents_of(shard) == documents
    read = shard.read(2, len(flat))
    assert read.dtype == np.int32 and read.tolist() == flat[2:]


@pytest.mark.parity
@theirs_too
def test_our_files_are_the_bytes_that_megatron_core_writes(tmp_path):
    megatron = _megatron()
    import torch

    documents = [[1, 2, 3], [4], [5, 6]]
    write(tmp_path / "ours", documents)
    builder = megatron.IndexedDatasetBuilder(str(tmp_path / "theirs.bin"))
    for document in documents:
        builder.add_document(torch.tensor(document), [len(document)])
    builder.finalize(str(tmp_path / "theirs.idx"))
    for suffix in (".bin", ".idx"):
        ours, theirs = tmp_path / f"ours{suffix}", tmp_path / f"theirs{suffix}"
        assert ours.read_bytes() == theirs.read_bytes()
