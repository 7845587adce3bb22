"""Two operations that the interpreter of Pallas' Mosaic GPU backend lacks (jax 0.12), for tests:
a product whose left side lies in registers, and writing to the sums of the matrix unit."""

import contextlib

import jax
import jax.numpy as jnp
from jax._src.pallas.mosaic_gpu import primitives
from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks, jaxpr_interpret
from jax._src.state import primitives as state_primitives
from jax._src.state.types import AbstractRef

_Interpreter = jaxpr_interpret.JaxprInterpreter
_interpret, _wgmma = _Interpreter.interpret, _Interpreter._interpret_wgmma_ref_p


def _interpret_with_stores(self, jaxpr, token, *args):
    no_transforms = {"tree": jax.tree.structure(())}
    eqns = [
        eqn.replace(primitive=state_primitives.swap_p, params=no_transforms)
        if eqn.primitive is primitives.wgmma_accumulator_store_p
        else eqn
        for eqn in jaxpr.eqns
    ]
    return _interpret(self, jaxpr.replace(eqns=eqns), token, *args)


def _wgmma_of_registers(self, eqn, token, get_invals):
    sums, left, right = eqn.invars[:3]
    if isinstance(left.aval, AbstractRef):
        return _wgmma(self, eqn, token, get_invals)
    sums_key, left_value, right_key, *leaves = get_invals()
    assert not (eqn.params["acc_transforms_tree"] or eqn.params["a_transforms_tree"])
    transforms = jax.tree.unflatten(eqn.params["b_transforms_tree"], leaves)
    right_key, transforms = jaxpr_interpret.resolve_ref(right.aval, right_key, transforms)
    where = {"mesh_location": self.mesh_location, "thread": self.thread}
    shape = (left.aval.shape[1], sums.aval.shape[1])
    token, right_value = gpu_callbacks.call_get(
        token=token,
        result_shape_and_dtype=jax.ShapeDtypeStruct(shape, right.aval.dtype),
        allocation_key_as_array=right_key,
        transforms=transforms,
        **where,
    )
    aval = sums.aval.inner_aval
    whole = {"result_shape_and_dtype": aval, "allocation_key_as_array": sums_key, "transforms": ()}
    token, before = gpu_callbacks.call_get(token=token, **whole, **where)
    after = before + jnp.dot(left_value, right_value, preferred_element_type=aval.dtype)
    token, _ = gpu_callbacks.call_swap(token=token, val=after, mask=None, **whole, **where)
    return token, []


@contextlib.contextmanager
def patched():
    _Interpreter.interpret = _interpret_with_stores
    _Interpreter._interpret_wgmma_ref_p = _wgmma_of_registers
    try:
        yield
    finally:
        _Interpreter.interpret, _Interpreter._interpret_wgmma_ref_p = _interpret, _wgmma
