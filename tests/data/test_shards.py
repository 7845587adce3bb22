"""Token shards: what is written comes back, damage is named, other people's readers agree."""

from __future__ import annotations

import errno
import gc
import hashlib
import os
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from absl import logging
from hypothesis import given, settings
from hypothesis import strategies as st

from stablelm_jax.data import shards
from stablelm_jax.data.shards import Shard, ShardError, ShardWriter, bin_path, idx_path

DOCUMENTS = st.lists(st.lists(st.integers(0, 2**31 - 1), min_size=1, max_size=9), max_size=9)


def write(path, documents):
    with ShardWriter(path) as writer:
        for document in documents:
            writer.add(np.array(document))
    return writer.info


@settings(max_examples=50, deadline=None)
@given(one_by_one=DOCUMENTS, together=DOCUMENTS)
def test_documents_come_back_as_they_were_added(tmp_path_factory, one_by_one, together):
    path = tmp_path_factory.mktemp("shard") / "train.v1-00000"
    with ShardWriter(path) as writer:
        for document in one_by_one:
            writer.add(np.array(document, np.int64))
        flat = np.array([token for document in together for token in document], np.int32)
        writer.add_many(flat, [len(document) for document in together])
    documents = one_by_one + together
    shard = Shard(path)
    shard.check()
    assert [shard.document(i).tolist() for i in range(shard.num_documents)] == documents
    assert shard.lengths.tolist() == [len(document) for document in documents]
    assert shard.tokens.dtype == np.int32 and shard.num_tokens == writer.info.tokens
    assert writer.info.documents == len(documents)


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
    writer.add(np.array([1, 0]))
    assert not list(tmp_path.glob("*.bin")) and not list(tmp_path.glob("*.idx"))
    assert writer.close() == writer.close()
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "train-00000.bin",
        "train-00000.idx",
    ]


def test_an_exception_while_writing_leaves_no_file(tmp_path):
    with pytest.raises(KeyError), ShardWriter(tmp_path / "train-00000") as writer:
        writer.add(np.array([1, 0]))
        raise KeyError
    assert not list(tmp_path.iterdir())


def test_a_shard_written_again_replaces_both_files(tmp_path):
    write(tmp_path / "a", [[1, 2, 3, 0]])
    write(tmp_path / "a", [[5, 0], [6, 0]])
    assert Shard(tmp_path / "a").tokens.tolist() == [5, 0, 6, 0]


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
    ("tokens", "lengths", "message"),
    [
        ([1, -1], [2], "ids must lie"),
        ([1, 2**31], [2], "ids must lie"),
        ([1.5, 2.0], [2], "integers"),
        ([[1, 2]], [2], "flat"),
        ([1, 2], [2, 0], "empty document"),
        ([1, 2], [1], "add up to 1 for 2"),
    ],
)
def test_what_is_no_list_of_documents_is_refused(tmp_path, tokens, lengths, message):
    with pytest.raises(ValueError, match=message), ShardWriter(tmp_path / "a") as writer:
        writer.add_many(np.array(tokens), lengths)


def test_an_empty_document_is_refused(tmp_path):
    with pytest.raises(ValueError, match="empty document"), ShardWriter(tmp_path / "a") as writer:
        writer.add(np.array([], np.int32))


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
    ("which", "damage", "message"),
    [
        (bin_path, os.unlink, "missing"),
        (idx_path, os.unlink, "missing"),
        (bin_path, _cut, "16 bytes where its index asks for 20"),
        (bin_path, _lengthen, "24 bytes where its index asks for 20"),
        (idx_path, _cut, "header asks for"),
        (idx_path, _lengthen, "header asks for"),
        (idx_path, lambda path: os.truncate(path, 20), "wrong first bytes"),
        (idx_path, lambda path: os.truncate(path, 0), "wrong first bytes"),
        (idx_path, _set_byte(3, 0), "wrong first bytes"),
        (idx_path, _set_byte(9, 2), "version 2"),
        (idx_path, _set_byte(17, 6), "token type 6"),
        (idx_path, _set_byte(-8, 1), "do not cover"),
    ],
)
def test_a_damaged_shard_is_refused_and_the_file_named(tmp_path, which, damage, message):
    write(tmp_path / "a", [[1, 2, 0], [3, 0]])
    path = which(tmp_path / "a")
    damage(path)
    with pytest.raises(ShardError, match=message) as caught:
        Shard(tmp_path / "a")
    assert str(path) in str(caught.value)


