"""The bytes that a device must send in a step, from the shapes alone.

Compiled programs are held against these (benchmarks/scaling.py). An all-gather or a reduce-scatter
of S bytes over n devices makes each send S (n - 1) / n, an all-reduce is one of each: no algorithm
sends less (Patarasuk and Yuan 2009, "Bandwidth optimal all-reduce algorithms for clusters of
workstations"). Sums of a few numbers (norms, losses by source) are left out.
"""

from __future__ import annotations

from stablelm_jax.planning.layout import Layout


def least_sent(layout: Layout) -> dict[str, float]:
    """Bytes that a device sends in one step, by mesh axis."""
    return {
        "replica": _over_replica(layout),
        "data": _over_data(layout),
        "model": _over_model(layout),
    }


def _over_replica(layout: Layout) -> float:
    """The gradients that a device is left with after its group's reduce-scatter, summed."""
    times = layout.accumulation if layout.fsdp else 1
    size = times * layout.reduce_bytes * layout.master_parameters
    return 2 * size * (layout.replica - 1) / layout.replica


def _over_data(layout: Layout) -> float:
    """Weights out, gradients back.

    Whole masters: one all-reduce of the gradients. ZeRO-1 (Rajbhandari et al. 2020, arXiv
    1910.02054): one reduce-scatter of the gradients, one all-gather of the weights in the compute
    type. FSDP: both once a microbatch, and the layers gathered again in the backward pass;
    embedding, final norm and head are used once and kept.
    """
    weights = layout.dtype_bytes * layout.parameters
    gradients = layout.reduce_bytes * layout.parameters
    if not layout.zero1:
        total = 2 * gradients
    elif not layout.fsdp:
        total = gradients + weights
    else:
        again = layout.dtype_bytes * layout.layer_parameters
        total = layout.accumulation * (gradients + weights + again)
    return total * (layout.data - 1) / layout.data


def _over_model(layout: Layout) -> float:
    """Sums of partial activations, each tokens x width in the compute type.

    A layer sums what attention and feed-forward put out, and in the backward pass the gradient of
    what they read (Shoeybi et al. 2019, arXiv 1909.08053, section 3): 4, or 2 where the two stand
    side by side. Remat 'full' and 'attention' project attention's result once
    more to reach the feed-forward, a sum more. The
    embedding's output and the gradient that the head gives back are one each; the softmax over a
    split vocabulary sums three float32 a token (maximum, sum, target).
    """
    sums = 2 if layout.sizes.parallel_residual else 4
    if layout.remat in ("full", "attention") and not layout.sizes.parallel_residual:
        sums += 1
    values = (sums * layout.sizes.num_layers + 2) * layout.tokens * layout.sizes.width
    total = layout.accumulation * (layout.dtype_bytes * values + 3 * 4 * layout.tokens)
    return 2 * total * (layout.model - 1) / layout.model
