"""prepare: whatever happens on the way, the same inputs give the same bytes; nothing is lost."""

import collections
import gzip
import hashlib
import json
import os
import pathlib
import random
import shutil
import signal
import stat
import subprocess
import sys
import time

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from prepared import check_contents

from stablelm_jax import prepare
from stablelm_jax.data import manifest
from stablelm_jax.data.shards import Shard
from stablelm_jax.preparation import parts
from stablelm_jax.tokenizer.tokenizer import load_tokenizer

SMALL_PIECES = str(pathlib.Path(__file__).with_name("in_small_pieces.py"))
ROOT = str(pathlib.Path(prepare.__file__).parents[1])


@pytest.fixture(scope="module")
def tokenizer_file(tmp_path_factory):
    """A tokenizer of bytes: loads at once, and every text is as long as it looks."""
    import tokenizers

    letters = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    vocabulary = {letter: number for number, letter in enumerate(sorted(letters))}
    engine = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, []))
    engine.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    engine.decoder = tokenizers.decoders.ByteLevel()
    engine.add_special_tokens(["<|endoftext|>"])
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    engine.save(str(path))
    return str(path)


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
    ("library.so", 1, "binary"),
]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, inputs, tokenizer_file):
    """The source as one worker makes it in one go, in small pieces, over several shards."""
    output = tmp_path_factory.mktemp("undisturbed")
    flags = ("--tokenizer", tokenizer_file, "--shard-tokens", 150_000, "--workers", 1)
    done = run("mixed", inputs[0], output, *flags, script=SMALL_PIECES)
    return output / "mixed", done


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
    directory, done = undisturbed
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
    assert all(info.tokens <= 150_000 for info in made.train.shards)
    *_, last = done.stdout.strip().splitlines()
    assert last.startswith("prepared mixed: 2,600 documents")
    assert set(os.listdir(directory)) == {
        'manifest.json', 'rejected.jsonl',
        *(info.file for info in made.train.shards + made.held_out.shards),
        *(info.file[:-4] + '.idx' for info in made.train.shards + made.held_out.shards),
    }  # fmt: skip


def test_what_was_rejected_is_listed_with_file_line_and_reason(undisturbed):
    directory, done = undisturbed
    rows = [json.loads(line) for line in open(directory / "rejected.jsonl")]
    assert len(rows) == len(REJECTED)
    for row, (file, line, reason) in zip(rows, REJECTED, strict=True):
        assert (os.path.basename(row["file"]), row["line"]) == (file, line)
        assert row["reason"].startswith(reason)
    assert "rejected: 7 (not UTF-8: 2; " in done.stdout


def test_workers_pieces_and_compression_do_not_change_a_byte(
    undisturbed, inputs, tokenizer_file, tmp_path
):
    directory, _ = undisturbed
    flags = ("--tokenizer", tokenizer_file, "--shard-tokens", 150_000, "--workers", 3)
    run("mixed", inputs[0], tmp_path, *flags)
    assert digests(tmp_path / "mixed") == digests(directory)


def test_killed_at_any_moment_it_goes_on_where_it_was_and_gives_the_same_bytes(
    undisturbed, inputs, tokenizer_file, tmp_path
):
    directory, _ = undisturbed
    target = tmp_path / "mixed"
    flags = ("--tokenizer", tokenizer_file, "--shard-tokens", 150_000, "--workers", 2)
    start = command("mixed", inputs[0], tmp_path, *flags, script=SMALL_PIECES)
    work = target / ".work"
    moments = [
        (work / "units.json").exists,
        lambda: len(finished(target)) >= random.randint(1, 10),
        lambda: len(finished(target)) >= random.randint(10, 30),
        (work / "shards.json").exists,
        (work / "shards" / "train-00001.npz").exists,
        (target / "manifest.json.partial").exists,
    ]
    for number, reached in enumerate(moments):
        before = finished(target)
        process = start_slowly(start)
        wait_for(lambda: reached() or process.poll() is not None, 60)  # noqa: B023
        time.sleep(random.uniform(0, 0.1))
        # In turn the whole group, as a terminal or a scheduler does, and the first process alone.
        os.killpg(process.pid, signal.SIGKILL) if number % 2 else process.kill()
        assert process.wait() == -signal.SIGKILL or number == len(moments) - 1
        if not (target / "manifest.json").exists():  # else it was about to remove its work
            assert before <= finished(target), "something whole was made again"
    done = run("mixed", inputs[0], tmp_path, *flags, script=SMALL_PIECES)
    assert "going on with what was begun" in done.stdout or "already prepared" in done.stdout
    assert digests(target) == digests(directory)


