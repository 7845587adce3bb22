"""Who reads a Hugging Face directory to check it: `transformers` where it is installed, else we.

T positions, V vocabulary.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np

from stablelm_jax.interop import from_hf
from stablelm_jax.interop.hf_config import write_config
from stablelm_jax.interop.verify import our_logits
from stablelm_jax.parallel.mesh import make_mesh


def installed() -> bool:
    """Whether `transformers` is, and PyTorch with it."""
    return all(importlib.util.find_spec(name) for name in ("torch", "transformers"))


def reference_name() -> str:
    """Who reads it, for a person."""
    if not installed():
        return "our own reader (install the extra `parity` for transformers')"
    return f"transformers {importlib.metadata.version('transformers')}"


def reference_logits(folder: Path, ids: Sequence[int]) -> np.ndarray:
    """Logits [T, V] of a directory's weights, computed in float32."""
    if not installed():
        directory = from_hf.open_directory(folder)
        params = from_hf.load_params(directory, make_mesh(devices=jax.local_devices()[:1]))
        return our_logits(directory.model, params, ids)
    import torch
    import transformers

    transformers.utils.logging.disable_progress_bar()  # ours says what is done
    options = {
        "dtype": torch.float32,
        "attn_implementation": "eager",
        "local_files_only": True,
    }
    if json.loads((folder / "config.json").read_text())["model_type"] == "stablelm":
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, **options)
    else:  # of the first remote code, which no release contains: the same tensors
        ours = from_hf.open_directory(folder).model
        config = transformers.StableLmConfig(
            **write_config(ours, dtype="float32", max_positions=4096, token_ids={})
        )
        model = transformers.StableLmForCausalLM.from_pretrained(folder, config=config, **options)
    with torch.no_grad():
        return model.eval()(torch.tensor([list(ids)])).logits[0].numpy()
