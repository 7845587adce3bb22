"""`prepare --adopt`: what Megatron or GPT-NeoX tokenised becomes a source to train on."""

import json
import struct

import numpy as np
import pytest
from prepared import mixture_of
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from stablelm_jax import prepare
from stablelm_jax.data import manifest
from stablelm_jax.data.batches import BatchSpec, train_batches
from stablelm_jax.data.shards import Shard
from stablelm_jax.preparation import chunks
from stablelm_jax.tokenizer.tokenizer import load_tokenizer

TEXTS = [f"document {i}: the cat sat on {i * 7919} größere mats\n" * (1 + i % 3) for i in range(60)]
CODES = {"uint8": 1, "int16": 3, "int32": 4, "int64": 5, "uint16": 8}


def write_tokenizer(path, rows):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=rows,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    tokenizer.save(str(path))
    return load_tokenizer(path)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return write_tokenizer(tmp_path_factory.mktemp("tokenizer") / "tokenizer.json", 330)


def write_megatron(prefix, documents, dtype="uint16"):
    """As Megatron's preprocess_data writes it: a sequence a document."""
    arrays = [np.asarray(ids, dtype) for ids in documents]
    lengths = np.array([len(ids) for ids in arrays], np.int32)
    starts = (np.cumsum(lengths, dtype=np.int64) - lengths) * np.dtype(dtype).itemsize
    prefix.with_suffix(".bin").write_bytes(b"".join(ids.tobytes() for ids in arrays))
    header = struct.pack("<9sQBQQ", b"MMIDIDX\0\0", 1, CODES[dtype], len(arrays), len(arrays) + 1)
    index = np.arange(len(arrays) + 1, dtype=np.int64)
    prefix.with_suffix(".idx").write_bytes(
        header + lengths.tobytes() + starts.tobytes() + index.tobytes()
    )
    return prefix


def encoded(tokenizer, *, end=True):
    return [tokenizer.encode(text) + [tokenizer.eod] * end for text in TEXTS]


def adopt(prefix, data, tokenizer, *flags, name="a"):
    command = ["--source", name, "--output", str(data), "--tokenizer", tokenizer.name]
    return prepare.main([*command, "--adopt", str(prefix), "--workers", "1", *flags])


def documents(directory, split):
    for info in getattr(manifest.read_manifest(directory), split).shards:
        shard = Shard(directory / info.file)
        for first, last in zip(shard.document_offsets, shard.document_offsets[1:]):
            yield shard.read(first, last).tolist()


@pytest.mark.parametrize("dtype", ["uint16", "int32", "int64"])
def test_an_adopted_source_is_the_one_that_its_texts_would_have_given(dtype, tokenizer, tmp_path):
    data = tmp_path / "data"
    prefix = write_megatron(tmp_path / "corpus_text_document", encoded(tokenizer), dtype)
    assert adopt(prefix, data, tokenizer) == 0
    path = tmp_path / "texts.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    command = ["--source", "b", "--input", str(path), "--output", str(data), "--workers", "1"]
    assert prepare.main([*command, "--tokenizer", tokenizer.name]) == 0
    adopted, prepared = (manifest.read_manifest(data / name) for name in "ab")
    assert (adopted.train, adopted.held_out) == (prepared.train, prepared.held_out)
    assert adopted.tokenizer == prepared.tokenizer
    assert adopted.unigram_entropy == prepared.unigram_entropy


def test_a_run_reads_batches_of_an_adopted_source(tokenizer, tmp_path):
    prefix = write_megatron(tmp_path / "corpus", encoded(tokenizer))
    assert adopt(f"{prefix}.bin", tmp_path / "data", tokenizer) == 0
    sources = manifest.open_sources(tmp_path / "data", ["a"], tokenizer=tokenizer)
    spec = BatchSpec(sequence_length=16, batch_size=2, seed=1, eod=tokenizer.eod)
    batch = next(iter(train_batches(sources, mixture_of({"a": 1}), spec)))
    assert batch["tokens"].shape == (2, 16)
    assert tokenizer.decode(batch["tokens"][0]) in "<|endoftext|>".join(TEXTS)


