"""Where the program that is being traced will run."""

from __future__ import annotations

import jax


def traced_device():
    """Has the `platform` ("gpu") and `device_kind` ("NVIDIA H200") that the trace is for.

    Inside `jax.shard_map` that of its mesh, which may be a machine that is not here; else this
    machine's.
    """
    mesh = jax.sharding.get_abstract_mesh()
    return getattr(mesh, "abstract_device", None) or jax.devices()[0]