def start_slowly(start, delay="0.02"):
    """Starts a command in a session of its own, with time to kill it in."""
    return subprocess.Popen(
        start, env=environment(PIECES_DELAY=delay), stdout=subprocess.DEVNULL,
        start_new_session=True,
    )  # fmt: skip


def finished(target):
    """Finished parts and shards with their times: what is made again has a new time."""
    whole = list((target / ".work" / "parts").glob("[0-9]*"))
    for record in (target / ".work" / "shards").glob("*.npz"):
        whole += [target / f"{record.stem}.bin", target / f"{record.stem}.idx"]
    return {(path.name, path.stat().st_mtime_ns) for path in whole}


def wait_for(reached, seconds):
    deadline = time.monotonic() + seconds
    while not reached():
        assert time.monotonic() < deadline, "this was not reached in time"
        time.sleep(0.01)


def test_a_killed_worker_is_noticed_and_the_next_call_finishes(
    undisturbed, inputs, tokenizer_file, tmp_path
):
    flags = ("--tokenizer", tokenizer_file, "--shard-tokens", 150_000, "--workers", 2)
    marker = tmp_path / "kill"
    marker.touch()
    extra = {"PIECES_KILL_WORKER": str(marker)}
    options = {"script": SMALL_PIECES, "extra": extra}
    done = run("mixed", inputs[0], tmp_path, *flags, check=1, **options)
    (last,) = done.stderr.strip().splitlines()
    assert last.startswith("prepare: a worker was killed")
    assert "run the same command again" in last
    run("mixed", inputs[0], tmp_path, *flags, **options)
    assert digests(tmp_path / "mixed") == digests(undisturbed[0])


def test_workers_end_when_their_parent_is_killed(inputs, tokenizer_file, tmp_path):
    start = command(
        "mixed", inputs[0], tmp_path, "--tokenizer", tokenizer_file, script=SMALL_PIECES
    )
    process = start_slowly(start, "0.3")
    wait_for(lambda: finished(tmp_path / "mixed"), 60)
    assert len(members(process.pid)) > 1
    process.kill()
    process.wait()
    wait_for(lambda: not members(process.pid), 10)


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

    same = ("--tokenizer", tokenizer_file, "--shard-tokens", 150_000)
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


def test_a_finished_source_with_a_shard_missing_is_not_taken_for_prepared(
    undisturbed, inputs, tokenizer_file, tmp_path, capsys
):
    shutil.copytree(undisturbed[0], tmp_path / "mixed")
    (tmp_path / "mixed" / "train-00001.bin").unlink()
    code, _, err = call(
        capsys, '--source', 'mixed', '--input', *inputs[0], '--output', tmp_path,
        '--tokenizer', tokenizer_file, '--shard-tokens', 150_000,
    )  # fmt: skip
    assert code == 1
    assert "train-00001.bin" in err


def test_two_processes_do_not_work_on_one_source(inputs, tokenizer_file, tmp_path):
    flags = ("--tokenizer", tokenizer_file)
    start = command("mixed", inputs[0], tmp_path, *flags, script=SMALL_PIECES)
    first = start_slowly(start, "0.2")
    wait_for((tmp_path / "mixed" / ".work" / "units.json").exists, 60)
    done = run("mixed", inputs[0], tmp_path, *flags, check=1)
    os.killpg(first.pid, signal.SIGKILL)
    first.wait()
    assert "another process is preparing this source" in done.stderr


# in one process: what is printed and what is refused


