"""Our tensors under the names of `transformers`' StableLmForCausalLM, and back.

Ours are stacked over the layers and keep heads apart, [in..., out...]; theirs are one a layer
(norms of query and key heads one a head), matrices [out, in]. Their names: `transformers`,
models/stablelm; the older remote code, `stablelm_epoch`, used the same.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterator, Sequence

import numpy as np

from stablelm_jax.model.config import ModelConfig
from stablelm_jax.model.parameters import ParameterSpec, specs_by_name

_TOP = {
    "embed/embedding": "model.embed_tokens.weight",
    "final_norm/scale": "model.norm.weight",
    "final_norm/bias": "model.norm.bias",
    "head/kernel": "lm_head.weight",
}
_IN_LAYER = {
    "attention_norm/scale": "input_layernorm.weight",
    "attention_norm/bias": "input_layernorm.bias",
    "mlp_norm/scale": "post_attention_layernorm.weight",
    "mlp_norm/bias": "post_attention_layernorm.bias",
    "attention/query/kernel": "self_attn.q_proj.weight",
    "attention/query/bias": "self_attn.q_proj.bias",
    "attention/key/kernel": "self_attn.k_proj.weight",
    "attention/key/bias": "self_attn.k_proj.bias",
    "attention/value/kernel": "self_attn.v_proj.weight",
    "attention/value/bias": "self_attn.v_proj.bias",
    "attention/out/kernel": "self_attn.o_proj.weight",
    "attention/query_norm/scale": "self_attn.q_layernorm.norms.{head}.weight",
    "attention/key_norm/scale": "self_attn.k_layernorm.norms.{head}.weight",
    "mlp/gate/kernel": "mlp.gate_proj.weight",
    "mlp/up/kernel": "mlp.up_proj.weight",
    "mlp/down/kernel": "mlp.down_proj.weight",
}
_NORM_BIASES = {
    "layers/attention_norm/bias": "block_norm_bias",
    "layers/mlp_norm/bias": "block_norm_bias",
    "final_norm/bias": "final_norm_bias",
}


@dataclasses.dataclass(frozen=True)
class Tensor:
    """One tensor of theirs, and the part of one of ours that it holds.

    Attributes:
      name, shape: as theirs has it.
      ours: name in our table of parameters.
      index: what it is of ours: () the whole, (layer,) or (layer, head).
      num_in: leading dims of that part that a matrix sums over; 0 where it is no matrix, and the
        embedding, which is a table in both.
      absent: the model has no such tensor: theirs is zero.
    """

    name: str
    shape: tuple[int, ...]
    ours: str
    index: tuple[int, ...] = ()
    num_in: int = 0
    absent: bool = False

    def theirs(self, ours: np.ndarray) -> np.ndarray:
        """Their layout, without a copy where it can be, of our whole tensor `ours`."""
        part = ours[self.index]
        if not self.num_in:
            return part.reshape(self.shape)
        return part.reshape(self.shape[::-1]).T

    def their_index(self, spans: Sequence[range], shape: tuple[int, ...]) -> tuple[slice, ...]:
        """Where a block of our part lies in theirs.

        Args:
          spans: of the block, one for each dim of our part.
          shape: of our part.
        """
        if not self.num_in:
            sides = [(spans, shape)] if len(self.shape) == 1 else zip(zip(spans), zip(shape))
        else:
            sides = [
                (spans[self.num_in :], shape[self.num_in :]),
                (spans[: self.num_in], shape[: self.num_in]),
            ]
        return tuple(_flat(*side) for side in sides)

    def part_of_ours(self, theirs: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
        """The other way: `shape` is that of our part, or of the block of it that was read."""
        return (theirs.T if self.num_in else theirs).reshape(shape)


@functools.cache
def tensors(model: ModelConfig) -> tuple[Tensor, ...]:
    """Every tensor of StableLmForCausalLM for this model, one of ours after the other.

    Theirs always has the biases of its norms.
    """
    full = with_norm_biases(model)
    present = specs_by_name(model)
    return tuple(
        dataclasses.replace(tensor, absent=spec.name not in present)
        for spec in specs_by_name(full).values()
        for tensor in _of(spec)
    )


def with_norm_biases(model: ModelConfig) -> ModelConfig:
    """The same model in the form that StableLmForCausalLM has."""
    return dataclasses.replace(model, block_norm_bias=True, final_norm_bias=True)


def norm_bias_switch(ours: str) -> str | None:
    """The field of ModelConfig that decides whether there is such a parameter, if one does."""
    return _NORM_BIASES.get(ours)


def _flat(spans: Sequence[range], shape: Sequence[int]) -> slice:
    """A block of several dims as a span of all of them laid flat.

    Only the first is ever split: the table of shardings splits heads, the feed-forward width and
    the vocabulary.
    """
    assert all(len(span) == size for span, size in zip(spans[1:], shape[1:])), (spans, shape)
    inner = math.prod(shape[1:])
    return slice(spans[0].start * inner, spans[0].stop * inner)


def _of(spec: ParameterSpec) -> Iterator[Tensor]:
    if not spec.stacked:
        yield _tensor(spec, _TOP[spec.name], spec.shape, ())
        return
    their_name = _IN_LAYER[spec.name.removeprefix("layers/")]
    each_head = "{head}" in their_name
    for layer in range(spec.shape[0]):
        name = f"model.layers.{layer}.{their_name}"
        if not each_head:
            yield _tensor(spec, name, spec.shape[1:], (layer,))
            continue
        for head in range(spec.shape[1]):
            yield _tensor(spec, name.format(head=head), spec.shape[2:], (layer, head))


def _tensor(spec: ParameterSpec, name: str, part: tuple[int, ...], index) -> Tensor:
    if not spec.name.endswith("/kernel"):
        shape = part if spec.name == "embed/embedding" else (math.prod(part),)
        return Tensor(name, shape, spec.name, index)
    num_in = 2 if spec.name == "layers/attention/out/kernel" else 1
    shape = (math.prod(part[num_in:]), math.prod(part[:num_in]))
    return Tensor(name, shape, spec.name, index, num_in)
