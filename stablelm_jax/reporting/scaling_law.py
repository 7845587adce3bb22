"""L(N, D) = E + A / N^a + B / D^b, fitted to the ends of runs.

N parameters, D tokens, L held-out loss, nats a token (Hoffmann et al., 2022, section 3.3). The fit
is theirs as Besiroglu et al. (2024) corrected it: the sum, not the mean, of the Huber losses of log
L, until it converges. Their values stand in for what too few runs cannot tell.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence

import numpy as np
from scipy.optimize import least_squares, nnls

PUBLISHED = {"E": 1.8172, "A": 482.01, "B": 2085.43, "a": 0.3478, "b": 0.3658}  # Besiroglu et al.
_HUBER = 1e-3  # Hoffmann et al.
_STARTS = tuple(itertools.product((0.2, 0.35, 0.5, 0.7), repeat=2))  # of the exponents
_FEWEST = {"all": 6, "exponents": 4, "shape": 2}  # runs that each kind of fit needs
_FREE = {"all": 5, "exponents": 3, "shape": 2}  # values that it has to tell
_APART = 2.0  # tokens a parameter differ so much, or N and D cannot be told apart


@dataclasses.dataclass(frozen=True)
class Run:
    """The end of a run: parameters, tokens, held-out loss."""

    name: str
    parameters: float
    tokens: float
    loss: float


@dataclasses.dataclass(frozen=True)
class Fit:
    """A fitted law.

    Attributes:
      kind: what the runs told: "all" five values; but for the "exponents", which are published
        ones; or the "shape" is published, and they told E and a factor of the rest.
      values: E, A, B, a, b.
      error: standard deviation of log L about the law; None where it fits because it must.
      drawn: values of the parametric bootstrap, a row each.
    """

    kind: str
    values: Mapping[str, float]
    error: float | None
    drawn: np.ndarray

    def loss(self, parameters: float, tokens: float) -> float:
        """Foretold by the law."""
        return float(_law(np.array([*self.values.values()]), parameters, tokens))

    def interval(self, parameters: float, tokens: float) -> tuple[float, float] | None:
        """Of 95 % of the bootstrap; None without one."""
        if not len(self.drawn):
            return None
        low, high = np.quantile(_law(self.drawn.T, parameters, tokens), (0.025, 0.975))
        return float(low), float(high)


def fit(runs: Sequence[Run], draws: int = 200, seed: int = 0) -> Fit:
    """Fits what the runs can tell; ValueError below two sizes.

    The bootstrap is parametric, since few runs drawn again from themselves are often of one size:
    losses of the law with the noise that was found, whose own size is drawn too, as a small sample
    leaves it unknown.
    """
    sizes, tokens, losses = np.array([(r.parameters, r.tokens, r.loss) for r in runs]).T
    kind = _kind(sizes, tokens)
    best = _fit(kind, sizes, tokens, losses)
    freedom = len(runs) - _FREE[kind]
    names, drawn = ("E", "A", "B", "a", "b"), np.zeros((0, 5))
    if not freedom:
        return Fit(kind, dict(zip(names, best)), None, drawn)
    fitted, rng = _law(best, sizes, tokens), np.random.default_rng(seed)
    square = np.square(np.log(losses / fitted)).sum()
    errors = np.sqrt(square / rng.chisquare(freedom, draws))
    noisy = fitted * np.exp(errors[:, None] * rng.normal(size=(draws, len(runs))))
    drawn = np.array([_fit(kind, sizes, tokens, row, best) for row in noisy])
    return Fit(kind, dict(zip(names, best)), float(np.sqrt(square / freedom)), drawn)


def _kind(sizes: np.ndarray, tokens: np.ndarray) -> str:
    """What so many runs, at such places, can tell."""
    different, ratio = len(set(sizes)), tokens / sizes
    if different < 2:
        raise ValueError(
            "the runs are of one size, and say nothing of another; train two rungs or more of "
            "configs/ladder.py"
        )
    if ratio.max() < _APART * ratio.min() or len(sizes) < _FEWEST["exponents"]:
        return "shape"
    return "all" if len(sizes) >= _FEWEST["all"] and different >= 3 else "exponents"


def _law(values: np.ndarray, parameters: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    e, a, b, alpha, beta = values
    return e + a * parameters**-alpha + b * tokens**-beta


def _fit(
    kind: str,
    sizes: np.ndarray,
    tokens: np.ndarray,
    losses: np.ndarray,
    start: np.ndarray | None = None,
) -> np.ndarray:
    """E, A, B, a, b of the least Huber loss, from `start` or from the best of many."""
    free = _FREE[kind]
    published = np.array([*PUBLISHED.values()])

    def values(x: np.ndarray) -> np.ndarray:
        if kind == "shape":
            return np.array([np.exp(x[0]), *np.exp(x[1]) * published[1:3], *published[3:]])
        return np.array([*np.exp(x[:3]), *(x[3:] if kind == "all" else published[3:])])

    def residuals(x: np.ndarray) -> np.ndarray:
        return np.log(_law(values(x), sizes, tokens) / losses)

    def begin(alpha: float, beta: float) -> np.ndarray:
        """With these exponents the rest is linear."""
        columns = np.stack([np.ones_like(sizes), sizes**-alpha, tokens**-beta])
        if kind == "shape":
            columns = np.stack([columns[0], published[1:3] @ columns[1:]])
        found = nnls((columns / losses).T, np.ones_like(losses))[0]
        return np.array([*np.log(np.maximum(found, 1e-6)), alpha, beta])[:free]

    if start is None:
        exponents = _STARTS if kind == "all" else [published[3:]]
        starts = sorted(
            (begin(*pair) for pair in exponents), key=lambda x: np.abs(residuals(x)).sum()
        )
    else:
        starts = [begin(*start[3:])]
    bounds = [-20.0, 0.05], [40.0, 1.5]  # of the logarithms and of the exponents
    low, high = (np.repeat(bound, (min(free, 3), max(free - 3, 0))) for bound in bounds)
    found = [
        least_squares(residuals, x, loss="huber", f_scale=_HUBER, bounds=(low, high), x_scale="jac")
        for x in starts[:4]
    ]
    return values(min(found, key=lambda result: result.cost).x)
