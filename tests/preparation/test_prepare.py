"""prepare: whatever happens on the way, the same inputs give the same bytes; nothing is lost."""

import collections
import contextlib
import gzip
import hashlib
import io
import itertools
import json
import os
import pathlib
import random
import re
import shutil
import signal
import socket
import stat
import subprocess
import sys
import time

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tokenizers
import zstandard
from prepared import check_contents

from stablelm_jax import prepare
from stablelm_jax.data import manifest
from stablelm_jax.data.shards import Shard
from stablelm_jax.preparation import chunks, executors, held_out, tokenize_chunk
from stablelm_jax.preparation.formats import Reading
from stablelm_jax.preparation.inputs import find_files
from stablelm_jax.preparation.job import job_of
from stablelm_jax.preparation.prepare_source import Preparation
from stablelm_jax.tokenizer.tokenizer import TokenizerError, load_tokenizer

SMALL_CHUNKS = str(pathlib.Path(__file__).with_name("in_small_chunks.py"))
# Less than the text of a compressed file, which is one chunk.
SHARD_TOKENS = 60_000
ROOT = str(pathlib.Path(prepare.__file__).parents[1])


def command(source, inputs, output, *flags, script=None):
    start = [script] if script else ["-m", "stablelm_jax.prepare"]
    paths = [str(path) for path in inputs]
    return [
        sys.executable, *start, '--source', source, '--input', *paths, '--output', str(output),
        *map(str, flags),
    ]  # fmt: skip


def environment(**extra):
    return {**os.environ, "PYTHONPATH": ROOT, **extra}


def run(*arguments, check=0, **options):
    extra = options.pop("extra", {})
    done = subprocess.run(
        command(*arguments, **options), env=environment(**extra), capture_output=True, text=True
    )
    assert done.returncode == check, done.stdout + done.stderr
    return done


def call(capsys, *arguments):
    code = prepare.main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def documents(directory, split, tokenizer):
    """Texts of a split, in order."""
    made = manifest.read_manifest(directory)
    texts = []
    for info in getattr(made, split).shards:
        shard = Shard(directory / info.file)
        for number in range(shard.num_documents):
            ids = shard.read(*shard.document_offsets[number : number + 2])
            assert ids[-1] == tokenizer.eod
            texts.append(tokenizer.decode(ids[:-1].tolist()))
    return texts


def digests(directory):
    """sha256 of every file under a directory, hidden ones included."""
    return {
        str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    }


def write_jsonl(path, texts):
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))


WORDS = "the of and a in to it is was I for that you he with on by at are not".split()


def some_texts(count, seed=0):
    source = random.Random(seed)
    return [
        f"{number}: " + " ".join(source.choices(WORDS, k=source.randint(1, 150)))
        for number in range(count)
    ]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """Every kind of input, with every kind of damage; and what is to come out of it."""
    folder = tmp_path_factory.mktemp("inputs")
    texts = some_texts(2600)
    lines = [json.dumps({"text": text}).encode() + b"\n" for text in texts]
    bad = [b'{"text": "cut\n', b'{"text": "caf\xe9"}\n', b'{"text": ""}\n', b'{"body": "a"}\n']
    plain = lines[:1000]
    for place, line in zip((3, 500, 800, 1003), bad, strict=True):
        plain.insert(place, line)
    (folder / "a.jsonl").write_bytes(b"".join(plain))
    (folder / "b.jsonl.gz").write_bytes(gzip.compress(b"".join(lines[1000:1500])))
    (folder / "c.jsonl.zst").write_bytes(
        zstandard.ZstdCompressor().compress(b"".join(lines[1500:1800]))
    )
    rows = [*texts[1800:2000], None, *texts[2000:2400]]
    pq.write_table(pa.table({"text": rows}), folder / "d.parquet", row_group_size=150)
    tree = folder / "tree"
    for number in range(2400, 2600):
        path = tree / f"{number % 7}" / f"{number}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(texts[number])
    (tree / "library.so").write_bytes(b"\x7fELF\0\0")
    (tree / "latin.txt").write_bytes("Grüße".encode("latin-1"))
    in_tree = sorted(range(2400, 2600), key=lambda number: (number % 7, number))
    expected = texts[:2400] + [texts[number] for number in in_tree]
    names = ["a.jsonl", "b.jsonl.gz", "c.jsonl.zst", "d.parquet", "tree"]
    return [folder / name for name in names], expected