def test_bad_arguments_exit_with_2_and_one_line_that_says_what_to_do(
    tmp_path, capsys, tokenizer_file
):
    write_jsonl(tmp_path / "a.jsonl", ["one", "two"])
    good = {"--source": "a", "--input": tmp_path / "a.jsonl", "--output": tmp_path / "data"}
    for flag, value, message in [
        ("--source", "A-b", "lower case letters"),
        ("--input", tmp_path / "missing.jsonl", "nothing there; check the path"),
        ("--output", "s3://bucket/data", "give a local folder"),
        ("--output", tmp_path.parent, ""),
        ("--tokenizer", "nonsense", "no tokenizer 'nonsense'"),
        ("--executor", "slurm", "--slurm-partition"),
    ]:
        if message:
            arguments = [part for pair in {**good, flag: value}.items() for part in pair]
            code, _, err = call(capsys, *arguments)
            assert code == 2
            assert message in err
            assert err.count("\n") == 1
    for flag, value in [("--held-out", "0.9"), ("--workers", "0"), ("--provenance", "nokey")]:
        with pytest.raises(SystemExit) as exit_info:
            call(capsys, *[part for pair in {**good, flag: value}.items() for part in pair])
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
        (b'oops\n{"text": ""}\noops\n', 'no usable document: 3 rejected, 2 of them "not JSON"'),
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
    assert "held out: a quarter of a small source, 50.00% of the text" in out
    made = manifest.read_manifest(tmp_path / "data" / "a")
    assert (made.train.documents, made.held_out.documents) == (1, 1)
    assert (made.languages, made.licence) == (("en", "de"), "MPL-2.0")
    assert made.provenance["from"] == "a test"
    assert made.provenance["input_files"] == 1


def test_a_document_that_the_tokenizer_cannot_take_is_rejected_and_no_other(
    tmp_path, monkeypatch, tokenizer_file
):
    from stablelm_jax.preparation import pipeline, units
    from stablelm_jax.tokenizer.tokenizer import TokenizerError

    write_jsonl(tmp_path / "a.jsonl", ["one", "poison", "two"])
    (tmp_path / "parts").mkdir()
    units.save(tmp_path / "units.json", units.cut(units.find_files([str(tmp_path / "a.jsonl")])))
    tokenizer = load_tokenizer(tokenizer_file)
    encode = tokenizer.encode_document

    def fragile(text):
        if text == "poison":
            raise TokenizerError("text that cannot be encoded: a panic")
        return encode(text)

    tokenizer.encode_document = fragile
    monkeypatch.setattr(pipeline, "_tokenizer", lambda name, ranks: tokenizer)
    records = pipeline.ReadUnit(str(tmp_path / "units.json"), str(tmp_path / "parts"), "text")()
    pipeline.TokenizeToParts(str(tmp_path / "parts"), "any", None)(records)
    (part,) = parts.parts_of_unit(tmp_path / "parts", 0)
    assert part.info.documents == 2
    assert part.rejected()[0][1:] == [2, "text that cannot be encoded: a panic"]


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
    undisturbed, inputs, tokenizer_file, tmp_path, slurm
):
    done = run(
        'mixed', inputs[0], tmp_path, '--tokenizer', tokenizer_file, '--shard-tokens', 150_000,
        '--executor', 'slurm', '--slurm-partition', 'cpu', '--slurm-option', 'account=us',
        '--workers', 2, extra={'PATH': f'{slurm}:{os.environ["PATH"]}'},
    )  # fmt: skip
    assert "for 2 slurm workers" in done.stdout
    assert digests(tmp_path / "mixed") == digests(undisturbed[0])
    assert len((slurm / "calls").read_text().splitlines()) == 2  # one array to read, one to write
    script = (slurm / "script").read_text()
    assert "#SBATCH --partition=cpu" in script
    assert "#SBATCH --account=us" in script


def test_slurm_jobs_that_leave_the_queue_undone_are_an_error_that_names_the_logs(
    tmp_path, monkeypatch
):
    from stablelm_jax.preparation import executors

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
