"""A checkpoint as lm-eval's model, with all that its tasks need."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jax.sharding import Mesh

from stablelm_jax.checkpoint.saved_model import SavedModel
from stablelm_jax.evaluation.generate_late import GenerateLate
from stablelm_jax.evaluation.lm_eval_model import CheckpointLM
from stablelm_jax.evaluation.progress import Progress
from stablelm_jax.evaluation.scoring import BATCH_TOKENS, Scorer


def lm_of_checkpoint(
    saved: SavedModel,
    mesh: Mesh,
    *,
    dtype: Any = None,
    max_length: int | None = None,
    batch_tokens: int = BATCH_TOKENS,
    progress: Progress | None = None,
) -> CheckpointLM:
    """Reads the weights onto the mesh.

    Args:
      dtype: of matrix products; by default bfloat16, float32 on a CPU.
      max_length: tokens of the longest input; by default the model's context.
      batch_tokens: of a batch on each device.

    Raises:
      CheckpointError: it is damaged.
    """
    on_cpu = mesh.devices.flat[0].platform == "cpu"
    scorer = Scorer(
        saved.model,
        mesh,
        max_length=max_length or saved.max_positions,
        dtype=dtype or (jnp.float32 if on_cpu else jnp.bfloat16),
        num_valid_ids=saved.num_valid_ids,
        batch_tokens=batch_tokens,
    )
    params = scorer.compute_copy(saved.load(mesh))
    generate = GenerateLate(saved.model, scorer, batch_tokens)
    generate.load(params)
    return CheckpointLM(
        scorer,
        params,
        saved.tokenizer,
        generate=generate,
        progress=progress,
        end_ids=saved.end_ids,
    )
