"""Where the program that is being traced will run."""

from __future__ import annotations

import jax
from jax.sharding import AxisType


def traced_device():
    """A device with the `platform` ("gpu") and `device_kind` ("NVIDIA H200") the trace is for.

    Inside `jax.shard_map` it is that of the mesh, which may be a machine that is not here.
    """
    mesh = jax.sharding.get_abstract_mesh()
    return getattr(mesh, "abstract_device", None) or jax.devices()[0]


def compilers_axes() -> dict[str, int]:
    """The mesh axes, and their sizes, that are left to the compiler where the trace is.

    Those of one device too: for TPUs, a kernel is an error while any axis is the compiler's.
    """
    mesh = jax.sharding.get_abstract_mesh()
    kinds = zip(mesh.axis_names, mesh.axis_types)
    return {name: mesh.shape[name] for name, kind in kinds if kind == AxisType.Auto}
