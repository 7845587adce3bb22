"""Do other programs compute what we do? Small models of the three kinds, every tensor random.

    python benchmarks/interop.py                 # transformers, and llama.cpp where it is installed
    python benchmarks/interop.py --seed 7 --scale 0.2

Heads, rotary dims and switches are those of the published models, widths and depth are not. Each
model goes out as float32 Hugging Face files and as an f32 GGUF file. `largest difference` is of a
logit (llama.cpp: of a log probability, which is what it tells), over the fixed prompt of the
conversions' own check; `spread` the standard deviation of the logits; `tokens equal` counts the
greedy continuation. `bits back` says whether the Hugging Face files, read again, hold every bit.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import sysconfig
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table

from stablelm_jax.checkpoint.checksum import flatten
from stablelm_jax.checkpoint.saved_model import SavedModel
from stablelm_jax.checkpoint.weights import write_weights
from stablelm_jax.data.tokenizer import load_tokenizer
from stablelm_jax.data.train_tokenizer import train
from stablelm_jax.interop import from_hf, gguf_export, gguf_peer, hf_peer, to_hf
from stablelm_jax.interop.verify import compare, our_logits, prompt_ids
from stablelm_jax.model.config import ModelConfig
from stablelm_jax.model.parameters import nest, parameter_table
from stablelm_jax.parallel.mesh import make_mesh

ROWS, LAYERS, NEW_TOKENS = 1024, 3, 32
# Head sizes as published: 64, 160, 80. Biases in block norms too, as the files of all three have.
KINDS = {
    "1.6B": ModelConfig(ROWS, LAYERS, 256, 4, 4, 704, block_norm_bias=True),
    "12B": ModelConfig(
        ROWS,
        LAYERS,
        640,
        4,
        1,
        1728,
        block_norm_bias=True,
        qkv_bias=False,
        qk_norm=True,
        parallel_residual=True,
    ),
    "3B": ModelConfig(ROWS, LAYERS, 320, 4, 4, 864, block_norm_bias=True, qkv_bias=False),
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--scale", type=float, default=0.1, help="standard deviation of a value")
    given = parser.parse_args()
    columns = ("kind", "held against", "largest difference", "spread", "tokens equal", "bits back")
    table = Table(*columns, title=f"seed {given.seed}, scale {given.scale}")
    with tempfile.TemporaryDirectory() as folder:
        tokenizer = Path(folder) / "tokenizer.json"
        sources = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))[:40]
        train((path.read_text("utf-8") for path in sources), ROWS).save(str(tokenizer))
        for number, (kind, model) in enumerate(KINDS.items()):
            rng = np.random.default_rng([given.seed, number])
            own = write_random(Path(folder) / kind, model, tokenizer, rng, given.scale)
            for row in rows(own, Path(folder) / kind):
                table.add_row(kind, *row)
    Console(width=None if sys.stdout.isatty() else 110).print(table)


def write_random(
    folder: Path, model: ModelConfig, tokenizer: Path, rng: np.random.Generator, scale: float
) -> SavedModel:
    """A checkpoint of random weights, biases and norms."""
    flat = {
        row.name: jnp.asarray(rng.normal(row.init_std == "ones", scale, row.shape), jnp.float32)
        for row in parameter_table(model)
    }
    run = {
        "step": 0,
        "model_config": dataclasses.asdict(model),
        "tokenizer_sha256": load_tokenizer(tokenizer).sha256,
        "imported": {"from": "random", "max_positions": 256, "end_ids": [], "chat_template": None},
    }
    path = folder / "global_step0"
    path.parent.mkdir()
    write_weights(path, nest(flat), run)
    (path / "tokenizer.json").write_bytes(tokenizer.read_bytes())
    return SavedModel.open(path)


def rows(own: SavedModel, folder: Path) -> Iterator[tuple[str, ...]]:
    """What stands in the table for each program."""
    flat = dict(own.leaves())
    params, ids = nest(flat), prompt_ids(own.tokenizer)
    ours_TV = our_logits(own.model, params, ids)
    greedy = our_greedy(own.model, params, ids)
    to_hf.write_directory(own, folder / "hf", dtype="float32")
    difference = compare(ours_TV, hf_peer.peer_logits(folder / "hf", ids))
    equal = same(greedy, transformers_greedy(folder / "hf", ids))
    back = from_hf.load_params(from_hf.open_directory(folder / "hf"), make_mesh())
    bits = "all" if all_bits_equal(params, back) else "NOT ALL"
    yield hf_peer.peer(), f"{difference.largest:.1e}", f"{difference.spread:.2f}", equal, bits
    if not gguf_peer.installed():
        return
    file = folder / "model.gguf"
    gguf_export.write_file(own, file, file_type="f32")
    llama = gguf_peer.LlamaCpp(file, len(ids) + NEW_TOKENS)
    positions = np.arange(len(ids))
    theirs = llama.log_probabilities(ids, positions)
    difference = compare(gguf_peer.log_probabilities(ours_TV, positions), theirs)
    equal = same(greedy, llama.generate(ids, NEW_TOKENS))
    yield gguf_peer.peer(), f"{difference.largest:.1e}", f"{difference.spread:.2f}", equal, ""


def our_greedy(model: ModelConfig, params: Any, ids: list[int]) -> list[int]:
    """The likeliest token each time, by the whole forward pass: no cache that could be wrong."""
    tokens = list(ids)
    for _ in range(NEW_TOKENS):
        padded = tokens + [0] * (len(ids) + NEW_TOKENS - len(tokens))
        tokens.append(int(our_logits(model, params, padded)[len(tokens) - 1].argmax()))
    return tokens[len(ids) :]


def transformers_greedy(folder: Path, ids: list[int]) -> list[int]:
    import torch
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    # An end of text does not end it: these models are random.
    options = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "eos_token_id": None}
    out = model.generate(torch.tensor([ids]), attention_mask=torch.ones(1, len(ids)), **options)
    return out[0, len(ids) :].tolist()


def same(ours: list[int], theirs: list[int]) -> str:
    """How many tokens are equal before the first that is not."""
    equal = next((i for i, (a, b) in enumerate(zip(ours, theirs)) if a != b), len(theirs))
    return f"{equal} of {NEW_TOKENS}"


def all_bits_equal(ours: Any, theirs: Any) -> bool:
    a, b = flatten(ours), flatten(theirs)
    return a.keys() == b.keys() and all(
        np.array_equal(a[name].view(np.uint32), np.asarray(b[name]).view(np.uint32)) for name in a
    )


if __name__ == "__main__":
    main()
