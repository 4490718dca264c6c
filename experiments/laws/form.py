"""The law L(N, D) = E + A / N^alpha + B / D^beta, and its fit.

Form and fit: Hoffmann et al. 2022 (arXiv 2203.15556), approach 3: the Huber loss of the logarithm's residuals, many starts.
Two things follow the replication of Besiroglu et al. 2024 (arXiv 2404.10102): the residuals are added up and not averaged,
since a mean of 1e-6 ends an optimiser early, and coefficients are never rounded before they are used.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import least_squares
from scipy.special import logsumexp

from experiments.laws.points import LawError

DELTA = 1e-3
"""Residuals of the logarithm up to here count squared, larger ones linearly (Hoffmann et al.)."""
COEFFICIENTS = ("irreducible_nats", "size_factor", "size_exponent", "tokens_factor", "tokens_exponent")
REFINED = 8
"""Starts that are followed to their end, the best of the grid."""
LEAST_LEVELS = 3
"""Different sizes, and different numbers of tokens, that a fit needs."""


@dataclass(frozen=True)
class Law:
    """E + A / N^alpha + B / D^beta, in nats per token; N parameters, D tokens."""

    irreducible_nats: float
    size_factor: float
    size_exponent: float
    tokens_factor: float
    tokens_exponent: float

    def loss(self, parameters: np.ndarray | float, tokens: np.ndarray | float) -> np.ndarray:
        """Nats per token, of the arguments' common shape."""
        n, d = np.asarray(parameters, dtype=np.float64), np.asarray(tokens, dtype=np.float64)
        return (
            self.irreducible_nats
            + self.size_factor * n**-self.size_exponent
            + self.tokens_factor * d**-self.tokens_exponent
        )

    @property
    def size_share(self) -> float:
        """The exponent of the best size: N_opt grows like C^size_share where C = const N D."""
        return self.tokens_exponent / (self.size_exponent + self.tokens_exponent)

    def best_size(self, product: float) -> float:
        """The size of least loss among those with N D = `product`."""
        a, b = self.size_exponent, self.tokens_exponent
        return float((a * self.size_factor / (b * self.tokens_factor)) ** (1 / (a + b)) * product ** (b / (a + b)))

    def tokens_for(self, parameters: float, loss_nats: float) -> float:
        """Tokens at which a model of that size has that loss; infinite where it never has."""
        left = loss_nats - self.irreducible_nats - self.size_factor * parameters**-self.size_exponent
        return float((self.tokens_factor / left) ** (1 / self.tokens_exponent)) if left > 0 else float("inf")


@dataclass(frozen=True)
class Fit:
    law: Law
    objective: float
    """sum of the Huber losses of the logarithm's residuals"""
    residuals_P: np.ndarray
    """log of the law's loss minus log of the measured one, (points,)"""
    start: np.ndarray
    """the optimiser's own coordinates, to begin a neighbouring fit with, (5,)"""


