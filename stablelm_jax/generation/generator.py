"""`Generator`: continues prompts with a model, in batches, from compiled programs."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from stablelm_jax.generation.programs import NOTHING, Programs, decode_weights
from stablelm_jax.generation.sampling import Sampling
from stablelm_jax.model.config import ModelConfig
from stablelm_jax.parallel import sharding
from stablelm_jax.parallel.mesh import make_mesh


class Generator:
    """Continues prompts with one model.

    Programs are compiled when first needed and kept: one for each padded length of prompts and each
    size of the cache (there are few of both), and each way to sample.

    Args:
      params: the float32 parameters, of which a copy is made for decoding; or their
        `ShapeDtypeStruct`s with shardings, to `compile` before there are any: then `load` them.
      mesh: by default that of the parameters, else one device.
      dtype: the type of matrix products, activations and cache; by default bfloat16, float32 on a
        CPU.
      batch_size: prompts at a time, rounded up to a multiple of the mesh's batch parts.
      max_length: tokens of a prompt and its continuation at most.
      chunk: tokens between two looks of the host at what was written.
      num_valid_ids: as the model was trained with it; None: padding rows may be chosen too.

    Raises:
      ValueError: heads that the mesh's `model` does not divide.
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
        assert batch_size >= 1 and chunk >= 1, (batch_size, chunk)
        leaf = jax.tree.leaves(params)[0]
        if mesh is None:
            place = getattr(leaf, "sharding", None)
            one_device = make_mesh(1, 1, jax.devices()[:1])
            mesh = place.mesh if isinstance(place, NamedSharding) else one_device
        on_cpu = mesh.devices.flat[0].platform == "cpu"
        dtype = jnp.dtype(dtype or (jnp.float32 if on_cpu else jnp.bfloat16))
        parts = sharding.batch_parts(mesh)
        self.batch_size = -(-batch_size // parts) * parts
        self.max_length = max_length
        self._rows, self._whole = sharding.batch_sharding(mesh), sharding.replicated(mesh)
        self._programs = Programs(model, mesh, dtype, chunk, num_valid_ids)
        self._copy, places = decode_weights(model, mesh, dtype)
        self._abstract = _abstract(jax.eval_shape(self._copy, params), places)
        self._compiled: dict[tuple, Any] = {}
        self._weights: Any = None
        if isinstance(leaf, jax.ShapeDtypeStruct):
            self._copy = self._copy.lower(params).compile()
        else:
            self.load(params)

    def load(self, params: Any) -> None:
        """Copies these parameters, of the same shapes and places as those it was made for."""
        self._weights = self._copy(params)

    def unload(self) -> None:
        """Lets go of the copy; the programs stay."""
        self._weights = None

    def compile(self, prompts: Sequence[Sequence[int]], **settings: Any) -> None:
        """Compiles now what `generate` or `stream` with these arguments needs."""
        for _ in self._batches(prompts, **settings):
            pass

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        stopped: Callable[[int, list[int]], bool] = lambda index, tokens: False,
        **settings: Any,
    ) -> list[list[int]]:
        """The new tokens of each prompt, without the stop token that ended them.

        What a prompt gets does not depend on the others.

        Args:
          prompts: token ids; more than `batch_size` of them are run in groups of alike length.
          stopped: asked after every chunk whether a prompt ends there, by its index and new tokens.
          settings: max_new_tokens, stop_tokens where some end a text, and arguments of `Sampling`;
            the likeliest token each time by default.

        Raises:
          ValueError: an empty prompt, one too long for `max_length`, or settings out of range.
        """
        found: list[list[int]] = [[] for _ in prompts]
        for group, tokens, active_B in self._chunks(prompts, **settings):
            for row, index in enumerate(group):
                found[index] += tokens[row]
                if active_B[row] and stopped(index, found[index]):
                    active_B[row] = False
        return found

    def stream(self, prompt: Sequence[int], **settings: Any) -> Iterator[list[int]]:
        """The new tokens of one prompt as they come, a chunk at a time; settings as `generate`."""
        for _, tokens, _ in self._chunks([prompt], **settings):
            yield tokens[0]

    def _chunks(
        self, prompts: Sequence[Sequence[int]], *, max_new_tokens: int, **settings: Any
    ) -> Iterator[tuple[list[int], list[list[int]], np.ndarray]]:
        """For each chunk: indices of its prompts, tokens of every row, which rows go on [B].

        The first chunk has one token a row, which is known when the prompts are read. Where the
        caller clears a place of the rows that go on, that row ends.
        """
        if self._weights is None:
            raise ValueError("this Generator holds no weights: load the parameters first")
        rows, whole, chunk = self._rows, self._whole, self._programs.chunk
        for group, batch, numbers, first, following in self._batches(
            prompts, max_new_tokens=max_new_tokens, **settings
        ):
            numbers = jax.device_put(numbers, whole)
            state, first_B = first(self._weights, jax.device_put(batch, rows), numbers)
            tokens_BN, written = jax.device_get(first_B)[:, None], 1
            while True:
                going_on_B = tokens_BN[:, -1] != NOTHING
                active_B = going_on_B.copy()
                yield group, [row_N[row_N != NOTHING].tolist() for row_N in tokens_BN], active_B
                if written == max_new_tokens or not active_B.any():
                    break
                if (active_B != going_on_B).any():
                    state = dataclasses.replace(state, active_B=jax.device_put(active_B, rows))
                limit = min(chunk, max_new_tokens - written)
                limit_there = jax.device_put(np.int32(limit), whole)
                state, tokens_BN = following(self._weights, state, numbers, limit_there)
                tokens_BN, written = jax.device_get(tokens_BN)[:, :limit], written + limit

    def _batches(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        max_new_tokens: int,
        stop_tokens: Collection[int] = (),
        **sampling: Any,
    ) -> Iterator[tuple[list[int], tuple, dict, Any, Any]]:
        """For each batch, long prompts first: their indices, what the programs take, and those."""
        if not prompts or not all(len(prompt) for prompt in prompts):
            raise ValueError("a prompt is empty; give at least one token of text")
        if max_new_tokens < 1:
            raise ValueError(f"max_new_tokens is {max_new_tokens}; it must be at least 1")
        order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
        longest = len(prompts[order[0]])
        if longest + max_new_tokens > self.max_length:
            raise ValueError(
                f"a prompt of {longest} tokens and {max_new_tokens} new ones are more than "
                f"{self.max_length}: shorten the prompt, or give a larger max_length (the context)"
            )
        settings = Sampling(**sampling)
        # A program has places for eight stop tokens, or for the next multiple.
        stop_ids = np.full(-(-max(len(stop_tokens), 1) // 8) * 8, NOTHING, np.int32)
        stop_ids[: len(stop_tokens)] = list(stop_tokens)
        numbers = settings.numbers() | {"stop_ids": stop_ids}
        for start in range(0, len(order), self.batch_size):
            group = order[start : start + self.batch_size]
            length = padded_length(len(prompts[group[0]]))
            batch = _batch([prompts[i] for i in group], group, self.batch_size, length)
            slots = padded_length(length + max_new_tokens)
            yield group, batch, numbers, *self._compile(batch, numbers, slots, settings.stages)

    def _compile(self, batch: tuple, numbers: dict, slots: int, stages: tuple[str, ...]) -> tuple:
        """The program that reads these prompts, and the one that writes what follows."""
        batch = _abstract(batch, self._rows)
        numbers, limit = _abstract((numbers, np.int32(0)), self._whole)
        following_key = slots, stages, numbers["stop_ids"].shape
        first_key = batch[0].shape, *following_key
        if first_key not in self._compiled:
            program = self._programs.first_token(slots, stages)
            self._compiled[first_key] = program.lower(self._abstract, batch, numbers).compile()
        first = self._compiled[first_key]
        if following_key not in self._compiled:
            state = _abstract(first.out_info[0], first.output_shardings[0])
            program = self._programs.next_tokens(stages).lower(
                self._abstract, state, numbers, limit
            )
            self._compiled[following_key] = program.compile()
        return first, self._compiled[following_key]


def padded_length(length: int) -> int:
    """The next of few lengths: multiples of 32 to 128, of 128 to 1024, then four in each octave.

    A program is compiled for each length that rows are padded to: few of them compile seldom.
    """
    step = 32 if length <= 128 else max(128, 1 << (length - 1).bit_length() - 3)
    return -(-length // step) * step


def _abstract(values: Any, places: Any) -> Any:
    """Arrays as shapes, with their shardings: a tree as `values`, or one for all."""
    if isinstance(places, NamedSharding):
        places = jax.tree.map(lambda _: places, values)
    return jax.tree.map(
        lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), values, places
    )


def _batch(prompts: list[Sequence[int]], rows: list[int], batch_size: int, length: int) -> tuple:
    """The prompts padded behind, their lengths and numbers, and which rows are prompts."""
    tokens_BT = np.zeros((batch_size, length), np.int32)
    length_B, row_B = np.ones(batch_size, np.int32), np.zeros(batch_size, np.int32)
    for i, prompt in enumerate(prompts):
        tokens_BT[i, : len(prompt)], length_B[i], row_B[i] = prompt, len(prompt), rows[i]
    return tokens_BT, length_B, row_B, np.arange(batch_size) < len(prompts)
