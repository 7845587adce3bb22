"""Reading checkpoints: nothing damaged is ever taken for whole."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts
from etils import epath

from stablelm_jax.checkpoint.checksum import checksums, fetch_checksums, gathered, shares
from stablelm_jax.checkpoint.names import REMEDY, checkpoint_path, checkpoint_step
from stablelm_jax.model.parameters import flatten, nest
from stablelm_jax.storage.files import what_is
from stablelm_jax.storage.remote import described, is_url, retried

FORMAT_VERSION = 2
_READERS = 4  # leaves that are read at once, and so held by the host
_ELSE = "use another checkpoint"
_OF_THE_HOST = ("RESOURCE_EXHAUSTED", "PERMISSION_DENIED", "Too many open files")


class CheckpointError(ValueError):
    """A checkpoint is missing, damaged or of another format."""


class DamagedCheckpoint(CheckpointError):
    """It was whole once, and is no longer."""


def read_run(path: epath.PathLike) -> dict[str, Any]:
    """The item `run` of the checkpoint folder `path`.

    Raises:
      DamagedCheckpoint: its bytes have changed, or it cannot be read.
      CheckpointError: not a finished checkpoint, or of another format.
    """
    path = checkpoint_path(path)
    what = "" if is_url(path) else what_is(path)
    if what not in ("", "a folder") and checkpoint_step(path.name) is not None:
        raise DamagedCheckpoint(f"{path} is {what}; {_ELSE}")
    if checkpoint_step(path.name) is None or not retried(f"looking for {path}", path.exists):
        raise CheckpointError(f"{path} is not a checkpoint; {REMEDY}")
    if not ocp.path.step.is_path_finalized(path):
        raise CheckpointError(f"{path} was never finished; use an earlier checkpoint")
    try:
        text = retried(f"reading {path}", lambda: (path / "run/metadata").read_text("utf-8"))
        run = json.loads(text)
    except (ValueError, FileNotFoundError) as error:
        raise DamagedCheckpoint(f"{path} cannot be read: {described(error)}; {_ELSE}") from error
    except OSError as error:  # the disk or the mount, which may come back
        raise CheckpointError(f"{path} cannot be read: {described(error)}") from error
    version = run.get("format_version") if isinstance(run, dict) else None
    whole = version is not None and run == sealed(run)
    # Format 1 had no seal: a record that has one, but calls itself 1, is a damaged one of format 2.
    if (whole and version != FORMAT_VERSION) or (version == 1 and "seal" not in run):
        raise CheckpointError(
            f"{path}: format_version {version}, but this program reads {FORMAT_VERSION}; use the "
            "version of stablelm_jax that wrote it"
        )
    if not whole:
        why = "run/metadata does not match its own checksum"
        raise DamagedCheckpoint(f"{path} is damaged: {why}; {_ELSE}")
    if run.get("step", checkpoint_step(path.name)) != checkpoint_step(path.name):
        raise CheckpointError(f"{path} holds step {run['step']}: give it back its own name")
    return run


def sealed(run: Mapping[str, Any]) -> dict[str, Any]:
    """`run` with the sha256 of all else in it under 'seal': a changed digit is noticed."""
    values = {key: value for key, value in run.items() if key != "seal"}
    text = json.dumps(values, sort_keys=True)
    return {**values, "seal": hashlib.sha256(text.encode()).hexdigest()}


def read_arrays(path: epath.PathLike, abstract: dict[str, Any], run: dict[str, Any]) -> Any:
    """The items named in `abstract` ({"params": tree, ...} of `ShapeDtypeStruct`s, placed as
    their shardings say), each leaf compared with its checksum in `run`.

    Raises:
      DamagedCheckpoint: a leaf is missing, has another shape, or its bits have changed.
    """
    path, context, wanted = checkpoint_path(path), _context(), flatten(abstract)
    here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    leaves, started = {}, {}

    def read(name: str, like: jax.ShapeDtypeStruct) -> jax.Array:
        stored, parts = _open(path, name, like.shape, like.dtype, context), {}

        def part(device, index):  # devices that hold the same one share one reading
            key = str(index)
            if key not in parts:
                parts[key] = stored[index].read().result()
            found = jax.device_put(parts[key], device)
            if device.platform == "cpu" and found.unsafe_buffer_pointer() == parts[key].ctypes.data:
                # The host's memory, taken as it is. No later step could write there, so the first
                # one would need room for a second state.
                found = jnp.copy(found)
            return found

        sharding = like.sharding or here
        indices = sharding.addressable_devices_indices_map(like.shape)
        on_devices = [part(device, index) for device, index in indices.items()]
        return jax.make_array_from_single_device_arrays(like.shape, sharding, on_devices)

    with _refused(path), ThreadPoolExecutor(_READERS) as pool:
        # The devices sum a leaf while the next ones are read.
        for name, leaf in zip(wanted, pool.map(read, wanted, wanted.values())):
            leaves[name], started[name] = leaf, shares(leaf)
    _compare(path, run["checksums"], fetch_checksums(gathered(started)))
    return nest(leaves)


def read_leaves(
    path: epath.PathLike, shapes: Mapping[str, tuple[int, ...]], run: dict[str, Any]
) -> Iterator[tuple[str, np.ndarray]]:
    """The float32 parameters of these names and shapes; the host holds one at a time.

    Checked, and refused, as by `read_arrays`.
    """
    path, context = checkpoint_path(path), _context()
    for name, shape in shapes.items():
        with _refused(path):
            leaf = _open(path, f"params/{name}", shape, "float32", context).read().result()
        _compare(path, run["checksums"], checksums({f"params/{name}": jax.device_put(leaf)}))
        yield name, leaf


def _context() -> ts.Context:
    """What the leaves of one reading share: the index of what lies where."""
    return ts.Context({"cache_pool": {"total_bytes_limit": 10**8}})


def _open(
    path: epath.Path, name: str, shape: tuple[int, ...], dtype: Any, context: ts.Context
) -> ts.TensorStore:
    """The stored leaf "ITEM/a/b" of a checkpoint, as Orbax lays it out."""
    item, _, leaf = name.partition("/")
    scheme, _, place = f"{path / item}/".rpartition("://")
    base = {"driver": "file", "path": place}
    if scheme:
        bucket, _, key = place.partition("/")
        base = {"driver": "gcs", "bucket": bucket, "path": key}
    store = {"driver": "ocdbt", "base": base, "path": leaf.replace("/", ".")}
    spec = {"driver": "zarr", "kvstore": store, "fill_missing_data_reads": False}
    stored = ts.open(spec, open=True, read=True, context=context).result()
    if (stored.shape, stored.dtype.numpy_dtype) != (shape, np.dtype(dtype)):
        what = f"{stored.dtype.name} {stored.shape}"
        raise ValueError(f"{name} is {what}, not {np.dtype(dtype)} {shape}")
    return stored


@contextlib.contextmanager
def _refused(path: epath.Path) -> Iterator[None]:
    """What fails inside becomes a CheckpointError."""
    try:
        yield
    except Exception as error:  # from tensorstore or the device
        # Too little memory or a missing permission is not the checkpoint's fault: another start
        # may read it. Of several processes each reads its own part, while the others wait for
        # its sums. There a person decides; else the run goes on from an older one.
        ends = isinstance(error, MemoryError | PermissionError) or jax.process_count() > 1
        ends = ends or any(text in str(error) for text in _OF_THE_HOST)
        kind = CheckpointError if ends else DamagedCheckpoint
        raise kind(f"{path} cannot be read: {described(error)}; {_ELSE}") from error


def _compare(path: epath.Path, recorded: dict[str, int], found: dict[str, int]) -> None:
    if changed := sorted(name for name in found if found[name] != recorded.get(name)):
        named = ", ".join(changed[:5]) + (" and others" if len(changed) > 5 else "")
        raise DamagedCheckpoint(
            f"{path} is damaged: the bits of {named} do not match their checksums; {_ELSE}"
        )


def state_hash(recorded: Mapping[str, int]) -> str:
    """One sha256 for all arrays that have these checksums: two states with one hash are equal."""
    return hashlib.sha256(json.dumps(dict(sorted(recorded.items()))).encode()).hexdigest()