def fit(
    parameters_P: Sequence[float] | np.ndarray,
    tokens_P: Sequence[float] | np.ndarray,
    loss_P: Sequence[float] | np.ndarray,
    *,
    delta: float = DELTA,
    start: np.ndarray | None = None,
) -> Fit:
    """The law of least Huber loss.

    Args:
        parameters_P, tokens_P, loss_P: one entry for each run; loss in nats per token.
        start: begin there only (of a fit to nearly the same points); None tries a grid of starts.

    Raises:
        LawError: fewer than six runs, fewer than three sizes or three numbers of tokens, values that are not positive, or
            no start that leads anywhere.
    """
    n, d, loss = (np.asarray(values, dtype=np.float64) for values in (parameters_P, tokens_P, loss_P))
    check(n, d, loss)
    log_n, log_d, log_loss = np.log(n), np.log(d), np.log(loss)
    middle = log_n.mean(), log_d.mean()
    problem = _Problem(log_n - middle[0], log_d - middle[1], log_loss, delta)
    starts = problem.grid() if start is None else [start]
    ends = 1e-12 if start is None else 1e-9
    best: tuple[float, np.ndarray] | None = None
    for place in starts:
        found = least_squares(
            problem.residuals, place, problem.jacobian, method="trf", loss="huber", f_scale=delta, x_scale="jac",
            xtol=ends, ftol=ends, gtol=1e-14, max_nfev=400,
        )  # fmt: skip
        if np.isfinite(found.cost) and (best is None or found.cost < best[0]):
            best = float(found.cost), found.x
    if best is None:
        raise LawError("no start of the fit came to an end: are the losses of one law at all?")
    a, alpha, b, beta, e = best[1]
    law = Law(
        float(np.exp(e)),
        float(np.exp(a + alpha * middle[0])),
        float(alpha),
        float(np.exp(b + beta * middle[1])),
        float(beta),
    )
    return Fit(law, best[0], problem.residuals(best[1]), best[1])


def check(n: np.ndarray, d: np.ndarray, loss: np.ndarray) -> None:
    """Raise LawError for points that five coefficients cannot be read from."""
    if not len(n) == len(d) == len(loss):
        raise LawError(f"{len(n)} sizes, {len(d)} numbers of tokens and {len(loss)} losses: one each for every run")
    if len(n) and not all(np.isfinite(v).all() and (v > 0).all() for v in (n, d, loss)):
        raise LawError("sizes, tokens and losses must be finite and above 0")
    if len(n) <= len(COEFFICIENTS):
        raise LawError(f"{len(n)} runs for {len(COEFFICIENTS)} coefficients: at least {len(COEFFICIENTS) + 1} are needed")
    for name, values in (("sizes", n), ("numbers of tokens", d)):
        if (levels := len(np.unique(values))) < LEAST_LEVELS:
            raise LawError(f"{levels} different {name}: at least {LEAST_LEVELS} are needed to read an exponent from")


@dataclass(frozen=True)
class _Problem:
    """In centred logarithms: coordinates (a, alpha, b, beta, e) with a and b taken in the middle of the runs."""

    log_n_P: np.ndarray
    log_d_P: np.ndarray
    log_loss_P: np.ndarray
    delta: float

    def _terms(self, place: np.ndarray) -> np.ndarray:
        a, alpha, b, beta, e = np.moveaxis(np.asarray(place)[..., None], -2, 0)
        one = np.ones_like(self.log_n_P)
        return np.stack([a - alpha * self.log_n_P, b - beta * self.log_d_P, e * one])

    def residuals(self, place: np.ndarray) -> np.ndarray:
        return np.asarray(logsumexp(self._terms(place), axis=0)) - self.log_loss_P

    def jacobian(self, place: np.ndarray) -> np.ndarray:
        terms = self._terms(place)
        share = np.exp(terms - logsumexp(terms, axis=0))
        return np.stack([share[0], -share[0] * self.log_n_P, share[1], -share[1] * self.log_d_P, share[2]], axis=-1)

    def grid(self) -> list[np.ndarray]:
        """The best `REFINED` of a grid of starts: shares of the loss for the three terms, and exponents."""
        middle = self.log_loss_P.mean()
        shares, exponents = np.log([0.05, 0.2, 0.5]), (0.05, 0.2, 0.4, 0.7, 1.1)
        places = np.array(
            [
                (middle + a, alpha, middle + b, beta, middle + e)
                for a, b, alpha, beta, e in itertools.product(shares, shares, exponents, exponents, np.log([0.1, 0.5, 0.9]))
            ]
        )
        off = np.abs(np.asarray(logsumexp(self._terms(places), axis=0)) - self.log_loss_P)
        huber = np.where(off < self.delta, off**2 / 2, self.delta * (off - self.delta / 2)).sum(-1)
        return [places[i] for i in np.argsort(huber)[:REFINED]]
