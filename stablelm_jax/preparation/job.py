"""What is asked for of a source, by flags or a recipe, and what its bytes follow from."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from typing import Any

from stablelm_jax.data.manifest import SOURCE_NAME
from stablelm_jax.preparation import filters, store
from stablelm_jax.preparation.contamination import Benchmarks
from stablelm_jax.preparation.finding import InputFile
from stablelm_jax.preparation.held_out import MAX_FRACTION
from stablelm_jax.preparation.inputs import fingerprint
from stablelm_jax.storage.remote import is_url
from stablelm_jax.tokenizer.chat import chat_template
from stablelm_jax.tokenizer.tokenizer import Tokenizer

# Changes when the same inputs and settings would give other bytes.
RECIPE = 3


def job_of(flags: argparse.Namespace, source: str) -> argparse.Namespace:
    """The flags of `prepare` for a source, checked; ValueError for what argparse cannot see.

    `inputs` are prefixes of tokenised files where `adopt` says so.
    """
    for is_wrong, problem in [
        (bool(flags.inputs) == bool(flags.adopt), "give --input, or --adopt in its place"),
        (
            str(flags.output).startswith("memory://"),
            "--output: memory:// is gone with this process; give a folder or a bucket",
        ),
        (
            flags.work_folder and not is_url(flags.output),
            "--work-folder: --output is a folder of this machine, where the work lies too",
        ),
        (
            not SOURCE_NAME.fullmatch(source),
            "--source: use lower case letters, digits and _, a letter first",
        ),
        (not 0 <= flags.held_out <= MAX_FRACTION, f"--held-out: give 0 to {MAX_FRACTION}"),
        (flags.sample is not None and flags.sample < 2, "--sample: from 2 documents up"),
    ]:
        if is_wrong:
            raise ValueError(problem)
    for name in ("max_turns", "max_tokens", "shard_tokens"):
        if (number := getattr(flags, name)) is not None and number < 1:
            raise ValueError(f"--{name.replace('_', '-')}: give a number from 1 up")
    given = {"inputs": flags.inputs or flags.adopt, "provenance": dict(flags.provenance)}
    # Another name, and it is no source of the config: never taken for the whole.
    given["source"] = f"{source}_sample" if flags.sample else source
    if is_url(flags.output):  # where the source is sent once it is made
        given["store"] = flags.output
        given["output"] = flags.work_folder or str(store.work_folder(flags.output))
    return argparse.Namespace(**{**vars(flags), **given})


def settings_of(
    job: argparse.Namespace,
    files: Sequence[InputFile],
    tokenizer: Tokenizer,
    benchmarks: Benchmarks | None,
) -> dict[str, Any]:
    """All that the bytes of a source follow from, as its plan and its manifest keep it.

    What not every source has is there only where it is asked for. ValueError: filters or a
    template that cannot be used.
    """
    always = "format text_key split_on held_out shard_tokens languages licence provenance".split()
    found = {
        "recipe": RECIPE,
        "inputs_sha256": fingerprint(files),
        "tokenizer_sha256": tokenizer.sha256,
        **{name: getattr(job, name) for name in always},
    }
    if job.append_eod:
        found["append_eod"] = True
    if job.template:
        found |= {"max_turns": job.max_turns, "max_tokens": job.max_tokens}
    asked = {
        "held_out_by": job.held_out_by,
        "keep": job.keep,
        "sample": job.sample,
        "filters": filters.in_full(job.filters, job.languages),
        "benchmarks": benchmarks and {"sha256": benchmarks.sha256, "drop": job.drop_contaminated},
        "chat": job.template and chat_template(job.template, tokenizer).to_json(),
    }
    return found | {name: value for name, value in asked.items() if value}


def difference(ours: Mapping[str, Any], theirs: Mapping[str, Any], named: Mapping[str, str]) -> str:
    """The first setting that is not `theirs`, in words; "" where all are.

    `named`: words for some. `theirs` of a plan holds the kind of source too.
    """
    named = {
        **named,
        "tokenizer_sha256": "tokenizer",
        "chat": "chat template",
        "filters": "filters, parameters of them, or versions of what they run on",
    }
    for name in dict.fromkeys(["chat", *ours, *theirs]):
        then, now = theirs.get(name), ours.get(name)
        if then != now and name != "kind":
            return named.get(name, f"{name} ({then!r}, not {now!r})")
    return ""