def test_the_same_command_again_finds_it_done_and_chunks_change_nothing(
    tokenizer, tmp_path, capsys, monkeypatch
):
    prefix = write_megatron(tmp_path / "corpus", encoded(tokenizer))
    assert adopt(prefix, tmp_path / "data", tokenizer) == 0
    assert adopt(prefix, tmp_path / "data", tokenizer) == 0
    assert "already prepared" in capsys.readouterr().out
    monkeypatch.setattr(chunks, "_MIN_CHUNK_BYTES", 300)
    monkeypatch.setattr(chunks, "_CHUNKS_PER_SOURCE", 10**9)
    assert adopt(prefix, tmp_path / "data", tokenizer, name="b") == 0
    for split in ("train", "held_out"):
        assert [*documents(tmp_path / "data/a", split)] == [*documents(tmp_path / "data/b", split)]
    assert len(manifest.read_manifest(tmp_path / "data" / "b").train.shards) > 3


def test_documents_without_their_end_are_refused_and_get_it_on_demand(tokenizer, tmp_path, capsys):
    prefix = write_megatron(tmp_path / "corpus", encoded(tokenizer, end=False))
    assert adopt(prefix, tmp_path / "data", tokenizer) == 2
    assert "does not end in token 0, which ends documents: --append-eod" in capsys.readouterr().err
    assert adopt(prefix, tmp_path / "data", tokenizer, "--append-eod") == 0
    with_ends = write_megatron(tmp_path / "ended", encoded(tokenizer))
    assert adopt(with_ends, tmp_path / "data", tokenizer, name="b") == 0
    first, second = (manifest.read_manifest(tmp_path / "data" / name) for name in "ab")
    assert (first.train, first.held_out) == (second.train, second.held_out)


def test_ids_of_another_tokenizer_are_refused(tokenizer, tmp_path, capsys):
    prefix = write_megatron(tmp_path / "corpus", encoded(tokenizer))
    smaller = write_tokenizer(tmp_path / "smaller.json", 280)
    assert adopt(prefix, tmp_path / "data", smaller) == 2
    assert "holds an id that the tokenizer lacks" in capsys.readouterr().err
    merged = [[i + 3 if i else i for i in ids] for ids in encoded(smaller)]
    prefix = write_megatron(tmp_path / "shifted", merged)
    assert adopt(prefix, tmp_path / "data", tokenizer) == 2
    assert "gives other ids for its texts" in capsys.readouterr().err
    assert not list(tmp_path.glob("data/a/*"))


def test_one_bad_document_is_rejected_by_number_and_the_others_kept(tokenizer, tmp_path):
    whole = encoded(tokenizer)
    whole[7] = [5, 9999, tokenizer.eod]
    whole[9] = [tokenizer.eod]
    prefix = write_megatron(tmp_path / "corpus", whole)
    assert adopt(prefix, tmp_path / "data", tokenizer) == 0
    lines = (tmp_path / "data/a/rejected.jsonl").read_text().splitlines()
    assert [(row["line"], row["reason"][:12]) for row in map(json.loads, lines)] == [
        (8, "holds an id "),
        (10, "empty docume"),
    ]


def test_what_is_no_pair_of_such_files_is_refused_by_name(tokenizer, tmp_path, capsys):
    assert adopt(tmp_path / "nothing", tmp_path / "data", tokenizer) == 2
    assert "nothing.idx: missing" in capsys.readouterr().err
    prefix = write_megatron(tmp_path / "corpus", encoded(tokenizer))
    with open(prefix.with_suffix(".bin"), "ab") as file:
        file.write(b"\0\0")
    assert adopt(prefix, tmp_path / "data", tokenizer) == 2
    assert "corpus.bin" in capsys.readouterr().err


def test_input_or_adopt_is_given_and_not_both(tokenizer, tmp_path, capsys):
    command = ["--source", "a", "--output", str(tmp_path / "data"), "--tokenizer", tokenizer.name]
    assert prepare.main(command) == 2
    assert adopt("x", tmp_path / "data", tokenizer, "--input", "y") == 2
    assert capsys.readouterr().err.count("give --input, or --adopt in its place") == 2


@pytest.mark.parametrize("flag", ["--format=text", "--text-key=body", "--split-on=blank-lines"])
def test_flags_for_texts_are_refused_with_adopt_and_not_ignored(tokenizer, tmp_path, capsys, flag):
    assert adopt("x", tmp_path / "data", tokenizer, flag) == 2
    assert flag.partition("=")[0] in capsys.readouterr().err
