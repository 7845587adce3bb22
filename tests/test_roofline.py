"""What is read from a compiled program's kernels, against programs whose traffic is known."""

import importlib.util
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from benchmarks.program_kernels import Kernel, kernels

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
LAYERS = 6

# Two turns of a loop: a slice of a stack of weights goes through a product, and the result into a
# stack of results, in a fusion that also reads the whole of a vector.
PROGRAM = """HloModule jit_f

%sliced (p.0: f32[2,8,16], p.1: s32[]) -> f32[8,16] {
  %p.0 = f32[2,8,16]{2,1,0} parameter(0)
  %p.1 = s32[] parameter(1)
  %zero = s32[] constant(0)
  %slice = f32[1,8,16]{2,1,0} dynamic-slice(%p.0, %p.1, %zero, %zero), dynamic_slice_sizes={1,8,16}
  ROOT %flat = f32[8,16]{1,0} bitcast(%slice)
}

%stacked (q.0: f32[2,4,16], q.1: f32[4,16], q.2: f32[16], q.3: s32[]) -> f32[2,4,16] {
  %q.0 = f32[2,4,16]{2,1,0} parameter(0)
  %q.1 = f32[4,16]{1,0} parameter(1)
  %q.2 = f32[16]{0} parameter(2)
  %wide = f32[4,16]{1,0} broadcast(%q.2), dimensions={1}
  %sum = f32[4,16]{1,0} add(%q.1, %wide), metadata={op_name="jit(f)/jvp()/while/body/mlp/add"}
  %one = f32[1,4,16]{2,1,0} bitcast(%sum)
  %q.3 = s32[] parameter(3)
  %none = s32[] constant(0)
  ROOT %put = f32[2,4,16]{2,1,0} dynamic-update-slice(%q.0, %one, %q.3, %none, %none)
}

%body (t: (s32[], f32[2,8,16], f32[2,4,16], f32[4,8], f32[16])) -> (s32[], f32[2,4,16]) {
  %t = (s32[], f32[2,8,16]{2,1,0}, f32[2,4,16]{2,1,0}, f32[4,8]{1,0}, f32[16]{0}) parameter(0)
  %i = s32[] get-tuple-element(%t), index=0
  %w = f32[2,8,16]{2,1,0} get-tuple-element(%t), index=1
  %out = f32[2,4,16]{2,1,0} get-tuple-element(%t), index=2
  %x = f32[4,8]{1,0} get-tuple-element(%t), index=3
  %b = f32[16]{0} get-tuple-element(%t), index=4
  %weights = f32[8,16]{1,0} fusion(%w, %i), kind=kLoop, calls=%sliced, metadata={op_name="a/b"}
  %product = f32[4,16]{1,0} dot(%x, %weights), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  %put.1 = f32[2,4,16]{2,1,0} fusion(%out, %product, %b, /*index=3*/%i), kind=kLoop, calls=%stacked
  ROOT %u = (s32[], f32[2,4,16]{2,1,0}) tuple(%i, %put.1)
}

ENTRY %main (a: f32[4,8]) -> f32[2,4,16] {
  %a = f32[4,8]{1,0} parameter(0)
  %zeros = f32[2,4,16]{2,1,0} fusion(), kind=kLoop, calls=%filled
  %start = (s32[], f32[2,4,16]{2,1,0}) tuple(%a, %zeros)
  %loop = (s32[], f32[2,4,16]{2,1,0}) while(%start), condition=%turns, body=%body, \
backend_config={"known_trip_count":{"n":"2"}}
  ROOT %result = f32[2,4,16]{2,1,0} get-tuple-element(%loop), index=1
}

%filled () -> f32[2,4,16] {
  %c = f32[] constant(0)
  ROOT %fill = f32[2,4,16]{2,1,0} broadcast(%c), dimensions={}
}
"""


def test_of_stacked_arrays_the_slice_counts_as_often_as_the_loop_turns():
    weights, x, vector, index = 4 * 8 * 16, 4 * 4 * 8, 4 * 16, 4
    product = 4 * 4 * 16
    assert kernels(PROGRAM) == [
        Kernel("zeros", "fusion", "", 1, 0, 2 * product, 0),
        Kernel("weights", "fusion", "a/b", 2, weights + index, weights, 0),
        Kernel("product", "dot", "", 2, x + weights, product, 2 * 4 * 8 * 16),
        Kernel(
            "put.1",
            "fusion",
            "jit(f)/jvp()/while/body/mlp/add",
            2,
            product + vector + index,
            product,
            0,
        ),
    ]


def test_products_of_a_compiled_scan_and_its_gradient_are_all_counted():
    def loss(weights, x):
        def layer(x, w):
            return jnp.tanh(x @ w), None

        return jnp.sum(jax.lax.scan(layer, x, weights)[0])

    weights = jax.ShapeDtypeStruct((LAYERS, 64, 64), jnp.float32)
    x = jax.ShapeDtypeStruct((32, 64), jnp.float32)
    text = jax.jit(jax.grad(loss)).lower(weights, x).compile().as_text()
    found = kernels(text)
    # In each turn one forward and two backward, the first input's unwanted gradient too.
    products = 3 * LAYERS * 2 * 32 * 64 * 64
    assert sum(k.count * k.flops for k in found) == products
    read = sum(k.count * k.read for k in found)
    # Weights are read in each direction, activations too: 12.6 stacks' worth, not the 18 and more
    # that it would be if a turn of a loop read a whole stack.
    stack = LAYERS * 64 * 64 * 4
    assert 2 * stack < read < 16 * stack


@pytest.fixture
def roofline(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    spec = importlib.util.spec_from_file_location("roofline", BENCHMARKS / "roofline.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "roofline", module)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("path", "flops", "part"),
    [
        ("jit(train_step)/jvp()/while/body/closed_call/mlp/dot_general", 1, "mlp projections"),
        ("jit(train_step)/jvp()/while/body/closed_call/mlp/mul", 0, "SwiGLU"),
        ("jit(train_step)/jvp()/while/body/closed_call/attention/rotary/mul", 0, "rotary, biases"),
        ("jit(train_step)/jvp()/while/body/closed_call/add", 0, "norms, residual"),
        ("jit(train_step)/jvp()/while/body/dynamic_slice", 0, "layers' slices, stacks"),
        ("jit(train_step)/jvp(head)/while/body/dynamic_slice", 0, "head, cross-entropy"),
        ("jit(train_step)/mul", 0, "optimizer"),
        ("", 0, "other"),
    ],
)
def test_a_kernel_belongs_to_its_innermost_scope(roofline, path, flops, part):
    forward = Kernel("k", "fusion", path, 1, 8, 8, flops)
    assert roofline.part_of(forward)[0] == part
    backward = Kernel("k", "fusion", path.replace("jvp()", "transpose(jvp())"), 1, 8, 8, flops)
    expected = "backward" if "jvp()" in path else roofline.part_of(forward)[1]
    assert roofline.part_of(backward) == (part, expected)