REJECTED = [
    ("a.jsonl", 4, "not JSON"),
    ("a.jsonl", 501, "not UTF-8"),
    ("a.jsonl", 801, "empty document"),
    ("a.jsonl", 1004, "no key"),
    ("d.parquet", 201, "'text' is null"),
    ("latin.txt", 1, "not UTF-8"),
    ("library.so", 1, "program or library"),
]


def in_small_chunks(inputs, output, tokenizer_file, *flags):
    """What `in_small_chunks.py` does, in this process; returns what it said."""
    arguments = command("mixed", inputs[0], output, "--tokenizer", tokenizer_file, *flags)[3:]
    said = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(said):
        patch.setattr(chunks, "_MIN_CHUNK_BYTES", 40_000)
        patch.setattr(chunks, "_CHUNKS_PER_SOURCE", 10**9)
        assert prepare.main([*arguments, "--shard-tokens", str(SHARD_TOKENS)]) == 0
    return said.getvalue()


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, inputs, tokenizer_file):
    """The source as one worker makes it in one go, in small chunks; and what it said."""
    output = tmp_path_factory.mktemp("undisturbed")
    said = in_small_chunks(inputs, output, tokenizer_file, "--workers", 1)
    return output / "mixed", said


def test_every_usable_document_is_in_the_shards_once_in_order_and_ended(
    undisturbed, inputs, tokenizer_file
):
    directory, _ = undisturbed
    tokenizer = load_tokenizer(tokenizer_file)
    train = documents(directory, "train", tokenizer)
    held_out = documents(directory, "held_out", tokenizer)
    held = set(held_out)
    assert train == [text for text in inputs[1] if text not in held]
    assert held_out == [text for text in inputs[1] if text in held]


def test_the_manifest_says_what_is_there(undisturbed, inputs, tokenizer_file):
    directory, said = undisturbed
    made = manifest.read_manifest(directory)
    check_contents(directory, made)
    sizes = {text: len(text.encode()) for text in inputs[1]}
    total = made.train.text_bytes + made.held_out.text_bytes
    assert total == sum(sizes.values())
    assert made.train.tokens + made.held_out.tokens == total + len(inputs[1])
    assert made.rejected == len(REJECTED)
    counts = sum(
        np.bincount(np.fromfile(directory / info.file, np.int32), minlength=384)
        for info in made.train.shards
    )
    assert made.unigram_entropy == pytest.approx(manifest.unigram_entropy(counts), abs=1e-12)
    assert len(made.train.shards) > 3
    assert all(info.tokens <= SHARD_TOKENS for info in made.train.shards)
    *_, last = said.strip().splitlines()
    assert last.startswith("prepared mixed: 2,600 documents")
    assert set(os.listdir(directory)) == {
        'manifest.json', 'rejected.jsonl', 'left_out.jsonl',
        *(info.file for info in made.train.shards + made.held_out.shards),
        *(info.file[:-4] + '.idx' for info in made.train.shards + made.held_out.shards),
    }  # fmt: skip


def test_what_was_rejected_is_listed_with_file_line_and_reason(undisturbed):
    directory, said = undisturbed
    rows = [json.loads(line) for line in open(directory / "rejected.jsonl")]
    assert len(rows) == len(REJECTED)
    for row, (file, line, reason) in zip(rows, REJECTED, strict=True):
        assert (os.path.basename(row["file"]), row["line"]) == (file, line)
        assert row["reason"].startswith(reason)
    assert "rejected: 7 (not UTF-8: 2; " in said


