"""How a run begins: resumed from its newest whole checkpoint, as a branch, or from fresh weights.

Which of the three is decided once, in `begin`. The item `run` of the checkpoint is read once; it
says where the run stands in its data, and so what the run is prepared with.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from stablelm_jax import config as config_lib
from stablelm_jax.checkpoint import names, reading
from stablelm_jax.checkpoint.merged import find_parent, parent_of, read_weights
from stablelm_jax.checkpoint.reading import CheckpointError, DamagedCheckpoint
from stablelm_jax.data.position import DataPosition, size_changes
from stablelm_jax.parallel import distributed, sharding
from stablelm_jax.run.folder import git_commit
from stablelm_jax.run.services import Services
from stablelm_jax.training import same_run
from stablelm_jax.training import state as states
from stablelm_jax.training.same_run import ResumeError
from stablelm_jax.training.setup import Run, mixture_of, prepare_run
from stablelm_jax.training.state import TrainState
from stablelm_jax.training.update_guard import guard_to_json, new_guard, without_row

_WEIGHTS_ALONE = "--config.branch.state=weights"
_COUNTS_ROWS_ANEW = ("data.weights", "data.stages", "data.batch_size", "data.batch_stages")


@dataclasses.dataclass(frozen=True)
class ResumeOptions:
    """How a run is to be resumed."""

    strict: bool = False  # a damaged newest checkpoint is an error; else the newest whole is taken
    accept_config_change: bool = False  # in more than harmless fields


@dataclasses.dataclass
class Progress:
    """The part of a run's state that lives on the host."""

    step: int = 0  # updates done, which is also the N of the checkpoint taken now
    rows_consumed: int = 0  # of the mixture; with the data hash the whole data state
    loss_sums: dict[str, Any] | None = None  # `LossSums.state()` at the last save
    # What was accepted on resuming: [{"step", "changes": {key: [was, now]}}].
    config_changes: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    wandb_id: str | None = None  # the run at Weights & Biases
    # Tokens of each source in these rows that `data.skip`, as it was then, left out.
    left_out: dict[str, int] = dataclasses.field(default_factory=dict)
    # {"parent", "parent_hash"}: the checkpoint with the weights under the adapters.
    lora_parent: dict[str, str] = dataclasses.field(default_factory=dict)

    @classmethod
    def of_checkpoint(cls, run: Mapping[str, Any]) -> Progress:
        """That of the run which wrote this item `run`."""
        fields = (field.name for field in dataclasses.fields(cls))
        return cls(**{name: run[name] for name in fields if name in run})

    def move(self, run: Run, steps: int) -> None:
        """Counts so many steps more, or fewer, and their rows."""
        rows = run.first_row(self.step + steps)
        span, sign = sorted((self.rows_consumed, rows)), 1 if steps > 0 else -1
        for name, tokens in run.left_out_tokens(*span).items():
            self.left_out[name] = self.left_out.get(name, 0) + sign * tokens
        self.step, self.rows_consumed = self.step + steps, rows

    def ledger(self, run: Run) -> dict[str, int]:
        """Tokens of each source so far, without what was left out."""
        given = run.tokens_by_source(self.rows_consumed)
        return {name: tokens - self.left_out.get(name, 0) for name, tokens in given.items()}


@dataclasses.dataclass(frozen=True)
class Beginning:
    """What the loop starts with; `resumed`: from a checkpoint of the run's own."""

    run: Run
    state: TrainState
    progress: Progress
    resumed: bool = False


def begin(config: ConfigDict, services: Services, options: ResumeOptions) -> Beginning:
    """Finds what the run in this folder goes on with.

    ValueError: config, data and checkpoint do not fit; nothing of the run is changed then.
    """
    store = services.store
    for name in store.unfinished:
        text = f"{name} was never finished; removed"
        services.events.tell("unfinished_checkpoint", text, name=name)
    if store.steps():
        return _newest_whole(config, services, options)
    beginning = _branch(config, services) if config.branch.parent else _fresh(config, services)
    services.goodput.go_on({})
    return beginning


