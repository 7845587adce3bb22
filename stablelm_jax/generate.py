"""`generate --checkpoint C --prompt TEXT`: continues a text, or chats."""

from __future__ import annotations

import argparse
import contextlib
import itertools
import sys
import time
from collections.abc import Sequence
from typing import Any


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0, 1 on failure, 2 for bad arguments (argparse)."""
    parser = _parser()
    arguments = parser.parse_args(argv)
    if not arguments.prompt and not arguments.chat:
        parser.error("give a --prompt, or --chat for a conversation")
    if arguments.system and not arguments.chat:
        parser.error("--system belongs to a chat: give --chat too")
    try:
        _generate(arguments)
    except (ValueError, OSError) as error:
        print(f"generate: {error}", file=sys.stderr)
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="stablelm generate", description=__doc__)
    parser.add_argument(
        "--checkpoint",
        required=True,
        help="global_step<N> or the run it is the newest of; or a URL",
    )
    parser.add_argument(
        "--prompt", action="append", help="may be repeated; - reads it from standard input"
    )
    parser.add_argument(
        "--chat", choices=["zephyr", "chatml"], help="a template; no --prompt: a conversation"
    )
    parser.add_argument("--system", default="", help="the system's message of a chat")
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--temperature", type=float, default=0.7, help="0: the likeliest token")
    parser.add_argument("--top-p", type=float, default=0.95)
    parser.add_argument("--top-k", type=int, default=0, help="0: of all tokens")
    parser.add_argument("--repetition-penalty", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--stop-token", action="append", default=[], help="ends a text, as <|endoftext|> does"
    )
    parser.add_argument("--tokenizer", help="default: the one the model was trained with")
    parser.add_argument(
        "--dtype", choices=["float32", "bfloat16"], help="default: bfloat16, on a CPU float32"
    )
    parser.add_argument("--context", type=_count, help="default: what the model was trained with")
    parser.add_argument("--model", type=_count, default=1, help="devices that share the model")
    return parser


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no number from 1 on")
    return int(text)


def _generate(arguments: argparse.Namespace) -> None:
    saved, params = _load(arguments)
    from stablelm_jax.generation import chat
    from stablelm_jax.generation.generator import Generator

    prompts = [sys.stdin.read() if text == "-" else text for text in arguments.prompt or []]
    tokenizer, is_streamed = saved.tokenizer, len(prompts) < 2
    generator = Generator(
        saved.model,
        params,
        dtype=arguments.dtype,
        batch_size=max(1, len(prompts)),
        max_length=arguments.context or saved.max_positions,
        chunk=8 if is_streamed else 32,
        num_valid_ids=saved.num_valid_ids,
    )
    del params  # the generator has its own copy
    names = ("max_new_tokens", "temperature", "top_p", "top_k", "repetition_penalty", "seed")
    settings = {name: getattr(arguments, name) for name in names}
    stops = [chat.special_id(tokenizer, special) for special in arguments.stop_token]
    if arguments.chat:
        stops += chat.stop_ids(tokenizer, arguments.chat)
    settings["stop_tokens"] = sorted({tokenizer.eod, *saved.end_ids, *stops})
    if not prompts:
        return _converse(generator, tokenizer, arguments, settings)
    ids = [_encoded(tokenizer, text, arguments) for text in prompts]
    opening = [""] * len(prompts) if arguments.chat else prompts
    write = _write_stream if is_streamed else _write_batch
    write(generator, tokenizer, ids, opening, settings)


def _load(arguments: argparse.Namespace) -> tuple[Any, Any]:
    """The `SavedModel` and its parameters."""
    import jax

    from stablelm_jax.checkpoint.saved_model import SavedModel
    from stablelm_jax.generation.forward import check_split
    from stablelm_jax.parallel.mesh import make_mesh

    saved = SavedModel.open(arguments.checkpoint, arguments.tokenizer)
    check_split(saved.model.num_kv_heads, arguments.model)
    return saved, saved.load(make_mesh(1, arguments.model, jax.devices()[: arguments.model]))


def _encoded(tokenizer, text: str, arguments: argparse.Namespace) -> list[int]:
    from stablelm_jax.generation.chat import encode_chat

    if not arguments.chat:
        return tokenizer.encode(text)
    system = [{"role": "system", "content": arguments.system}] if arguments.system else []
    return encode_chat(tokenizer, [*system, {"role": "user", "content": text}], arguments.chat)


def _write_stream(generator, tokenizer, ids, opening, settings) -> None:
    """One text, to the terminal as it comes."""
    from stablelm_jax.generation.text import as_text

    times, written = [time.perf_counter()], 0

    def counted():
        nonlocal written
        for chunk in generator.stream(ids[0], **settings):
            if len(times) == 2:  # the first token came when the prompt was read
                times.append(time.perf_counter())
            written += len(chunk)
            yield chunk

    generator.compile(ids, **settings)
    times.append(time.perf_counter())
    print(opening[0], end="", flush=True)
    with contextlib.suppress(KeyboardInterrupt):  # what was written so far is meant to stay
        for piece in as_text(tokenizer, counted()):
            print(piece, end="", flush=True)
    print()
    _tell_speed(("compiled", "prompt"), times, len(ids[0]), max(written - 1, 0))


def _write_batch(generator, tokenizer, ids, opening, settings) -> None:
    """Several texts, when all are done."""
    times = [time.perf_counter()]
    generator.compile(ids, **settings)
    times.append(time.perf_counter())
    found = generator.generate(ids, **settings)
    for prompt, tokens in zip(opening, found):
        print(prompt + tokenizer.decode(tokens))
    _tell_speed(("compiled",), times, sum(map(len, ids)), sum(map(len, found)))


def _tell_speed(names: Sequence[str], times: list[float], read: int, written: int) -> None:
    """How long each span took that lies between two of the times, and the last one until now."""
    *spans, last = itertools.pairwise([*times, time.perf_counter()])
    told = [f"{name} {end - start:.2f} s" for name, (start, end) in zip(names, spans)]
    seconds = last[1] - last[0]
    told.append(f"{read} tokens read, {written} written in {seconds:.2f} s")
    print(f"{', '.join(told)}: {written / seconds:,.1f} tokens/s", file=sys.stderr)


def _converse(generator, tokenizer, arguments, settings) -> None:
    """A conversation on the terminal: Ctrl-C ends an answer, Ctrl-D the program."""
    from stablelm_jax.generation.text import Conversation

    def forgotten(count: int) -> None:
        print(f"(the first {count} messages no longer fit)", file=sys.stderr)

    conversation = Conversation(
        generator,
        tokenizer,
        arguments.chat,
        system=arguments.system,
        forgotten=forgotten,
        **settings,
    )
    while True:
        try:
            text = input("> ")
        except EOFError:
            return print()
        except KeyboardInterrupt:
            text = ""
        if text.strip():
            with contextlib.closing(conversation.answer(text)) as pieces:
                try:
                    for piece in pieces:
                        print(piece, end="", flush=True)
                except KeyboardInterrupt:  # the answer ends, the conversation goes on
                    pass
                except ValueError as error:  # a message longer than the context
                    print(f"generate: {error}", file=sys.stderr)
        print()


if __name__ == "__main__":
    sys.exit(main())
