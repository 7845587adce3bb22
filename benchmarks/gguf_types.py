"""What each type of GGUF file costs and keeps of a trained model, in llama.cpp.

    python benchmarks/gguf_types.py --checkpoint runs/smoke/run/checkpoints/global_step400

Each type is written and held against our float32 over the fixed prompt of the conversions' own
check, in llama.cpp where it is installed (`pip install xllamacpp`), else by our own reader.
`difference` is the largest of a log probability, `spread` their standard deviation. Then what
llama.cpp goes on to write after `--prompt`, the likeliest token each time.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from stablelm_jax.interop import gguf_export, gguf_peer
from stablelm_jax.interop.checkpoint import OwnCheckpoint
from stablelm_jax.interop.conversions import own_logits
from stablelm_jax.interop.gguf_tensors import FILE_TYPES
from stablelm_jax.interop.verify import compare, prompt_ids

NEW_TOKENS = 40


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--checkpoint", required=True, help="a folder global_step<N>")
    parser.add_argument("--tokenizer", help="where the training's is gone")
    parser.add_argument("--prompt", default="def main(argv):\n")
    given = parser.parse_args()
    own = OwnCheckpoint.open(given.checkpoint, given.tokenizer)
    columns = ("type", "bytes", "difference", "spread", "top 1", "KL, nats", "limit", "goes on")
    table = Table(*columns, title=f"{own.path}, {gguf_peer.peer()}")
    ids = prompt_ids(own.tokenizer)[: own.max_positions - 1]
    positions = gguf_peer.compared_positions(len(ids), own.model.vocab_size)
    ours_PV = gguf_peer.log_probabilities(own_logits(own, ids), positions)
    for file_type in FILE_TYPES:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "model.gguf"
            gguf_export.write_file(own, path, file_type=file_type)
            theirs_PV = gguf_peer.peer_log_probabilities(path, own.tokenizer, ids, positions)
            text = goes_on(path, own, given.prompt) if gguf_peer.installed() else ""
            table.add_row(*row(file_type, path, ours_PV, theirs_PV), text)
    Console(width=None if sys.stdout.isatty() else 150).print(table)


def row(file_type: str, path: Path, ours_PV: np.ndarray, theirs_PV: np.ndarray) -> list[str]:
    """One line of the table."""
    found = compare(ours_PV, theirs_PV)
    numbers = (
        f"{found.largest:.2g}",
        f"{found.spread:.2g}",
        f"{found.top1:.1%}",
        f"{found.kl:.2g}",
    )
    return [file_type, f"{path.stat().st_size:,}", *numbers, str(FILE_TYPES[file_type].limit)]


def goes_on(path: Path, own: OwnCheckpoint, prompt: str) -> str:
    ids = own.tokenizer.encode(prompt)
    llama = gguf_peer.LlamaCpp(path, len(ids) + NEW_TOKENS)
    return own.tokenizer.decode(llama.generate(ids, NEW_TOKENS))


if __name__ == "__main__":
    main()
