"""Runs on packed rows: what they refuse, what they say, and what of them is scored."""

import io
import math

import pytest
from prepared import write_source
from rich.console import Console
from tiny import CHOICES, TALKS, tiny_config, write_chats, write_data

from stablelm_jax.reporting.console import show_decisions
from stablelm_jax.training.same_run import ResumeError, check_same_run
from stablelm_jax.training.setup import _document_ends, prepare_run

MIXED = {TALKS: 0.5, "squares": 0.25, "fibonacci": 0.25}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Sources of text, of conversations and of pairs, of one tokenizer."""
    return write_chats(write_data(tmp_path_factory.mktemp("packed") / "data"))


def prepared(root, sources=MIXED, packing="best_fit", **overrides):
    objective = "dpo" if CHOICES in sources else "sft"
    overrides = {"data.packing": packing, "training.objective": objective, **overrides}
    return prepare_run(tiny_config(root, sources=sources, **overrides))


@pytest.mark.parametrize("source, kind", [(TALKS, "conversations"), (CHOICES, "pairs")])
def test_what_may_not_be_cut_is_not_concatenated(root, source, kind):
    with pytest.raises(ValueError, match=f"{source!r} holds {kind}.*data.packing=best_fit"):
        prepared(root, {source: 1.0}, "concatenate")


def test_pairs_are_trained_on_alone(root):
    for objective, refused in (("dpo", TALKS), ("sft", CHOICES)):
        with pytest.raises(ValueError, match=f"objective={objective}: source {refused!r} holds"):
            prepared(root, {CHOICES: 1.0, TALKS: 1.0}, **{"training.objective": objective})
    assert prepared(root, {CHOICES: 1.0}).num_pairs > 1


def test_an_item_that_no_row_holds_is_told_at_the_start(root):
    with pytest.raises(ValueError, match=r"talks: \d+ of 50 train conversations fit into no row"):
        prepared(root, {TALKS: 1.0}, **{"data.sequence_length": 8})


def test_another_packing_or_loss_is_another_run(root):
    text = {"squares": 1.0}
    now = {packing: prepared(root, text, packing).identity() | {"rows_consumed": 8}
           for packing in ("concatenate", "best_fit", "one")}  # fmt: skip
    old = dict(now["concatenate"])  # as written before there was a choice
    old["row_order"] = {
        key: value for key, value in old["row_order"].items() if key not in ("packing", "loss_on")
    }
    check_same_run(old, now["concatenate"])
    for saved, current in ((old, "best_fit"), (now["best_fit"], "one"), (now["one"], "best_fit")):
        with pytest.raises(ResumeError, match="config.data.packing was '.*', now '"):
            check_same_run(saved, now[current])
    everything = prepared(root, text, **{"data.loss_on": "all"}).identity()
    with pytest.raises(ResumeError, match="config.data.loss_on was 'answers', now 'all'"):
        check_same_run(now["best_fit"], everything)


def test_epochs_and_steps_are_counted_in_packed_rows_and_said(root):
    run = prepared(root, {TALKS: 1.0, "squares": 1.0}, **{"training.num_steps": 20})
    rows = {name: len(run.packed[name, "train"]) for name in (TALKS, "squares")}
    assert run.tokens_per_epoch == {name: 32 * count for name, count in rows.items()}
    file = io.StringIO()
    show_decisions(Console(file=file, width=200), run)
    said = file.getvalue()
    talks = run.packed[TALKS, "train"]
    (line,) = [line for line in said.splitlines() if "talks" in line and "%" in line]
    cells = [cell.strip() for cell in line.strip("│").split("│")]
    filled = talks.lengths.sum() / (32 * len(talks))
    steps = [str(math.ceil(n * len(talks) / 4)) for n in (1, 2, 3)]
    assert cells == [TALKS, "50", str(len(talks)), f"{filled:.2%}", str(talks.trained), *steps]
    assert "read all sources equally often" in said
    # Concatenated text counts as it did.
    text = prepare_run(tiny_config(root))
    assert text.tokens_per_epoch == {n: m.train.tokens for n, m in text.manifests.items()}


def test_hosts_whose_documents_end_elsewhere_under_the_same_tokens_are_told_apart(tmp_path):
    ends = []
    for number, documents in enumerate(([[8, 9, 10, 11]], [[8, 9], [10, 11]])):
        source = write_source(tmp_path / str(number), "web", [documents])
        ends.append(_document_ends({"web": source}))
    assert [key for key in ends[0] if ends[0][key] != ends[1][key]] == [
        "web/train, ends of documents"
    ]
