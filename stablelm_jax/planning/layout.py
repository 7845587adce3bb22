"""How a step is divided over devices, in the few numbers that estimates need."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

import jax.numpy as jnp
from ml_collections import ConfigDict

from stablelm_jax import config as config_lib
from stablelm_jax.model.config import ModelConfig
from stablelm_jax.model.parameters import ParameterSpec, parameter_table
from stablelm_jax.parallel.sharding import mesh_axes


@dataclasses.dataclass(frozen=True)
class Layout:
    """One step of a run on a mesh of replica x data x model devices."""

    sizes: ModelConfig
    sequence_length: int
    rows: int  # of one device in one microbatch; the devices along `model` share them
    accumulation: int
    data: int
    model: int
    remat: str
    zero1: bool
    fsdp: bool
    dtype_bytes: int  # of a value in the compute type
    reduce_bytes: int  # of a gradient's value on its way to another device
    replica: int = 1

    @property
    def tokens(self) -> int:
        """Tokens of one device in one microbatch."""
        return self.rows * self.sequence_length

    @property
    def layer_parameters(self) -> int:
        """As `parameters`, those of the layers alone."""
        return self._count(row for row in parameter_table(self.sizes) if row.stacked)

    @property
    def parameters(self) -> int:
        """All parameters; of those that `model` splits, one device's part."""
        return self._count(parameter_table(self.sizes))

    @property
    def master_parameters(self) -> float:
        """Parameters that a device holds in float32, with two moments of each."""
        return self.parameters / (self.data if self.zero1 else 1)

    def _count(self, rows: Iterable[ParameterSpec]) -> int:
        return sum(r.count // (self.model if "model" in mesh_axes(r.axes) else 1) for r in rows)


def layout_of(config: ConfigDict, num_devices: int) -> Layout:
    """The layout of `config` on that many devices; `ConfigError` where it does not fit them."""
    mesh = config_lib.validate_mesh(config, num_devices)
    parallel, training = config.parallel, config.training
    dtype_bytes = jnp.dtype(training.dtype).itemsize
    batch_parts = mesh["replica"] * mesh["data"] * training.accumulation
    return Layout(
        sizes=config_lib.model_config(config),
        sequence_length=config.data.sequence_length,
        rows=config.data.batch_size // batch_parts,
        accumulation=training.accumulation,
        remat=training.remat,
        zero1=parallel.zero1,
        fsdp=parallel.fsdp,
        dtype_bytes=dtype_bytes,
        reduce_bytes=4 if parallel.float32_reduce else dtype_bytes,
        **mesh,
    )


def divided(config: ConfigDict, settings: Mapping[str, Any]) -> ConfigDict:
    """A copy of `config` with other values at some of its dotted keys."""
    config = copy.deepcopy(config)
    for key, value in settings.items():
        config_lib.set_value(config, key, value)
    return config


def mode_text(split: Layout | ConfigDict) -> str:
    """How weights and moments are split over `data`, by a layout or by the group `parallel`."""
    return "FSDP" if split.fsdp else "ZeRO-1" if split.zero1 else "whole"
