"""Rows of MLX and OpenVINO for `report --edge`: q8 and q4, int8 and int4.

    python launch/edge_others.py mlx CHECKPOINT [flags of report --edge]

launch/edge.sh runs it, in an environment for each program. The weights come from `convert to-hf` in
float16; rows go to the folder of `report --edge`. Speed and memory come from a process of its own,
as there (--time).
"""

from __future__ import annotations

import argparse
import functools
import importlib.metadata
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from stablelm_jax.interop.llama_cpp import peak_memory, time_reading
from stablelm_jax.report import add_edge

GROUP = 64  # weights that share a scale: MLX's default; it divides every width of ours


class Mlx:
    """mlx-lm's StableLM on the processor, affine weights of 8 or 4 bits."""

    types = {"mlx_q8": 8, "mlx_q4": 4}

    def __init__(self, folder: Path):
        import mlx.core as mx
        from mlx_lm.models.cache import make_prompt_cache
        from mlx_lm.utils import load_model

        self._mx, self._make_cache = mx, make_prompt_cache
        self._model, config = load_model(folder)
        self._model.set_dtype(mx.float32)  # scales and activations: float16 is slower on processors
        self.vocab_size = config["vocab_size"]

    @staticmethod
    def write(hf: Path, folder: Path, kind: str) -> None:
        from mlx_lm import convert

        bits = Mlx.types[kind]
        convert(str(hf), str(folder), quantize=True, q_bits=bits, q_group_size=GROUP)

    @staticmethod
    def program() -> str:
        return f"MLX ({importlib.metadata.version('mlx')})"

    @staticmethod
    def size(folder: Path) -> int:
        return sum(file.stat().st_size for file in folder.glob("*.safetensors"))

    def logits(self, texts) -> np.ndarray:
        found = [self._model(self._mx.array([list(ids)]))[0] for ids in texts]
        return np.concatenate([np.array(x.astype(self._mx.float32)) for x in found])

    def read(self, ids, first=0) -> None:
        if first == 0:
            self._cache = self._make_cache(self._model)
        self._mx.eval(self._model(self._mx.array([list(ids)]), cache=self._cache)[:, -1])


class OpenVino:
    """An OpenVINO graph without a cache of keys and values: it reads, and writes nothing."""

    types = {"openvino_int8": "INT8_ASYM", "openvino_int4": "INT4_SYM"}

    def __init__(self, folder: Path):
        import openvino

        core = openvino.Core()
        # Weights alone are of few bits; the processor may choose bfloat16 for the rest otherwise.
        given = {"INFERENCE_PRECISION_HINT": "f32"}
        self._model = core.compile_model(folder / "model.xml", "CPU", given)
        self.vocab_size = self._model.output(0).partial_shape[2].get_length()

    @staticmethod
    def write(hf: Path, folder: Path, kind: str) -> None:
        import nncf
        import openvino
        import torch
        from transformers import StableLmForCausalLM

        model = StableLmForCausalLM.from_pretrained(
            hf, dtype=torch.float32, attn_implementation="eager", local_files_only=True
        ).eval()

        class Logits(torch.nn.Module):
            def __init__(self):
                super().__init__()
                self.model = model

            def forward(self, input_ids):
                return self.model(input_ids=input_ids, use_cache=False).logits

        tokens = torch.zeros((1, 16), dtype=torch.int64)
        length = torch.export.Dim("length", min=2, max=4096)
        dynamic = {"input_ids": {1: length}}
        with torch.no_grad():
            graph = torch.export.export(Logits(), (tokens,), dynamic_shapes=dynamic)
        made = openvino.convert_model(graph)
        mode = nncf.CompressWeightsMode[OpenVino.types[kind]]
        how = {"group_size": GROUP, "ratio": 1.0} if "INT4" in mode.name else {}
        folder.mkdir()
        openvino.save_model(nncf.compress_weights(made, mode=mode, **how), folder / "model.xml")

    @staticmethod
    def program() -> str:
        return f"OpenVINO ({importlib.metadata.version('openvino')})"

    @staticmethod
    def size(folder: Path) -> int:
        return (folder / "model.bin").stat().st_size

    def logits(self, texts) -> np.ndarray:
        return np.concatenate([self._one(list(ids)) for ids in texts])

    def _one(self, ids: list[int]) -> np.ndarray:
        padded = ids + [0] * (2 - len(ids))  # the export takes two tokens at least
        return self._model(np.array([padded], np.int64))[0][0, : len(ids)].copy()

    def read(self, ids, first=0) -> None:
        if first == 0:
            self._one(list(ids))


PROGRAMS = {"mlx": Mlx, "openvino": OpenVino}


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("program", choices=PROGRAMS)
    parser.add_argument("checkpoint")
    parser.add_argument("--output")
    add_edge(parser)  # types, tasks and importance matrix are of GGUF files
    return parser.parse_args(argv)


def main() -> None:
    given = arguments()
    from stablelm_jax.evaluation.edge import Edge, in_fresh_process
    from stablelm_jax.interop.conversions import to_hf
    from stablelm_jax.storage.files import new_result

    held_out = {name: getattr(given, name) for name in ("config", "data", "max_rows")}
    edge = Edge(given.checkpoint, given.output, **held_out)
    program = PROGRAMS[given.program]

    @functools.cache  # once for all types, and only where one must be written
    def exported() -> Path:
        export = edge.folder / f"{edge.saved.name}-hf-float16"
        how = {"revision": None, "max_file_bytes": 5 * 10**9, "tokenizer": None}
        to_hf(str(edge.saved.path), export, dtype="float16", verify=False, force=True, **how)
        return export

    for kind in program.types:
        folder = edge.folder / f"{edge.saved.name}-{kind}"

        def write(folder=folder, kind=kind):
            with new_result(folder, force=True) as aside:
                program.write(exported(), aside, kind)

        def measure(folder=folder):
            size = program.size(folder)
            row = {"program": program.program(), "file": folder.name, "bytes": size}
            row["bits_per_weight"] = 8 * size / edge.num_parameters
            return row | edge.quality(program(folder).logits)

        def speed(folder=folder):
            return in_fresh_process(__file__, "--time", given.program, str(folder))

        print(f"{kind}: {folder.name}", flush=True)
        edge.row(kind, measure, (folder, write), speed, again=given.speed)


def time_one(name: str, folder: str) -> None:
    """Prints speed and memory as JSON, as stablelm_jax.interop.llama_cpp does."""
    if name == "mlx":
        import mlx_lm.utils  # noqa: F401
    else:
        import openvino  # noqa: F401
    before = peak_memory()
    program = PROGRAMS[name](Path(folder))
    found = time_reading(program.read, program.vocab_size)
    if name == "openvino":
        del found["write_tokens_per_second"]  # each token would read the whole text again
    print(json.dumps(found | {"memory_bytes": peak_memory() - before}))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--time"]:
        time_one(*sys.argv[2:])
    else:
        main()
