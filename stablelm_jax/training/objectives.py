"""What a run minimises: the likelihood of tokens (pretraining, SFT) or preferences (DPO).

A loss is divided by what the whole step holds, over all devices and microbatches: microbatches of
very different counts then add up to the gradient of one large batch.

B rows, T sequence length, S sources, P pairs of a row; 2: chosen, rejected.
"""

from __future__ import annotations

import dataclasses
import functools
import operator
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from stablelm_jax.model.compute import Compute
from stablelm_jax.model.config import ModelConfig
from stablelm_jax.model.loss import (
    Batch,
    batch_loss,
    by_source,
    head_inputs,
    head_loss,
    source_sums,
)
from stablelm_jax.model.transformer import Fetch

if TYPE_CHECKING:  # benchmarks run without it
    from ml_collections import ConfigDict

# A metric is a sum of ratios of the objective's sums: ((numerator, denominator), ...).
Metrics = Mapping[str, tuple[tuple[str, str], ...]]
Sums = dict[str, jax.Array]
# What kinds of source each can be trained on.
KINDS = {
    "pretrain": ("text",),
    "sft": ("conversations", "text"),
    "dpo": ("pairs",),
}
SIDES = ("chosen", "rejected")


@dataclasses.dataclass(frozen=True)
class TokenObjective:
    """The mean negative log-likelihood of the counted tokens."""

    num_sources: int  # S
    name: str = "pretrain"  # or 'sft', a batch of which may hold no trained token at all
    metrics: ClassVar[Metrics] = {"loss": (("nll", "tokens"),)}

    def count(self, batch: Batch) -> Sums:
        """What the loss is divided by: scalars of this part of a batch."""
        return {"tokens": jnp.sum(batch["loss_mask"])}

    def loss(
        self,
        model: ModelConfig,
        params: Any,
        batch: Batch,
        totals: Sums,
        *,
        compute: Compute,
        fetch: Fetch | None = None,
    ) -> tuple[jax.Array, Sums]:
        """This part's share of the step's loss, for its gradient; and sums by source, float32 [S].

        `totals`: those of `count`, over the whole step.
        """
        scale = 1 / self.divisor(totals["tokens"])
        loss, nll_BT = batch_loss(model, params, batch, scale, compute=compute, fetch=fetch)
        return loss, source_sums(nll_BT, batch, self.num_sources)

    def measure(
        self, model: ModelConfig, params: Any, batch: Batch, *, compute: Compute
    ) -> tuple[Sums, dict[str, jax.Array]]:
        """The sums alone, and for each token, [B, T]: "nll" and "counted", the loss mask."""
        _, nll_BT = batch_loss(model, params, batch, compute=compute)
        by_token = {"nll": nll_BT, "counted": batch["loss_mask"]}
        return source_sums(nll_BT, batch, self.num_sources), by_token

    def divisor(self, count: jax.Array) -> jax.Array:
        """`count`; where it may be 0, so that nothing is divided by that, 1 at least."""
        return count if self.name == "pretrain" else jnp.maximum(count, 1)


