"""The device mesh: every run has the axes `replica`, `data` and `model`, also on one device."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh

# Outermost first: what talks least crosses the slowest links. Rows of a batch are split over
# `replica` and `data`, weights and moments over `data`, single layers over `model`.
AXES = ("replica", "data", "model")
BATCH_AXES = ("replica", "data")


def make_mesh(
    data: int = -1,
    model: int = 1,
    devices: Sequence[jax.Device] | None = None,
    *,
    replica: int = 1,
) -> Mesh:
    """A (replica, data, model) mesh over `devices` (default: all of the job's).

    Neighbours along `model`, then along `data`, are neighbours in the machine: GPUs of one host,
    TPU chips of one slice. Several TPU slices are joined along `replica`, then along `data`.

    Args:
      data: size of the `data` axis; -1 takes all devices that the others leave.
      model: size of the `model` axis (tensor parallelism).
      replica: groups of devices that each hold all weights and moments.

    Raises:
      ValueError: the sizes do not use every device exactly once, or would tear `model` apart.
    """
    devices = list(jax.devices() if devices is None else devices)
    if data == -1:
        data = len(devices) // (replica * model)
    shape = (replica, data, model)
    if math.prod(shape) != len(devices):
        raise ValueError(
            f"parallel.replica x parallel.data x parallel.model = {replica} x {data} x {model} = "
            f"{math.prod(shape)}, but there are {len(devices)} devices; set parallel.data=-1 and "
            "a parallel.replica and parallel.model that divide them"
        )
    return Mesh(_in_order(shape, devices), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def sum_over(x: Any, axes: Sequence[str] = BATCH_AXES) -> Any:
    """`jax.lax.psum` of a tree; a sum over one device would be compiled as a copy."""
    axes = tuple(axis for axis in axes if jax.lax.axis_size(axis) > 1)
    return jax.lax.psum(x, axes) if axes else x


def mesh_text(sizes: Mapping[str, int], *, names: bool = True) -> str:
    """The sizes of a mesh for people; `replica` is left out where there is one."""
    shown = {axis: sizes[axis] for axis in AXES if axis != "replica" or sizes[axis] > 1}
    return " x ".join(f"{axis} {size}" if names else str(size) for axis, size in shown.items())


def _in_order(shape: tuple[int, int, int], devices: Sequence[jax.Device]) -> np.ndarray:
    """The devices as an array of `shape`, the nearest ones along the last axis."""
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    if devices[0].platform != "tpu" or slices == 1:  # jax lists GPUs host by host
        return mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    replica, data, model = shape
    outer = math.gcd(replica, slices)
    if data % (slices // outer):
        raise ValueError(
            f"{slices} slices cannot share parallel.replica={replica} x parallel.data={data} "
            f"evenly: use parallel.replica={slices}"
        )
    between = (outer, slices // outer, 1)
    within = (replica // outer, data // between[1], model)
    return mesh_utils.create_hybrid_device_mesh(
        within, between, devices, allow_split_physical_axes=True
    )