def test_the_number_of_workers_does_not_change_a_byte(
    undisturbed, inputs, tokenizer_file, tmp_path
):
    in_small_chunks(inputs, tmp_path, tokenizer_file, "--workers", 3)
    assert digests(tmp_path / "mixed") == digests(undisturbed[0])


def test_killed_at_any_moment_it_goes_on_where_it_was_and_gives_the_same_bytes(
    undisturbed, inputs, tokenizer_file, tmp_path
):
    directory, _ = undisturbed
    target = tmp_path / "mixed"
    flags = ("--tokenizer", tokenizer_file, "--shard-tokens", SHARD_TOKENS, "--workers", 2)
    start = command("mixed", inputs[0], tmp_path, *flags, script=SMALL_CHUNKS)
    work = target / ".work"
    rng = random.Random(1)
    moments = [
        (work / "plan.json").exists,
        lambda: len(finished(target)) >= rng.randint(1, 10),
        lambda: len(finished(target)) >= rng.randint(10, 20),
        (target / "train-00003.bin").exists,
        (target / "manifest.json.partial").exists,
    ]
    for number, reached in enumerate(moments):
        before = finished(target)
        process = start_slowly(start)
        wait_for(lambda: reached() or process.poll() is not None, 60)  # noqa: B023
        time.sleep(rng.uniform(0, 0.1))
        # In turn the whole group, as a terminal or a scheduler does, and the first process alone.
        os.killpg(process.pid, signal.SIGKILL) if number % 2 else process.kill()
        assert process.wait() == -signal.SIGKILL or number == len(moments) - 1
        if not (target / "manifest.json").exists():  # else it was about to remove its work
            assert before <= finished(target), "something whole was made again"
    said = in_small_chunks(inputs, tmp_path, tokenizer_file, "--workers", 2)
    assert "going on with what was begun" in said or "already prepared" in said
    assert digests(target) == digests(directory)


def start_slowly(start, delay="0.02"):
    """Starts a command in a session of its own, with time to kill it in."""
    return subprocess.Popen(
        start, env=environment(CHUNKS_DELAY=delay), stdout=subprocess.DEVNULL,
        start_new_session=True,
    )  # fmt: skip


def finished(target):
    """Finished outputs with the times of their records: what is made again has a new time."""
    whole = (target / ".work").glob("outputs/[0-9]*/record.json")
    return {(path.parent.name, path.stat().st_mtime_ns) for path in whole}


def wait_for(reached, seconds):
    deadline = time.monotonic() + seconds
    while not reached():
        assert time.monotonic() < deadline, "this was not reached in time"
        time.sleep(0.01)


def test_a_killed_worker_is_noticed_and_the_next_call_finishes(
    undisturbed, inputs, tokenizer_file, tmp_path
):
    flags = ("--tokenizer", tokenizer_file, "--shard-tokens", SHARD_TOKENS, "--workers", 2)
    marker = tmp_path / "kill"
    marker.touch()
    extra = {"CHUNKS_KILL_WORKER": str(marker)}
    options = {"script": SMALL_CHUNKS, "extra": extra}
    done = run("mixed", inputs[0], tmp_path, *flags, check=1, **options)
    (last,) = done.stderr.strip().splitlines()
    assert last.startswith("prepare: a worker was killed")
    assert "run the same command again" in last
    assert re.search(r"at work near \S+, line [\d,]+( after byte [\d,]+)?$", last)
    in_small_chunks(inputs, tmp_path, tokenizer_file, "--workers", 2)
    assert digests(tmp_path / "mixed") == digests(undisturbed[0])


