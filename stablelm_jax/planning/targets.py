"""Machines by name: `v5p:4x4x4`, `a100-40gb:64x8` (64 hosts of 8), `h200:1x1`.

Its devices come from its own compiler: libtpu, or jax's CUDA plugin with NVIDIA's (extra `aot`).
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
from jax.experimental import topologies

from stablelm_jax.parallel.chips import peak_flops

# A GPU shares its memory with the driver's context and the buffers of NCCL.
_GPU_SHARE_OF_MEMORY = 0.94
GIB = 2**30


class CompilerError(ValueError):
    """The target's compiler is not installed or refuses it; the message says what to do."""


@dataclasses.dataclass(frozen=True)
class Target:
    """A number of chips of one kind."""

    chip: str  # key of chips.json
    shape: tuple[int, ...]  # dims of the slice (TPU), or hosts x GPUs of a host
    facts: dict[str, Any] = dataclasses.field(
        hash=False, compare=False, repr=False
    )  # of chips.json

    def __str__(self) -> str:
        return f"{self.chip}:{'x'.join(map(str, self.shape))}"

    @property
    def num_devices(self) -> int:
        return math.prod(self.shape)

    @property
    def num_hosts(self) -> int:
        if self.facts["kind"] == "gpu":
            return self.shape[0]
        return max(1, self.num_devices // self.facts["chips_per_host"])

    @property
    def peak_flops(self) -> float:
        """Dense bfloat16 FLOP/s of one device."""
        return peak_flops(self.facts["name"])

    @property
    def available_bytes(self) -> int:
        """Memory of one device that a program may use."""
        share = _GPU_SHARE_OF_MEMORY if self.facts["kind"] == "gpu" else 1.0
        return int(self.facts["memory_gib"] * GIB * share)

    def devices(self) -> Sequence[jax.Device]:
        """Descriptions of the devices, to compile for; `CompilerError` where there are none."""
        make = _gpu_topology if self.facts["kind"] == "gpu" else _tpu_topology
        try:
            return list(make(self).devices)
        except CompilerError:
            raise
        except Exception as error:  # jaxlib's XlaRuntimeError, which is a plain RuntimeError
            reason = str(error).splitlines()[0][:300]
            raise CompilerError(f"--target {self}: its compiler refuses it: {reason}") from error


@functools.cache
def chips() -> dict[str, dict[str, Any]]:
    """chips.json: figures of the data sheets."""
    return json.loads(Path(__file__).with_name("chips.json").read_text(encoding="utf-8"))


class TargetError(ValueError):
    """A target that is no machine. Not a ConfigError: benchmarks do without ml_collections."""


def parse_target(text: str) -> Target:
    """The target of that name; `TargetError` for an unknown chip or a shape it cannot have."""
    chip, _, shape = text.partition(":")
    if chip not in chips():
        raise TargetError(f"--target {text}: no chip {chip!r}; known are {', '.join(chips())}")
    facts = chips()[chip]
    dims = 2 if facts["kind"] == "gpu" else facts["dims"]
    numbers = shape.split("x")
    if len(numbers) != dims or not all(n.isdecimal() and int(n) > 0 for n in numbers):
        example = "64x8 for 64 hosts of 8 GPUs" if facts["kind"] == "gpu" else "x".join("4" * dims)
        raise TargetError(f"--target {text}: {chip} needs {dims} sizes, as in {chip}:{example}")
    return Target(chip, tuple(map(int, numbers)), facts)


def _require(target: Target, *modules: str) -> None:
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    if missing:
        raise CompilerError(
            f"--target {target}: its compiler is not installed (no module "
            f"{', '.join(missing)}): pip install -e '.[aot]'"
        )


def _tpu_topology(target: Target):
    _require(target, "libtpu")
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # do not look for a TPU machine's metadata
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # two plans may run side by side
    options = {}
    if "chip_config" in target.facts:
        options["chip_config_name"] = target.facts["chip_config"]
    return topologies.get_topology_desc(platform="tpu", topology_name=str(target), **options)


def _gpu_topology(target: Target):
    _require(target, "jax_cuda13_plugin")
    hosts, per_host = target.shape
    return topologies.get_topology_desc(
        platform="cuda",
        topology_name=str(target),
        target_config=_gpu_description(target.facts),
        topology=f"1x{hosts}x{per_host}",
    )


def _gpu_description(facts: dict[str, Any]) -> str:
    """What XLA wants to know of a GPU, as the text form of its GpuTargetConfigProto."""
    major, minor = facts["compute_capability"]
    fields = {
        "threads_per_block_limit": 1024,
        "threads_per_warp": 32,
        "shared_memory_per_block": 48 << 10,
        "shared_memory_per_core": facts["shared_kib"] << 10,
        "shared_memory_per_block_optin": facts["shared_kib_per_block"] << 10,
        "threads_per_core_limit": 2048,
        "core_count": facts["cores"],
        "fpus_per_core": facts["lanes_per_core"],
        "block_dim_limit_x": 2**31 - 1,
        "block_dim_limit_y": 65535,
        "block_dim_limit_z": 65535,
        "thread_dim_limit_x": 1024,
        "thread_dim_limit_y": 1024,
        "thread_dim_limit_z": 64,
        "memory_bandwidth": int(facts["bandwidth_gb_s"] * 1e9),
        "l2_cache_size": facts["l2_mib"] << 20,
        "clock_rate_ghz": facts["clock_ghz"],
        "device_memory_size": int(facts["memory_gib"] * GIB),
        "registers_per_core_limit": 65536,
        "registers_per_block_limit": 65536,
    }
    lines = " ".join(f"{name}: {value}" for name, value in fields.items())
    return (
        f"gpu_device_info {{ {lines} cuda_compute_capability {{ major: {major} minor: {minor} }} }}"
        ' platform_name: "CUDA" dnn_version_info { major: 9 minor: 10 }'
        f' device_description_str: "{facts["name"]}"'
    )
