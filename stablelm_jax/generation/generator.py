"""`Generator`: continues prompts with a model, in batches, from compiled programs."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from stablelm_jax.generation.programs import NOTHING, LayerCache, Programs, State, decode_weights
from stablelm_jax.generation.sampling import Sampling
from stablelm_jax.model.config import ModelConfig
from stablelm_jax.parallel import sharding
from stablelm_jax.parallel.mesh import make_mesh

# Tokens that are read at a time where a text goes on: scores of all of them are in memory at once.
PIECE = 256


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
        # A text that goes on: the tokens in the cache, each in the slot of its position; the cache.
        self._kept: tuple[list[int], list[LayerCache]] | None = None
        if isinstance(leaf, jax.ShapeDtypeStruct):
            self._copy = self._copy.lower(params).compile()
        else:
            self.load(params)

    def load(self, params: Any) -> None:
        """Copies these parameters, of the same shapes and places as those it was made for."""
        self._weights, self._kept = self._copy(params), None

    def unload(self) -> None:
        """Lets go of the copy and of what is kept; the programs stay."""
        self._weights = self._kept = None

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

    def stream(
        self, prompt: Sequence[int], *, go_on: bool = False, **settings: Any
    ) -> Iterator[list[int]]:
        """The new tokens of one prompt as they come, a chunk at a time; settings as `generate`.

        Args:
          go_on: keeps the cache for the next call with `go_on`. That one reads only what its prompt
            does not share, from the beginning on, with this prompt and what was written after it.
        """
        if go_on:
            return self._going_on(prompt, **settings)
        return (tokens[0] for _, tokens, _ in self._chunks([prompt], **settings))

    def _chunks(
        self, prompts: Sequence[Sequence[int]], *, max_new_tokens: int, **settings: Any
    ) -> Iterator[tuple[list[int], list[list[int]], np.ndarray]]:
        """For each chunk: indices of its prompts, and as `_written`."""
        self._check_loaded()
        for group, batch, numbers, first, following in self._batches(
            prompts, max_new_tokens=max_new_tokens, **settings
        ):
            numbers = jax.device_put(numbers, self._whole)
            begun = first(self._weights, jax.device_put(batch, self._rows), numbers)
            for _, tokens, active_B in self._written(*begun, following, numbers, max_new_tokens):
                yield group, tokens, active_B

    def _written(
        self, state: State, first_B: jax.Array, following: Any, numbers: dict, max_new_tokens: int
    ) -> Iterator[tuple[State, list[list[int]], np.ndarray]]:
        """For each chunk: the state, tokens of every row, which rows go on [B].

        The first chunk has one token a row, which is known when the prompts are read. Where the
        caller clears a place of the rows that go on, that row ends. The buffers of the state are
        reused for the next chunk.
        """
        rows, whole, chunk = self._rows, self._whole, self._programs.chunk
        tokens_BN, written = jax.device_get(first_B)[:, None], 1
        while True:
            going_on_B = tokens_BN[:, -1] != NOTHING
            active_B = going_on_B.copy()
            yield state, [row_N[row_N != NOTHING].tolist() for row_N in tokens_BN], active_B
            if written == max_new_tokens or not active_B.any():
                return
            if (active_B != going_on_B).any():
                state = dataclasses.replace(state, active_B=jax.device_put(active_B, rows))
            limit = min(chunk, max_new_tokens - written)
            limit_there = jax.device_put(np.int32(limit), whole)
            state, tokens_BN = following(self._weights, state, numbers, limit_there)
            tokens_BN, written = jax.device_get(tokens_BN)[:, :limit], written + limit

    def _going_on(
        self, prompt: Sequence[int], *, max_new_tokens: int, **settings: Any
    ) -> Iterator[list[int]]:
        """`stream` of a text that goes on."""
        self._check_loaded()
        numbers, stages = self._settings([prompt], max_new_tokens, **settings)
        numbers = jax.device_put(numbers, self._whole)
        tokens = list(prompt)
        same, cache = self._shared(tokens, max_new_tokens)
        if ("go_on", stages) not in self._compiled:  # jit keeps one for each length and cache
            programs = self._programs.read_on(stages), self._programs.next_tokens(stages)
            self._compiled["go_on", stages] = programs
        read_on, following = self._compiled["go_on", stages]
        for begin in range(same, len(tokens), PIECE):
            piece = self._piece(tokens, begin, stages)
            begun = read_on(self._weights, cache, piece, numbers)
            cache = begun[0].cache
        for state, new, _ in self._written(*begun, following, numbers, max_new_tokens):
            tokens += new[0]
            self._kept = tokens[:-1], state.cache  # the newest token is not in the cache yet
            yield new[0]
            self._kept = None  # the next chunk reuses the buffers, and may be interrupted
        self._kept = tokens[:-1], state.cache

    def _shared(self, tokens: list[int], max_new_tokens: int) -> tuple[int, list[LayerCache]]:
        """How many tokens need not be read again, and the cache that holds them, large enough."""
        known, cache = self._kept or ([], None)
        self._kept = None
        # The last one is read in any case: the next token follows from it.
        pairs = zip(known, tokens[:-1])
        same = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))
        # Twice as many slots as before or more, so that few programs are compiled; and those of
        # the last piece's padding.
        needed = len(tokens) + max(max_new_tokens, PIECE)
        slots = min(1 << (needed - 1).bit_length(), padded_length(self.max_length + PIECE))
        if cache is None or cache[0][0].shape[2] < slots:
            cache = self._programs.enlarged(cache, self.batch_size, slots)
        return same, cache

    def _piece(self, tokens: list[int], begin: int, stages: tuple[str, ...]) -> tuple:
        """What `Programs.read_on` takes of the tokens from `begin` on."""
        found, seen_BV = tokens[begin : begin + PIECE], None
        tokens_BT = np.zeros((self.batch_size, padded_length(len(found))), np.int32)
        tokens_BT[:, : len(found)] = found
        if "penalty" in stages:
            seen_BV = np.zeros((self.batch_size, self._programs.model.vocab_size), bool)
            seen_BV[:, tokens] = True
        tokens_BT, seen_BV = jax.device_put((tokens_BT, seen_BV), self._rows)
        place = jax.device_put((np.int32(begin), np.int32(len(found))), self._whole)
        return tokens_BT, *place, seen_BV

    def _check_loaded(self) -> None:
        if self._weights is None:
            raise ValueError("this Generator holds no weights: load the parameters first")

    def _batches(
        self, prompts: Sequence[Sequence[int]], *, max_new_tokens: int, **settings: Any
    ) -> Iterator[tuple[list[int], tuple, dict, Any, Any]]:
        """For each batch, long prompts first: their indices, what the programs take, and those."""
        numbers, stages = self._settings(prompts, max_new_tokens, **settings)
        order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
        for start in range(0, len(order), self.batch_size):
            group = order[start : start + self.batch_size]
            length = padded_length(len(prompts[group[0]]))
            batch = _batch([prompts[i] for i in group], group, self.batch_size, length)
            slots = padded_length(length + max_new_tokens)
            yield group, batch, numbers, *self._compile(batch, numbers, slots, stages)

    def _settings(
        self,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        stop_tokens: Collection[int] = (),
        **sampling: Any,
    ) -> tuple[dict[str, np.ndarray], tuple[str, ...]]:
        """What programs take and what they must hold; errors as `generate`."""
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
        settings = Sampling(**sampling)
        # A program has places for eight stop tokens, or for the next multiple.
        stop_ids = np.full(-(-max(len(stop_tokens), 1) // 8) * 8, NOTHING, np.int32)
        stop_ids[: len(stop_tokens)] = list(stop_tokens)
        return settings.numbers() | {"stop_ids": stop_ids}, settings.stages

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