def test_a_second_process_is_refused_and_workers_end_when_their_parent_is_killed(
    inputs, tokenizer_file, tmp_path, capsys
):
    flags = ("--tokenizer", tokenizer_file)
    start = command("mixed", inputs[0], tmp_path, *flags, script=SMALL_CHUNKS)
    process = start_slowly(start, "0.3")
    wait_for(lambda: finished(tmp_path / "mixed"), 60)
    code, _, err = call(capsys, *command("mixed", inputs[0], tmp_path, *flags)[3:])
    assert code == 1
    assert f"process {process.pid} on {socket.gethostname()}, since 20" in err
    assert len(members(process.pid)) > 1
    process.kill()
    process.wait()
    wait_for(lambda: not members(process.pid), 10)


def test_ctrl_c_in_the_terminal_is_one_line_from_prepare_and_none_from_its_workers(
    inputs, tokenizer_file, tmp_path
):
    """The terminal sends it to the whole group, here while workers are about to start."""
    start = command("mixed", inputs[0], tmp_path, "--tokenizer", tokenizer_file, "--workers", 2)
    process = subprocess.Popen(
        start, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
        start_new_session=True, encoding="utf-8",
    )  # fmt: skip
    wait_for(lambda: list((tmp_path / "mixed").rglob("workers.log")), 60)
    os.killpg(process.pid, signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130
    assert error == "prepare: interrupted; run the same command again to go on\n"


def members(session):
    """Processes of a session, but for those that have ended and wait to be collected."""
    listed = subprocess.run(["ps", "-A", "-o", "pid=,sess=,stat="], capture_output=True, text=True)
    rows = [line.split() for line in listed.stdout.splitlines()]
    return [int(pid) for pid, of, state in rows if int(of) == session and state[0] != "Z"]


def test_a_finished_source_is_skipped_and_other_settings_are_refused(
    undisturbed, inputs, tokenizer_file, capsys
):
    directory, _ = undisturbed
    before = {path: path.stat().st_mtime_ns for path in directory.iterdir()}

    def again(files, *flags):
        return call(
            capsys, "--source", "mixed", "--input", *files, "--output", directory.parent, *flags
        )

    same = ("--tokenizer", tokenizer_file, "--shard-tokens", SHARD_TOKENS)
    code, out, _ = again(inputs[0], *same, "--workers", 2)
    assert code == 0
    assert "already prepared, 2,600 documents" in out
    for flags, named in [
        ((*same, "--text-key", "body"), "other text_key ('text', not 'body')"),
        ((*same, "--held-out", 0.1), "other held_out"),
        ((*same, "--licence", "MIT"), "other licence"),
        (("--tokenizer", "arcade100k"), "other tokenizer"),
    ]:
        code, _, err = again(inputs[0], *flags)
        assert code == 1
        assert err.count("\n") == 1
        assert named in err
        assert f"remove {directory}" in err
    code, _, err = again(inputs[0][:2], *same)
    assert code == 1
    assert "other input files" in err
    assert {path: path.stat().st_mtime_ns for path in directory.iterdir()} == before


def test_what_an_earlier_release_prepared_is_kept_and_said(
    undisturbed, inputs, tokenizer_file, tmp_path
):
    shutil.copytree(undisturbed[0], tmp_path / "mixed")
    path = tmp_path / "mixed" / "manifest.json"
    fields = json.loads(path.read_text())
    fields["provenance"]["settings"]["recipe"] = 1
    del fields["provenance"]["held_out"]
    path.write_text(json.dumps(fields))
    said = in_small_chunks(inputs, tmp_path, tokenizer_file)
    assert "already prepared, 2,600 documents" in said
    assert f"by an earlier release; remove {tmp_path / 'mixed'} to do it anew" in said


def test_a_finished_source_with_a_shard_missing_is_not_taken_for_prepared(
    undisturbed, inputs, tokenizer_file, tmp_path, capsys
):
    shutil.copytree(undisturbed[0], tmp_path / "mixed")
    (tmp_path / "mixed" / "train-00001.bin").unlink()
    code, _, err = call(
        capsys, '--source', 'mixed', '--input', *inputs[0], '--output', tmp_path,
        '--tokenizer', tokenizer_file, '--shard-tokens', SHARD_TOKENS,
    )  # fmt: skip
    assert code == 1
    assert "train-00001.bin" in err


# in one process: what is printed and what is refused


def test_bad_arguments_exit_with_2_and_one_line_that_says_what_to_do(
    tmp_path, capsys, tokenizer_file
):
    write_jsonl(tmp_path / "a.jsonl", ["one", "two"])
    good = {"--source": "a", "--input": tmp_path / "a.jsonl", "--output": tmp_path / "data"}
    for flag, value, message in [
        ("--source", "A-b", "lower case letters"),
        ("--input", tmp_path / "missing.jsonl", "nothing there; check the path"),
        ("--work-folder", tmp_path, "--output is a folder of this machine"),
        ("--output", tmp_path.parent, ""),
        ("--tokenizer", "nonsense", "no tokenizer 'nonsense'"),
        ("--executor", "slurm", "--slurm-partition"),
        ("--held-out", "0.9", "give 0 to 0.25"),
        ("--workers", "0", "from 1 up"),
        ("--shard-tokens", "0", "from 1 up"),
    ]:
        if message:
            arguments = [part for pair in {**good, flag: value}.items() for part in pair]
            code, _, err = call(capsys, *arguments)
            assert code == 2
            assert message in err
            assert err.count("\n") == 1
    with pytest.raises(SystemExit) as exit_info:
        call(capsys, *[part for pair in good.items() for part in pair], "--provenance", "nokey")
    assert exit_info.value.code == 2
    assert not (tmp_path / "data").exists()


def test_its_own_output_is_refused_as_input(tmp_path, capsys, tokenizer_file):
    (tmp_path / "a").mkdir()
    write_jsonl(tmp_path / "a" / "a.jsonl", ["one", "two"])
    code, _, err = call(
        capsys, '--source', 'a', '--input', tmp_path, '--output', tmp_path,
        '--tokenizer', tokenizer_file,
    )  # fmt: skip
    assert code == 2
    assert "lies in the output" in err


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "all are empty"),
        (b'oops\n{"text": ""}\noops\n', "no usable document (not JSON: 2; empty document: 1)"),
        (b'{"content": "a"}\n', "--text-key names the key"),
        (b'{"text": "a"}\n', "needs two different ones"),
        (b'{"text": "a"}\n' * 5, "needs two different ones"),
    ],
)
def test_no_usable_document_is_an_error_that_says_why(
    tmp_path, capsys, tokenizer_file, data, message
):
    (tmp_path / "a.jsonl").write_bytes(data)
    code, _, err = call(
        capsys, '--source', 'a', '--input', tmp_path / 'a.jsonl', '--output', tmp_path / 'data',
        '--tokenizer', tokenizer_file, '--workers', 1,
    )  # fmt: skip
    assert code == 1
    assert message in err
    assert not (tmp_path / "data" / "a" / "manifest.json").exists()


