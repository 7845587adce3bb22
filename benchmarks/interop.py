"""Do other programs compute what we do? Small models of the three kinds, every tensor random.

    python benchmarks/interop.py                 # transformers, and llama.cpp where it is installed
    python benchmarks/interop.py --seed 7 --scale 0.2
    python benchmarks/interop.py --types all     # each type that is written, not float32 alone
    python benchmarks/interop.py --types all --checkpoint C

Heads, rotary dims and switches are those of the published models, widths and depth are not. Each
model goes out as Hugging Face and as GGUF files, and the other program computes the fixed prompt of
the conversions' own check: `largest difference` is of a logit, `of the spread` the same in standard
deviations of the logits. In float32 `tokens equal` counts the greedy continuation, and `bits back`
says whether the Hugging Face files, read again, hold every bit.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
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

from stablelm_jax.checkpoint.saved_model import SavedModel
from stablelm_jax.checkpoint.saving import write_checkpoint
from stablelm_jax.interop import from_hf, gguf_export, hf_reference, llama_cpp, to_hf
from stablelm_jax.interop.gguf_types import FILE_TYPES
from stablelm_jax.interop.safetensors_files import DTYPES
from stablelm_jax.interop.verify import Difference, compare, our_logits, prompt_ids
from stablelm_jax.model.config import ModelConfig
from stablelm_jax.model.parameters import flatten, nest, parameter_table
from stablelm_jax.parallel.mesh import make_mesh
from stablelm_jax.tokenizer.tokenizer import load_tokenizer
from stablelm_jax.tokenizer.train_tokenizer import train

ROWS, LAYERS, NEW_TOKENS = 1024, 3, 32
COLUMNS = (
    *("kind", "type", "held against", "largest difference", "of the spread", "likeliest equal"),
    *("KL", "bytes", "tokens equal", "bits back"),
)
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
    parser.add_argument("--checkpoint", help="a trained model in place of the random ones")
    parser.add_argument("--types", choices=["float32", "all"], default="float32")
    given = parser.parse_args()
    table = Table(*COLUMNS, title=given.checkpoint or f"seed {given.seed}, scale {given.scale}")
    with tempfile.TemporaryDirectory() as folder:
        if given.checkpoint:
            models = {"trained": SavedModel.open(given.checkpoint)}
        else:
            models = random_models(Path(folder), given.seed, given.scale)
        for kind, own in models.items():
            for row in rows(own, Path(folder) / f"{kind} out", given.types):
                table.add_row(kind, *row)
    Console(width=None if sys.stdout.isatty() else 140).print(table)


def random_models(folder: Path, seed: int, scale: float) -> dict[str, SavedModel]:
    """A checkpoint of each kind, with a tokenizer made for it."""
    tokenizer = folder / "tokenizer.json"
    sources = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))[:40]
    train((path.read_text("utf-8") for path in sources), ROWS).save(str(tokenizer))
    return {
        kind: write_random(
            folder / kind, model, tokenizer, np.random.default_rng([seed, number]), scale
        )
        for number, (kind, model) in enumerate(KINDS.items())
    }


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
    write_checkpoint(path, {"params": nest(flat)}, run)
    (path / "tokenizer.json").write_bytes(tokenizer.read_bytes())
    return SavedModel.open(path)


def rows(own: SavedModel, folder: Path, types: str) -> Iterator[tuple[str, ...]]:
    """What stands in the table for each program and type."""
    params, ids = nest(dict(own.leaves())), prompt_ids(own.tokenizer)[: own.max_positions - 1]
    ours_TV = our_logits(own.model, params, ids)
    greedy = our_greedy(own.model, params, ids) if types == "float32" else []
    for dtype in DTYPES if types == "all" else ("float32",):
        yield dtype, *hf_row(own, folder / dtype, dtype, ids, ours_TV, greedy)
    if importlib.util.find_spec("cyllama") is None:
        return
    for file_type in FILE_TYPES if types == "all" else ("f32",):
        file = folder / f"{file_type}.gguf"
        gguf_export.write_file(own, file, file_type)
        told = gguf_row(own, file, ids, ours_TV, greedy)
        yield file_type, llama_cpp.name(), *told


def hf_row(own, folder: Path, dtype: str, ids, ours_TV, greedy) -> tuple[str, ...]:
    to_hf.write_directory(own, folder, dtype, 5_000_000_000, own.name)
    who, theirs_TV = hf_reference.reference_logits(folder, ids)
    size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    told = who, *shown(compare(ours_TV, theirs_TV), size)
    if not greedy:
        return *told, "", ""
    back = from_hf.load_params(from_hf.open_directory(folder), make_mesh())
    bits = "all" if all_bits_equal(nest(dict(own.leaves())), back) else "NOT ALL"
    return *told, same(greedy, transformers_greedy(folder, ids)), bits


def gguf_row(own, file: Path, ids, ours_TV, greedy) -> tuple[str, ...]:
    llama = llama_cpp.LlamaCpp(file, len(ids) + NEW_TOKENS)
    told = shown(compare(ours_TV, llama.logits([ids])), file.stat().st_size)
    if not greedy:
        return *told, "", ""
    tokens = list(ids)
    while len(tokens) < len(ids) + NEW_TOKENS:
        tokens.append(int(llama.logits([tokens])[-1].argmax()))
    return *told, same(greedy, tokens[len(ids) :]), ""


def shown(difference: Difference, size: int) -> tuple[str, ...]:
    share = difference.largest / difference.spread
    return (
        f"{difference.largest:.1e}",
        f"{share:.1e}",
        f"{difference.top1:.1%}",
        f"{difference.kl:.1e}",
        f"{size:,}",
    )


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