def _check_length(config: ConfigDict, path: Any, saved: Mapping[str, Any]) -> None:
    """Before the run is prepared: what a run of fewer steps reads cannot be shown."""
    last_step = config.training.num_steps
    if saved["step"] > last_step:
        raise ResumeError(
            f"config.training.num_steps={last_step}, but {path} has step "
            f"{saved['step']} already: give more steps, or another --workdir"
        )


def _newest_whole(config: ConfigDict, services: Services, options: ResumeOptions) -> Beginning:
    """Resumes from the newest checkpoint that is whole; damaged ones get another name."""
    store, damaged = services.store, {}
    for step in reversed(store.steps()):
        path = store.folder / names.checkpoint_name(step)
        beginning, error = None, None
        try:
            beginning = resume(config, path, services, options)
        except DamagedCheckpoint as caught:
            error = caught
        if not distributed.anywhere(error is not None):
            services.events.print(f"resuming from {path}")
            break
        damaged[step] = error or DamagedCheckpoint(f"{path} is damaged on another host")
        if options.strict:
            raise CheckpointError(
                f"{damaged[step]} (--strict: without it the run goes on from the newest whole one)"
            )
    else:
        raise CheckpointError(
            f"no checkpoint in {store.folder} can be read: {'; '.join(map(str, damaged.values()))}."
            " Give one of them back, or move them all away to begin anew"
        )
    for step, error in damaged.items():  # not before another one was read: it might be the disk
        aside = store.set_aside(step)
        services.events.tell(
            "damaged_checkpoint",
            f"{error}; it is now called {aside}, and the run goes on from the newest whole one",
            checkpoint=str(store.folder / names.checkpoint_name(step)),
        )
    return beginning


def _fresh(config: ConfigDict, services: Services) -> Beginning:
    if config.training.objective == "dpo" or config.lora.rank:
        raise config_lib.ConfigError(
            "config.branch.parent='': DPO starts from a model, which is what it compares with, as "
            "LoRA does, which adds to it; set it to a checkpoint, as of an SFT run, with "
            f"{_WEIGHTS_ALONE}"
        )
    run = prepare_run(config)
    services.events.print("starting from fresh weights")
    state = states.init_state(run.model, run.optimizer, run.abstract, config.seed)
    return Beginning(run, state, Progress())


def _branch(config: ConfigDict, services: Services) -> Beginning:
    """From `branch.parent`: all of its state, or its weights alone."""
    parent = distributed.gathered(_parent_of(config))[0]
    saved = reading.read_run(parent)
    position = _branch_position(config, parent, saved)
    if _weights_alone(config, saved):
        return _from_weights(config, services, position, saved)
    if bool(config.lora.rank) != ("lora" in saved):
        trained = "adapters" if "lora" in saved else "all weights"
        raise config_lib.ConfigError(
            f"config.branch.state='all': the run of {parent} trained {trained}, this one does not; "
            f"take its weights alone, with {_WEIGHTS_ALONE}"
        )
    if saved["config"]["training"].get("objective") == "dpo":
        raise config_lib.ConfigError(
            f"config.branch.state='all': the run of {parent} compares with the weights that it "
            "began with, which are not these. Go on in that run's own --workdir, or compare with "
            f"these: take the weights alone, with {_WEIGHTS_ALONE}"
        )
    _check_length(config, parent, saved)
    run = prepare_run(config, position, saved)
    remedy = f"take the weights of {parent} alone, with {_WEIGHTS_ALONE}"
    same_run.check_same_run(saved, run.identity(), remedy)
    with services.goodput.cause("restore"):
        state, progress = _restore(run, parent, saved)
    _tell_branch(services, run, f"a branch of {parent}, from step {progress.step}")
    state, progress = _without_row(state, progress)
    progress = dataclasses.replace(progress, config_changes=[], wandb_id=None)
    return Beginning(run, state, progress)


