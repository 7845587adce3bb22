"""`convert from-hf | to-hf | to-gguf | from-peft | to-peft`: for other software, and from it."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from stablelm_jax.run_verb import run_verb

DTYPES = ("bfloat16", "float16", "float32")
GGUF_TYPES = (
    *("f32", "f16", "bf16", "q8_0", "q4_0", "q2_k", "q3_k_s", "q3_k_m", "q3_k_l", "iq4_xs"),
    *("q4_k_s", "q4_k_m", "q5_k_s", "q5_k_m", "q6_k"),
)


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0, 1 on failure, 2 for bad arguments (argparse)."""
    options = vars(_parser().parse_args(argv))
    direction = options.pop("direction")
    try:
        from stablelm_jax.interop import conversions

        print(getattr(conversions, direction.replace("-", "_"))(**options))
    except (ValueError, OSError, ImportError) as error:
        print(f"convert: {error}", file=sys.stderr)
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="stablelm convert", description=__doc__)
    directions = parser.add_subparsers(dest="direction", required=True)
    from_hf = directions.add_parser("from-hf", help="a Hugging Face directory as a checkpoint")
    from_hf.add_argument("source", type=Path, metavar="DIR", help="holds config.json")
    from_hf.add_argument(
        "out", type=Path, metavar="OUT", help="a checkpoint global_step<N>, or a folder for one"
    )
    from_hf.add_argument("--step", type=_step, help="N, where OUT does not say it; default 0")
    to_hf = directions.add_parser("to-hf", help="a checkpoint for transformers")
    _takes_checkpoint(to_hf, "OUT")
    to_hf.add_argument("--dtype", choices=DTYPES, default=DTYPES[0], help="%(default)s")
    to_hf.add_argument("--revision", help="branch on the Hub; default: the checkpoint's name")
    to_hf.add_argument(
        "--max-file-size",
        type=_size,
        default=_size("5GB"),
        dest="max_file_bytes",
        metavar="SIZE",
        help="of the weights; default 5GB",
    )
    _takes_type(directions.add_parser("to-gguf", help="a checkpoint for llama.cpp"))
    from_peft = directions.add_parser("from-peft", help="a directory of PEFT's as a checkpoint")
    from_peft.add_argument("source", type=Path, metavar="DIR", help="holds adapter_config.json")
    from_peft.add_argument("out", type=Path, metavar="OUT", help="as of from-hf")
    from_peft.add_argument(
        "--parent", required=True, metavar="CKPT", help="the weights that the adapters are for"
    )
    from_peft.add_argument("--step", type=_step, help="N, where OUT does not say it; default 0")
    to_peft = directions.add_parser("to-peft", help="the adapters of a LoRA run for PEFT")
    _takes_checkpoint(to_peft, "OUT")
    to_peft.add_argument(
        "--base", default="", help="what PEFT is told to load under them; default: the parent"
    )
    for direction in directions.choices.values():
        direction.add_argument(
            "--tokenizer", help="a name or a tokenizer.json; default: the model's own"
        )
        direction.add_argument(
            "--no-verify",
            action="store_false",
            dest="verify",
            help="do not hold the result against the source",
        )
        direction.add_argument("--force", action="store_true", help="replace what OUT is now")
    return parser


def _takes_type(parser: argparse.ArgumentParser) -> None:
    _takes_checkpoint(parser, "OUT.gguf")
    add = parser.add_argument
    add("--type", choices=GGUF_TYPES, default="f16", dest="file_type", help="%(default)s")
    what = "round by importance: of a prepared folder's held-out text, or llama.cpp's file"
    add("--imatrix", type=Path, metavar="DATA|FILE", help=what)
    add("--imatrix-rows", type=_count, metavar="N", help="of 512 tokens of DATA; default 128")
    add("--save-imatrix", type=Path, metavar="FILE", help="keep that of DATA for other types")


def _takes_checkpoint(parser: argparse.ArgumentParser, out: str) -> None:
    parser.add_argument(
        "checkpoint", metavar="CKPT", help="a folder global_step<N>, or that of its run: its newest"
    )
    parser.add_argument("out", type=Path, metavar=out)


def _step(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is no step, a number from 0 on")
    return int(text)


def _count(text: str) -> int:
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"{text!r} is no number from 1 on")
    return int(text)


def _size(text: str) -> int:
    """Bytes of '5GB', '500MB'."""
    match = re.fullmatch(r"(\d+) ?([KMG])B?", text.upper())
    if match is None or not int(match[1]):
        raise argparse.ArgumentTypeError(f"{text!r} is no size such as 5GB or 500MB")
    return int(match[1]) * 1000 ** (1 + "KMG".index(match[2]))


if __name__ == "__main__":
    run_verb(main, "convert")
