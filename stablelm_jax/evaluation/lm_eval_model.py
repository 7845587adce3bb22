"""A checkpoint of ours as a model of lm-eval: what its tasks ask of it, answered on our mesh.

Text becomes tokens as lm-eval's own Hugging Face class makes them with the exported tokenizer:
no token is put in front, the spelling of a special token is that token, a continuation's tokens
are what the whole text has more than its context, and an empty context is `<|endoftext|>`. A chat
is text too, rendered by the model's template.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import (
    Collator,
    handle_stop_sequences,
    normalize_gen_kwargs,
    postprocess_generated_text,
)
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from stablelm_jax.evaluation.scoring import Answer, Scorer
from stablelm_jax.generation.generator import Generator
from stablelm_jax.parallel import sharding
from stablelm_jax.reporting.evaluations import Told
from stablelm_jax.tokenizer.chat import ChatTemplate, render_chat, stop_ids
from stablelm_jax.tokenizer.tokenizer import Tokenizer

_AT_A_TIME = 64  # prompts that are continued before somebody may ask to leave


class CheckpointLM(TemplateLM):
    """Weights, a tokenizer and the programs to run them, behind lm-eval's three requests.

    Every process of a job answers all requests itself, all of them together: to lm-eval there is
    one. Programs are kept when the weights change.

    Attributes:
      max_length: tokens of the longest input.
      cut: requests that lost their beginning, being longer than that.
    """

    def __init__(
        self,
        scorer: Scorer,
        tokenizer: Tokenizer,
        *,
        told: Told,
        end_ids: Sequence[int] = (),
        chat: ChatTemplate | None = None,
        max_new_tokens: int | None = None,
    ):
        """Load weights before use.

        Args:
          told: called before the first request of a kind and after every batch, on all processes.
          end_ids: tokens that end a text; by default `<|endoftext|>` alone.
          chat: the template of `apply_chat_template`; its enders end a text too.
          max_new_tokens: of a text, where a task asks for more.
        """
        super().__init__()
        self._scorer, self._text, self._told = scorer, tokenizer, told
        self._chat, self._max_new_tokens = chat, max_new_tokens
        enders = stop_ids(tokenizer, chat) if chat else ()
        self._end_ids = tuple(dict.fromkeys((*enders, *end_ids))) or (tokenizer.eod,)
        self._params: Any = None
        self._generator: Generator | None = None  # made when a task asks for text: most never do
        self.max_length, self.cut = scorer.max_length, 0

    def load(self, params: Any) -> None:
        """Answers with these parameters from now on."""
        self._params = self._scorer.compute_copy(params)
        if self._generator is not None:
            self._generator.load(self._params)

    def unload(self) -> None:
        """Lets go of the parameters."""
        self._params = None
        if self._generator is not None:
            self._generator.unload()

    @property
    def eot_token_id(self) -> int:
        """The token that ends a generated text."""
        return self._end_ids[0]

    @property
    def prefix_token_id(self) -> int:
        """The token that stands for an empty context: the end of another text."""
        return self._text.eod

    def tok_encode(self, string: str, *_: Any, **__: Any) -> list[int]:
        """`add_special_tokens` changes nothing: this model's texts have no first token."""
        return self._text.encode(string, specials=True)

    def _decoded(self, tokens: Iterable[int]) -> str:
        """Without special tokens."""
        return self._text.decode([token for token in tokens if token not in self._text.special_ids])

    @property
    def tokenizer_name(self) -> str:
        """For the names of lm-eval's own caches: other tokens, another name."""
        return f"{self._text.sha256[:12]}-{self._chat.name if self._chat else ''}"

    def chat_template(self, chat_template: bool | str = False) -> str:
        """The Jinja that `apply_chat_template` fills in; "" without a chat."""
        return self._chat.jinja if chat_template and self._chat else ""

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """The conversation as text; without the prompt, its last message is to be gone on with.

        As in lm-eval's own class, system messages are left out where a template refuses them.
        """
        if not add_generation_prompt:
            return self.apply_chat_template(chat_history[:-1]) + chat_history[-1]["content"]
        try:
            return render_chat(chat_history, self._chat)
        except ValueError:
            others = [message for message in chat_history if message["role"] != "system"]
            return render_chat(others, self._chat)

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = True) -> list[Answer]:
        """For each continuation after its context; and whether greedy choice would say it."""
        return super().loglikelihood(requests, disable_tqdm=True)  # ours shows how far it is

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], **_: Any
    ) -> list[Answer]:
        """`requests`: (texts or None, context, continuation); the answers are in their order."""
        count, most = len(requests), self.max_length
        self._told("scoring", 0, count)
        pairs = []
        for _, context, continuation in requests:
            whole = [*context, *continuation]
            self.cut += len(whole) > most + 1
            pairs.append((whole[-most - 1 : -1], continuation[-most:]))
        return self._scorer.score(
            self._params, pairs, lambda done: self._told("scoring", done, count)
        )

    def loglikelihood_rolling(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        """For whole texts, in windows that do not overlap, the first after `<|endoftext|>`."""
        windows, owners = [], []
        for number, request in enumerate(requests):
            overlapping = get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0]),
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
        count, texts = len(requests), []
        self._told("generating", 0, count)
        alike = Collator(
            [request.args for request in requests],
            sort_fn=lambda arguments: -len(arguments[0]),
            group_by="gen_kwargs",
        )
        for batch in alike.get_batched(n=_AT_A_TIME):
            prompts, settings = zip(*batch)
            texts += self._continued(prompts, normalize_gen_kwargs(settings[0]))
            self._told("generating", len(texts), count)
        return alike.get_original(texts)

    def _continued(self, texts: Sequence[str], settings: Mapping[str, Any]) -> list[str]:
        """The continuation of each text, with the settings of a task."""
        end = self._text.decode([self.eot_token_id])
        until = handle_stop_sequences(list(settings["until"]), eos=end)
        count = min(settings["max_gen_toks"], self._max_new_tokens or settings["max_gen_toks"])
        room = self.max_length - count
        if room < 1:
            raise ValueError(
                f"the task asks for {count} new tokens, but the model reads {self.max_length}: "
                "give fewer by --max-new-tokens, or a larger --max-length"
            )

        def has_ended(_: int, tokens: list[int]) -> bool:
            text = self._decoded(tokens)
            return any(word and word in text for word in until)

        draw = {"temperature": 0.0}  # the likeliest token, or as a task that samples says
        if settings["do_sample"]:
            draw = {k: settings[k] for k in ("temperature", "top_p", "top_k") if k in settings}
        prompts = [self.tok_encode(text) for text in texts]
        self.cut += sum(len(prompt) > room for prompt in prompts)
        if self._generator is None:
            scorer = self._scorer
            rows = max(1, scorer.batch_tokens // scorer.max_length)
            self._generator = Generator(
                scorer.model,
                self._params,
                mesh=scorer.mesh,
                dtype=scorer.compute.dtype,
                batch_size=rows * sharding.batch_parts(scorer.mesh),
                max_length=scorer.max_length,
                num_valid_ids=scorer.compute.num_valid_ids,
            )
        done = self._generator.generate(
            [prompt[-room:] for prompt in prompts],
            max_new_tokens=count,
            stop_tokens=self._end_ids,
            stopped=has_ended,
            **draw,
        )
        return [postprocess_generated_text(self._decoded(new), until, None) for new in done]