def test_two_short_documents_make_a_source_and_the_split_is_said(tmp_path, capsys, tokenizer_file):
    write_jsonl(tmp_path / "a.jsonl", ["one", "two"])
    code, out, _ = call(
        capsys, '--source', 'a', '--input', tmp_path / 'a.jsonl', '--output', tmp_path / 'data',
        '--tokenizer', tokenizer_file, '--language', 'en', 'de', '--licence', 'MPL-2.0',
        '--provenance', 'from=a test', '--workers', 2,
    )  # fmt: skip
    assert code == 0
    assert "held out: the smallest hashes of all 2 documents" in out
    made = manifest.read_manifest(tmp_path / "data" / "a")
    assert (made.train.documents, made.held_out.documents) == (1, 1)
    assert (made.languages, made.licence) == (("en", "de"), "MPL-2.0")
    assert made.provenance["from"] == "a test"
    assert made.provenance["input_files"] == 1


@pytest.mark.parametrize(("threshold", "side"), [(0, "hold out"), (2**64, "train on")])
def test_a_split_without_a_document_is_an_error_that_says_what_to_do(
    tmp_path, capsys, tokenizer_file, monkeypatch, threshold, side
):
    write_jsonl(tmp_path / "a.jsonl", ["one", "two", ""])
    rule = held_out.HeldOutRule(threshold, [], "a bad guess")
    monkeypatch.setattr(held_out, "choose", lambda look, fraction, by_topic: rule)
    code, _, err = call(
        capsys, '--source', 'a', '--input', tmp_path / 'a.jsonl', '--output', tmp_path / 'data',
        '--tokenizer', tokenizer_file, '--workers', 1,
    )  # fmt: skip
    assert code == 1
    assert f"no document to {side}" in err and "add documents" in err and "rejected.jsonl" in err
    assert not (tmp_path / "data" / "a" / "manifest.json").exists()