def test_check_finds_an_index_that_contradicts_itself(tmp_path):
    write(tmp_path / "a", [[1, 2, 0], [3, 0]])
    _set_byte(34, 2)(idx_path(tmp_path / "a"))  # length of the first document, 3 -> 2
    shard = Shard(tmp_path / "a")
    with pytest.raises(ShardError, match="one after the other"):
        shard.check()


def test_reads_agree_with_the_map_at_every_position(tmp_path):
    tokens = np.arange(50)
    write(tmp_path / "a", [tokens])
    shard = Shard(tmp_path / "a")
    for start in range(51):
        for stop in range(start, 51):
            read = shard.read(start, stop)
            assert read.dtype == np.int32 and read.tolist() == tokens[start:stop].tolist()


def test_a_read_that_the_system_gives_in_pieces_is_put_together(tmp_path, monkeypatch):
    write(tmp_path / "a", [list(range(100))])
    whole = os.preadv

    def pieces(descriptor, buffers, offset):
        return whole(descriptor, [memoryview(buffers[0]).cast("B")[:7]], offset)

    monkeypatch.setattr(os, "preadv", pieces)
    assert Shard(tmp_path / "a").read(3, 97).tolist() == list(range(3, 97))


def test_a_file_cut_short_after_it_was_opened_is_named_by_the_read(tmp_path):
    write(tmp_path / "a", [list(range(100))])
    shard = Shard(tmp_path / "a")
    shard.read(0, 100)
    os.truncate(shard.path, 200)
    assert shard.read(0, 50).tolist() == list(range(50))
    with pytest.raises(ShardError, match="cut short") as caught:
        shard.read(40, 60)
    assert str(shard.path) in str(caught.value)


def test_a_file_that_is_gone_before_its_first_read_is_named(tmp_path):
    write(tmp_path / "a", [[1, 0]])
    shard = Shard(tmp_path / "a")
    shard.path.unlink()
    with pytest.raises(ShardError, match="missing") as caught:
        shard.read(0, 1)
    assert str(shard.path) in str(caught.value)


def test_many_shards_keep_few_files_open_and_stay_readable(tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "_MAX_OPEN_FILES", 5)
    for number in range(20):
        write(tmp_path / str(number), [[number, 0]])
    opened = [Shard(tmp_path / str(number)) for number in range(20)]
    gc.collect()
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(2):
        assert [int(shard.read(0, 1)[0]) for shard in opened] == list(range(20))
        assert len(os.listdir("/proc/self/fd")) <= before + 5
    del opened
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) <= before


@pytest.fixture
def waits(monkeypatch):
    """The waits between tries, as they were asked for; none takes time."""
    asked = []
    monkeypatch.setattr(shards.time, "sleep", asked.append)
    return asked


@pytest.fixture
def warnings(monkeypatch):
    """The warnings in the log."""
    texts = []
    monkeypatch.setattr(logging, "warning", lambda text, *args: texts.append(text % args))
    return texts


def failing(monkeypatch, times, code, call="preadv"):
    """`os.<call>` fails `times` times with `code`, then works; returns how often it was called."""
    works, calls, lock = getattr(os, call), [], threading.Lock()

    def fails(*args, **kwargs):
        with lock:
            calls.append(args)
            if len(calls) <= times:
                raise OSError(code, os.strerror(code))
        return works(*args, **kwargs)

    monkeypatch.setattr(os, call, fails)
    return calls


PASSING = [errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EAGAIN, errno.ECONNRESET, errno.ENOTCONN]


