"""`Generator`: continues prompts with a model, in batches, from compiled programs."""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from stablelm_jax.generation.programs import NOTHING, Programs, Prompts
from stablelm_jax.generation.sampling import Sampling
from stablelm_jax.generation.weights import decode_weights
from stablelm_jax.generation.writing import Writing
from stablelm_jax.model.config import ModelConfig
from stablelm_jax.parallel import sharding
from stablelm_jax.parallel.mesh import make_mesh

# f(index of a prompt, its new tokens so far) -> whether it ends here
Stopped = Callable[[int, list[int]], bool]

# Places for stop tokens in a program; more of them compile it for the next multiple.
_STOP_IDS = 8


class Generator:
    """Continues prompts with one model.

    Programs are compiled when first needed and kept: one for each padded length of prompts and each
    size of the cache (`padded_length` keeps these few), and each way to sample.

    Args:
      params: the float32 parameters, of which a copy is made for decoding; or their
        `ShapeDtypeStruct`s with shardings, to `compile` before there are any: then `load` them.
      mesh: by default that of the parameters, else one device.
      dtype: of matrix products, activations and cache; by default bfloat16, float32 on a CPU.
      batch_size: prompts at a time, rounded up to a multiple of the mesh's batch parts.
      max_length: tokens of a prompt and its continuation at most.
      chunk: tokens between two looks of the host at what was written.
      num_valid_ids: as the model was trained with it; None: padding rows may be chosen too.

    Raises:
      ValueError: sizes below 1, or heads that the mesh's `model` does not divide.
    """

    def __init__(
        self,
        model: ModelConfig,
        params: Any,
        *,
        mesh: Mesh | None = None,
        dtype: Any = None,
        batch_size: int,
        max_length: int,
        chunk: int = 32,
        num_valid_ids: int | None = None,
    ):
        for name, size in (
            ("batch_size", batch_size),
            ("max_length", max_length),
            ("chunk", chunk),
        ):
            if size < 1:
                raise ValueError(f"{name} is {size}; it must be at least 1")
        mesh = _mesh_of(params) if mesh is None else mesh
        on_cpu = mesh.devices.flat[0].platform == "cpu"
        dtype = jnp.dtype(dtype or (jnp.float32 if on_cpu else jnp.bfloat16))
        parts = sharding.batch_parts(mesh)
        self.batch_size = -(-batch_size // parts) * parts
        self.max_length = max_length
        self._programs = Programs(model, mesh, dtype, chunk, num_valid_ids)
        self._copy, places = decode_weights(model, mesh, dtype)
        self._abstract = _abstract(jax.eval_shape(self._copy, params), places)
        self._kept: dict[tuple, Any] = {}  # programs
        self._weights: Any = None
        if isinstance(jax.tree.leaves(params)[0], jax.ShapeDtypeStruct):
            self._copy = self._copy.lower(params).compile()
        else:
            self.load(params)

    def load(self, params: Any) -> None:
        """Copies these parameters, of the same shapes and places as those it was made for."""
        self._weights = self._copy(params)

    def unload(self) -> None:
        """Lets go of the copy; the programs stay."""
        self._weights = None

    def compile(
        self, prompts: Sequence[Sequence[int]], *, max_new_tokens: int, **sampling: Any
    ) -> None:
        """Compiles now what `generate` needs for these prompts and settings."""
        stages = Sampling(**sampling).stages
        *settings, limit = self._programs.abstract_settings(_STOP_IDS)
        for group in self._groups(prompts, max_new_tokens):
            length, slots = self._sizes(prompts, group, max_new_tokens)
            batch = self._programs.abstract_prompts(self.batch_size, length)
            first = self._first(length, slots, stages)
            first = first.lower(self._abstract, batch, *settings).compile()
            state = _abstract(first.out_info[0], first.output_shardings[0])
            following = self._following(slots, stages)
            following = following.lower(self._abstract, state, *settings, limit).compile()
            self._kept[length, slots, stages], self._kept[slots, stages] = first, following

    def warm_up(self, prompts: Sequence[Sequence[int]], **settings: Any) -> None:
        """Compiles what `generate` or `stream` with these arguments needs, by running no further
        than the first token: what comes after it takes its own time only."""
        for _, writing in self._writings(prompts, **settings):
            writing.warm_up()

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        max_new_tokens: int,
        stop_tokens: Collection[int] = (),
        stopped: Stopped | None = None,
        **sampling: Any,
    ) -> list[list[int]]:
        """The new tokens of each prompt, without the stop token that ended them.

        Args:
          prompts: token ids; more than `batch_size` of them are run in groups of alike length. What
            a prompt gets does not depend on the others.
          stopped: asked after every chunk.
          sampling: arguments of `Sampling`; the likeliest token each time by default.

        Raises:
          ValueError: an empty prompt, one too long for `max_length`, or settings out of range.
        """
        found: list[list[int]] = [[] for _ in prompts]
        settings = {"max_new_tokens": max_new_tokens, "stop_tokens": stop_tokens, **sampling}
        for group, writing in self._writings(prompts, **settings):
            for tokens_BN in writing.chunks():
                for row, index in enumerate(group):
                    found[index] += _until_nothing(tokens_BN[row])
                if stopped is not None:
                    going_on = list(writing.going_on())
                    writing.end(i for i in going_on if stopped(group[i], found[group[i]]))
        return found

    def stream(self, prompt: Sequence[int], **settings: Any) -> Iterator[list[int]]:
        """The new tokens of one prompt as they come, a chunk at a time; settings as `generate`."""
        for _, writing in self._writings([prompt], **settings):
            for tokens_BN in writing.chunks():
                yield _until_nothing(tokens_BN[0])

    def _groups(self, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> list[list[int]]:
        """Indices of the prompts of each batch, the longest first."""
        if not prompts or not all(len(prompt) for prompt in prompts):
            raise ValueError("a prompt is empty; give at least one token of text")
        if max_new_tokens < 1:
            raise ValueError(f"max_new_tokens is {max_new_tokens}; it must be at least 1")
        longest = max(map(len, prompts))
        if longest + max_new_tokens > self.max_length:
            raise ValueError(
                f"a prompt of {longest} tokens and {max_new_tokens} new ones are more than "
                f"{self.max_length}: shorten the prompt, or give a larger max_length (the context)"
            )
        order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
        return [order[i : i + self.batch_size] for i in range(0, len(order), self.batch_size)]

    def _sizes(self, prompts, group: Sequence[int], max_new_tokens: int) -> tuple[int, int]:
        """(padded length of the prompts, slots of the cache)."""
        length = padded_length(len(prompts[group[0]]))
        return length, padded_length(length + max_new_tokens)

    def _writings(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        max_new_tokens: int,
        stop_tokens: Collection[int] = (),
        **sampling: Any,
    ) -> Iterator[tuple[list[int], Writing]]:
        """Indices of the prompts of each batch, and the batch; to be used up before the next."""
        if self._weights is None:
            raise ValueError("this Generator holds no weights: load the parameters first")
        settings = Sampling(**sampling)
        for group in self._groups(prompts, max_new_tokens):
            length, slots = self._sizes(prompts, group, max_new_tokens)
            first = self._first(length, slots, settings.stages)
            following = self._following(slots, settings.stages)
            yield (
                group,
                Writing(
                    self._programs,
                    functools.partial(first, self._weights),
                    functools.partial(following, self._weights),
                    _batch([prompts[i] for i in group], group, self.batch_size, length),
                    (settings.numbers(), _stop_ids(stop_tokens)),
                    max_new_tokens,
                ),
            )

    def _first(self, length: int, slots: int, stages: tuple[str, ...]) -> Any:
        """The program that reads prompts."""
        key = length, slots, stages
        if key not in self._kept:
            self._kept[key] = self._programs.first_token(slots, stages)
        return self._kept[key]

    def _following(self, slots: int, stages: tuple[str, ...]) -> Any:
        """The program that writes tokens."""
        key = slots, stages
        if key not in self._kept:
            self._kept[key] = self._programs.next_tokens(stages)
        return self._kept[key]


def padded_length(length: int) -> int:
    """The next of few lengths: multiples of 32 to 128, of 128 to 1024, then four in each octave."""
    if length <= 128:
        step = 32
    else:
        step = max(128, 1 << (length - 1).bit_length() - 3)
    return -(-length // step) * step


def _abstract(shapes: Any, places: Any) -> Any:
    return jax.tree.map(
        lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), shapes, places
    )


def _mesh_of(params: Any) -> Mesh:
    place = getattr(jax.tree.leaves(params)[0], "sharding", None)
    return place.mesh if isinstance(place, NamedSharding) else make_mesh(1, 1, jax.devices()[:1])


def _batch(prompts: list[Sequence[int]], rows: list[int], batch_size: int, length: int) -> Prompts:
    """The prompts padded behind, and rows that have ended before they begin for the rest."""
    tokens_BT = np.zeros((batch_size, length), np.int32)
    for row_T, prompt in zip(tokens_BT, prompts):
        row_T[: len(prompt)] = prompt
    missing = batch_size - len(prompts)
    return Prompts(
        tokens_BT,
        np.array([len(prompt) for prompt in prompts] + [1] * missing, np.int32),
        np.array(rows + [0] * missing, np.int32),
        np.arange(batch_size) < len(prompts),
    )


def _stop_ids(tokens: Collection[int]) -> np.ndarray:
    places = -(-max(len(tokens), 1) // _STOP_IDS) * _STOP_IDS
    return np.array([*tokens, *[NOTHING] * (places - len(tokens))], np.int32)


def _until_nothing(tokens_N: np.ndarray) -> list[int]:
    return tokens_N[tokens_N != NOTHING].tolist()
