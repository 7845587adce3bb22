"""What another program, such as llama.cpp, makes of a model: its logits, judged as ours are.

Held-out rows, masks and documents are those of a checkpoint's evaluation. The other program gets
each document of a row as a text of its own, since a mask over a row is not something it knows.

B rows, T sequence length, N places of a row that its texts fill, V vocabulary.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from stablelm_jax import config as config_lib
from stablelm_jax.checkpoint.saved_model import SavedModel
from stablelm_jax.data.position import DataPosition
from stablelm_jax.evaluation.scoring import Answer, Request
from stablelm_jax.interop.llama_cpp import LlamaCpp
from stablelm_jax.interop.verify import log_softmax
from stablelm_jax.model.transformer import logits as our_logits
from stablelm_jax.training.held_out import EvalStep
from stablelm_jax.training.setup import Run, prepare_run

# f(texts) -> [N, V] float32: after each token of texts that do not see one another, in their order.
Logits = Callable[[Sequence[Sequence[int]]], np.ndarray]
_AT_A_TIME = 256  # places whose probabilities are held in float64


def held_out_run(
    saved: SavedModel | None,
    *,
    config: str | None = None,
    data: str | None = None,
    tokenizer: str | None = None,
    dtype: str | None = None,
    model: int = 1,
    batch_tokens: int = 16_384,
    max_rows: int = 2**31 - 1,
) -> Run:
    """The run whose held-out text a checkpoint or file is evaluated on, on this machine's devices.

    Args:
      saved: whose config it is, where `config` names no file.
      data, tokenizer, dtype: in place of the config's. model: devices that share the model.
      max_rows: of each source.

    Raises:
      ValueError: no config, data that is missing, a config of another model than the checkpoint.
    """
    found = saved.run if saved else {}
    if config:
        given = config_lib.load(config)
    elif "config" in found:
        given = config_lib.from_dict(found["config"])
    else:
        raise ValueError(
            f"{saved.path if saved else 'a GGUF file'} names no held-out text: give --config (with "
            "data.weights of the sources)"
        )
    given.data.root = data or given.data.root
    given.data.tokenizer = tokenizer or given.data.tokenizer
    given.training.dtype = dtype or given.training.dtype
    # Rows and devices are those of this machine, not of the training.
    given.parallel.update(data=-1, model=model, replica=1, fsdp=False)
    given.training.update(accumulation=1, norms="xla")
    if given.training.attention not in ("chunked", "reference"):
        given.training.attention = "auto"  # the kernel named may be another chip's
    rows = max(1, batch_tokens // given.data.sequence_length)
    given.data.batch_size = rows * max(1, jax.device_count() // model)
    given.data.batch_stages = ""
    given.evaluation.max_rows = max_rows
    run = prepare_run(given, DataPosition.of_checkpoint(found) if found else DataPosition())
    if saved and saved.model != run.model:
        differing = config_lib.differing(vars(saved.model), vars(run.model))
        what = {f"model.{name}": two for name, two in differing.items()}
        raise ValueError(f"the checkpoint has another model: {config_lib.show_changes(what)}")
    return run


def open_gguf(path: str, run: Run) -> LlamaCpp:
    """A GGUF file for the rows of a run.

    ValueError: llama.cpp does not load it; its vocabulary is not the data's; the run scores pairs.
    """
    if run.objective.name == "dpo":
        raise ValueError("a GGUF file is scored on text, and these sources hold preference pairs")
    llama = LlamaCpp(path, run.spec.sequence_length)
    if llama.vocab_size != run.model.vocab_size:
        raise ValueError(
            f"{path} has a vocabulary of {llama.vocab_size:,} rows, the data's model "
            f"{run.model.vocab_size:,}: give the --config and --data that it was trained with"
        )
    llama.check_tokens(run.tokenizer)
    return llama


def eval_step_of(logits: Logits, run: Run, differences: Differences | None = None) -> EvalStep:
    """f(params, batch) with the results of a run's own `eval_step`, of text, from these logits.

    `differences`, where given, learns how far they are from what `params` of our model give.
    """

    def eval_step(params: Any, batch: Mapping[str, Any]) -> dict[str, Any]:
        batch = {name: np.asarray(values) for name, values in batch.items()}
        nll_BT = np.zeros(batch["tokens"].shape, np.float32)
        for b in range(len(nll_BT)):
            row = {name: values[b] for name, values in batch.items()}
            places_N, texts = _texts(row)
            if not texts:
                continue
            logits_NV = logits(texts)[:, : run.compute.num_valid_ids]
            nll_BT[b, places_N] = nll(logits_NV, row["targets"][places_N])
            if differences:
                differences.add(params, row, places_N, logits_NV)
        counted_BT = batch["loss_mask"]
        nll_BT *= counted_BT
        packed = run.packed is not None
        ends_BT = batch["positions"] == 0 if packed else batch["tokens"] == run.tokenizer.eod
        by_source = [batch["source_ids"] == number for number in range(len(run.sources))]
        sums = {
            name: np.array([values_BT[mine].sum(dtype=np.float64) for mine in by_source])
            for name, values_BT in (("nll", nll_BT), ("tokens", counted_BT))
        }
        return sums | {"parts": {"nll": nll_BT, "counted": counted_BT, "ends": ends_BT}}

    return eval_step


def _texts(row: Mapping[str, np.ndarray]) -> tuple[np.ndarray, list[list[int]]]:
    """The documents of a row that count, up to the last token that does, and their places [N]."""
    places, texts = [np.zeros(0, int)], []
    for number in np.unique(row["segment_ids"]):
        mine = np.flatnonzero(row["segment_ids"] == number)
        counted = np.flatnonzero(row["loss_mask"][mine])
        if len(counted):
            mine = mine[: counted[-1] + 1]
            places.append(mine)
            texts.append(row["tokens"][mine].tolist())
    return np.concatenate(places), texts


def nll(logits_NV: np.ndarray, targets_N: np.ndarray) -> np.ndarray:
    """Negative log likelihood of each target, nats, float64 [N]."""
    found_N = np.empty(len(targets_N))
    for start in range(0, len(targets_N), _AT_A_TIME):
        part = slice(start, start + _AT_A_TIME)
        logs_NV = log_softmax(logits_NV[part].astype(np.float64))
        found_N[part] = -np.take_along_axis(logs_NV, targets_N[part, None], axis=1)[:, 0]
    return found_N


class Differences:
    """How far another program's probabilities are from our model's, over the counted places.

    Attributes:
      kl: nats at each place, of the other's distribution from ours.
      same: at each, whether both find the same token the likeliest.
    """

    def __init__(self, run: Run):
        compute = dataclasses.replace(run.compute.forward_only(), dtype=jnp.float32)
        self._ours = jax.jit(lambda params, *row: our_logits(run.model, params, *row, compute))
        self._num_valid = run.compute.num_valid_ids
        self.kl: list[float] = []
        self.same: list[bool] = []

    def add(
        self, params: Any, row: Mapping[str, np.ndarray], places_N: np.ndarray, theirs_NV
    ) -> None:
        """Of one row [T], whose `places_N` the other's logits are of."""
        inputs = (row[name][None] for name in ("tokens", "segment_ids", "positions"))
        ours_TV = np.asarray(self._ours(params, *inputs)[0])[:, : self._num_valid]
        counted_N = row["loss_mask"][places_N] > 0
        ours_NV, theirs_NV = ours_TV[places_N[counted_N]], theirs_NV[counted_N]
        self.same += (ours_NV.argmax(-1) == theirs_NV.argmax(-1)).tolist()
        for start in range(0, len(ours_NV), _AT_A_TIME):
            parts = (x[start:][:_AT_A_TIME].astype(np.float64) for x in (ours_NV, theirs_NV))
            ours, theirs = map(log_softmax, parts)
            self.kl += (np.exp(ours) * (ours - theirs)).sum(-1).tolist()


