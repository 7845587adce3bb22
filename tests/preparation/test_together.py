"""Several sources in the same files are read in one pass, and each is as if it were alone."""

import collections
import contextlib
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import zstandard

from stablelm_jax import prepare
from stablelm_jax.data import manifest
from stablelm_jax.preparation import chunks, held_out, readers, together
from stablelm_jax.preparation.formats import Reading
from stablelm_jax.preparation.inputs import find_files
from stablelm_jax.preparation.prepare_source import Preparation
from stablelm_jax.preparation.tokenize_chunk import TokenizeTogether
from stablelm_jax.run.console import make_console

SETS = {"philpapers": "PhilPapers", "hackernews": "HackerNews", "dm_math": "DM Mathematics"}
SMALL_CHUNKS = str(Path(__file__).with_name("in_small_chunks.py"))
WORDS = "a theory of mind in which 12 + 30 is always 42 and nobody asks why".split()


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """Four shards of the Pile, all components mixed, with what there is of damage."""
    folder, rng = tmp_path_factory.mktemp("train"), random.Random(0)
    for number in range(4):
        lines = ['{"text": "cut\n', '{"text": "no set at all"}\n']
        for count in range(300):
            text = " ".join(rng.choices(WORDS, k=rng.randint(1, 60))) if count % 50 else ""
            name = rng.choice([*SETS.values(), "Pile-CC", "Github"])
            lines.append(json.dumps({"text": text, "meta": {"pile_set_name": name}}) + "\n")
        rng.shuffle(lines)
        data = zstandard.ZstdCompressor().compress("".join(lines).encode())
        (folder / f"{number:02d}.jsonl.zst").write_bytes(data)
    return folder


def arguments(shards, output, tokenizer_file, *names):
    return [
        '--recipe', 'stablelm_2', '--source', *names, '--input', f'{shards}/*.jsonl.zst',
        '--output', str(output), '--tokenizer', tokenizer_file, '--workers', '1',
        '--shard-tokens', '20000',
    ]  # fmt: skip


@contextlib.contextmanager
def small_chunks():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chunks, "_MIN_CHUNK_BYTES", 1000)  # a shard of the Pile is a chunk
        patch.setattr(chunks, "_CHUNKS_PER_SOURCE", 10**9)
        yield


def digests(directory):
    return {
        str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    }


@pytest.fixture(scope="module")
def alone(tmp_path_factory, shards, tokenizer_file):
    """Each source as it is prepared by itself, with --keep and no recipe but for the licence."""
    output = tmp_path_factory.mktemp("alone")
    with small_chunks():
        for name in SETS:
            assert prepare.main(arguments(shards, output, tokenizer_file, name)) == 0
    return output


def test_sources_prepared_together_are_the_bytes_of_each_alone_and_each_shard_is_read_once(
    alone, shards, tokenizer_file, tmp_path, capsys
):
    with small_chunks():
        assert prepare.main(arguments(shards, tmp_path, tokenizer_file, *SETS)) == 0
    said = capsys.readouterr().out
    assert "reading the files of philpapers, hackernews, dm_math once" in said
    # Nothing was begun before, and what the one read took is said once, not of each source.
    assert "going on" not in said
    assert said.count("tokenizing 100%") == said.count("s from the first byte to the last") == 1
    assert said.count("read together with others") == len(SETS)
    assert digests(tmp_path) == digests(alone)
    for name, set_name in SETS.items():
        made = manifest.read_manifest(tmp_path / name)
        counts = made.provenance["keep"]
        assert list(counts["kept"]) == [set_name]
        assert sum(counts["kept"].values()) + sum(counts["not_kept"].values()) == 4 * 301
        assert counts["not_kept"]["no key meta.pile_set_name"] == 4
        documents = made.train.documents + made.held_out.documents
        # Of its own those without text are rejected; a line that is no JSON may be anybody's.
        assert documents == sum(counts["kept"].values()) - (made.rejected - 4)
        assert made.train.shards


def preparations(shards, output, tokenizer_file):
    parser, flags = prepare.make_parser(), arguments(shards, output, tokenizer_file, *SETS)
    recipe = prepare.load_recipe("stablelm_2")
    jobs, _ = prepare._jobs(parser, flags, parser.parse_args(flags), recipe, make_console())
    (group,) = together.groups(jobs)
    return list(map(Preparation, group))


