import json
import subprocess
import sys

import numpy as np
import pytest
from tiny import CHOICES, TALKS, tiny_config, write_chats, write_config, write_data

from stablelm_jax.data.shards import Shard
from stablelm_jax.reporting.inspection import places
from stablelm_jax.tokenizer.tokenizer import load_tokenizer
from stablelm_jax.training.setup import prepare_run


def batch_rows(run, step):
    batches = run.batches(step)
    batch = next(batches)
    batches.close()
    return batch


@pytest.mark.parametrize("step", [0, 3, 40])  # in later epochs of both sources too
def test_the_documents_shown_are_those_that_the_batch_holds(data, step):
    run = prepare_run(tiny_config(data))
    tokenizer, batch = run.tokenizer, batch_rows(run, step)
    rows = range(8 * step, 8 * step + 8)
    found = list(places(run.sources, run.mixture, rows, run.spec, tokenizer))
    for place, tokens, source, segments in zip(
        found, batch["tokens"], batch["source_ids"], batch["segment_ids"]
    ):
        assert place.source == run.mixture.sources[source]
        assert [d.tokens for d in place.documents] == np.bincount(segments)[1:].tolist()
        text = tokenizer.decode(tokens.tolist()).split()
        assert " ".join(d.text for d in place.documents).split() == text
        for document in place.documents:
            shard = Shard(document.file)
            inside = shard.read(document.offset, document.offset + document.tokens)
            assert tokenizer.decode(inside.tolist()) == document.text
            first = shard.document_offsets[document.number]
            assert (first == document.offset) == document.opens
            assert first <= document.offset < shard.document_offsets[document.number + 1]


@pytest.fixture(scope="module")
def shown(data, tmp_path_factory):
    path = write_config(tiny_config(data), tmp_path_factory.mktemp("configs"))

    def call(*arguments):
        command = [sys.executable, "-m", "stablelm_jax.inspect_data", f"--config={path}"]
        done = subprocess.run([*command, *arguments], capture_output=True, text=True)
        return done.returncode, done.stdout, done.stderr

    return call


def test_step_n_is_the_one_whose_metrics_line_says_n(shown, data):
    code, out, _ = shown("--step=4", "--json")
    rows = [json.loads(line) for line in out.splitlines()]
    assert code == 0 and [row["row"] for row in rows] == list(range(24, 32))
    tokens = batch_rows(prepare_run(tiny_config(data)), 3)["tokens"]
    tokenizer = load_tokenizer(data / "tokenizer.json")
    text = tokenizer.decode(tokens[0].tolist()).split()
    assert " ".join(d["text"] for d in rows[0]["documents"]).split() == text


def test_a_person_sees_source_file_offset_and_text(shown):
    code, out, _ = shown("--step=1", "--source=squares", "--rows=2")
    assert code == 0
    assert out.count("squares, epoch 0") == 2 and "fibonacci" not in out
    assert "train-00000.bin token" in out and "from its middle" in out
    assert "<|endoftext|>" in out


def test_a_source_that_is_not_in_the_mixture_is_refused(shown):
    code, _, err = shown("--step=1", "--source=cubes")
    assert code == 2 and "the mixture has fibonacci, squares" in err


def test_packed_rows_show_their_items_and_what_of_them_is_trained(tmp_path):
    root = write_chats(write_data(tmp_path / "data"))
    for sources, objective in (({TALKS: 0.5, "squares": 0.5}, "sft"), ({CHOICES: 1.0}, "dpo")):
        settings = {"data.packing": "best_fit", "training.objective": objective}
        run = prepare_run(tiny_config(root, sources=sources, **settings))
        decode, batch = run.tokenizer.decode, batch_rows(run, 3)
        found = places(run.sources, run.mixture, range(24, 32), run.spec, run.tokenizer, run.packed)
        for place, row in enumerate(found):
            segments, mask = batch["segment_ids"][place], batch["loss_mask"][place] == 1
            assert row.source == run.mixture.sources[batch["source_ids"][place]]
            for number, document in enumerate(row.documents, 1):
                inside = segments == number
                trained = " ".join(text for text, yes in document.parts if yes)
                targets = batch["targets"][place][inside & mask]
                assert trained.split() == decode(targets.tolist()).split()
                texts = " ".join(text for text, _ in document.parts)
                assert texts.split() == document.text.split()
                assert document.tokens == inside.sum() + 1
                shard = Shard(document.file)
                span = shard.document_offsets[document.number : document.number + 2]
                if row.source != "squares":
                    assert [document.offset, document.offset + document.tokens] == span.tolist()
                assert document.opens == (document.offset == span[0])
            assert segments.max() - len(row.documents) in (0, 1)
            if row.source == CHOICES:
                ids = [i for i in batch["pair_ids"][place].tolist() if i >= 0]
                sides = [f"pair {i}, {side}" for i in ids for side in ("chosen", "rejected")]
                assert [document.item for document in row.documents] == sides
