"""The device mesh: every run has the axes `data` and `model`, also on one device."""

from __future__ import annotations

from collections.abc import Sequence

import jax
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh

AXES = ("data", "model")


def make_mesh(data: int = -1, model: int = 1, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A (data, model) mesh over `devices` (default: all of the job's).

    Args:
      data: size of the `data` axis; -1 takes all devices that `model` leaves.
      model: size of the `model` axis (tensor parallelism).

    Raises:
      ValueError: the sizes do not use every device exactly once.
    """
    devices = list(jax.devices() if devices is None else devices)
    if data == -1:
        data = len(devices) // model
    if data * model != len(devices):
        raise ValueError(
            f"parallel.data x parallel.model = {data} x {model} = {data * model}, but there are "
            f"{len(devices)} devices; set parallel.data=-1 and a parallel.model that divides them"
        )
    grid = mesh_utils.create_device_mesh((data, model), devices, allow_split_physical_axes=True)
    return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))
