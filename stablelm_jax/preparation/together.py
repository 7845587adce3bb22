"""Several sources that lie in the same files, such as components of the Pile, in one read of them.

Each source stays one of its own, with its plan, its held-out rule and its outputs. Reading together
only makes the outputs that the tasks of each would have made, and nothing else: the preparation of
each source then finds them, as after an interruption. So the bytes are the same, and whatever was
killed is gone on with, together or one by one.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

from stablelm_jax.preparation import held_out
from stablelm_jax.preparation.executors import Executor
from stablelm_jax.preparation.prepare_source import Preparation, PreparationError
from stablelm_jax.preparation.tokenize_chunk import TokenizeTogether


def groups(jobs: Sequence[argparse.Namespace]) -> list[list[argparse.Namespace]]:
    """The jobs, those together that may read their files at once."""
    found: dict[Any, list[argparse.Namespace]] = {}
    for job in jobs:
        keys = tuple(dict.fromkeys(key for key, _ in job.keep or ()))
        files = (tuple(job.inputs), job.format, job.text_key, job.split_on, keys)
        is_shared = keys and not (job.sample or job.template)
        found.setdefault(files if is_shared else job.source, []).append(job)
    return list(found.values())


def begin(preparations: Sequence[Preparation]) -> list[bool]:
    """As `begin` of each, which says whether it goes on with earlier work; one look serves all."""
    keeps, seen = [preparation.job.keep for preparation in preparations], []

    def look(cut, reading, *_) -> held_out.Look:
        seen[:] = seen or held_out.look_at_several(cut, reading, keeps)
        return seen[keeps.index(reading.keep)]

    resumed = [preparation.begin(look) for preparation in preparations]
    if any(other.plan.chunks != preparations[0].plan.chunks for other in preparations):
        names = ", ".join(preparation.job.source for preparation in preparations)
        raise PreparationError(
            f"{names}: their files changed while they were begun; prepare one after the other"
        )
    return resumed


def tokenize(preparations: Sequence[Preparation], executor: Executor) -> None:
    """Makes the outputs of all; TasksFailed where some chunk was not done."""
    step = TokenizeTogether([preparation.step() for preparation in preparations])
    preparations[0].run(executor, step, "logs_together")