def test_one_look_and_one_read_of_each_shard_serve_all_sources(
    shards, tokenizer_file, tmp_path, monkeypatch
):
    read, read_file = collections.Counter(), readers.read_file

    def counted(file, *rest):
        read[file.last_name] += 1
        return read_file(file, *rest)

    monkeypatch.setattr(held_out, "FEW_DOCUMENTS", 0)  # fewer are looked at twice
    with small_chunks():
        found = preparations(shards, tmp_path, tokenizer_file)
        monkeypatch.setattr(readers, "read_file", counted)
        with contextlib.ExitStack() as locks:
            for preparation in found:
                locks.enter_context(preparation.locked())
            together.begin(found)
            looked = dict(read)
            step = TokenizeTogether([preparation.step() for preparation in found])
            for rank in range(4):
                step.run(rank=rank)
    assert set(looked.values()) == {1}
    assert set(read.values()) == {2}


def test_what_was_begun_together_is_gone_on_with_alone_and_the_other_way_round(
    alone, shards, tokenizer_file, tmp_path
):
    with small_chunks():
        found = preparations(shards, tmp_path, tokenizer_file)
        with contextlib.ExitStack() as locks:
            for preparation in found:
                locks.enter_context(preparation.locked())
            together.begin(found)
            TokenizeTogether([each.step() for each in found]).run(rank=2)
            found[1].step().run(rank=0)
        assert prepare.main(arguments(shards, tmp_path, tokenizer_file, "philpapers")) == 0
        assert prepare.main(arguments(shards, tmp_path, tokenizer_file, *SETS)) == 0
    assert digests(tmp_path) == digests(alone)


def test_several_looks_in_one_are_what_each_would_have_seen(shards, monkeypatch):
    monkeypatch.setattr(held_out, "_LOOK_DOCUMENTS_MOST", 50)
    cut = chunks.cut(find_files([str(shards)]))
    keeps = [[["meta.pile_set_name", name]] for name in SETS.values()]
    found = held_out.look_at_several(cut, Reading(keep=keeps[0]), keeps)
    assert found == [held_out.look(cut, Reading(keep=keep)) for keep in keeps]
    assert not any(look.whole for look in found)


def test_the_look_at_a_small_part_of_large_files_goes_no_further_than_it_must(shards, monkeypatch):
    cut = chunks.cut(find_files([str(shards)]))
    keep = [["meta.pile_set_name", "PhilPapers"]]
    whole = held_out.look(cut, Reading(keep=keep))
    monkeypatch.setattr(held_out, "_LOOK_INPUT_BYTES", cut[0].size // 4)
    assert held_out.look(cut, Reading(keep=keep)) != whole
    found = held_out.look(cut, Reading(keep=keep))
    assert (whole.whole, found.whole, len(found.found)) == (True, False, 100)
    assert len(found.found) / found.share == pytest.approx(len(whole.found), rel=0.25)
    assert held_out.look(cut, Reading()).whole  # of all records as before


@pytest.mark.by_hand
def test_killed_at_any_moment_together_goes_on_and_gives_the_same_bytes(
    alone, shards, tokenizer_file, tmp_path
):
    start = [sys.executable, SMALL_CHUNKS, *arguments(shards, tmp_path, tokenizer_file, *SETS)]
    start[start.index("--workers") + 1] = "2"
    environment = {**os.environ, "PYTHONPATH": str(Path(prepare.__file__).parents[1])}
    environment |= {"CHUNKS_DELAY": "0.1", "CHUNKS_BYTES": "1000"}
    moments = [
        lambda: list(tmp_path.glob("*/.work/plan.json")),
        lambda: list(tmp_path.glob("*/.work/outputs/0*")),
        lambda: len(list(tmp_path.glob("*/.work/outputs/0*"))) > 3,
        lambda: list(tmp_path.glob("*/train-00000.bin")),
        lambda: len(list(tmp_path.glob("*/manifest.json"))) > 1,
    ]
    for number, reached in enumerate(moments):
        process = subprocess.Popen(
            start, env=environment, stdout=subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip
        deadline = time.monotonic() + 300
        while not reached() and process.poll() is None:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        os.killpg(process.pid, signal.SIGKILL) if number % 2 else process.kill()
        process.wait()
    with small_chunks():
        assert prepare.main(arguments(shards, tmp_path, tokenizer_file, *SETS)) == 0
    assert digests(tmp_path) == digests(alone)
