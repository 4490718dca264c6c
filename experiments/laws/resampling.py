"""Intervals by the bootstrap over runs: of every coefficient, and of what the law says of a run that was not made yet.

Runs are drawn with replacement within each size, so that no draw loses a size. Percentiles of few runs are too narrow; the
draws are therefore spread about the estimate by sqrt(P / (P - 5)) for P runs and five coefficients, the factor by which a
regression's residuals are smaller than its errors.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from experiments.laws.form import COEFFICIENTS, Fit, Law, fit
from experiments.laws.points import LawError

DRAWS = 200
LEVEL = 0.95
"""Of coefficients: with it, at least nine of ten intervals hold the true coefficient where few runs are fitted (tests)."""
PREDICTION_LEVEL = 0.9


@dataclass(frozen=True)
class Interval:
    """low <= value <= high at `level`; a bound may be infinite."""

    value: float
    low: float
    high: float
    level: float = LEVEL

    def holds(self, value: float) -> bool:
        return self.low <= value <= self.high


@dataclass(frozen=True)
class Resampled:
    """A fit and those to drawn runs."""

    fit: Fit
    laws: tuple[Law, ...]
    spread: float
    """what the draws' distance from the estimate is multiplied by"""

    def coefficients(self, level: float = LEVEL) -> dict[str, Interval]:
        return {name: self.interval([getattr(law, name) for law in self.laws], getattr(self.fit.law, name), level)
                for name in COEFFICIENTS}  # fmt: skip

    def interval(self, drawn: list[float] | np.ndarray, value: float, level: float = LEVEL) -> Interval:
        """The interval of any figure of a law, from its values by the drawn laws. Positive ones are spread by their ratio,
        as factors and exponents are skewed."""
        drawn = np.asarray(drawn, dtype=np.float64)
        if value > 0 and (drawn > 0).all():
            spread = value * (drawn / value) ** self.spread
        else:
            spread = value + self.spread * (drawn - value)
        low, high = np.quantile(spread, [(1 - level) / 2, (1 + level) / 2])
        return Interval(value, float(low), float(high), level)

    def predicted(self, parameters: float, tokens: float, level: float = PREDICTION_LEVEL, seed: int = 0) -> Interval:
        """The loss of a run that was not made yet, in nats per token: the uncertainty of the law, and what one run lies off
        it, drawn from the residuals."""
        rng = np.random.default_rng(seed)
        residuals = self.fit.residuals_P - self.fit.residuals_P.mean()
        value = float(self.fit.law.loss(parameters, tokens))
        means = np.array([float(law.loss(parameters, tokens)) for law in self.laws])
        off = rng.choice(residuals, (20, len(means))) * self.spread
        return self.interval((means * np.exp(-off)).ravel(), value, level)


def resample(
    parameters_P: np.ndarray, tokens_P: np.ndarray, loss_P: np.ndarray, draws: int = DRAWS, seed: int = 0
) -> Resampled:
    """A fit to all runs, and one to each of `draws` draws of them. Raises LawError as `form.fit` does."""
    n, d, loss = (np.asarray(v, dtype=np.float64) for v in (parameters_P, tokens_P, loss_P))
    whole = fit(n, d, loss)
    laws = []
    for index in drawn(n, draws, seed):
        if len(np.unique(d[index])) < 3:
            continue
        laws.append(fit(n[index], d[index], loss[index], start=whole.start).law)
    if len(laws) < draws / 2:
        raise LawError(f"only {len(laws)} of {draws} draws of the runs have three numbers of tokens: add runs")
    return Resampled(whole, tuple(laws), float(np.sqrt(len(n) / (len(n) - len(COEFFICIENTS)))))


def drawn(groups_P: np.ndarray, draws: int, seed: int) -> Iterator[np.ndarray]:
    """Indices of runs drawn with replacement within each group, (runs,), `draws` times."""
    rng = np.random.default_rng(seed)
    members = [np.flatnonzero(groups_P == group) for group in np.unique(groups_P)]
    for _ in range(draws):
        yield np.concatenate([rng.choice(mine, len(mine)) for mine in members])
