"""Whether a checkpoint belongs to a run: what may differ where one goes on from the other."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from etils import epath

from stablelm_jax import config as config_lib
from stablelm_jax.checkpoint.saved_model import load_own_tokenizer
from stablelm_jax.config.access import IDENTITY, within
from stablelm_jax.config.tree import FIELDS
from stablelm_jax.tokenizer.tokenizer import Tokenizer

# Fields of a model that none of its weights depends on.
_NOT_OF_THE_WEIGHTS = ("model.rotary_theta", "model.init_std")


class ResumeError(ValueError):
    """The checkpoint belongs to another run."""


def check_same_run(
    saved: Mapping[str, Any],
    current: Mapping[str, Any],
    remedy: str = "another --workdir to start anew",
) -> None:
    """Refuses a checkpoint whose model, data or row order is not this run's.

    `saved` is the checkpoint's item `run`, `current` what this run would write. The ResumeError
    names each difference; `remedy`: what else can be done than to give back what it started with.
    """
    found = config_lib.differing(_as_fields(saved), _as_fields(current))
    differences = [config_lib.show_changes(found)] if found else []
    if saved["tokenizer_sha256"] != current["tokenizer_sha256"]:
        was, now = saved["tokenizer_sha256"], current["tokenizer_sha256"]
        differences.append(f"tokenizer_sha256 was {was[:12]}, now {now[:12]}")
    now = current["source_hashes"]  # a source that comes later, in a new stage, is no change
    differences += [
        f"data_hash of source {name!r} was {was[:12]}, now {now.get(name, 'missing')[:12]}"
        for name, was in saved["source_hashes"].items()
        if now.get(name) != was
    ]
    rows = saved["rows_consumed"]  # which weights come after them is a field like others
    before, after = (begun_before(item["row_order"]["stages"], rows) for item in (saved, current))
    if before != after:
        differences.append(
            f"row_order of the first {rows} rows was {before}, now {after} (rows of each source; "
            "new weights begin at a later step: config.data.stages)"
        )
    if differences:
        raise ResumeError(
            f"the checkpoint belongs to another run: {'; '.join(differences)}; give back the "
            f"settings and the data it started with, or {remedy}"
        )


def check_same_weights(
    parent: epath.PathLike, saved: Mapping[str, Any], current: Mapping[str, Any], own: Tokenizer
) -> dict[str, list[Any]]:
    """Refuses a parent whose weights do not fit this run's model and the ids of its tokens.

    `saved` is the parent's item `run`, `current` and `own` are what this run would write there and
    its tokenizer. Returns {key of the config: [was, now]} of what differs in the model, as it may;
    the ConfigError names each difference that may not be.
    """
    found = config_lib.differing(_as_fields(saved), _as_fields(current))
    found = {key: change for key, change in found.items() if key.startswith("model.")}
    allowed = {key: found.pop(key) for key in _NOT_OF_THE_WEIGHTS if key in found}
    if found:
        raise config_lib.ConfigError(
            f"the weights of {parent} are of another model: {config_lib.show_changes(found)}; give "
            "the values that they were trained with, or another config.branch.parent"
        )
    if own.sha256 != saved["tokenizer_sha256"]:
        _check_ids(parent, saved, own)
    return allowed


def _check_ids(parent: epath.PathLike, saved: Mapping[str, Any], own: Tokenizer) -> None:
    """Two files may hold one vocabulary: a tokenizer.json of Arcade100k, as exports have it."""
    put = f"put its tokenizer.json into {parent}, whose ids this run's tokenizer is to have"
    try:
        theirs = load_own_tokenizer(parent, saved, remedy=put).vocabulary()
    except ValueError as error:
        raise config_lib.ConfigError(f"config.data.tokenizer={own.name!r}: {error}") from error
    if changed := config_lib.differing(theirs, own.vocabulary()):
        some = "; ".join(f"{t!r} was {was}, now {now}" for t, (was, now) in [*changed.items()][:3])
        raise config_lib.ConfigError(
            f"config.data.tokenizer={own.name!r}: {len(changed)} tokens have other ids than in the "
            f"tokenizer of {parent} ({some}); name that one, and prepare the data with it"
        )


def _as_fields(item: Mapping[str, Any]) -> dict[str, Any]:
    """What an item `run` is of, by field of the config; one that it lacks is newer: the default."""
    found = {key: field.default for key, field in FIELDS.items() if within(key, IDENTITY)}
    parts = {"model": "model_config", "data": "row_order", "lora": "lora", "optimizer": "optimizer"}
    for group, part in parts.items():
        found |= {f"{group}.{name}": value for name, value in item.get(part, {}).items()}
    for name in ("data.stages", "lora.parent", "lora.parent_hash"):  # compared otherwise
        found.pop(name, None)
    found["seed"] = found.pop("data.seed", None)  # imports have none
    return found


def begun_before(stages: Any, rows: int) -> list[Any]:
    """The stages that began before row `rows`."""
    return [[row, counts] for row, counts in stages if row < rows]
