"""Why a source, or one side of it, came out without a document, and what to do."""

from __future__ import annotations

import argparse
import collections
import pathlib
from collections.abc import Sequence

from stablelm_jax.preparation import keeping
from stablelm_jax.preparation.outputs import SPLITS, Output

# What helps against a reason, by its beginning: the longer beginnings first.
_REMEDIES = {
    "no key to hold out by": "--held-out-by {job.held_out_by} is no key of the records",
    "no key": "--text-key names the key",
    "no column": "--text-key names the key",
    "a conversation": "--template zephyr, chatml, tokenizer or a Jinja file takes them",
}


def why_empty(
    job: argparse.Namespace,
    outputs: Sequence[Output],
    reasons: collections.Counter,
    dropped: collections.Counter,
    directory: pathlib.Path,
) -> str:
    """What is wrong; "" where there are documents to train on and to hold out.

    `reasons` of what was rejected and `dropped` by filters, counted; `directory`: of the source.
    """
    filled = {split for output in outputs for split in output.shards}
    if len(filled) == len(SPLITS):
        return ""
    if filled:
        problem = _one_side(job, "train on" if "held_out" in filled else "hold out")
    elif job.keep and not any(output.kept for output in outputs):
        seen = ", ".join(keeping.total(output.not_kept for output in outputs))
        kept = " ".join(map("=".join, job.keep))
        problem = f"no record is kept by --keep {kept}; there are: {seen or 'no records at all'}"
    elif dropped:
        ((kind, count),) = dropped.most_common(1)
        problem = (
            f"no document is left: the filters dropped {dropped.total():,}, {count:,} of them by"
            f' "{kind}"; look at some with --show-dropped {directory}, and give --language or other'
            " parameters"
        )
    elif not reasons:
        return "no document in the files: all are empty"
    else:
        ((reason, count),) = reasons.most_common(1)
        problem = f'no usable document: {reasons.total()} rejected, {count} of them "{reason}"'
        found = (said for begin, said in _REMEDIES.items() if reason.startswith(begin))
        if remedy := next(found, ""):
            problem += f"; {remedy.format(job=job)}"
    listed = f" (what was rejected is listed in {directory / 'rejected.jsonl'})" if reasons else ""
    return problem + listed


def _one_side(job: argparse.Namespace, side: str) -> str:
    if job.held_out_by:
        return f"no usable document to {side}; change --held-out {job.held_out:g}"
    problem = f"no document to {side}: it needs two different ones, one of them held out"
    if job.template:
        return problem
    return f"{problem}; add documents, or cut long texts: --split-on blank-lines, or 64kB"