@pytest.mark.parametrize("code", PASSING, ids=lambda code: errno.errorcode[code])
@pytest.mark.parametrize("call", ["preadv", "open"])
def test_a_read_that_fails_for_a_while_gives_the_same_tokens_in_the_end(
    tmp_path, monkeypatch, waits, warnings, code, call
):
    write(tmp_path / "a", [list(range(100))])
    shard = Shard(tmp_path / "a")
    calls = failing(monkeypatch, 4, code, call)
    assert shard.read(3, 97).tolist() == list(range(3, 97))
    assert len(calls) == 5
    assert len(waits) == 4 and 7 < sum(waits) < 15
    assert all(later > sooner / 2 for sooner, later in zip(waits, waits[1:]))
    assert warnings == [
        f"{shard.path}: cannot be read ({os.strerror(code)}); trying again for up to 15 seconds"
    ]


def test_a_read_that_never_succeeds_says_where_how_often_why_and_what_to_do(
    tmp_path, monkeypatch, waits, warnings
):
    write(tmp_path / "a", [[1, 2, 0]])
    shard = Shard(tmp_path / "a")
    calls = failing(monkeypatch, 10**9, errno.EIO)
    with pytest.raises(ShardError) as caught:
        shard.read(0, 2)
    message = str(caught.value)
    assert message.startswith(f"{shard.path}: cannot be read (Input/output error), tried 5 times; ")
    assert "look at the disk or the mount" in message and "same command again" in message
    assert len(calls) == 5 and len(warnings) == 1
    assert isinstance(caught.value.__cause__, OSError)
    assert caught.value.__cause__.errno == errno.EIO


@pytest.mark.parametrize("code", [errno.EACCES, errno.EPERM, errno.ENOENT, errno.EISDIR])
def test_an_error_that_lasts_is_not_waited_for(tmp_path, monkeypatch, waits, code):
    write(tmp_path / "a", [[1, 2, 0]])
    shard = Shard(tmp_path / "a")
    calls = failing(monkeypatch, 10**9, code, "open")
    with pytest.raises(ShardError) as caught:
        shard.read(0, 2)
    assert str(shard.path) in str(caught.value) and "tried" not in str(caught.value)
    assert len(calls) == 1 and not waits


def test_a_file_that_is_gone_when_it_is_tried_again_is_missing(tmp_path, monkeypatch, waits):
    write(tmp_path / "a", [[1, 2, 0]])
    shard = Shard(tmp_path / "a")
    shard.read(0, 2)
    shard.path.unlink()
    failing(monkeypatch, 1, errno.ESTALE)
    with pytest.raises(ShardError, match="missing"):
        shard.read(0, 2)
    assert len(waits) == 1


def test_stale_handles_are_let_go_at_once_and_the_file_opened_anew(
    tmp_path, monkeypatch, request, waits
):
    write(tmp_path / "a", [list(range(50))])
    shard = Shard(tmp_path / "a")
    shard.read(0, 50)
    gc.collect()
    before = len(os.listdir("/proc/self/fd"))
    opened = failing(monkeypatch, 0, 0, "open")
    failing(monkeypatch, 4, errno.ESTALE)
    request.addfinalizer(gc.enable)
    gc.disable()
    assert shard.read(5, 50).tolist() == list(range(5, 50))
    assert len(os.listdir("/proc/self/fd")) == before
    assert shard.read(0, 5).tolist() == list(range(5))
    assert len(opened) == len(waits) == 4  # the second read met no error and opened nothing


def test_threads_whose_reads_fail_together_all_get_their_own_tokens(tmp_path, monkeypatch, waits):
    write(tmp_path / "a", [list(range(1000))])
    shard = Shard(tmp_path / "a")
    works = os.preadv
    turn, lock = [0], threading.Lock()

    def every_third_fails(descriptor, buffers, offset):
        with lock:
            turn[0] += 1
            failed = turn[0] % 3 == 0
        if failed:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return works(descriptor, buffers, offset)

    monkeypatch.setattr(os, "preadv", every_third_fails)
    monkeypatch.setattr(shards, "_WAITS", (0.0,) * 50)  # eight threads may meet the third in turn
    with ThreadPoolExecutor(8) as pool:
        reads = list(pool.map(lambda start: shard.read(start, start + 10), range(990)))
    assert [read.tolist() for read in reads] == [list(range(n, n + 10)) for n in range(990)]
    assert len(waits) == turn[0] - 990 > 400


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
    assert shard.dtype == np.dtype(dtype) and shard.tokens.tolist() == flat
    assert [shard.document(i).tolist() for i in range(5)] == documents
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
