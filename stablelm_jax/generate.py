"""`generate --checkpoint C --prompt TEXT`: continues a text, or chats."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import time
from collections.abc import Sequence
from typing import Any

from stablelm_jax.run_verb import answer_interrupts, run_verb


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0, 1 on failure, 2 for bad arguments (argparse)."""
    parser = _parser()
    arguments = parser.parse_args(argv)
    if not arguments.prompt and arguments.chat is None:
        parser.error("give a --prompt, or --chat for a conversation")
    if arguments.system and arguments.chat is None:
        parser.error("--system belongs to a chat: give --chat too")
    try:
        _generate(arguments)
    except (ValueError, OSError) as error:
        print(f"generate: {error}", file=sys.stderr)
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="stablelm generate", description=__doc__)
    add = parser.add_argument
    add("--checkpoint", required=True, help="global_step<N> or its run, then the newest; or a URL")
    add("--prompt", action="append", type=_utf_8, help="may be repeated; - reads it from stdin")
    what = "in the template that the model came with, or in zephyr, chatml or a FILE of Jinja; "
    what += "without a --prompt: a conversation"
    add("--chat", nargs="?", const="", metavar="TEMPLATE", help=what)
    add("--system", default="", type=_utf_8, help="the system's message of a chat")
    add("--max-new-tokens", type=int, help="64 by default, in a chat 512, or half the context")
    add("--temperature", type=float, default=0.7, help="%(default)s; 0: the likeliest token")
    add("--top-p", type=float, default=0.95, help="%(default)s")
    add("--top-k", type=int, default=0, help="%(default)s: of all tokens")
    add("--repetition-penalty", type=float, default=1.0, help="%(default)s: none")
    add("--seed", type=int, default=0, help="%(default)s")
    add("--stop-token", action="append", default=[], help="ends a text, as <|endoftext|> does")
    add("--tokenizer", help="default: the one the model was trained with")
    add("--dtype", choices=["float32", "bfloat16"], help="default: bfloat16, on a CPU float32")
    add("--context", type=_count, help="default: what the model was trained with")
    add("--model", type=_count, default=1, help="devices that share the model (%(default)s)")
    return parser


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no number from 1 on")
    return int(text)


def _utf_8(argument: str) -> str:
    """The bytes of the argument as UTF-8, whatever the locale."""
    return os.fsencode(argument).decode("utf-8")


def _generate(arguments: argparse.Namespace) -> None:
    saved, mesh = _open(arguments)
    from stablelm_jax.generation.generator import Generator
    from stablelm_jax.tokenizer.chat import encode_chat

    system = [{"role": "system", "content": arguments.system}] if arguments.system else []
    template = None
    if arguments.chat is not None:
        template = saved.chat_or_own(arguments.chat or None)
        # What the template refuses is said before the weights are read.
        encode_chat(saved.tokenizer, [*system, {"role": "user", "content": "?"}], template)
    length = arguments.context or saved.max_positions
    settings = _settings(arguments, saved, template, length)
    prompts = [sys.stdin.read() if text == "-" else text for text in arguments.prompt or []]
    params = saved.load(mesh)
    generator = Generator(
        saved.model,
        params,
        dtype=arguments.dtype,
        batch_size=max(1, len(prompts)),
        max_length=length,
        chunk=8 if len(prompts) < 2 else 32,  # one text is shown as it comes
        num_valid_ids=saved.num_valid_ids,
    )
    del params  # the generator has its own copy
    if prompts:
        _continue(generator, saved.tokenizer, template, system, prompts, settings)
    else:
        _converse(generator, saved.tokenizer, template, system, settings)


def _open(arguments: argparse.Namespace) -> tuple[Any, Any]:
    """The `SavedModel`, and the mesh for its parameters."""
    import jax

    from stablelm_jax.checkpoint.saved_model import SavedModel
    from stablelm_jax.generation.programs import check_split
    from stablelm_jax.parallel.mesh import make_mesh

    saved = SavedModel.open(arguments.checkpoint, arguments.tokenizer)
    check_split(saved.model.num_kv_heads, arguments.model)
    return saved, make_mesh(1, arguments.model, jax.devices()[: arguments.model])


def _settings(arguments: argparse.Namespace, saved: Any, template: Any, length: int) -> dict:
    """What `Generator.stream` takes; a ValueError where the model could not sample so."""
    from stablelm_jax.generation.sampling import Sampling
    from stablelm_jax.tokenizer.chat import special_id, stop_ids

    names = ("temperature", "top_p", "top_k", "repetition_penalty", "seed")
    settings = {name: getattr(arguments, name) for name in names}
    Sampling(**settings)
    count = arguments.max_new_tokens
    if count is None:
        count = min(512, max(1, length // 2)) if template else 64
    stops = [special_id(saved.tokenizer, special) for special in arguments.stop_token]
    stops += stop_ids(saved.tokenizer, template) if template else []
    stops = sorted({saved.tokenizer.eod, *saved.end_ids, *stops})
    return settings | {"max_new_tokens": count, "stop_tokens": stops}


def _continue(generator, tokenizer, template, system, prompts, settings) -> None:
    """One text to the terminal as it comes, or several when all are done; then the speed."""
    from stablelm_jax.generation.text import as_text
    from stablelm_jax.tokenizer.chat import encode_chat

    opening, ids = prompts, [tokenizer.encode(text) for text in prompts]
    if template:
        opening = [""] * len(prompts)
        turns = [[*system, {"role": "user", "content": text}] for text in prompts]
        ids = [encode_chat(tokenizer, messages, template) for messages in turns]
    generator.compile(ids, **settings)
    written, began = [], time.perf_counter()
    if len(ids) == 1:
        print(opening[0], end="", flush=True)
        try:
            for piece in as_text(tokenizer, generator.stream(ids[0], **settings), written):
                print(piece, end="", flush=True)
        finally:
            print()
    else:
        for prompt, tokens in zip(opening, generator.generate(ids, **settings)):
            written += tokens
            print(prompt + tokenizer.decode(tokens))
    seconds = time.perf_counter() - began
    told = f"tokens: {sum(map(len, ids))} read, {len(written)} written in {seconds:.2f} s"
    print(f"{told}: {len(written) / seconds:,.1f} tokens/s", file=sys.stderr)


def _converse(generator, tokenizer, template, messages, settings) -> None:
    """A conversation on the terminal: Ctrl-C ends an answer, Ctrl-D the program."""
    from stablelm_jax.generation.text import answer

    answer_interrupts()
    at_terminal = sys.stdin.isatty()
    while True:
        try:
            text = input("> " if at_terminal else "")
        except EOFError:
            return print() if at_terminal else None
        except KeyboardInterrupt:
            text = ""
        if text.strip():
            messages.append({"role": "user", "content": text})
            pieces = answer(generator, tokenizer, template, messages, settings)
            with contextlib.closing(pieces):
                try:
                    for piece in pieces:
                        print(piece, end="", flush=True)
                except KeyboardInterrupt:  # the answer ends, the conversation goes on
                    pass
                except ValueError as error:  # a message that cannot be read
                    print(f"generate: {error}", file=sys.stderr)
        print()


if __name__ == "__main__":
    run_verb(main, "generate", prints_result=True, interrupted="the text ends here")
