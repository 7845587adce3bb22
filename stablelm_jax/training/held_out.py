"""Held-out loss, perplexity and bits per byte of each source and language; held-out preferences.

B rows of a batch, T sequence length, S sources, D documents.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from stablelm_jax.model.compute import Compute
from stablelm_jax.model.config import ModelConfig
from stablelm_jax.model.parameters import parameter_table
from stablelm_jax.parallel import distributed, sharding
from stablelm_jax.parallel.mesh import sum_over
from stablelm_jax.training.objectives import Objective, means

EvalStep = Callable[[Any, Mapping[str, jax.Array]], dict[str, Any]]
Batch = Mapping[str, np.ndarray]
# By source: "language", "tokens_per_byte", and of its documents in their order "nll" (nats) and
# "tokens" (how many of them count), both [D].
Documents = Mapping[str, Mapping[str, Any]]


@dataclasses.dataclass(frozen=True)
class HeldOut:
    """The held-out text of one source."""

    batches: Iterable[Batch]  # this process's part of each; the rows of all follow one another
    tokens_per_byte: float  # end-of-text counted, of UTF-8; NaN where not all tokens are scored
    language: str | None = None  # ISO 639-1; None: in several languages, or in none


def make_eval_step(
    model: ModelConfig,
    mesh: Mesh,
    objective: Objective,
    *,
    eod: int,
    compute: Compute,
    packed: bool = False,
) -> EvalStep:
    """Jitted f(params, batch), whose results every device holds whole.

    They are the objective's sums over the whole batch, float32 [S], and "parts", what its `measure`
    gives of each token or pair; with "ends" [B, T]: whether the document before ends in this input
    (its target is the first of the next one), which is `eod`, or where documents are `packed` whole
    the first of a document.
    """
    places = sharding.named(mesh, sharding.parameter_specs(parameter_table(model)))

    def local_sums(params, batch):
        sums, parts = objective.measure(model, params, batch, compute=compute.forward_only())
        ends_BT = batch["positions"] == 0 if packed else batch["tokens"] == eod
        return sum_over(sums), parts | {"ends": ends_BT}

    out_specs = PartitionSpec(), sharding.mesh_axes(["batch"])
    local_sums = sharding.map_rows(local_sums, mesh, out_specs=out_specs)

    def eval_step(params, batch):
        sums, parts = local_sums(sharding.gathered(params, compute.dtype, places), batch)
        return sums | {"parts": parts}

    return jax.jit(eval_step, out_shardings=sharding.replicated(mesh))


class HeldOutError(ValueError):
    """Batches outside the loop cannot be read, here or on another host."""


def evaluate_held_out(
    eval_step: EvalStep,
    params: Any,
    sources: Mapping[str, HeldOut],
    mesh: Mesh,
    objective: Objective,
    stopped: Callable[[], bool] = lambda: False,
    keep: Callable[[Documents], None] = lambda documents: None,
) -> dict[str, float | None] | None:
    """Means over held-out text, under the metrics keys `eval/...`.

    Every token counts once: what fills the last row and the last batch has a loss mask of 0.

    Args:
      sources: by name, in the order of their `source_ids`.
      stopped: asked before each batch, on every process alike; whether to leave it.
      keep: gets what two runs are compared by, document by document; not of preferences.

    Returns:
      See `held_out_line`; of preferences the metrics of training, as "eval/..."; None where it was
      left.

    Raises:
      HeldOutError: on every process, where one of them cannot read, or nothing is held out.
    """
    totals: dict[str, np.ndarray] = {}
    documents = []
    for source in sources.values():
        documents_2D = np.zeros((2, 1))
        for batch in agreed_batches(source.batches, "held-out text"):
            if stopped():
                return None
            sums = jax.device_get(eval_step(params, sharding.put_batch(batch, mesh)))
            parts = sums.pop("parts")
            totals = {name: totals.get(name, 0) + np.float64(sums[name]) for name in sums}
            if "nll" in parts:
                documents_2D = _with_documents(documents_2D, parts)
        documents.append(documents_2D)
    if not totals:
        raise HeldOutError(
            f"nothing is held out in {', '.join(sources)}: prepare a source again with more in it "
            "or a larger --held-out, or name one that holds some in data.weights"
        )
    if objective.name == "dpo":
        found = means(objective, list(sources), totals)
        return {f"eval/{key}": mean for key, mean in found.items()}
    keep(
        {
            name: {
                "language": source.language,
                "tokens_per_byte": source.tokens_per_byte,
                "nll": nll_D.tolist(),
                "tokens": tokens_D.astype(int).tolist(),
            }
            for (name, source), (nll_D, tokens_D) in zip(sources.items(), documents)
        }
    )
    return held_out_line(sources, totals["nll"], totals["tokens"], documents)


def agreed_batches(batches: Iterable[Batch], what: str) -> Iterator[Batch]:
    """Each batch once every process has its part of it, so that none waits for one that failed.

    Raises HeldOutError, which says `what` cannot be read, on every process.
    """
    iterator = iter(batches)
    while True:
        try:
            with distributed.together_or_not():
                batch = next(iterator, None)
        except (OSError, ValueError) as error:
            raise HeldOutError(f"{what} cannot be read: {error}") from error
        if batch is None:
            return
        yield batch


def _with_documents(before_2D: np.ndarray, by_token: Mapping[str, np.ndarray]) -> np.ndarray:
    """Nats and counted tokens of each document, float64 [2, D], with those of one more batch.

    A batch goes on in the document that the batch before it ended in. The target after an
    `<|endoftext|>` is the first of its document. Sums over tokens in their order do not depend on
    how the rows lay on devices.
    """
    number = np.cumsum(by_token["ends"].ravel())
    sums_2D = np.stack([np.bincount(number, by_token[key].ravel()) for key in ("nll", "counted")])
    sums_2D[:, 0] += before_2D[:, -1]
    return np.concatenate([before_2D[:, :-1], sums_2D], axis=1)


def held_out_line(
    sources: Mapping[str, HeldOut],
    nll: np.ndarray,
    tokens: np.ndarray,
    documents: Sequence[np.ndarray],
) -> dict[str, float | None]:
    """The metrics of sums by source.

    Args:
      nll, tokens: of each source, nats over its counted tokens and how many these are, float64 [S].
      documents: for each source the same of each of its documents, [2, D].

    Returns:
      "eval/loss" (nats a token), "eval/perplexity", "eval/documents" (how many were scored) and
      "eval/loss_stderr" over everything; these and "eval/bits_per_byte" again as ".../<source>",
      and as ".../language/<code>" over the sources of one language, tokens and bytes added up.
      What has no token has no key; a source of one document has no standard error.
    """
    bytes_ = tokens / np.array([source.tokens_per_byte for source in sources.values()])
    counts, variances = np.array([count_and_variance(found) for found in documents]).T
    sums = np.stack([nll, tokens, bytes_, counts, variances], axis=1)
    line: dict[str, float | None] = {"eval/loss": None, "eval/perplexity": None}
    line |= _means("", (nll.sum(), tokens.sum(), math.nan, counts.sum(), variances.sum()))
    for name, of_source in zip(sources, sums):
        line |= _means(f"/{name}", of_source)
    languages = [source.language for source in sources.values()]
    for language in sorted(set(languages) - {None}):
        members = [language == other for other in languages]
        line |= _means(f"/language/{language}", sums[members].sum(axis=0))
    return line


def count_and_variance(documents_2D: np.ndarray) -> tuple[int, float]:
    """How many documents were scored, and the variance of their nats about the mean loss.

    The loss is a ratio of two sums over documents, which were drawn at random: this is its
    linearised variance times the squared number of tokens (Cochran, Sampling Techniques, 1977,
    chapter 6). Those of several sources add up. NaN where there is a single document.
    """
    nll_D, tokens_D = documents_2D[:, documents_2D[1] > 0]
    count = len(tokens_D)
    if count < 2:
        return count, math.nan if count else 0.0
    with np.errstate(invalid="ignore", over="ignore"):  # a loss that is not finite
        residual_D = nll_D - nll_D.sum() / tokens_D.sum() * tokens_D
        return count, count / (count - 1) * np.square(residual_D).sum()


def _means(suffix: str, sums: Sequence[Any]) -> dict[str, float | None]:
    """`sums`: nats, tokens, bytes (NaN: not told), documents, variance."""
    nll, tokens, bytes_, documents, variance = sums
    if not tokens:
        return {}
    loss = float(nll / tokens)
    perplexity = math.exp(loss) if loss < 709 else None  # too large for a float
    line = {f"eval/loss{suffix}": loss, f"eval/perplexity{suffix}": perplexity}
    if math.isfinite(bytes_):
        line[f"eval/bits_per_byte{suffix}"] = float(nll / math.log(2) / bytes_)
    line[f"eval/documents{suffix}"] = int(documents)
    if math.isfinite(variance):
        line[f"eval/loss_stderr{suffix}"] = float(math.sqrt(variance) / tokens)
    return line
