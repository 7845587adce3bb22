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

from stablelm_jax.evaluation.progress import Progress, Silent
from stablelm_jax.evaluation.scoring import Scorer
from stablelm_jax.tokenizer.tokenizer import Tokenizer

MAX_NEW_TOKENS = 256  # where a task names no number, as in lm-eval's own class
_AT_A_TIME = 64  # prompts that are continued before somebody may ask to leave
# prompts, settings -> new tokens of each; the arguments of `Generator.generate`.
Generate = Callable[..., list[list[int]]]


class CheckpointLM(TemplateLM):
    """Weights, a tokenizer and the programs to run them, behind lm-eval's three requests.

    Every process of a job answers all requests itself, all of them together: to lm-eval there is
    one.
    """

    def __init__(
        self,
        scorer: Scorer,
        params: Any,
        tokenizer: Tokenizer,
        generate: Generate | None = None,
        progress: Progress | None = None,
        end_ids: Sequence[int] = (),
    ):
        """Args:
        params: as `scorer.compute_copy` gives them.
        generate: continues prompts; None: tasks that ask for text are refused.
        progress: told of every batch; by raising it ends the evaluation.
        end_ids: tokens that end a text, as of a chat; by default `<|endoftext|>` alone.
        """
        super().__init__()
        self._scorer, self._params, self._text = scorer, params, tokenizer
        self._generate, self._progress = generate, progress or Silent()
        self._end_ids = tuple(end_ids) or (tokenizer.eod,)
        self.cut = 0  # requests that lost their beginning, being longer than the model reads

    @property
    def max_length(self) -> int:
        """Tokens of the longest input."""
        return self._scorer.max_length

    @property
    def eot_token_id(self) -> int:
        """What ends a text that is generated."""
        return self._end_ids[0]

    @property
    def prefix_token_id(self) -> int:
        """What an empty context is: the end of another text."""
        return self._text.eod

    @property
    def tokenizer_name(self) -> str:
        return self._text.name

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **_: Any
    ) -> list[int]:
        """`add_special_tokens` changes nothing: this model's texts have no first token."""
        return self._text.encode(string, specials=True)

    def tok_decode(self, tokens: Iterable[int], skip_special_tokens: bool = True) -> str:
        hidden = self._text.special_ids if skip_special_tokens else ()
        return self._text.decode([token for token in tokens if token not in hidden])

    def loglikelihood(
        self, requests: list[Instance], disable_tqdm: bool = True
    ) -> list[tuple[float, bool]]:
        """Of each continuation after its context; and whether greedy choice would say it."""
        return super().loglikelihood(requests, disable_tqdm=True)  # ours shows how far it is

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], **_: Any
    ) -> list[tuple[float, bool]]:
        """`requests`: (texts or None, context, continuation); the answers are in their order."""
        self._progress.begin("scoring", len(requests))
        pairs = [self._fitted(context, continuation) for _, context, continuation in requests]
        answers = self._scorer.score(self._params, pairs, self._progress.advance)
        for (texts, *_), answer in zip(requests, answers):
            if texts is not None:
                self.cache_hook.add_partial("loglikelihood", texts, answer)
        return answers

    def _fitted(self, context: list[int], continuation: list[int]) -> tuple[list[int], list[int]]:
        """The input, without its beginning where it is too long, and what is scored on it."""
        whole = [*context, *continuation]
        self.cut += len(whole) > self.max_length + 1
        kept = whole[-self.max_length - 1 :]
        return kept[:-1], continuation[-self.max_length :]

    def loglikelihood_rolling(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        """Of whole texts, in windows that do not overlap, the first after `<|endoftext|>`."""
        windows, owners = [], []
        for number, (string,) in enumerate(request.args for request in requests):
            for window in self._windows(string):
                windows.append((None, *window))
                owners.append(number)
        totals = [0.0] * len(requests)
        for owner, (logprob, _) in zip(owners, self._loglikelihood_tokens(windows)):
            totals[owner] += logprob
        for request, total in zip(requests, totals):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def _windows(self, string: str) -> Iterable[tuple[list[int], list[int]]]:
        overlapping = get_rolling_token_windows(
            token_list=self.tok_encode(string),
            prefix_token=self.prefix_token_id,
            max_seq_len=self.max_length,
            context_len=1,
        )
        return map(make_disjoint_window, overlapping)

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Greedy unless a task asks for a draw; ended by the task's words or `<|endoftext|>`."""
        if self._generate is None:
            raise ValueError("this evaluation was made without a generator: choose other tasks")
        self._progress.begin("generating", len(requests))
        texts = [""] * len(requests)
        for numbers in self._alike(requests):
            found = self._generate_group([requests[number] for number in numbers])
            for number, text in zip(numbers, found):
                texts[number] = text
                self.cache_hook.add_partial("generate_until", requests[number].args, text)
            self._progress.advance(len(numbers))
        return texts

    def _alike(self, requests: Sequence[Instance]) -> Iterator[list[int]]:
        """Numbers of requests with the same settings and of like length, a few at a time."""
        groups: dict[str, list[int]] = {}
        for number in sorted(range(len(requests)), key=lambda n: -len(requests[n].args[0])):
            groups.setdefault(repr(requests[number].args[1]), []).append(number)
        for numbers in groups.values():
            for start in range(0, len(numbers), _AT_A_TIME):
                yield numbers[start : start + _AT_A_TIME]

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
        prompts = [self.tok_encode(request.args[0]) for request in requests]
        self.cut += sum(len(prompt) > room for prompt in prompts)
        done = self._generate(
            [prompt[-room:] for prompt in prompts],
            max_new_tokens=count,
            stop_tokens=self._end_ids,
            stopped=lambda _, tokens: self._has_ended(tokens, until),
            **_draw(settings),
        )
        texts = [self.tok_decode(tokens) for tokens in done]
        return [postprocess_generated_text(text, until, None) for text in texts]

    def _has_ended(self, tokens: Sequence[int], until: Sequence[str]) -> bool:
        text = self.tok_decode(tokens)
        return any(word and word in text for word in until)


def _draw(settings: dict[str, Any]) -> dict[str, Any]:
    """How tokens are chosen: the likeliest, or as a task that samples says."""
    if not settings["do_sample"]:
        return {"temperature": 0.0}
    return {key: settings[key] for key in ("temperature", "top_p", "top_k") if key in settings}