class GgufScorer:
    """llama.cpp in the place of `Scorer`: log-likelihoods of continuations, for lm-eval's tasks."""

    def __init__(self, llama: LlamaCpp, max_length: int, num_valid_ids: int | None = None):
        self._llama, self.max_length = llama, max_length
        self._num_valid = num_valid_ids or llama.vocab_size

    def compute_copy(self, params: Any) -> Any:
        """There are none: the file has them."""
        return params

    @property
    def model(self) -> None:
        """ValueError: a `Generator` would need it."""
        raise ValueError("the task asks for text, and a GGUF file is scored only; use --checkpoint")

    def score(
        self, params: Any, requests: Sequence[Request], on_answers: Callable[[int], None]
    ) -> list[Answer]:
        """See `Scorer.score`."""
        answers, alike = {}, collections.defaultdict(list)  # several choices for one input
        for number, (tokens, targets) in enumerate(requests):
            if targets:
                alike[tuple(tokens)].append((number, targets))
        for tokens, asked in alike.items():
            logits_TV = self._llama.logits([tokens], max(len(targets) for _, targets in asked))
            logits_TV[:, self._num_valid :] = -np.inf
            for number, targets in asked:
                logits_NV = logits_TV[-len(targets) :]
                greedy = logits_NV.argmax(-1).tolist() == list(targets)
                answers[number] = -float(nll(logits_NV, np.array(targets)).sum()), greedy
            on_answers(len(answers))
        return [answers.get(number, (0.0, True)) for number in range(len(requests))]
