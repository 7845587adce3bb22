"""How a step is divided, its time, and the least that it must send and hold: from shapes alone.

The time is a roofline (Williams et al. 2009) at the data sheet's rates: matrix products at the
chip's peak or at the speed their weights are read, whichever is slower; all other work at the speed
of memory; what is sent at the speed of the links. Nothing overlaps, so the parts add up; nothing is
slower than its data sheet, so a real step takes longer. Good for comparing, not for promising.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
from ml_collections import ConfigDict

from stablelm_jax import config as config_lib
from stablelm_jax.kernels.cross_entropy import ROWS
from stablelm_jax.model.config import ModelConfig
from stablelm_jax.model.flops import flops_per_token
from stablelm_jax.model.parameters import ParameterSpec, count_parameters, parameter_table
from stablelm_jax.optimizer.muon import newton_schulz_flops
from stablelm_jax.parallel.sharding import mesh_axes
from stablelm_jax.planning.program import Collective
from stablelm_jax.planning.targets import Target

FORMULA = (
    "max(matrix FLOPs / peak, weight bytes / memory bandwidth) + other bytes / memory bandwidth "
    "+ bytes sent / link bandwidth; data-sheet rates, nothing overlaps"
)

# Backward does twice the forward's matrix work, flash attention 2.5 times: it computes the scores
# again (Dao et al. 2022, arXiv 2205.14135, algorithm 4).
_BACKWARD, _ATTENTION_BACKWARD = 2.0, 2.5

# Passes over memory of a layer's elementwise work, each over an array of tokens x width (A), or of
# tokens x feed-forward (F): two norms and two residual sums 8 A, rotary 4 A, SwiGLU 3 F; backward
# 10 A, 4 A and 6 F. Counted from the layer's code as if each of them were one kernel.
_NORMS, _ROTARY, _SWIGLU = (8, 10), (4, 4), (3, 6)

# Bytes of a logit: float32 exponentials written and read, their gradient written and read twice.
_LOGIT_BYTES, _LOGIT_BYTES_FORWARD = 4 + 4 + 3 * 2, 4 + 4
# Bytes of a parameter. An update reads the gradient, reads and writes the weight, writes the copy
# in bfloat16 (14), clipping reads the gradient (4). A microbatch reads and writes the float32 sum
# and reads its own gradient.
_UPDATE_BYTES, _ACCUMULATE_BYTES = 18, 12
# Float32 values that an optimizer keeps of a parameter; Muon of a matrix one, else two as Adam.
_STATE_VALUES = {"adamw": 2, "muon": 2, "lion": 1, "ademamix": 3, "schedule_free_adamw": 2}
_PROJECTS_AGAIN = ("full", "attention")  # remat that runs the layers' projections twice


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
    head_passes: int = 1  # forward, of head and loss
    state_values: float = 2  # float32 values that the optimizer keeps of a parameter, on average
    muon_steps: int = 0  # of the Newton-Schulz iteration; 0: another optimizer

    @property
    def tokens(self) -> int:
        """Tokens of one device in one microbatch."""
        return self.rows * self.sequence_length

    @property
    def layer_parameters(self) -> int:
        """As `parameters`, those of the layers alone."""
        return self._count(row for row in parameter_table(self.sizes) if row.stacked)

    @property
    def matrix_parameters(self) -> int:
        """As `parameters`, those of the layers' matrices alone."""
        return self._count(row for row in parameter_table(self.sizes) if row.layer_matrix)

    @property
    def parameters(self) -> int:
        """All parameters; of those that `model` splits, one device's part."""
        return self._count(parameter_table(self.sizes))

    @property
    def master_parameters(self) -> float:
        """Parameters that a device holds in float32, with the optimizer's state of each."""
        return self.parameters / (self.data if self.zero1 else 1)

    def _count(self, rows: Iterable[ParameterSpec]) -> int:
        return sum(r.count // (self.model if "model" in mesh_axes(r.axes) else 1) for r in rows)


def layout_of(config: ConfigDict, num_devices: int) -> Layout:
    """The layout of `config` on that many devices; `ConfigError` where it does not fit them."""
    mesh = config_lib.validate_mesh(config, num_devices)
    parallel, training = config.parallel, config.training
    dtype_bytes = jnp.dtype(training.dtype).itemsize
    is_muon, sizes = config.optimizer.kind == "muon", config_lib.model_config(config)
    values = _STATE_VALUES[config.optimizer.kind]
    if is_muon:
        matrices = sum(row.count for row in parameter_table(sizes) if row.layer_matrix)
        values -= matrices / count_parameters(sizes)
    batch_parts = mesh["replica"] * mesh["data"] * training.accumulation
    return Layout(
        sizes=sizes,
        sequence_length=config.data.sequence_length,
        rows=config.data.batch_size // batch_parts,
        accumulation=training.accumulation,
        remat=training.remat,
        zero1=parallel.zero1,
        fsdp=parallel.fsdp,
        dtype_bytes=dtype_bytes,
        reduce_bytes=4 if parallel.float32_reduce else dtype_bytes,
        head_passes=head_passes(config),
        state_values=values,
        muon_steps=config.optimizer.muon_steps if is_muon else 0,
        **mesh,
    )


def head_passes(config: ConfigDict) -> int:
    """Forward passes of the head in a step: DPO needs all likelihoods before it weighs them."""
    return 2 if config.training.objective == "dpo" else 1


def divided(config: ConfigDict, settings: Mapping[str, Any]) -> ConfigDict:
    """A copy of `config` with other values at some of its dotted keys."""
    config = copy.deepcopy(config)
    for key, value in settings.items():
        config_lib.set_value(config, key, value)
    return config


def mode_text(split: Layout | ConfigDict) -> str:
    """How weights and moments are split over `data`, by a layout or by the group `parallel`."""
    return "FSDP" if split.fsdp else "ZeRO-1" if split.zero1 else "whole"


class StepTime(NamedTuple):
    """Seconds of one step by part, which add up."""

    matrices: float
    memory: float
    communication: float


def step_time(
    layout: Layout, target: Target, collectives: Iterable[Collective] | None = None
) -> StepTime:
    """The estimate; without the `collectives` of a compiled program, the least bytes are sent."""
    if collectives is None:
        sent = least_sent(layout).items()
    else:
        sent = [(found.axis, found.sent) for found in collectives]
    bandwidth = target.facts["bandwidth_gb_s"] * 1e9
    # Weights are read forward, again where remat says so, and backward.
    passes = 3 if layout.remat in _PROJECTS_AGAIN else 2
    weight_bytes = passes * layout.dtype_bytes * layout.parameters
    matrices = max(matrix_flops(layout) / target.peak_flops, weight_bytes / bandwidth)

    forward, backward = (sum(part) for part in zip(*elementwise_bytes(layout).values()))
    microbatch = forward + backward + (0 if layout.remat == "none" else forward)
    microbatch += logit_bytes(layout)
    if layout.accumulation > 1:
        held = layout.master_parameters if layout.fsdp else layout.parameters
        microbatch += _ACCUMULATE_BYTES * held
    other_bytes = layout.accumulation * microbatch + update_bytes(layout)
    return StepTime(
        matrices=layout.accumulation * matrices + orthogonal_flops(layout) / target.peak_flops,
        memory=other_bytes / bandwidth,
        communication=sum(size / link_bandwidth(target, layout, axis) for axis, size in sent),
    )


def matrix_flops(layout: Layout) -> float:
    """Operations of one device in one microbatch, what backward computes again included.

    Attention is counted causal and as a fused kernel. Remat 'full' runs the layers' forward pass
    again, 'attention' all of it but that kernel, 'dots' no matrix product.
    """
    parts = flops_per_token(layout.sizes, layout.sequence_length)
    again = 1 if layout.remat in _PROJECTS_AGAIN else 0
    scores_again = 1 if layout.remat == "full" else 0
    operations = (
        (parts["attention_projections"] + parts["mlp"]) * (1 + _BACKWARD + again)
        + parts["attention_scores"] / 2 * (1 + _ATTENTION_BACKWARD + scores_again)
        + parts["head"] * (layout.head_passes + _BACKWARD)
    )
    return operations * layout.tokens / layout.model


def orthogonal_flops(layout: Layout) -> float:
    """Muon's operations of one device in a step: of the layers that it has, the most of any."""
    layers = math.ceil(layout.sizes.num_layers / (layout.data * layout.model))
    total = newton_schulz_flops(parameter_table(layout.sizes), layout.muon_steps)
    return total * layers / layout.sizes.num_layers


def elementwise_bytes(layout: Layout) -> dict[str, tuple[float, float]]:
    """{part: (forward, backward)}: the layers' traffic of a microbatch beside the products."""
    sizes = layout.sizes
    width = sizes.num_layers * sizes.width * layout.tokens * layout.dtype_bytes
    feed_forward = sizes.num_layers * sizes.feed_forward_width * layout.tokens * layout.dtype_bytes
    return {
        "norms, residual": tuple(passes * width for passes in _NORMS),
        "rotary": tuple(passes * width / layout.model for passes in _ROTARY),
        "SwiGLU": tuple(passes * feed_forward / layout.model for passes in _SWIGLU),
    }


def logit_bytes(layout: Layout) -> float:
    """Traffic of a microbatch's logits and their gradient."""
    each = _LOGIT_BYTES + (layout.head_passes - 1) * _LOGIT_BYTES_FORWARD
    return each * layout.tokens * layout.sizes.vocab_size / layout.model


def update_bytes(layout: Layout) -> float:
    """Traffic of clipping, the update and the copy in the compute type, once a step."""
    return (_UPDATE_BYTES + 8 * layout.state_values) * layout.master_parameters


def link_bandwidth(target: Target, layout: Layout, axis: str) -> float:
    """Bytes a second that a device sends to the others along a mesh axis, at best.

    GPUs: NVLink inside a host. A ring through several hosts crosses every port of a host's network
    that its devices there have, so each device sends at the speed of those together. TPUs: `model`
    lies along one dim of the torus and has that dim's links; `data` has those of the others. Groups
    along `replica` lie in different hosts, and each device has its own port there.
    """
    facts = target.facts
    if facts["kind"] == "tpu":
        dims = facts["dims"]
        share = 1 / dims if axis == "model" else 1 if layout.model == 1 else 1 - 1 / dims
        return facts["interconnect_gb_s"] * 1e9 * share
    per_host = target.shape[1]
    inside = axis == "model" and per_host % layout.model == 0
    if inside or target.num_hosts == 1:
        return facts["nvlink_gb_s"] * 1e9
    members = {"data": max(1, per_host // layout.model), "replica": 1}.get(axis, per_host)
    return min(facts["nvlink_gb_s"], members * facts["network_gb_s"]) * 1e9


def least_sent(layout: Layout) -> dict[str, float]:
    """Bytes that a device must send in one step, by mesh axis.

    An all-gather or a reduce-scatter of S bytes over n devices makes each send S (n - 1) / n, an
    all-reduce is one of each: no algorithm sends less (Patarasuk and Yuan 2009, "Bandwidth optimal
    all-reduce algorithms for clusters of workstations"). Sums of a few numbers are left out.
    """

    def over(axis_size: int, total: float) -> float:
        return total * (axis_size - 1) / axis_size

    times = layout.accumulation if layout.fsdp else 1
    gradients_left = times * layout.reduce_bytes * layout.master_parameters
    return {
        # The gradients that a device is left with after its group's reduce-scatter, summed.
        "replica": over(layout.replica, 2 * gradients_left),
        "data": over(layout.data, _over_data(layout) + _to_whole_layers(layout)),
        "model": over(layout.model, 2 * _over_model(layout) + _to_whole_layers(layout)),
    }


def _over_data(layout: Layout) -> float:
    """Weights out, gradients back.

    Whole masters: one all-reduce of the gradients. ZeRO-1 (Rajbhandari et al. 2020, arXiv
    1910.02054): one reduce-scatter of the gradients, one all-gather of the weights in the compute
    type. FSDP: both once a microbatch, and the layers gathered again in the backward pass;
    embedding, final norm and head are used once and kept.
    """
    weights = layout.dtype_bytes * layout.parameters
    gradients = layout.reduce_bytes * layout.parameters
    if layout.fsdp:
        again = layout.dtype_bytes * layout.layer_parameters
        return layout.accumulation * (gradients + weights + again)
    return gradients + weights if layout.zero1 else 2 * gradients


def _to_whole_layers(layout: Layout) -> float:
    """Muon: float32 momentum to the devices that have whole layers, and their directions back.

    An all-to-all: a device sends but its own part, and back what it made. Where masters are whole
    the momentum is there, and the directions go to all.
    """
    if not layout.muon_steps:
        return 0.0
    return 4 * layout.matrix_parameters * (2 / layout.data if layout.zero1 else 1)


def _over_model(layout: Layout) -> float:
    """Sums of partial activations, each tokens x width in the compute type.

    A layer sums what attention and feed-forward put out, and in the backward pass the gradient of
    what they read (Shoeybi et al. 2019, arXiv 1909.08053, section 3): 4, or 2 where the two stand
    side by side. Remat 'full' and 'attention' project attention's result once more to reach the
    feed-forward: one more sum. The embedding's output and the gradient that the head gives back are
    one each; the softmax over a split vocabulary sums three float32 a token (maximum, sum, target).
    """
    sums = 2 if layout.sizes.parallel_residual else 4
    if layout.remat in ("full", "attention") and not layout.sizes.parallel_residual:
        sums += 1
    values = (sums * layout.sizes.num_layers + 2) * layout.tokens * layout.sizes.width
    return layout.accumulation * (layout.dtype_bytes * values + 3 * 4 * layout.tokens)


def least_bytes(layout: Layout) -> float:
    """Memory that a device cannot do without, in bytes: a lower bound, to spare compilations.

    Weights and moments; without FSDP the whole copy in the compute type, and with several
    microbatches the float32 sum of gradients; a chunk's logits in float32; and what backward finds
    saved of each layer: always its input, for 'attention' also the result of that, for 'dots' also
    queries, keys, values, gate and up, for 'none' the other operands of products.
    """
    sizes, remat = layout.sizes, layout.remat
    whole, split = sizes.width, 0  # values of a token and layer; `split` by `model`
    if remat != "full":
        split += sizes.num_heads * sizes.head_size
    if remat in ("dots", "none"):
        split += (sizes.num_heads + 2 * sizes.num_kv_heads) * sizes.head_size
        split += 2 * sizes.feed_forward_width
    if remat == "none":
        whole += sizes.width * (1 if sizes.parallel_residual else 2)  # the norms' results
        split += sizes.feed_forward_width  # SwiGLU's result
    saved = sizes.num_layers * (whole + split / layout.model) * layout.tokens * layout.dtype_bytes
    held = layout.master_parameters if layout.fsdp else layout.parameters
    copy = 0 if layout.fsdp else layout.dtype_bytes * layout.parameters
    gradients = 4 * held if layout.accumulation > 1 else 0
    logits = 4 * min(layout.tokens, ROWS) * sizes.vocab_size / layout.model
    state = 4 * (1 + layout.state_values) * layout.master_parameters
    return state + copy + gradients + saved + logits
