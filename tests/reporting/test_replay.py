"""A run with bad documents: the replay names them, and without them there is no spike."""

import functools
import re

import numpy as np
import pytest
import tiny
from byte_tokenizer import write_byte_tokenizer
from prepared import write_source
from tiny import (
    CHOICES,
    TALKS,
    bare_config,
    events,
    losses,
    train,
    write_chats,
    write_data,
    write_parent,
)

from stablelm_jax.checkpoint.reading import read_run
from stablelm_jax.data.manifest import TokenizerInfo, open_sources
from stablelm_jax.data.rows import epoch_order, source_seed
from stablelm_jax.reporting.documents import choose, sample
from stablelm_jax.reporting.replay import replay, tables
from stablelm_jax.tokenizer.tokenizer import load_tokenizer
from stablelm_jax.training import programs
from stablelm_jax.training.begin import ResumeOptions

DOCUMENTS, SPIKE, STEPS = 400, 41, 44  # documents, each as long as a row; steps
ORDER = epoch_order(DOCUMENTS - 1, source_seed(1234, "counting"), 0)
BAD = sorted(ORDER[8 * (SPIKE - 1) :][:3].tolist())  # three of the eight that step 41 reads
NAMES = sorted(f"counting:documents:{number}" for number in BAD)
SKIP = tuple(f"counting:rows:{number}" for number in BAD)  # document N is row N