def plan_of(folder, texts):
    """The file of a plan that holds nothing out, for documents in one chunk."""
    write_jsonl(folder / "a.jsonl", texts)
    cut = chunks.cut(find_files([str(folder / "a.jsonl")]))
    settings = {"text_key": "text", "shard_tokens": 100}
    path = folder / "plan.json"
    path.write_text(json.dumps([settings, held_out.HeldOutRule(0, [], ""), cut]))
    return path


def test_a_document_that_the_tokenizer_cannot_take_is_rejected_and_no_other(
    tmp_path, monkeypatch, tokenizer_file
):
    tokenizer = load_tokenizer(tokenizer_file)
    encode = tokenizer.encode_document

    def fragile(text):
        if text == "poison":
            raise TokenizerError("text that cannot be encoded: a panic")
        return encode(text)

    tokenizer.encode_document = fragile
    monkeypatch.setattr(tokenize_chunk, "load_tokenizer", lambda name, ranks: tokenizer)
    path = plan_of(tmp_path, ["one", "poison", "two"])
    tokenize_chunk.TokenizeChunk(path, tmp_path, "any", None).run()
    (output,) = tokenize_chunk.outputs_of_chunk(tmp_path, 0)
    assert output.shards["train"]["documents"] == 2
    (row,) = map(json.loads, open(tmp_path / output.name / "rejected.jsonl"))
    assert (row["line"], row["reason"]) == (2, "text that cannot be encoded: a panic")


def test_a_document_that_the_tokenizer_refuses_is_never_the_one_held_out(tmp_path, capsys):
    letters = {"<|endoftext|>": 0, **{letter: n for n, letter in enumerate("abc ", start=1)}}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(letters, []))  # no bytes, no unknown
    tokenizer.add_special_tokens(["<|endoftext|>"])
    tokenizer.save(str(tmp_path / "letters.json"))
    texts = ["abc " * count for count in range(1, 20)]
    least = min(held_out.content_hash(text.encode()) for text in texts)
    refused = next(
        text
        for text in map("漢".__mul__, itertools.count(1))
        if held_out.content_hash(text.encode()) < least
    )
    write_jsonl(tmp_path / "a.jsonl", [*texts, refused])
    code, _, err = call(
        capsys, '--source', 'a', '--input', tmp_path / 'a.jsonl', '--output', tmp_path / 'data',
        '--tokenizer', tmp_path / 'letters.json', '--workers', 1,
    )  # fmt: skip
    assert code == 0, err
    made = manifest.read_manifest(tmp_path / "data" / "a")
    assert (made.train.documents, made.held_out.documents, made.rejected) == (18, 1, 1)


