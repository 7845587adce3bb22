"""`report --fit`: what the runs of a ladder foretell of the large model, and how sure that is."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from rich.table import Table

from stablelm_jax import config as config_lib
from stablelm_jax.model.config import STABLELM_2_1_6B
from stablelm_jax.model.parameters import count_parameters
from stablelm_jax.reporting.paired import LEVEL
from stablelm_jax.reporting.recorded import RecordedRun
from stablelm_jax.reporting.scaling_law import Fit, Run, fit
from stablelm_jax.run.console import make_console
from stablelm_jax.storage.files import check_writable, write_json

_TOKENS = 2e12  # what the 1.6B read in each of its passes (technical report)
_NEAR = 10.0  # ours: an extrapolation by more is called one not to build on
_KINDS = {
    "all": "all five values are fitted",
    "exponents": "too few runs for five values: the exponents are the published ones",
    "shape": "too few runs, or all of as many tokens a parameter: but for E and a factor of the "
    "rest the law is the published one",
}


def show_fit(folders: Sequence[str], file: str | None = None) -> None:
    """Prints the law of finished runs, and what it foretells; the JSON `file` gets it too.

    Raises ValueError where the runs do not tell one: unfinished, of one size, of other data.
    """
    if file:
        check_writable(Path(file))
    records = [RecordedRun(folder) for folder in folders]
    _check_alike(records)
    runs = [_end(record) for record in records]
    found, console = fit(runs), make_console(file_width=120)
    vocabulary = records[0].config["model.vocab_size"]
    target = count_parameters(dataclasses.replace(STABLELM_2_1_6B, vocab_size=vocabulary))
    console.print(_table(runs, found))
    texts = [*_law_text(found), _foretold(found, target), *_trust(runs, found, target)]
    for text in texts:
        console.print(text, soft_wrap=True)
    if file:
        ends = [dataclasses.asdict(run) for run in runs]
        at = {"parameters": target, "tokens": _TOKENS, "loss": found.loss(target, _TOKENS)}
        at["interval"] = found.interval(target, _TOKENS)
        law = {"kind": found.kind, "values": found.values, "error": found.error}
        write_json(Path(file), {"runs": ends, "law": law, "foretold": at, "notes": texts})


def _check_alike(records: Sequence[RecordedRun]) -> None:
    """Their losses have to be those of one text in one tokenizer."""
    first = records[0]

    def text(run: RecordedRun) -> list[object]:
        found = [run.item.get(key) for key in ("tokenizer_sha256", "source_hashes")]
        return [*found, run.config.get("evaluation.max_rows"), run.order()["sequence_length"]]

    for other in records[1:]:
        if text(other) != text(first):
            raise ValueError(
                f"{first.folder} and {other.folder} are not scored on the same held-out text "
                "(tokenizer, data, sequence length, evaluation.max_rows): fit runs that are"
            )


def _end(record: RecordedRun) -> Run:
    """Only ends count: before, the learning rate has not fallen yet, and so neither has the loss
    to where a run of so many tokens ends (Hoffmann et al., 2022, section 3.1)."""
    losses = record.curves["eval/loss"]
    if record.step < record.planned_steps or not losses or losses.steps[-1] != record.step:
        raise ValueError(
            f"{record.folder}: no held-out loss at its end, step {record.planned_steps:,}; finish "
            "it, or leave it out: only the ends of runs compare"
        )
    parameters = count_parameters(config_lib.model_config(config_lib.from_dict(record.tree)))
    return Run(str(record.folder), parameters, record.tokens_at(record.step), losses.values[-1])


def _table(runs: Sequence[Run], found: Fit) -> Table:
    table = Table(title="ends of runs", title_justify="left")
    for column in ("run", "parameters", "tokens", "a parameter", "loss", "of the law"):
        table.add_column(column, justify="left" if column == "run" else "right")
    for run in runs:
        table.add_row(
            run.name,
            f"{run.parameters:,.3g}",
            f"{run.tokens:,.3g}",
            f"{run.tokens / run.parameters:.3g}",
            f"{run.loss:.4f}",
            f"{found.loss(run.parameters, run.tokens):.4f}",
        )
    return table


def _law_text(found: Fit) -> list[str]:
    value = found.values
    law = "L = {E:.4g} + {A:.4g} / N^{a:.4g} + {B:.4g} / D^{b:.4g}".format(**value)
    error = "none to be seen" if found.error is None else f"{found.error:.2%}"
    return [f"{law}: {_KINDS[found.kind]}.", f"Error of a loss about the law: {error}."]


def _foretold(found: Fit, target: float) -> str:
    interval = found.interval(target, _TOKENS)
    spread = "no interval" if interval is None else "{:.3f} to {:.3f}".format(*interval)
    loss = found.loss(target, _TOKENS)
    place = f"{target:.3g} parameters and {_TOKENS:.3g} tokens"
    return f"Foretold for {place}: {loss:.3f} nats a token, {LEVEL:.0%} interval {spread}."


def _trust(runs: Sequence[Run], found: Fit, target: float) -> list[str]:
    """How far from the runs that is."""
    further = target / max(run.parameters for run in runs)
    longer = _TOKENS / max(run.tokens for run in runs)
    far = max(further, longer) > _NEAR
    verdict = "not to be built on" if far else "within reach"
    return [
        f"That is {further:,.3g} times the most parameters and {longer:,.3g} times the most tokens "
        f"of {len(runs)} runs: {verdict}.",
        "The interval is of the noise about this law; that another law holds so far away is not in"
        " it, nor other data.",
    ]
