"""Writing and reading checkpoints.

A checkpoint `global_step<N>` has three items: `params` (float32, plain nested dict under the names
of the parameter table), `optimizer` (`m`, `v` under the same names, and `count`) and `run` (JSON:
what else is needed to go on, evaluate or convert). Nothing in it depends on flax or optax classes,
on the mesh or on the number of hosts.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import orbax.checkpoint as ocp
from etils import epath
from orbax.checkpoint.checkpoint_managers import preservation_policy

from stablelm_jax.checkpoint.checksum import checksums, differing, flatten
from stablelm_jax.checkpoint.names import (
    GlobalStepFormat,
    branch_name,
    branch_step,
    checkpoint_path,
)
from stablelm_jax.data.remote import retried

FORMAT_VERSION = 1
ITEMS = ("params", "optimizer", "run")


class CheckpointError(ValueError):
    """A checkpoint is missing, damaged or of another format."""


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """What is saved: `params` and `optimizer` arrays, `run` plain JSON values."""

    params: Any
    optimizer: Any
    run: dict[str, Any]


class CheckpointStore:
    """The folder `checkpoints/` of a run."""

    def __init__(self, folder: epath.PathLike, *, keep_latest: int, keep_every: int | None = None):
        """Opens (and makes) `folder`.

        Args:
          keep_latest: how many of the newest checkpoints stay.
          keep_every: checkpoints whose step is a multiple of this stay for good.
        """
        self.folder = checkpoint_path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        keep = [preservation_policy.LatestN(n=keep_latest)]
        if keep_every:
            keep.append(preservation_policy.EveryNSteps(keep_every))
        self._manager = ocp.CheckpointManager(
            self.folder,
            item_names=ITEMS,
            options=ocp.CheckpointManagerOptions(
                step_name_format=GlobalStepFormat(),
                preservation_policy=preservation_policy.AnyPreservationPolicy(keep),
                cleanup_tmp_directories=True,
                enable_async_checkpointing=True,
            ),
        )

    def steps(self) -> list[int]:
        """Steps of the finished checkpoints, ascending."""
        return sorted(self._manager.all_steps())

    def latest(self) -> int | None:
        """Step of the newest finished checkpoint."""
        return max(self.steps(), default=None)

    def save(self, step: int, checkpoint: Checkpoint) -> None:
        """Starts to write `global_step<step>`; the arrays are free for donation on return."""
        arrays = {"params": checkpoint.params, "optimizer": checkpoint.optimizer}
        run = {"format_version": FORMAT_VERSION, **checkpoint.run, "checksums": checksums(arrays)}
        self._manager.save(
            step,
            args=ocp.args.Composite(
                params=ocp.args.StandardSave(checkpoint.params),
                optimizer=ocp.args.StandardSave(checkpoint.optimizer),
                run=ocp.args.JsonSave(run),
            ),
        )

    def wait(self) -> None:
        """Returns when all that was saved is finished; raises what a save raised."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits and releases the threads."""
        self._manager.close()


def read_run(path: epath.PathLike) -> dict[str, Any]:
    """The item `run` of the checkpoint folder `path`.

    Raises:
      CheckpointError: not a finished checkpoint, or of a newer format.
    """
    path = _finished(path)
    run = _restore(path, {"run": ocp.args.JsonRestore()})["run"]
    if run.get("format_version") != FORMAT_VERSION:
        raise CheckpointError(
            f"{path}: format_version {run.get('format_version')}, but this program reads "
            f"{FORMAT_VERSION}; use the version of stablelm_jax that wrote it"
        )
    return run


def read_arrays(path: epath.PathLike, abstract: dict[str, Any], run: dict[str, Any]) -> Any:
    """The items named in `abstract` ({"params": tree, ...} of `ShapeDtypeStruct`s, placed as
    their shardings say), each leaf compared with its checksum in `run`.

    Raises:
      CheckpointError: a leaf is missing, has another shape, or its bits have changed.
    """
    path = _finished(path)
    wanted = {name: ocp.args.StandardRestore(tree) for name, tree in abstract.items()}
    restored = _restore(path, wanted)
    arrays = {name: restored[name] for name in abstract}
    _verify(path, arrays, run["checksums"])
    return arrays


def _restore(path: epath.Path, items: dict[str, Any]) -> Any:
    with ocp.Checkpointer(ocp.CompositeCheckpointHandler(*items)) as reader:
        try:
            return reader.restore(path, args=ocp.args.Composite(**items))
        except (ValueError, KeyError, OSError) as error:
            raise CheckpointError(
                f"{path} cannot be read: {_first_line(error)}; use another checkpoint (remove this "
                "folder to resume from the one before)"
            ) from error


def _verify(path: epath.Path, arrays: dict[str, Any], recorded: dict[str, int]) -> None:
    expected = {name: recorded.get(name) for name in flatten(arrays)}
    changed = differing(expected, checksums(arrays))
    if changed:
        raise CheckpointError(
            f"{path} is damaged: the bits of {', '.join(changed[:5])}"
            f"{' and others' if len(changed) > 5 else ''} do not match their checksums; "
            "use another checkpoint (remove this folder to resume from the one before)"
        )


def _finished(path: epath.PathLike) -> epath.Path:
    path = checkpoint_path(path)
    if branch_step(path.name) is None or not retried(f"looking for {path}", path.exists):
        raise CheckpointError(
            f"{path} is not a checkpoint; give the path of a folder named {branch_name(1000)!r} "
            "or the like, as found under WORKDIR/checkpoints/"
        )
    if not ocp.path.step.is_path_finalized(path):
        raise CheckpointError(f"{path} was never finished; use an earlier checkpoint")
    return path


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0][:300] if str(error) else type(error).__name__
