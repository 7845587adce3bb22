"""`generate --checkpoint C --prompt TEXT`: continues a text."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0, 1 on failure, 2 for bad arguments (argparse)."""
    arguments = _parser().parse_args(argv)
    try:
        for prompt, text in _generate(arguments).items():
            print(prompt + text)
    except (ValueError, OSError) as error:
        print(f"generate: {error}", file=sys.stderr)
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="stablelm generate", description=__doc__)
    parser.add_argument(
        "--checkpoint", required=True, help="a folder global_step<N>, or its gs:// URL"
    )
    parser.add_argument("--prompt", required=True, action="append", help="may be repeated")
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--temperature", type=float, default=0.7, help="0: the likeliest token")
    parser.add_argument("--top-p", type=float, default=0.95)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tokenizer", help="default: the one the model was trained with")
    return parser


def _generate(arguments: argparse.Namespace) -> dict[str, str]:
    from stablelm_jax.checkpoint.weights import load_weights
    from stablelm_jax.data.tokenizer import load_tokenizer
    from stablelm_jax.generation.sampler import prepare_texts
    from stablelm_jax.parallel.mesh import make_mesh

    run, model, params = load_weights(arguments.checkpoint, make_mesh())
    tokenizer = load_tokenizer(arguments.tokenizer or run["config"]["data"]["tokenizer"])
    if tokenizer.sha256 != run["tokenizer_sha256"]:
        raise ValueError(
            f"tokenizer {tokenizer.name} is not the one that {arguments.checkpoint} was trained "
            "with; name that one with --tokenizer"
        )
    texts = prepare_texts(
        model,
        params,
        tokenizer,
        arguments.prompt,
        max_new_tokens=arguments.max_new_tokens,
        temperature=arguments.temperature,
        top_p=arguments.top_p,
        seed=arguments.seed,
    )
    return texts(params)


if __name__ == "__main__":
    sys.exit(main())
