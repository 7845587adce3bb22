"""How a step is divided over devices, in the few numbers that estimates need."""

from __future__ import annotations

import dataclasses

from ml_collections import ConfigDict

from stablelm_jax import config as config_lib
from stablelm_jax.model.config import ModelConfig
from stablelm_jax.model.parameters import parameter_table
from stablelm_jax.parallel.sharding import mesh_axes

_DTYPE_BYTES = {"bfloat16": 2, "float32": 4}


@dataclasses.dataclass(frozen=True)
class Layout:
    """One step of a run on a mesh of replica x data x model devices.

    Attributes:
      rows: of one device in one microbatch, shared by the devices along `model`.
      dtype_bytes: of a value in the compute type; reduce_bytes: of a gradient on its way.
      The others are the config's.
    """

    sizes: ModelConfig
    sequence_length: int
    rows: int
    accumulation: int
    data: int
    model: int
    remat: str
    zero1: bool
    fsdp: bool
    dtype_bytes: int
    reduce_bytes: int
    replica: int = 1

    @property
    def tokens(self) -> int:
        """Of one device in one microbatch."""
        return self.rows * self.sequence_length

    @property
    def layer_parameters(self) -> int:
        """Of all layers; a device's share where they are split over `model`."""
        return self._count(stacked=True)

    @property
    def other_parameters(self) -> int:
        """Embedding, final norm and head; a device's share, as above."""
        return self._count(stacked=False)

    @property
    def parameters(self) -> int:
        """A device's share of all, before anything is split over `data`."""
        return self.layer_parameters + self.other_parameters

    @property
    def master_parameters(self) -> float:
        """What a device holds in float32, with two moments of each."""
        return self.parameters / (self.data if self.zero1 else 1)

    def _count(self, stacked: bool) -> int:
        rows = (row for row in parameter_table(self.sizes) if row.stacked == stacked)
        return sum(r.count // (self.model if "model" in mesh_axes(r.axes) else 1) for r in rows)


def layout_of(config: ConfigDict, num_devices: int) -> Layout:
    """The layout of `config` on that many devices; `ConfigError` where it does not fit them."""
    sizes = config_lib.validate_mesh(config, num_devices)
    parts = sizes["replica"] * sizes["data"]
    parallel, training = config.parallel, config.training
    dtype_bytes = _DTYPE_BYTES[training.dtype]
    return Layout(
        sizes=config_lib.model_config(config),
        sequence_length=config.data.sequence_length,
        rows=config.data.batch_size // parts // training.accumulation,
        accumulation=training.accumulation,
        remat=training.remat,
        zero1=parallel.zero1,
        fsdp=parallel.fsdp,
        dtype_bytes=dtype_bytes,
        reduce_bytes=4 if parallel.float32_reduce else dtype_bytes,
        **sizes,
    )
