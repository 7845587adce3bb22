"""Why a source, or one side of it, came out without a document, and what to do."""

from __future__ import annotations

import argparse
import collections
from collections.abc import Sequence

from stablelm_jax.preparation import keeping
from stablelm_jax.preparation.outputs import SPLITS, Output

# What helps against a cause, by its beginning: the longer beginnings first.
_REMEDIES = {
    "no key to hold out by": "--held-out-by {job.held_out_by} is no key of the records",
    "no key": "--text-key names the key",
    "no column": "--text-key names the key",
    "a conversation": "--template zephyr, chatml, tokenizer or a Jinja file takes them",
    "dropped by": "look at some with --show-dropped, and give --language or other parameters",
    "not kept": "--keep {keep} fits no record",
}


def why_empty(
    job: argparse.Namespace,
    outputs: Sequence[Output],
    reasons: collections.Counter,
    dropped: collections.Counter,
) -> str:
    """What is wrong; "" where there are documents to train on and to hold out.

    `reasons` of what was rejected and `dropped` by filters, counted.
    """
    filled = {split for output in outputs for split in output.shards}
    if len(filled) == len(SPLITS):
        return ""
    if filled:
        return _one_side(job, "train on" if "held_out" in filled else "hold out")
    causes = collections.Counter(reasons)
    causes.update({f"dropped by {kind}": count for kind, count in dropped.items()})
    others = keeping.total(output.not_kept for output in outputs)
    causes.update({f"not kept: {value}": count for value, count in others.items()})
    if not causes:
        return "no document in the files: all are empty"
    (first, _), *_ = most = causes.most_common(3)
    remedies = (text for begin, text in _REMEDIES.items() if first.startswith(begin))
    remedy = next(remedies, "").format(job=job, keep=" ".join(map("=".join, job.keep or ())))
    listed = "; ".join(f"{cause}: {count:,}" for cause, count in most)
    return f"no usable document ({listed})" + (f"; {remedy}" if remedy else "")


def _one_side(job: argparse.Namespace, side: str) -> str:
    if job.held_out_by:
        return f"no usable document to {side}; change --held-out {job.held_out:g}"
    problem = f"no document to {side}: it needs two different ones, one of them held out"
    if job.template:
        return problem
    return f"{problem}; add documents, or cut long texts: --split-on blank-lines, or 64kB"
