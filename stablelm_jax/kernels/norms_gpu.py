"""A layer's norm for GPUs, in Pallas with the Triton backend: one pass forward, one backward.

Backward computes the statistics again, adds the gradient of what goes on beside the norm, and sums
those of scale and bias over each program's rows: no two programs add to the same place, and the
bits are the same in every run. Sizes of Triton's arrays are powers of two: 5120 is 4096 + 1024.

R rows, D width, P programs; lists under a name in D hold the parts of a row.
"""

from __future__ import annotations

import math
from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton
from jax.sharding import PartitionSpec

from stablelm_jax.kernels.attention_gpu import parts_of
from stablelm_jax.kernels.device import compilers_axes, traced_device

# Of the backward pass: four for each core of an A100 or H100. An ESTIMATE, not timed on a chip.
PROGRAMS = 512


def pallas_gpu(x, scale_D, bias_D, kind, readers, *, interpret=False):
    """As `norms.xla`. `interpret`: compute with the CPU what the GPU would, for tests.

    Raises:
      ValueError: on any other device.
    """
    platform = traced_device().platform
    if platform not in ("gpu", "cuda") and not interpret:
        raise ValueError(f"norms 'pallas_gpu' run on GPUs, not on a {platform}: use 'xla'")
    x_RD, normed = _norm(x.reshape(-1, x.shape[-1]), scale_D, bias_D, kind, readers, interpret)
    return x_RD.reshape(x.shape), tuple(y_RD.reshape(x.shape) for y_RD in normed)


@partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5))
def _norm(x_RD, scale_D, bias_D, kind, readers, interpret):
    return _forward(x_RD, scale_D, bias_D, kind, readers, interpret)[0]


def _forward(x_RD, scale_D, bias_D, kind, readers, interpret):
    row = pl.BlockSpec((None, x_RD.shape[1]), lambda r: (r, 0))
    vectors = [x_D for x_D in (scale_D, bias_D) if x_D is not None]
    y_RD = _call(
        partial(_forward_kernel, kind=kind),
        [x_RD, *vectors],
        jax.eval_shape(lambda x: x, x_RD),
        interpret=interpret,
        grid=x_RD.shape[:1],
        in_specs=[row] + len(vectors) * [pl.BlockSpec(scale_D.shape, lambda r: (0,))],
        out_specs=row,
        name="norm_forward",
    )
    return (x_RD, readers * (y_RD,)), (x_RD, scale_D, bias_D)


def _backward(kind, readers, interpret, saved, gradients):
    x_RD, scale_D, bias_D = saved
    dx_RD, dys = gradients
    if math.prod(compilers_axes().values()) > 1:
        dys = (sum(dys),)  # partial sums of several devices: sent once, not each of them
    count = pl.cdiv(len(x_RD), PROGRAMS)  # rows of a program
    programs = pl.cdiv(len(x_RD), count)
    sums_PD = jax.ShapeDtypeStruct((programs, x_RD.shape[1]), jnp.float32)
    dx_RD, *sums = _call(
        partial(_backward_kernel, count=count, num_dys=len(dys), kind=kind),
        [x_RD, scale_D, dx_RD, *dys],
        [jax.eval_shape(lambda x: x, x_RD)] + (1 if bias_D is None else 2) * [sums_PD],
        interpret=interpret,
        grid=(programs,),
        name="norm_backward",
    )
    dscale_D, *dbias_D = (jnp.sum(x_PD, 0).astype(scale_D.dtype) for x_PD in sums)
    return dx_RD, dscale_D, dbias_D[0] if dbias_D else None


_norm.defvjp(_forward, _backward)


def _call(kernel, arrays, out_shape, **options):
    """The kernel on whole arrays, on every device along the axes that are the compiler's."""
    widest = parts_of(arrays[0].shape[1])[0].stop
    warps = min(16, max(1, widest // 256))  # a thread has 8 neighbours: 16 bytes in bfloat16
    params = triton.CompilerParams(num_warps=warps, num_stages=1)
    call = pl.pallas_call(kernel, out_shape=out_shape, compiler_params=params, **options)
    if axes := compilers_axes():
        specs = dict(in_specs=PartitionSpec(), out_specs=PartitionSpec())
        call = jax.shard_map(call, **specs, axis_names=set(axes), check_vma=False)
    return call(*arrays)


def _forward_kernel(x, scale, *refs, kind):
    """One row; scale and, if there is one, bias are [D]."""
    *bias, y = refs
    parts = parts_of(x.shape[0])
    centred_D, inverse = _statistics(_load(x, parts), kind)
    y_D = [x * inverse * scale for x, scale in zip(centred_D, _load(scale, parts))]
    if bias:
        y_D = [y + bias for y, bias in zip(y_D, _load(bias[0], parts))]
    _store(y, y_D, parts)


def _backward_kernel(x, scale, dx, *refs, count, num_dys, kind):
    """With z the normalised row and g = dy * scale, the row's gradient is
    dx + (g - mean(g) - z * mean(g * z)) / deviation; 'rms' has no mean(g)."""
    dys, (d, *sums) = refs[:num_dys], refs[num_dys:]
    parts = parts_of(x.shape[1])
    scale_D = _load(scale, parts)

    def of_row(row, totals):
        # All loads first: the chip takes them in the order that they stand here.
        x_D, dx_D, *dys_D = (_load(ref, parts, row) for ref in (x, dx, *dys))
        dy_D = [sum(dys) for dys in zip(*dys_D)]
        centred_D, inverse = _statistics(x_D, kind)
        z_D = [x * inverse for x in centred_D]
        g_D = [dy * scale for dy, scale in zip(dy_D, scale_D)]
        along = _mean([g * z for g, z in zip(g_D, z_D)])
        mean = _mean(g_D) if kind.name == "layer" else 0.0
        d_D = [dx + inverse * (g - mean - z * along) for dx, g, z in zip(dx_D, g_D, z_D)]
        _store(d, d_D, parts, row)
        new = [dy * z for dy, z in zip(dy_D, z_D)], dy_D
        return [[t + x for t, x in zip(*both)] for both in zip(totals, new)]

    first = pl.program_id(0) * count
    last = jnp.minimum(first + count, x.shape[0])
    zeros_D = [jnp.zeros_like(x) for x in scale_D]
    totals = jax.lax.fori_loop(first, last, of_row, [zeros_D] * len(sums))
    for ref, total_D in zip(sums, totals):
        _store(ref, total_D, parts, pl.program_id(0))


def _statistics(x_D, kind):
    """The row less its mean ('rms': as it is), and 1 / its deviation."""
    if kind.name == "layer":
        mean = _mean(x_D)
        x_D = [x - mean for x in x_D]
    return x_D, jax.lax.rsqrt(_mean([x * x for x in x_D]) + kind.epsilon)


def _mean(x_D):
    return sum(jnp.sum(x) for x in x_D) / sum(x.size for x in x_D)


def _load(ref, parts, *row):
    return [ref[*row, part].astype(jnp.float32) for part in parts]


def _store(ref, x_D, parts, *row):
    for part, x in zip(parts, x_D):
        ref[*row, part] = x.astype(ref.dtype)
