"""Who reads a Hugging Face directory to check it: `transformers` where it is installed, else we.

T positions, V vocabulary.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np

from stablelm_jax.interop import from_hf
from stablelm_jax.interop.hf_config import write_config
from stablelm_jax.interop.verify import our_logits
from stablelm_jax.parallel.mesh import make_mesh


def reference_logits(folder: Path, ids: Sequence[int]) -> tuple[str, np.ndarray]:
    """Who reads it, and logits [T, V] of a directory's weights, computed in float32."""
    try:
        import torch
        import transformers
    except ImportError:
        directory = from_hf.open_directory(folder)
        params = from_hf.load_params(directory, make_mesh(devices=jax.local_devices()[:1]))
        name = "our own reader (pip install -e '.[parity]' for transformers)"
        return name, our_logits(directory.model, params, ids)
    transformers.utils.logging.disable_progress_bar()  # ours says what is done
    config = None
    if json.loads((folder / "config.json").read_text(encoding="utf-8"))["model_type"] != "stablelm":
        # The first remote code, which no release contains: the same tensors.
        ours = from_hf.open_directory(folder).model
        values = write_config(ours, dtype="float32", max_positions=4096, token_ids={})
        config = transformers.StableLmConfig(**values)
    model = transformers.StableLmForCausalLM.from_pretrained(
        folder,
        config=config,
        dtype=torch.float32,
        attn_implementation="eager",
        local_files_only=True,
    )
    with torch.no_grad():
        logits_TV = model.eval()(torch.tensor([list(ids)])).logits[0].numpy()
    return f"transformers {transformers.__version__}", logits_TV
