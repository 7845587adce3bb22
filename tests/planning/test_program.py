"""What is read from a compiled program, against programs whose communication is known."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P

from stablelm_jax.parallel.mesh import make_mesh
from stablelm_jax.planning.program import Collective, collectives


def compiled(function, mesh, in_specs, out_specs, *shapes):
    mapped = jax.shard_map(
        function, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False
    )
    return jax.jit(mapped).lower(*shapes).compile().as_text()


def array(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def test_a_collective_in_a_loop_counts_as_often_as_the_loop_turns():
    mesh = make_mesh(4, 2)

    def function(x):
        def inner(x, _):
            return jnp.sin(jax.lax.psum(x, "data")), None

        def outer(x, _):
            x = jax.lax.scan(inner, x, length=5)[0]
            return jnp.sin(jax.lax.psum(x, "model")), None

        return jax.lax.scan(outer, x, length=3)[0]

    text = compiled(function, mesh, P(), P(), array(16))
    assert set(collectives(text, {"data": 4, "model": 2})) == {
        Collective("all-reduce", "data", "f32", 15 * 64, 4, 15),
        Collective("all-reduce", "model", "f32", 3 * 64, 2, 3),
    }


def test_sizes_are_those_of_the_whole_array():
    mesh = make_mesh(8, 1)

    def function(x):
        scattered = jax.lax.psum_scatter(x, "data", tiled=True)
        return jax.lax.all_gather(jnp.sin(scattered), "data", tiled=True)

    found = {
        c.kind: c
        for c in collectives(compiled(function, mesh, P(), P(), array(64)), {"data": 8, "model": 1})
    }
    assert found["reduce-scatter"].size == found["all-gather"].size == 64 * 4
    assert found["all-gather"].sent == 64 * 4 * 7 // 8


def test_groups_along_both_axes_are_told_from_those_along_one():
    mesh = make_mesh(2, 4)
    text = compiled(lambda x: jax.lax.psum(x, ("data", "model")), mesh, P(), P(), array(8))
    (found,) = collectives(text, {"data": 2, "model": 4})
    assert (found.axis, found.devices) == ("data+model", 8)
    assert found.sent == 2 * 32 * 7 // 8


ASYNC = """HloModule m

%body (p: f32[8]) -> f32[8] {
  %p = f32[8]{0} parameter(0)
  ROOT %r = f32[8]{0} all-reduce(%p), replica_groups=[2,4]<=[4,2]T(1,0), to_apply=%add
}

ENTRY %main (a: f32[8]) -> f32[64] {
  %a = f32[8]{0} parameter(0)
  %s = ((bf16[4]{0}, bf16[8]{0}), (bf16[32]{0}, bf16[64]{0})) all-gather-start(%a, %a), \
replica_groups=mesh['axis_0'=2,'axis_1'=8] {'axis_1'}, dimensions={0}
  %d = (bf16[32]{0}, bf16[64]{0}) all-gather-done(%s)
  %c = (f32[8]{0}, f32[8]{0}, u32[], u32[]) collective-permute-start(%a), \
source_target_pairs={{0,1},{1,0}}
  ROOT %w = f32[8]{0} while(%a), condition=%cond, body=%body, \
backend_config={"known_trip_count":{"n":"6"}}
}
"""


def test_asynchronous_forms_and_every_spelling_of_groups_are_read():
    found = {c.kind: c for c in collectives(ASYNC, {"data": 2, "model": 8})}
    assert found["all-gather"] == Collective("all-gather", "model", "bf16", 192, 8, 1)
    assert found["all-reduce"].count == 6 and found["all-reduce"].devices == 4
    assert found["collective-permute"].size == found["collective-permute"].sent == 32


TPU_LOOP = """HloModule m

%cond (p: (s32[], f32[8])) -> pred[] {
  %p = (s32[]{:T(128)}, f32[8]{0:T(128)}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%p), index=0
  %n = s32[]{:T(128)} constant(24), metadata={op_name="scan"}
  ROOT %lt.2 = pred[]{:T(512)} compare(%i, %n), direction=LT, metadata={op_name="scan/cond/lt"}
}

%body (p: (s32[], f32[8])) -> (s32[], f32[8]) {
  %p = (s32[]{:T(128)}, f32[8]{0:T(128)}) parameter(0)
  %x = f32[8]{0:T(128)} get-tuple-element(%p), index=1
  %r = f32[8]{0:T(128)} all-reduce(%x), replica_groups=[1,8]<=[8], to_apply=%add
  ROOT %t = (s32[]{:T(128)}, f32[8]{0:T(128)}) tuple(%i, %r)
}

ENTRY %main (a: (s32[], f32[8])) -> (s32[], f32[8]) {
  %a = (s32[]{:T(128)}, f32[8]{0:T(128)}) parameter(0)
  ROOT %w = (s32[]{:T(128)}, f32[8]{0:T(128)}) while(%a), condition=%cond, body=%body
}
"""


def test_a_loop_without_a_stated_count_turns_as_often_as_its_condition_says():
    (found,) = collectives(TPU_LOOP, {"data": 8, "model": 1})
    assert (found.count, found.size) == (24, 24 * 32)


def test_what_is_no_program_is_refused():
    with pytest.raises(ValueError, match="no ENTRY"):
        collectives("hello", {"data": 1, "model": 1})
