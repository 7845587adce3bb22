"""`generate --checkpoint C --prompt TEXT`: continues a text, or chats."""

from __future__ import annotations

import argparse
import contextlib
import sys
import time
from collections.abc import Iterator, Sequence
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
    from stablelm_jax.generation.generator import Generator

    prompts = [sys.stdin.read() if text == "-" else text for text in arguments.prompt or []]
    is_streamed = len(prompts) < 2
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
    settings = _settings(arguments, saved)
    if not prompts:
        return _converse(generator, saved.tokenizer, arguments, settings)
    ids = [_encoded(saved.tokenizer, text, arguments) for text in prompts]
    opening = [""] * len(prompts) if arguments.chat else prompts
    write = _write_stream if is_streamed else _write_batch
    write(generator, saved.tokenizer, ids, opening, settings)


def _load(arguments: argparse.Namespace) -> tuple[Any, Any]:
    """The `SavedModel` and its parameters."""
    import jax

    from stablelm_jax.checkpoint.saved_model import SavedModel
    from stablelm_jax.generation.weights import check_split
    from stablelm_jax.parallel.mesh import make_mesh

    saved = SavedModel.open(arguments.checkpoint, arguments.tokenizer)
    check_split(saved.model.num_kv_heads, arguments.model)
    return saved, saved.load(make_mesh(1, arguments.model, jax.devices()[: arguments.model]))


def _settings(arguments: argparse.Namespace, saved) -> dict[str, Any]:
    from stablelm_jax.generation import chat

    stops = [chat.special_id(saved.tokenizer, special) for special in arguments.stop_token]
    if arguments.chat:
        stops += chat.stop_ids(saved.tokenizer, arguments.chat)
    return {
        "max_new_tokens": arguments.max_new_tokens,
        "temperature": arguments.temperature,
        "top_p": arguments.top_p,
        "top_k": arguments.top_k,
        "repetition_penalty": arguments.repetition_penalty,
        "seed": arguments.seed,
        "stop_tokens": sorted({saved.tokenizer.eod, *saved.end_ids, *stops}),
    }


def _encoded(tokenizer, text: str, arguments: argparse.Namespace) -> list[int]:
    from stablelm_jax.generation.chat import encode_chat

    if not arguments.chat:
        return tokenizer.encode(text)
    messages = [{"role": "user", "content": text}]
    if arguments.system:
        messages.insert(0, {"role": "system", "content": arguments.system})
    return encode_chat(tokenizer, messages, arguments.chat)


def _write_stream(generator, tokenizer, ids, opening, settings) -> None:
    """One text, to the terminal as it comes."""
    from stablelm_jax.generation.text import as_text

    clock = _Clock()
    generator.warm_up(ids, **settings)
    clock.mark("compiled")
    print(opening[0], end="", flush=True)
    try:
        for piece in as_text(tokenizer, clock.counted(generator.stream(ids[0], **settings))):
            print(piece, end="", flush=True)
    except KeyboardInterrupt:  # what was written so far is meant to stay
        pass
    print()
    clock.report(sum(map(len, ids)))


def _write_batch(generator, tokenizer, ids, opening, settings) -> None:
    """Several texts, when all are done."""
    clock = _Clock()
    generator.warm_up(ids, **settings)
    clock.mark("compiled")
    found = generator.generate(ids, **settings)
    for prompt, tokens in zip(opening, found):
        print(prompt + tokenizer.decode(tokens))
    clock.report(sum(map(len, ids)), sum(map(len, found)))


def _converse(generator, tokenizer, arguments, settings) -> None:
    """A conversation on the terminal: Ctrl-C ends an answer, Ctrl-D the program."""
    from stablelm_jax.generation.text import Conversation

    conversation = Conversation(
        generator,
        tokenizer,
        arguments.chat,
        system=arguments.system,
        forgotten=lambda count: print(
            f"(the first {count} messages no longer fit)", file=sys.stderr
        ),
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
            _answer(conversation, text)
        print()


def _answer(conversation, text: str) -> None:
    with contextlib.closing(conversation.answer(text)) as pieces:
        try:
            for piece in pieces:
                print(piece, end="", flush=True)
        except KeyboardInterrupt:  # the answer ends, the conversation goes on
            pass
        except ValueError as error:  # a message longer than the context
            print(f"generate: {error}", file=sys.stderr)


class _Clock:
    """How long one generation takes, told on stderr."""

    def __init__(self) -> None:
        self._began = time.perf_counter()
        self._spans: list[str] = []
        self._tokens = 0

    def mark(self, what: str) -> float:
        """Ends a span."""
        seconds = time.perf_counter() - self._began
        self._began += seconds
        self._spans.append(f"{what} {seconds:.2f} s")
        return seconds

    def counted(self, chunks: Iterator[list[int]]) -> Iterator[list[int]]:
        """The chunks; the first one ends the span of reading the prompt."""
        for chunk in chunks:
            if not self._tokens:
                self.mark("prompt")
            self._tokens += len(chunk)
            yield chunk

    def report(self, prompt_tokens: int, tokens: int | None = None) -> None:
        """One line; `tokens`: written in the last span, by default those that were counted."""
        written = max(self._tokens - 1, 0) if tokens is None else tokens
        seconds = self.mark(f"{prompt_tokens} tokens read, {written} written in")
        speed = f"{written / seconds:,.1f} tokens/s"
        print(f"{', '.join(self._spans)}: {speed}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
