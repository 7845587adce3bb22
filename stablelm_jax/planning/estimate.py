"""An estimate of a step's time and of the least memory it needs, from the shapes.

The time is a roofline (Williams et al. 2009) at the data sheet's rates: matrix products at the
chip's peak or at the speed their weights are read, whichever is slower; all other work at the speed
of memory; what is sent at the speed of the links. Nothing overlaps, so the parts add up; nothing is
slower than its data sheet, so a real step takes longer. Good for comparing, not for promising.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

from stablelm_jax.kernels.cross_entropy import ROWS
from stablelm_jax.model.flops import flops_per_token
from stablelm_jax.planning.communication import least_sent
from stablelm_jax.planning.layout import Layout
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
_LOGIT_BYTES = 4 + 4 + 3 * 2
# Of a parameter: AdamW reads gradient, weight and two moments, writes three and the copy in
# bfloat16 (30), clipping reads the gradient (4).
_UPDATE_BYTES = 34
# Of a parameter and microbatch: the float32 sum read and written, the new gradient read.
_ACCUMULATE_BYTES = 12
_STATE_BYTES = 12  # float32 weight and two moments
_AGAIN = ("full", "attention")  # what remat runs the layers' projections twice


@dataclasses.dataclass(frozen=True)
class StepTime:
    """Seconds of one step by part; see the module's text for what they leave out."""

    matrices: float
    memory: float
    communication: float

    @property
    def total(self) -> float:
        return self.matrices + self.memory + self.communication


def step_time(
    layout: Layout, target: Target, collectives: Iterable[Collective] | None = None
) -> StepTime:
    """The estimate; `collectives` of the compiled program, else the least bytes stand in."""
    if collectives is None:
        sent = least_sent(layout).items()
    else:
        sent = [(found.axis, found.sent) for found in collectives]
    bandwidth = target.facts["bandwidth_gb_s"] * 1e9
    return StepTime(
        matrices=layout.accumulation
        * max(
            matrix_flops(layout) / (target.facts["peak_tflops"] * 1e12),
            _weight_bytes(layout) / bandwidth,
        ),
        memory=_other_bytes(layout) / bandwidth,
        communication=sum(size / link_bandwidth(target, layout, axis) for axis, size in sent),
    )


def matrix_flops(layout: Layout) -> float:
    """Operations of one device in one microbatch, what backward computes again included.

    Attention is counted causal and as a fused kernel. Remat 'full' runs the layers' forward pass
    again, 'attention' all of it but that kernel, 'dots' no matrix product; the head is never run
    again.
    """
    parts = flops_per_token(layout.sizes, layout.sequence_length)
    again = 1 if layout.remat in _AGAIN else 0
    scores_again = 1 if layout.remat == "full" else 0
    layers = parts["attention_projections"] + parts["mlp"]
    operations = (
        layers * (1 + _BACKWARD + again)
        + parts["attention_scores"] / 2 * (1 + _ATTENTION_BACKWARD + scores_again)
        + parts["head"] * (1 + _BACKWARD)
    )
    return operations * layout.tokens / layout.model


def _weight_bytes(layout: Layout) -> float:
    """Weights are read forward, again where remat says so, and backward."""
    passes = 3 if layout.remat in _AGAIN else 2
    return passes * layout.dtype_bytes * layout.parameters


def _other_bytes(layout: Layout) -> float:
    """Memory traffic of one device in one step beside the matrix products."""
    held = layout.master_parameters if layout.fsdp else layout.parameters
    accumulate = _ACCUMULATE_BYTES * held if layout.accumulation > 1 else 0
    microbatch = _elementwise_bytes(layout) + logit_bytes(layout) + accumulate
    return layout.accumulation * microbatch + update_bytes(layout)


def logit_bytes(layout: Layout) -> float:
    """Traffic of a microbatch's logits and their gradient."""
    return _LOGIT_BYTES * layout.tokens * layout.sizes.vocab_size / layout.model


def update_bytes(layout: Layout) -> float:
    """Traffic of a step's update: clipping, AdamW and the copy in the compute type."""
    return _UPDATE_BYTES * layout.master_parameters


def _elementwise_bytes(layout: Layout) -> float:
    forward, backward = (sum(part) for part in zip(*elementwise_bytes(layout).values()))
    return forward + backward + (0 if layout.remat == "none" else forward)


def elementwise_bytes(layout: Layout) -> dict[str, tuple[float, float]]:
    """{part: (forward, backward)}: the layers' traffic of a microbatch beside the products."""
    sizes = layout.sizes
    width = sizes.width * layout.tokens * layout.dtype_bytes
    feed_forward = sizes.feed_forward_width * layout.tokens * layout.dtype_bytes

    def all_layers(passes, size):
        return tuple(sizes.num_layers * number * size for number in passes)

    return {
        "norms, residual": all_layers(_NORMS, width),
        "rotary": all_layers(_ROTARY, width / layout.model),
        "SwiGLU": all_layers(_SWIGLU, feed_forward / layout.model),
    }


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


def least_bytes(layout: Layout) -> float:
    """Memory that a device cannot do without, in bytes: a lower bound, to spare compilations.

    Weights and moments; without FSDP the whole copy in the compute type, and with several
    microbatches the float32 sum of gradients; what backward finds saved of each layer; a chunk's
    logits in float32.
    """
    sizes = layout.sizes
    layers = sizes.num_layers * _saved_values(layout) * layout.tokens * layout.dtype_bytes
    logits = 4 * min(layout.tokens, ROWS) * sizes.vocab_size / layout.model
    copy = 0 if layout.fsdp else layout.dtype_bytes * layout.parameters
    gradients = 0
    if layout.accumulation > 1:
        gradients = 4 * (layout.master_parameters if layout.fsdp else layout.parameters)
    return _STATE_BYTES * layout.master_parameters + copy + gradients + layers + logits


def _saved_values(layout: Layout) -> float:
    """Of a token and layer, at least: what goes into the layer; for 'attention' its result too; for
    'dots' also queries, keys, values, gate and up; for 'none' the other operands of products."""
    sizes = layout.sizes
    whole, split = sizes.width, 0
    if layout.remat != "full":
        split += sizes.num_heads * sizes.head_size
    if layout.remat in ("dots", "none"):
        split += (sizes.num_heads + 2 * sizes.num_kv_heads) * sizes.head_size
        split += 2 * sizes.feed_forward_width
    if layout.remat == "none":
        whole += sizes.width * (1 if sizes.parallel_residual else 2)  # the norms' results
        split += sizes.feed_forward_width  # SwiGLU's
    return whole + split / layout.model