@pytest.fixture(autouse=True)
def compiled_once(monkeypatch):
    """The run's own program, which lies in a file where a run and its replay are two processes."""
    once = functools.partial(tiny.compiled_once, "compile_step")
    monkeypatch.setattr(programs, "compile_step", once)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Documents of characters that count on by two; those of BAD are random bytes as text."""
    root, rng = tmp_path_factory.mktemp("planted"), np.random.default_rng(4)
    own = load_tokenizer(write_byte_tokenizer(root / "tokenizer.json"))
    codes = 48 + (rng.integers(0, 64, (DOCUMENTS, 1)) + 2 * np.arange(31)) % 64
    texts = [bytes(row).decode() for row in codes.tolist()]
    for number in BAD:
        texts[number] = rng.bytes(31).decode("latin-1")
    made_by = TokenizerInfo("bytes", own.sha256, own.vocab_size, own.eod)
    shard = [[*own.encode(text)[:31], own.eod] for text in texts]
    write_source(root, "counting", [shard], shard[:3], tokenizer=made_by)
    return root


def config(root, **overrides):
    changed = {"training.num_steps": STEPS, "schedule.total_steps": 100, **overrides}
    changed |= {"checkpoint.every": 36, "checkpoint.save_initial": False}
    return bare_config(root, sources={"counting": 1.0}, **changed)


@pytest.fixture(scope="module")
def spiked(root, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("spiked")
    return workdir, losses(train(config(root), workdir)[1])


@pytest.fixture(scope="module")
def skipped(root, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("skipped")
    return workdir, train(config(root, **{"data.skip": SKIP}), workdir)[1]


def test_a_replay_is_the_run_bit_for_bit_and_puts_the_bad_documents_first(spiked):
    workdir, seen = spiked
    assert seen[SPIKE] > seen[SPIKE - 1] + 1
    found = replay(str(workdir), SPIKE)
    assert found.restored == "global_step36" and found.compared == [37, 38, 39, 40, 41]
    assert not found.differences and found.loss == seen[SPIKE]
    assert sorted(share.skip for share in found.shares[:3]) == NAMES
    others = found.shares[3:]
    assert min(s.loss for s in found.shares[:3]) > 2 * max(share.loss for share in others)
    assert sum(share.part for share in found.shares) == pytest.approx(found.loss)
    assert sum(share.tokens for share in found.shares) == 8 * 32
    norms = [share.grad_norm for share in found.shares]
    assert max(norms) / 8 < found.grad_norm <= 1.0001 * sum(norms)
    text = "\n".join(part for part in tables(found, 3, str) if isinstance(part, str))
    assert "equal to metrics.jsonl bit for bit" in text and "3 of 8 documents" in text


def test_the_documents_of_highest_loss_under_a_checkpoint_are_the_bad_ones(root, spiked):
    source = open_sources(root, ["counting"])["counting"]
    seen = sample(source, DOCUMENTS, 5, seed=0)
    found = choose("loss", seen, 3, source, str(spiked[0]))
    assert sorted(document.number for document, _ in found) == BAD
    assert all(note.endswith("nats a token") for _, note in found)


def test_without_the_documents_there_is_no_spike_and_all_other_rows_stay(spiked, skipped):
    seen, lines = losses(skipped[1]), skipped[1]
    before = {step: loss for step, loss in spiked[1].items() if step < SPIKE}
    assert {step: seen[step] for step in before} == before
    assert abs(seen[SPIKE] - seen[SPIKE - 1]) < 0.3
    assert lines[SPIKE - 2]["tokens_seen"] == (SPIKE - 1) * 8 * 32
    assert lines[-1]["tokens_seen"] == (STEPS * 8 - 3) * 32
    # What is left out was passed: the next epoch begins where it would with it.
    assert lines[-1]["epochs/counting"] == STEPS * 8 * 32 / (DOCUMENTS * 32)
    found = replay(str(skipped[0]), SPIKE, wanted=lambda row: False)
    assert SPIKE in found.compared and not found.differences


def test_leaving_out_is_a_change_to_be_accepted_and_resumes_exactly(root, skipped, tmp_path):
    train(config(root, **{"training.num_steps": 40}), tmp_path)
    changed = config(root, **{"data.skip": SKIP, "training.num_steps": 42})
    with pytest.raises(ValueError, match="config.data.skip was .*--accept-config-change"):
        train(changed, tmp_path)
    accepted = ResumeOptions(accept_config_change=True)
    assert train(changed, tmp_path, options=accepted)[0] == 0
    _, lines = train(config(root, **{"data.skip": SKIP}), tmp_path)
    assert losses(lines) == losses(skipped[1])
    folders = tmp_path, skipped[0]
    last, other = (read_run(folder / f"checkpoints/global_step{STEPS}") for folder in folders)
    assert last["checksums"] == other["checksums"]
    change = {"data.skip": [[], list(SKIP)]}
    assert last["config_changes"] == [{"step": 40, "changes": change}]
    assert events(tmp_path, "config_changed")[0]["data.skip"] == change["data.skip"]
    assert last["left_out"] == other["left_out"] == {"counting": 3 * 32}


def test_a_step_before_the_oldest_checkpoint_is_refused_with_what_there_is(spiked):
    with pytest.raises(ValueError, match=r"step 3 lies before its checkpoints.*there are \[36, 44"):
        replay(str(spiked[0]), 3)
    with pytest.raises(ValueError, match="step 45 .* has not been done"):
        replay(str(spiked[0]), 45)


@pytest.mark.by_hand
@pytest.mark.parametrize("objective", ["sft", "dpo"])
def test_conversations_and_pairs_are_replayed_too(tmp_path, objective):
    root = write_chats(write_data(tmp_path / "data"))
    parent = write_parent(tmp_path / "parent/global_step7", root)
    settings = {"data.packing": "best_fit", "training.objective": objective}
    settings |= {"branch.parent": str(parent), "checkpoint.every": 2, "training.log_every": 3}
    source = {"sft": TALKS, "dpo": CHOICES}[objective]
    run = bare_config(root, sources={source: 1.0}, **settings)
    assert train(run, tmp_path / "run")[0] == 0
    found = replay(str(tmp_path / "run"), 11)  # the next line is that of step 12
    assert found.compared == [12] and not found.differences
    assert sum(share.part for share in found.shares) == pytest.approx(found.loss, rel=1e-4)
    assert max(share.grad_norm for share in found.shares) < 2 * found.grad_norm
    ending = r":documents:\d+-\d+" if objective == "dpo" else r":documents:\d+"
    assert all(re.fullmatch(source + ending, share.skip) for share in found.shares)
    worst = found.shares[0].skip
    again = bare_config(root, sources={source: 1.0}, **settings, **{"data.skip": (worst,)})
    assert train(again, tmp_path / "again")[0] == 0
    assert worst not in [s.skip for s in replay(str(tmp_path / "again"), 11).shares]


def test_a_step_of_which_nothing_is_left_makes_no_update_and_says_so(root, tmp_path):
    skip = tuple(f"counting:rows:{number}" for number in ORDER[8:16].tolist())  # all of step 2
    changed = config(root, **{"data.skip": skip, "training.num_steps": 4})
    code, lines = train(changed, tmp_path)
    assert code == 0
    assert [line["updates_skipped"] for line in lines] == [0, 1, 1, 1]
    assert [line["loss"] is None for line in lines] == [False, True, False, False]
    assert lines[1]["param_norm"] == lines[0]["param_norm"] != lines[2]["param_norm"]
    assert lines[-1]["tokens_seen"] == 3 * 8 * 32
