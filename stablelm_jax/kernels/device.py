"""Where the program that is being traced will run."""

from __future__ import annotations

import jax


def traced_device():
    """A device with the `platform` ("gpu") and `device_kind` ("NVIDIA H200") the trace is for.

    Inside `jax.shard_map` it is that of the mesh, which may be a machine that is not here.
    """
    mesh = jax.sharding.get_abstract_mesh()
    return getattr(mesh, "abstract_device", None) or jax.devices()[0]
