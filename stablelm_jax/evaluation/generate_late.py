"""A generator that is made when a task first asks for text."""

from __future__ import annotations

from typing import Any

from stablelm_jax.evaluation.scoring import BATCH_TOKENS, Scorer
from stablelm_jax.model.config import ModelConfig
from stablelm_jax.parallel import sharding


class GenerateLate:
    """Called as `Generator.generate`, with the weights that were loaded last.

    Its batches are as many rows of `scorer.max_length` as `batch_tokens` hold, at least one a part
    of the mesh; its programs are kept when the weights change.
    """

    def __init__(self, model: ModelConfig, scorer: Scorer, batch_tokens: int = BATCH_TOKENS):
        self._model, self._scorer = model, scorer
        rows = max(1, batch_tokens // scorer.max_length)
        self._rows = rows * sharding.batch_parts(scorer.mesh)
        self._params: Any = None
        self._generator: Any = None
        self._holds_them = False

    def load(self, params: Any) -> None:
        """These parameters from now on."""
        self._params, self._holds_them = params, False

    def unload(self) -> None:
        """Lets go of them."""
        self._params = None
        if self._holds_them:
            self._generator.unload()
            self._holds_them = False

    def __call__(self, prompts: list[list[int]], **settings: Any) -> list[list[int]]:
        if self._generator is None:
            from stablelm_jax.generation.generator import Generator

            self._generator = Generator(
                self._model,
                self._params,
                mesh=self._scorer.mesh,
                dtype=self._scorer.dtype,
                batch_size=self._rows,
                max_length=self._scorer.max_length,
                num_valid_ids=self._scorer.num_valid_ids,
            )
        elif not self._holds_them:
            self._generator.load(self._params)
        self._holds_them = True
        return self._generator.generate(prompts, **settings)