def _from_weights(
    config: ConfigDict, services: Services, position: DataPosition, saved: Mapping[str, Any]
) -> Beginning:
    """The parent's weights as step 0 of a run of its own: all else begins anew."""
    parent, run = position.parent, prepare_run(config, position, saved)
    changed = same_run.check_same_weights(parent, saved, run.identity(), run.tokenizer)
    with services.goodput.cause("restore"):
        weights = read_weights(parent, saved, run.abstract.base)
    why = "which holds nothing else, " if "imported" in saved else ""
    also = f"; {config_lib.show_changes(changed)}" if changed else ""
    text = f"a branch of the weights of {parent}, {why}step {saved['step']} there: fresh moments, "
    _tell_branch(services, run, f"{text}from step 0 and the beginning of the data{also}")
    if run.lora is None:
        state = states.state_of_weights(run.optimizer, run.abstract, weights)
        return Beginning(run, state, Progress())
    made = run.model, run.optimizer, run.abstract, config.seed, run.lora, weights
    return Beginning(run, states.init_state(*made), Progress(lora_parent=parent_of(parent, saved)))


def _tell_branch(services: Services, run: Run, text: str) -> None:
    at = run.data_position
    named = {"parent": at.parent, "step": at.parent_step, "hash": at.parent_hash}
    services.events.tell("branch", text, **named)


def _parent_of(config: ConfigDict) -> str:
    """The whole path of the checkpoint that `branch.parent` names, as `find_checkpoint` has it."""
    parent = config.branch.parent
    try:
        return str(names.find_checkpoint(parent))
    except ValueError as error:
        raise config_lib.ConfigError(f"config.branch.parent={parent!r}: {error}") from error


def _weights_alone(config: ConfigDict, saved: Mapping[str, Any]) -> bool:
    """Whether a branch takes nothing else; of an imported parent there is nothing else."""
    return config.branch.state == "weights" or "imported" in saved


def _branch_position(config: ConfigDict, parent: str, saved: Mapping[str, Any]) -> DataPosition:
    hashed = reading.state_hash(saved["checksums"])
    named = {"parent": parent, "parent_step": saved["step"], "parent_hash": hashed}
    if _weights_alone(config, saved):
        return DataPosition(**named)
    return DataPosition().moved(saved, **named)


def position_of(config: ConfigDict, workdir: str | None = None) -> DataPosition:
    """The data position of the run in `workdir`, by its newest readable checkpoint.

    Without a folder: that of a run of `config` that has not begun. CheckpointError: the folder, or
    the parent of a branch, has no checkpoint that can be read.
    """
    if not workdir:
        if not config.branch.parent:
            return DataPosition()
        parent = _parent_of(config)
        return _branch_position(config, parent, reading.read_run(parent))
    folder = names.checkpoint_path(workdir) / "checkpoints"
    for step in reversed(names.finished_steps(folder)):
        try:
            return DataPosition.of_checkpoint(
                reading.read_run(folder / names.checkpoint_name(step))
            )
        except DamagedCheckpoint:
            continue  # whoever restores it says so
    raise CheckpointError(f"{workdir}: holds no checkpoint that can be read")


def resume(config: ConfigDict, path: Any, services: Services, options: ResumeOptions) -> Beginning:
    """The run of `config` as it stands at its own checkpoint `path`; writes events and no more.

    Raises DamagedCheckpoint, or another ValueError where config, data and run do not fit.
    """
    saved = reading.read_run(path)
    if "config" not in saved:
        remedy = "no run can go on from it; move it away"
        raise ResumeError(f"{path} was imported and holds weights alone: {remedy}")
    changes = config_lib.config_changes(saved["config"], config)
    if changes and not options.accept_config_change:
        raise ResumeError(
            f"the config is not the one that {path} was trained with: "
            f"{config_lib.show_changes(changes)}; give the old values back, or add "
            "--accept-config-change (it is recorded), or start a branch in another --workdir with "
            f"--config.branch.parent={path}"
        )
    _check_length(config, services.store.folder, saved)
    position = was = DataPosition.of_checkpoint(saved)
    rows_change = any(key.startswith(_COUNTS_ROWS_ANEW) for key in changes)
    if rows_change and not _same_rows_so_far(config, was, saved):
        position = was.moved(saved)
    run = prepare_run(config, position, saved)
    same_run.check_same_run(saved, run.identity())
    with services.goodput.cause("restore"):
        state, progress = _restore(run, path, saved)
    services.goodput.go_on(saved.get("timers") or {"seconds": {"step": saved["train_seconds"]}})
    if position != was:
        state, progress = _without_row(state, progress)
    if changes:
        progress.config_changes.append({"step": progress.step, "changes": changes})
        text = f"config changed at step {progress.step}: {config_lib.show_changes(changes)}"
        services.events.tell("config_changed", text, **changes)
    if rounding := config_lib.rounding_changes(saved["config"], config):
        services.events.print(
            f"{', '.join(rounding)} changed: losses go on to rounding, not bit for bit"
        )
    return Beginning(run, state, progress, resumed=True)


