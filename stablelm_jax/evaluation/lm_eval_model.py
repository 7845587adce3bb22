"""A checkpoint of ours as a model of lm-eval: what its tasks ask of it, answered on our mesh.

Text becomes tokens as lm-eval's own Hugging Face class makes them with the exported tokenizer:
no token is put in front, the spelling of a special token is that token, a continuation's tokens
are what the whole text has more than its context, and an empty context is `<|endoftext|>`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import (
    handle_stop_sequences,
    normalize_gen_kwargs,
    postprocess_generated_text,
)
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from stablelm_jax.evaluation.scoring import Answer, Scorer
from stablelm_jax.generation.generator import Generator
from stablelm_jax.parallel import sharding
from stablelm_jax.tokenizer.tokenizer import Tokenizer

MAX_NEW_TOKENS = 256  # where a task names no number, as in lm-eval's own class
_AT_A_TIME = 64  # prompts that are continued before somebody may ask to leave
# f(what is done, requests answered so far, requests in all); it may raise to end the evaluation.
Told = Callable[[str, int, int], None]


class CheckpointLM(TemplateLM):
    """Weights, a tokenizer and the programs to run them, behind lm-eval's three requests.

    Every process of a job answers all requests itself, all of them together: to lm-eval there is
    one. Programs are kept when the weights change.
    """

    def __init__(
        self,
        scorer: Scorer,
        tokenizer: Tokenizer,
        *,
        told: Told = lambda what, done, count: None,
        end_ids: Sequence[int] = (),
    ):
        """Load weights before use.

        Args:
          told: called before the first request of a kind and after every batch, on all processes.
          end_ids: tokens that end a text, as of a chat; by default `<|endoftext|>` alone.
        """
        super().__init__()
        self._scorer, self._text, self._told = scorer, tokenizer, told
        self._end_ids = tuple(end_ids) or (tokenizer.eod,)
        self._params: Any = None
        self._generator: Generator | None = None
        self._generator_is_loaded = False
        self.cut = 0  # requests that lost their beginning, being longer than the model reads

    def load(self, params: Any) -> None:
        """Answers with these parameters from now on."""
        self._params, self._generator_is_loaded = self._scorer.compute_copy(params), False

    def unload(self) -> None:
        """Lets go of the parameters."""
        self._params, self._generator_is_loaded = None, False
        if self._generator is not None:
            self._generator.unload()

    @property
    def max_length(self) -> int:
        """Tokens of the longest input."""
        return self._scorer.max_length

    @property
    def eot_token_id(self) -> int:
        """The token that ends a generated text."""
        return self._end_ids[0]

    @property
    def prefix_token_id(self) -> int:
        """The token that stands for an empty context: the end of another text."""
        return self._text.eod

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **_: Any
    ) -> list[int]:
        """`add_special_tokens` changes nothing: this model's texts have no first token."""
        return self._text.encode(string, specials=True)

    def tok_decode(self, tokens: Iterable[int], skip_special_tokens: bool = True) -> str:
        hidden = self._text.special_ids if skip_special_tokens else ()
        return self._text.decode([token for token in tokens if token not in hidden])

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = True) -> list[Answer]:
        """For each continuation after its context; and whether greedy choice would say it."""
        return super().loglikelihood(requests, disable_tqdm=True)  # ours shows how far it is

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], **_: Any
    ) -> list[Answer]:
        """`requests`: (texts or None, context, continuation); the answers are in their order."""
        count = len(requests)
        self._told("scoring", 0, count)
        pairs = [self._fitted(context, continuation) for _, context, continuation in requests]
        return self._scorer.score(
            self._params, pairs, on_answers=lambda done: self._told("scoring", done, count)
        )

    def _fitted(self, context: list[int], continuation: list[int]) -> tuple[list[int], list[int]]:
        """The input, without its beginning where it is too long, and what is scored on it."""
        whole = [*context, *continuation]
        self.cut += len(whole) > self.max_length + 1
        kept = whole[-self.max_length - 1 :]
        return kept[:-1], continuation[-self.max_length :]

    def loglikelihood_rolling(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        """For whole texts, in windows that do not overlap, the first after `<|endoftext|>`."""
        windows, owners = [], []
        for number, (string,) in enumerate(request.args for request in requests):
            overlapping = get_rolling_token_windows(
                token_list=self.tok_encode(string),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            for window in map(make_disjoint_window, overlapping):
                windows.append((None, *window))
                owners.append(number)
        totals = [0.0] * len(requests)
        for owner, (logprob, _) in zip(owners, self._loglikelihood_tokens(windows)):
            totals[owner] += logprob
        return totals

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Greedy unless a task asks for a draw; ended by the task's words or `<|endoftext|>`."""
        count, done = len(requests), 0
        self._told("generating", 0, count)
        texts = [""] * count
        for numbers in _alike(requests):
            found = self._generate_group([requests[number] for number in numbers])
            for number, text in zip(numbers, found):
                texts[number] = text
            done += len(numbers)
            self._told("generating", done, count)
        return texts

    def _generate_group(self, requests: list[Instance]) -> list[str]:
        settings = normalize_gen_kwargs(requests[0].args[1], MAX_NEW_TOKENS)
        end = self.tok_decode([self.eot_token_id], skip_special_tokens=False)
        until = handle_stop_sequences(list(settings["until"]), eos=end)
        count = settings["max_gen_toks"]
        room = self.max_length - count
        if room < 1:
            raise ValueError(
                f"the task asks for {count} new tokens, but the model reads {self.max_length}: "
                "lower max_gen_toks in its generation_kwargs"
            )

        def has_ended(_: int, tokens: list[int]) -> bool:
            text = self.tok_decode(tokens)
            return any(word and word in text for word in until)

        prompts = [self.tok_encode(request.args[0]) for request in requests]
        self.cut += sum(len(prompt) > room for prompt in prompts)
        done = self._loaded_generator().generate(
            [prompt[-room:] for prompt in prompts],
            max_new_tokens=count,
            stop_tokens=self._end_ids,
            stopped=has_ended,
            **_draw(settings),
        )
        texts = [self.tok_decode(tokens) for tokens in done]
        return [postprocess_generated_text(text, until, None) for text in texts]

    def _loaded_generator(self) -> Generator:
        """Made when a task first asks for text: most tasks never do."""
        scorer = self._scorer
        if self._generator is None:
            rows = max(1, scorer.batch_tokens // scorer.max_length)
            self._generator = Generator(
                scorer.model,
                self._params,
                mesh=scorer.mesh,
                dtype=scorer.dtype,
                batch_size=rows * sharding.batch_parts(scorer.mesh),
                max_length=scorer.max_length,
                num_valid_ids=scorer.compute.num_valid_ids,
            )
        elif not self._generator_is_loaded:
            self._generator.load(self._params)
        self._generator_is_loaded = True
        return self._generator


def _alike(requests: Sequence[Instance]) -> Iterator[list[int]]:
    """Numbers of requests with the same settings and of like length, a few at a time."""
    groups: dict[str, list[int]] = {}
    for number in sorted(range(len(requests)), key=lambda n: -len(requests[n].args[0])):
        groups.setdefault(repr(requests[number].args[1]), []).append(number)
    for numbers in groups.values():
        for start in range(0, len(numbers), _AT_A_TIME):
            yield numbers[start : start + _AT_A_TIME]


def _draw(settings: dict[str, Any]) -> dict[str, Any]:
    """How tokens are chosen: the likeliest, or as a task that samples says."""
    if not settings["do_sample"]:
        return {"temperature": 0.0}
    return {key: settings[key] for key in ("temperature", "top_p", "top_k") if key in settings}