def test_an_output_made_twice_is_kept_once(tmp_path):
    plan = tokenize_chunk.Plan.read(plan_of(tmp_path, ["first", "the second"]))
    outputs = tmp_path / "outputs"
    outputs.mkdir()
    writers = [
        tokenize_chunk.OutputWriter(outputs, tokenize_chunk.Output(3, 0), plan, 10)
        for _ in range(2)
    ]
    for writer, record in zip(writers, chunks.read_chunk(plan.chunks[0], Reading()), strict=True):
        ids = [np.array([1, 7], np.int32)]
        writer.add(record, tokenize_chunk.Documents(ids, [], record.content))
        writer.close(last=True)
    (output,) = tokenize_chunk.outputs_of_chunk(outputs, 3)
    assert output.text_bytes["train"] == len("first")
    assert [path.name for path in outputs.iterdir()] == [output.name]


def test_a_chunk_whose_last_output_is_gone_is_noticed(tmp_path, tokenizer_file):
    write_jsonl(tmp_path / "a.jsonl", ["one", "two"])
    arguments = command("a", [tmp_path / "a.jsonl"], tmp_path, "--tokenizer", tokenizer_file)[3:]
    preparation = Preparation(job_of(prepare.make_parser().parse_args(arguments), "a"))
    with preparation.locked():
        preparation.begin()
        preparation.tokenize(executors.Executor())
        shutil.rmtree(preparation.outputs / "00000000-0000")
        with pytest.raises(ValueError, match="chunk 0 .* begin again"):
            preparation.tokenize(executors.Executor())


def test_arcade100k_decodes_back_to_the_text_of_a_million_spaces_and_of_specials(tmp_path, capsys):
    texts = ["a" + " " * 1_000_000 + "b", "say <|endoftext|> and <|im_start|>", "Straße 2024"]
    write_jsonl(tmp_path / "a.jsonl", texts)
    code, _, _ = call(
        capsys, '--source', 'a', '--input', tmp_path / 'a.jsonl', '--output', tmp_path / 'data',
        '--workers', 1,
    )  # fmt: skip
    assert code == 0
    tokenizer = load_tokenizer("arcade100k")
    directory = tmp_path / "data" / "a"
    made = documents(directory, "train", tokenizer) + documents(directory, "held_out", tokenizer)
    assert collections.Counter(made) == collections.Counter(texts)
    assert manifest.read_manifest(directory).tokenizer.vocab_size == 100_352


def test_prepare_starts_without_jax():
    code = 'import sys, stablelm_jax.prepare; sys.exit("jax" in sys.modules)'
    subprocess.run([sys.executable, "-c", code], env=environment(), check=True)


# SLURM

SBATCH = """#!/bin/bash
# Runs every task of the array that the script asks for, two at a time, then says its number.
echo "$@" >> {folder}/calls
script="${{@: -1}}"
last=$(sed -n 's/^#SBATCH --array=0-\\([0-9]*\\).*/\\1/p' "$script")
export RUN_OFFSET=0 SLURM_NODELIST=localhost
seq 0 "$last" | xargs -P 2 -I N env SLURM_ARRAY_TASK_ID=N bash "$script" >> {folder}/output 2>&1
cp "$script" {folder}/script
echo Submitted batch job 7
"""


@pytest.fixture
def slurm(tmp_path):
    """A PATH on which sbatch runs what it is given, and the folder it notes its calls in."""
    folder = tmp_path / "slurm"
    folder.mkdir()
    for name, script in {
        "sbatch": SBATCH.format(folder=folder),
        "squeue": "#!/bin/bash\n",
        "scontrol": "#!/bin/bash\necho localhost\n",
    }.items():
        (folder / name).write_text(script)
        (folder / name).chmod(0o755 | stat.S_IXUSR)
    return folder


def test_slurm_runs_the_array_to_its_end_and_gives_the_same_bytes(
    undisturbed, inputs, tokenizer_file, tmp_path, slurm, monkeypatch
):
    monkeypatch.setenv("PATH", f"{slurm}:{os.environ['PATH']}")
    monkeypatch.setattr(executors, "_SLURM_POLL_SECONDS", 0.1)
    flags = ("--executor", "slurm", "--slurm-partition", "cpu", "--slurm-option", "account=us")
    out = in_small_chunks(inputs, tmp_path, tokenizer_file, *flags, "--workers", 1)
    assert "slurm workers: 1;" in out
    assert digests(tmp_path / "mixed") == digests(undisturbed[0])
    assert len((slurm / "calls").read_text().splitlines()) == 1
    script = (slurm / "script").read_text()
    assert "#SBATCH --partition=cpu" in script
    assert "#SBATCH --account=us" in script


