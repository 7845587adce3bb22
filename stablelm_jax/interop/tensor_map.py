"""Our tensors under the names of `transformers`' StableLmForCausalLM, and back.

Ours are stacked over the layers and keep heads apart, [in..., out...]; theirs are one a layer
(norms of query and key heads one a head), matrices [out, in]. Their names: `transformers`,
models/stablelm; the older remote code, `stablelm_epoch`, used the same.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterable, Iterator

import numpy as np

from stablelm_jax.model.config import ModelConfig
from stablelm_jax.model.parameters import parameter_table, specs_by_name

# Ours: theirs, with places for the number of the layer and of the head.
_NAMES = {
    "embed/embedding": "model.embed_tokens.weight",
    "layers/attention_norm/scale": "model.layers.{}.input_layernorm.weight",
    "layers/attention_norm/bias": "model.layers.{}.input_layernorm.bias",
    "layers/attention/query/kernel": "model.layers.{}.self_attn.q_proj.weight",
    "layers/attention/query/bias": "model.layers.{}.self_attn.q_proj.bias",
    "layers/attention/key/kernel": "model.layers.{}.self_attn.k_proj.weight",
    "layers/attention/key/bias": "model.layers.{}.self_attn.k_proj.bias",
    "layers/attention/value/kernel": "model.layers.{}.self_attn.v_proj.weight",
    "layers/attention/value/bias": "model.layers.{}.self_attn.v_proj.bias",
    "layers/attention/query_norm/scale": "model.layers.{}.self_attn.q_layernorm.norms.{}.weight",
    "layers/attention/key_norm/scale": "model.layers.{}.self_attn.k_layernorm.norms.{}.weight",
    "layers/attention/out/kernel": "model.layers.{}.self_attn.o_proj.weight",
    "layers/mlp_norm/scale": "model.layers.{}.post_attention_layernorm.weight",
    "layers/mlp_norm/bias": "model.layers.{}.post_attention_layernorm.bias",
    "layers/mlp/gate/kernel": "model.layers.{}.mlp.gate_proj.weight",
    "layers/mlp/up/kernel": "model.layers.{}.mlp.up_proj.weight",
    "layers/mlp/down/kernel": "model.layers.{}.mlp.down_proj.weight",
    "final_norm/scale": "model.norm.weight",
    "final_norm/bias": "model.norm.bias",
    "head/kernel": "lm_head.weight",
}
# Fields of ModelConfig, and the parameters that are there only where they are true.
NORM_BIASES = {
    "block_norm_bias": ("layers/attention_norm/bias", "layers/mlp_norm/bias"),
    "final_norm_bias": ("final_norm/bias",),
}


@dataclasses.dataclass(frozen=True)
class Tensor:
    """One tensor of theirs, with its name and shape, and the part of one of ours that it holds."""

    name: str
    shape: tuple[int, ...]
    ours: str  # name in our table of parameters
    index: tuple[int, ...]  # which part of ours it is: () the whole, (layer,) or (layer, head)
    num_input_dims: int  # leading dims of that part that a matrix sums over; 0: no matrix
    absent: bool  # the model has no such tensor: theirs is zero

    def theirs(self, ours: np.ndarray) -> np.ndarray:
        """Their layout, without a copy where it can be, of our whole tensor `ours`."""
        part = ours[self.index]
        if not self.num_input_dims:
            return part.reshape(self.shape)
        return part.reshape(self.shape[::-1]).T

    def put(self, ours: np.ndarray, theirs: np.ndarray) -> None:
        """The other way: copies their tensor to its part of our whole tensor `ours`."""
        part = ours[self.index]
        part[...] = (theirs.T if self.num_input_dims else theirs).reshape(part.shape)


@functools.cache
def tensors(model: ModelConfig) -> tuple[Tensor, ...]:
    """Every tensor of StableLmForCausalLM for this model, one of ours after the other.

    Theirs always has the biases of its norms.
    """
    present, found = specs_by_name(model), []
    for spec in parameter_table(with_norm_biases(model)):
        their_name, num_in = _NAMES[spec.name], spec.num_input_dims
        leading = their_name.count("{}")
        part = spec.shape[leading:]
        if num_in:
            shape = math.prod(part[num_in:]), math.prod(part[:num_in])
        else:  # the embedding is a table in both; other vectors are flat in theirs
            shape = part if spec.name == "embed/embedding" else (math.prod(part),)
        for index in np.ndindex(spec.shape[:leading]):
            name, absent = their_name.format(*index), spec.name not in present
            found.append(Tensor(name, shape, spec.name, index, num_in, absent))
    return tuple(found)


def tensor_values(
    wanted: Iterable[Tensor], leaves: Iterator[tuple[str, np.ndarray]]
) -> Iterator[np.ndarray]:
    """The values of each tensor, float32; zeros for those that the model does not have.

    Args:
      wanted: in the order of `tensors`. leaves: our parameters by name, in that of their table.
    """
    name, leaf = "", np.empty(0)
    for tensor in wanted:
        if tensor.absent:
            yield np.zeros(tensor.shape, np.float32)
            continue
        if tensor.ours != name:
            name, leaf = next(leaves)
            assert name == tensor.ours, (name, tensor)
        yield np.ascontiguousarray(tensor.theirs(leaf))


def with_norm_biases(model: ModelConfig) -> ModelConfig:
    """The same model in the form that StableLmForCausalLM has."""
    return dataclasses.replace(model, **dict.fromkeys(NORM_BIASES, True))