@dataclasses.dataclass(frozen=True)
class PairObjective:
    """Direct preference optimisation (Rafailov et al. 2023, arXiv 2305.18290) and its relatives.

    With r the log-probability of an answer's trained tokens less that under the reference, and
    m = beta * (r of chosen - r of rejected), the loss of a pair is

        sigmoid   -(1 - e) log sigmoid(m) - e log sigmoid(-m), e the label smoothing: how often the
                  preference is taken to be the wrong way round (Mitchell 2023, "cDPO")
        ipo       (m / beta - 1 / (2 beta))^2 of r per token: the paper (Azar et al. 2023, arXiv
                  2310.12036, eq. 17) leaves the length open; its results are of means, as its
                  authors told the makers of trl
        length_normalised   sigmoid of r per token

    The loss of a step is the mean over its pairs, plus `sft_weight` times the mean negative
    log-likelihood of the trained tokens of its chosen answers. Rewards are beta * r, as the loss
    has it. Attributes are fields of the config's group `dpo`; `num_sources` is S.
    """

    num_sources: int
    beta: float
    kind: str = "sigmoid"
    label_smoothing: float = 0.0
    length_normalised: bool = False
    sft_weight: float = 0.0
    name: ClassVar[str] = "dpo"

    @property
    def metrics(self) -> Metrics:
        """The mean loss, and means over pairs."""
        sft = (("sft", "answer_tokens/chosen"),) if self.sft_weight else ()
        names = [f"{what}/{side}" for what in ("logps", "answer_tokens") for side in SIDES]
        names += [f"rewards/{what}" for what in (*SIDES, "margin", "accuracy")]
        loss = (("preference", "pairs"), *sft)
        return {"loss": loss} | {name: ((name, "pairs"),) for name in names}

    def count(self, batch: Batch) -> Sums:
        """See `TokenObjective.count`."""
        tokens_BP2 = _by_answer(batch["loss_mask"], batch)
        return {"pairs": jnp.sum(batch["pair_ids"] >= 0), "tokens": jnp.sum(tokens_BP2[..., 0])}

    def loss(
        self,
        model: ModelConfig,
        params: Any,
        batch: Batch,
        totals: Sums,
        *,
        compute: Compute,
        fetch: Fetch | None = None,
    ) -> tuple[jax.Array, Sums]:
        """See `TokenObjective.loss`: the value is no loss, its gradient is the loss's.

        A pair's loss is a function of its tokens' negative log-likelihoods alone. So its gradient
        is that of their sum, weighted by the derivatives for each of them; and that sum is what the
        head computes a gradient of without ever holding all logits. The head runs twice.
        """
        inputs = head_inputs(model, params, batch, compute, fetch)
        constant = jax.lax.stop_gradient(inputs)
        nll_BT = head_loss(*constant, batch, batch["loss_mask"], compute)[1]
        weights_BT, sums = jax.grad(self._loss_of, has_aux=True)(nll_BT, batch, totals)
        return head_loss(*inputs, batch, jax.lax.stop_gradient(weights_BT), compute)[0], sums

    def measure(
        self, model: ModelConfig, params: Any, batch: Batch, *, compute: Compute
    ) -> tuple[Sums, dict[str, jax.Array]]:
        """The sums alone, and "logps" of the answers, [B, P, 2], with what tells whose they are."""
        inputs = head_inputs(model, params, batch, compute)
        nll_BT = head_loss(*inputs, batch, batch["loss_mask"], compute)[1]
        sums = self._loss_of(nll_BT, batch, self.count(batch))[1]
        logps_BP2 = -_by_answer(nll_BT * batch["loss_mask"], batch)
        whose = ("pair_ids", "source_ids", "reference")
        return sums, {"logps": logps_BP2} | {name: batch[name] for name in whose}

    def divisor(self, count: jax.Array) -> jax.Array:
        """See `TokenObjective.divisor`."""
        return jnp.maximum(count, 1)

    def _loss_of(self, nll_BT: jax.Array, batch: Batch, totals: Sums) -> tuple[jax.Array, Sums]:
        tokens_BP2 = _by_answer(batch["loss_mask"], batch)
        logps_BP2 = -_by_answer(nll_BT * batch["loss_mask"], batch)
        ratios_BP2 = logps_BP2 - batch["reference"]
        if self.length_normalised or self.kind == "ipo":
            ratios_BP2 /= jnp.maximum(tokens_BP2, 1)
        rewards_BP2 = self.beta * ratios_BP2
        margins_BP = rewards_BP2[..., 0] - rewards_BP2[..., 1]
        there_BP = (batch["pair_ids"] >= 0).astype(jnp.float32)
        preference_BP = there_BP * self._of_margin(margins_BP)
        sft_BP = -self.sft_weight * logps_BP2[..., 0]
        loss = jnp.sum(preference_BP) / self.divisor(totals["pairs"])
        loss += jnp.sum(sft_BP) / self.divisor(totals["tokens"])
        by_pair = {
            "preference": preference_BP,
            "sft": sft_BP,
            "pairs": there_BP,
            "rewards/margin": margins_BP,
            "rewards/accuracy": (margins_BP > 0).astype(jnp.float32),
        }
        sides = {"rewards": rewards_BP2, "logps": logps_BP2, "answer_tokens": tokens_BP2}
        for name, values_BP2 in sides.items():
            by_pair |= {f"{name}/{side}": values_BP2[..., n] for n, side in enumerate(SIDES)}
        return loss, by_source(by_pair, batch, self.num_sources)

    def _of_margin(self, margins_BP: jax.Array) -> jax.Array:
        if self.kind == "ipo":
            return jnp.square((margins_BP - 0.5) / self.beta)
        wrong, right = self.label_smoothing, 1 - self.label_smoothing
        loss_BP = -right * jax.nn.log_sigmoid(margins_BP)
        if wrong:  # an infinite margin times 0 would be no number
            loss_BP -= wrong * jax.nn.log_sigmoid(-margins_BP)
        return loss_BP


Objective = TokenObjective | PairObjective


def make_objective(config: ConfigDict, num_sources: int) -> Objective:
    """The objective of a run of `config`."""
    name, dpo = config.training.objective, config.dpo
    if name != "dpo":
        return TokenObjective(num_sources, name)
    options = {key: value for key, value in dpo.items() if key != "loss"}
    return PairObjective(num_sources, kind=dpo.loss, **options)


def mean_loss(objective: Objective, sums: Sums) -> jax.Array:
    """The loss of a step, of its sums by source."""
    ratios = [
        jnp.sum(sums[above]) / objective.divisor(jnp.sum(sums[below]))
        for above, below in objective.metrics["loss"]
    ]
    return functools.reduce(operator.add, ratios)


def means(
    objective: Objective, sources: Sequence[str], sums: Mapping[str, np.ndarray]
) -> dict[str, float | None]:
    """Each metric over everything, and again as ".../<source>" for each source seen.

    `sums`: by source, float64 [S], on the host. "loss" is None where nothing was counted.
    """
    found: dict[str, float | None] = {"loss": None}
    for suffix, place in [("", slice(None)), *((f"/{s}", [n]) for n, s in enumerate(sources))]:
        for name, ratios in objective.metrics.items():
            counts = [sums[below][place].sum() for _, below in ratios]
            if all(counts):
                parts = [sums[above][place].sum() / n for (above, _), n in zip(ratios, counts)]
                found[name + suffix] = float(sum(parts))
    return found


def sum_names(objective: Objective) -> list[str]:
    """The sums that its metrics are made of."""
    ratios = [ratio for ratios in objective.metrics.values() for ratio in ratios]
    return list(dict.fromkeys(name for ratio in ratios for name in ratio))


def _by_answer(values_BT: jax.Array, batch: Batch) -> jax.Array:
    """Sums of the values of each answer's own segment, [B, P, 2]; 0 where there is no pair.

    Other segments add exact zeros: nothing of a neighbour in the row comes in.
    """
    pairs = batch["pair_ids"].shape[1]
    segments = jnp.arange(1, 2 * pairs + 1)[:, None]
    is_own_BNT = batch["segment_ids"][:, None, :] == segments
    sums_BN = jnp.sum(jnp.where(is_own_BNT, values_BT[:, None, :], 0.0), axis=-1)
    there_BP1 = (batch["pair_ids"] >= 0)[..., None]
    return jnp.where(there_BP1, sums_BN.reshape(-1, pairs, 2), 0.0)