def test_slurm_jobs_that_leave_the_queue_undone_are_an_error_that_names_the_logs(
    tmp_path, monkeypatch
):
    class Stuck:
        world_size = 5

        def get_incomplete_ranks(self):
            return [3, 4]

    monkeypatch.setattr(executors, "_SLURM_POLL_SECONDS", 0.01)
    monkeypatch.setattr(executors, "_SLURM_GRACE_SECONDS", 0.05)
    answers = iter([True, True])
    monkeypatch.setattr(executors, "_is_queued", lambda job: next(answers, False))
    with pytest.raises(executors.TasksFailed, match="2 of 5 tasks not done .*slurm_logs"):
        executors._wait_for_slurm(Stuck(), "7", tmp_path)


def test_a_job_that_sbatch_refuses_is_an_error_of_one_line(
    inputs, tokenizer_file, tmp_path, slurm, monkeypatch, capsys
):
    (slurm / "sbatch").write_text("#!/bin/bash\nexit 3\n")
    monkeypatch.setenv("PATH", f"{slurm}:{os.environ['PATH']}")
    code, _, err = call(
        capsys, '--source', 'a', '--input', *inputs[0], '--output', tmp_path / 'data',
        '--tokenizer', tokenizer_file, '--executor', 'slurm', '--slurm-partition', 'cpu',
    )  # fmt: skip
    assert code == 1
    assert err == "prepare: sbatch failed with exit code 3, see above\n"


def test_one_large_text_is_refused_with_what_to_do_and_then_split(tmp_path, capsys, tokenizer_file):
    play = "".join(f"Speaker {i}:\nHear me speak of {i * i}.\n\n" for i in range(3000))
    (tmp_path / "input.txt").write_text(play, encoding="utf-8")
    flags = ["--source", "play", "--input", tmp_path / "input.txt", "--tokenizer", tokenizer_file]
    code, _, err = call(capsys, *flags, "--output", tmp_path / "out")
    assert code == 1
    assert "--split-on blank-lines" in err
    for workers in (1, 2):
        output = tmp_path / f"out{workers}"
        done = ["--output", output, "--split-on", "1kB", "--workers", workers]
        assert call(capsys, *flags, *done)[0] == 0
    assert digests(tmp_path / "out1") == digests(tmp_path / "out2")
    tokenizer = load_tokenizer(tokenizer_file)
    texts = [
        text
        for split in ("train", "held_out")
        for text in documents(tmp_path / "out1/play", split, tokenizer)
    ]
    assert sorted("\n".join(texts).split()) == sorted(play.split())
    # After a refusal the same command with the flag just works.
    again = ["--output", tmp_path / "out", "--split-on", "blank-lines"]
    code, out, _ = call(capsys, *flags, *again)
    assert code == 0
    assert "3,000 documents" in out


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--split-on", "0kB"], "give a text, blank-lines, or a size up to"),
        (["--split-on", "blank-lines"], "--split-on cuts texts, and there is none in the input"),
    ],
)
def test_a_split_that_cannot_be_is_refused_at_once(tmp_path, capfd, tokenizer_file, flags, said):
    write_jsonl(tmp_path / "a.jsonl", ["one", "two"])
    arguments = ["--source", "s", "--input", str(tmp_path), "--output", str(tmp_path / "out")]
    try:
        code = prepare.main([*arguments, "--tokenizer", tokenizer_file, *flags])
    except SystemExit as exit:
        code = exit.code
    assert code == 2
    assert said in capfd.readouterr().err