def _same_rows_so_far(config: ConfigDict, position: DataPosition, saved: Mapping[str, Any]) -> bool:
    """Whether rows are counted as before: only weights and batches of later steps are new."""
    rows, was = saved["rows_consumed"], config_lib.from_dict(saved["config"])
    sizes = [
        size_changes(config_lib.batch_sizes(c), position.step, saved["step"]) for c in (was, config)
    ]
    spans = [list(span) for span in mixture_of(config, position).spans]
    before, after = (same_run.begun_before(s, rows) for s in (saved["row_order"]["stages"], spans))
    return sizes[0] == sizes[1] and before == after


def _restore(run: Run, path: Any, saved: Mapping[str, Any]) -> tuple[TrainState, Progress]:
    """State and progress of the checkpoint at `path`, placed on this run's mesh.

    DamagedCheckpoint: its arrays are not what `saved`, its item `run`, says.
    """
    arrays = reading.read_arrays(path, states.stored_arrays(run.abstract), saved)
    guard = {name: jnp.float32(saved.get("guard", {}).get(name, 0.0)) for name in new_guard()}
    step, guard = jax.device_put((jnp.int32(saved["step"]), guard), sharding.replicated(run.mesh))
    progress = Progress.of_checkpoint(saved)
    state = states.from_arrays(arrays, step, guard)
    if run.lora:
        state = dataclasses.replace(state, frozen=_under_adapters(run, path, saved, progress))
    return state, progress


def _under_adapters(run: Run, path: Any, saved: Mapping[str, Any], progress: Progress) -> Any:
    """The frozen weights of a checkpoint of adapters; `progress` learns where they are now."""
    parent, weights = find_parent(path, saved, run.config.branch.parent)
    progress.lora_parent = parent_of(parent, weights)
    try:
        return read_weights(parent, weights, run.abstract.frozen)
    except DamagedCheckpoint as error:  # not this checkpoint, which an older one cannot replace
        raise CheckpointError(str(error)) from error


def _without_row(state: TrainState, progress: Progress) -> tuple[TrainState, Progress]:
    """Forgets updates left out in a row, which would lead back before a run's own first step."""
    row = ("in_a_row", "before_row")  # keys of `LossSums.state()`
    sums = {k: v for k, v in (progress.loss_sums or {}).items() if k not in row}
    return (
        dataclasses.replace(state, guard=without_row(state.guard)),
        dataclasses.replace(progress, loss_sums=sums or None),
    )


def run_item(
    run: Run, state: TrainState, progress: Progress, loss_sums: Any, timers: Mapping[str, Any]
) -> dict[str, Any]:
    """A checkpoint's item `run`: enough to go on, and to use the weights without the run.

    `timers`: `Goodput.record()`.
    """
    item = run.identity() | {
        "step": progress.step,
        "rows_consumed": progress.rows_consumed,
        "tokens": progress.ledger(run),
        "train_seconds": timers["seconds"]["step"] + timers["seconds"]["data_wait"],
        "timers": timers,
        "loss_sums": loss_sums,
        "guard": guard_to_json(state.guard),
        "origin": dataclasses.asdict(run.data_position),
        "config_changes": progress.config_changes,
        "wandb_id": progress.wandb_id,
        "config": config_lib.to_dict(run.config),
        "git_commit": git_commit(),
    }
    if run.chat:
        item["chat"] = run.chat.to_json()
    if run.lora:
        item["lora"] |= progress.lora_parent
    if progress.left_out:
        item["left_out"] = progress.left_out
    return item
