"""Seconds and host memory of converting a model of full size, in and out.

    python benchmarks/convert.py --folder DIR                 # the 1.6B, random weights in bfloat16
    python benchmarks/convert.py --folder DIR --size 3b --steps to-hf,to-gguf
    python benchmarks/convert.py --smoke                      # shows in a minute that all runs

A directory as Hugging Face has it is made of random weights, all biases and norms too; then each
step runs as a process of its own, with and without its check. `forward` is one forward pass of the
imported checkpoint over 128 tokens in bfloat16. `anonymous` is the most memory that a process had
for itself; mapped files, which the system takes back when it needs to, are not in it. The first
column of seconds is the whole command, start of Python included.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from stablelm_jax.interop import hf_config, tensor_map
from stablelm_jax.interop.safetensors_files import DTYPES, write_tensors
from stablelm_jax.model import config as sizes

SIZES = {
    "1.6b": sizes.STABLELM_2_1_6B,
    "3b": sizes.STABLELM_3B_4E1T,
    "12b": sizes.STABLELM_2_12B,
    "smoke": dataclasses.replace(
        sizes.STABLELM_2_1_6B, num_layers=2, width=128, num_heads=2, num_kv_heads=2
    ),
}
ROOT = Path(__file__).parents[1]
FORWARD = """
import sys, jax, jax.numpy as jnp
from stablelm_jax.checkpoint.saved_model import SavedModel
from stablelm_jax.model.compute import Compute
from stablelm_jax.model.transformer import logits
from stablelm_jax.parallel.mesh import make_mesh
saved = SavedModel.open(sys.argv[1])
model, params = saved.model, saved.load(make_mesh(devices=jax.devices()[:1]))
leaves, tree = jax.tree.flatten(params)
del params
for i, leaf in enumerate(leaves):
    leaves[i] = jax.block_until_ready(leaf.astype("bfloat16"))
params = jax.tree.unflatten(tree, leaves)
tokens = jax.random.randint(jax.random.key(0), (1, 128), 0, model.vocab_size)
positions = jnp.arange(128)[None]
forward = jax.jit(logits, static_argnums=(0, 5))
compute = Compute(dtype=jnp.bfloat16)
out = forward(model, params, tokens, jnp.ones_like(tokens), positions, compute)
print(out.shape, "finite", bool(jnp.isfinite(out).all()), "spread", float(out.std()))
"""


# Each as its module and arguments, None for `forward`, and what it writes.
FROM_HF = ("stablelm_jax.convert", "from-hf", "hf", "global_step0", "--tokenizer", "arcade100k")
TO_HF = ("stablelm_jax.convert", "to-hf", "global_step0", "out")
TO_GGUF = ("stablelm_jax.convert", "to-gguf", "global_step0", "out.gguf", "--type", "q8_0")
STEPS = {
    "from-hf": ((*FROM_HF, "--force", "--no-verify"), "global_step0"),
    "from-hf, checked": ((*FROM_HF, "--force"), "global_step0"),
    "forward": (None, None),
    "to-hf": ((*TO_HF, "--force", "--no-verify"), "out"),
    "to-hf, checked": ((*TO_HF, "--force"), "out"),
    "to-gguf": ((*TO_GGUF, "--force", "--no-verify"), "out.gguf"),
}


def main() -> None:
    arguments = _parser().parse_args()
    size = "smoke" if arguments.smoke else arguments.size
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        source = Path(folder) / "hf"
        began = time.monotonic()
        write_random(source, sizes=SIZES[size])
        print(f"{size}: random weights made in {time.monotonic() - began:.0f} s", flush=True)
        table = Table("step", "seconds", "anonymous GB", "on disk GB", "last line", title=size)
        for name in arguments.steps.split(","):
            table.add_row(name, *measured(name, Path(folder)))
    Console(width=None if sys.stdout.isatty() else 150).print(table)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", choices=list(SIZES), default="1.6b")
    parser.add_argument("--folder", type=Path, help="on the disk that is meant; 15 GB for the 1.6B")
    parser.add_argument("--smoke", action="store_true", help="a tiny model")
    parser.add_argument("--steps", default=",".join(STEPS), help=f"of {', '.join(STEPS)}")
    return parser


def write_random(folder: Path, sizes: sizes.ModelConfig) -> None:
    """A directory of StableLmForCausalLM in bfloat16, every tensor random."""
    folder.mkdir(parents=True)
    model = tensor_map.with_norm_biases(sizes)
    rng = np.random.default_rng(0)
    tensors = tensor_map.tensors(model)
    shapes = {tensor.name: tensor.shape for tensor in tensors}

    def values() -> Iterator[np.ndarray]:
        for tensor in tensors:
            mean = 1.0 if tensor.ours.endswith("scale") else 0.0
            drawn = rng.standard_normal(tensor.shape, np.float32) * 0.02 + mean
            yield drawn.astype(DTYPES["bfloat16"][1])

    write_tensors(folder, shapes, values(), "bfloat16", max_bytes=5_000_000_000)
    ids = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), 100257)
    config = hf_config.write_config(model, dtype="bfloat16", max_positions=4096, token_ids=ids)
    (folder / "config.json").write_text(json.dumps(config))


def measured(name: str, folder: Path) -> tuple[str, str, str, str]:
    """Runs one step; seconds, peak of anonymous memory, what it wrote, its last line."""
    verb, written = STEPS[name]
    command = [sys.executable, *(["-c", FORWARD] if verb is None else ["-m", verb[0]])]
    command += ["global_step0"] if verb is None else verb[1:]
    began, peak = time.monotonic(), 0
    with (folder / "log").open("w+") as log:
        process = subprocess.Popen(
            command, cwd=folder, stdout=log, stderr=log, env=os.environ | {"PYTHONPATH": str(ROOT)}
        )
        while process.poll() is None:
            peak = max(peak, anonymous_bytes(process.pid))
            time.sleep(0.05)
        seconds = time.monotonic() - began
        log.seek(0)
        lines = log.read().strip().splitlines() or [""]
    if process.returncode:
        raise SystemExit("\n".join(lines))
    said = next((line for line in lines if line.startswith("checked by")), lines[-1])
    size = sum(path.stat().st_size for path in paths(folder / written)) if written else 0
    return f"{seconds:.1f}", f"{peak / 1e9:.2f}", f"{size / 1e9:.2f}" if size else "", said


def paths(written: Path) -> list[Path]:
    """A file, or what is in a folder."""
    return [written] if written.is_file() else list(written.rglob("*"))


def anonymous_bytes(pid: int) -> int:
    """Memory that a process has for itself now; 0 where the system does not say."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:  # it has just ended, or this is no Linux
        return 0
    match = re.search(r"RssAnon:\s+(\d+) kB", status)
    return 1024 * int(match[1]) if match else 0


if __name__ == "__main__":
    main()
