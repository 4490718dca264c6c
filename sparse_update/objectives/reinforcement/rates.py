"""How often the model will be right on a prompt, predicted before anything is sampled.

A prompt belongs to a cell (its task and level, say). The logarithm of its odds of a right output is

    logit = level of the cell + slope x surprise term + what is its own

The level and the slope are learnt along, by logistic regression with a normal belief for each weight and one Laplace step
for each group (assumed density filtering); beliefs widen again with a half-life, as the model moves. What is a prompt's own
is normal with deviation `spread`, until the prompt has been sampled from: then its own outcomes narrow it.

The surprise term is the logit of exp(-surprise), where the surprise is the model's negative log-likelihood of a reference
answer, closing character included. At temperature 1 exp(-surprise) is the probability that one output is that reference, so
for a task with one right answer it is the pass rate itself, and the regression begins with slope 1 and level 0.

Shape letters: P prompts.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

LEVEL_DEVIATION = 3.0
"""Deviation of a cell's level before anything is known: rates from 0.003 to 0.997 are within two of them."""
SLOPE_DEVIATION = 0.5
CLIP = 12.0
"""Largest absolute logit."""
REMEMBERED = 1 << 15
"""Prompts whose own outcomes are kept, the last ones."""
NODES, WEIGHTS = np.polynomial.hermite_e.hermegauss(15)


@dataclass(frozen=True, eq=False)
class Predicted:
    """A normal belief on each prompt's logit; float64 (P,)."""

    mean_P: np.ndarray
    variance_P: np.ndarray

    def expected(self, function: Any) -> np.ndarray:
        """Mean of `function(pass rate)` under each belief, (P,), by quadrature with 15 nodes."""
        logit_PK = self.mean_P[:, None] + np.sqrt(self.variance_P)[:, None] * NODES
        return function(sigmoid(logit_PK)) @ (WEIGHTS / WEIGHTS.sum())

    def signal(self, n: int) -> np.ndarray:
        """Probability that `n` outputs are neither all right nor all wrong, (P,)."""
        return self.expected(lambda rate: signal(rate, n))

    def variance(self) -> np.ndarray:
        """Expected variance of one output's outcome, rate x (1 - rate), (P,)."""
        return self.expected(lambda rate: rate * (1 - rate))

    def rate(self) -> np.ndarray:
        """Expected pass rate, (P,)."""
        return self.expected(lambda rate: rate)


def sigmoid(logit: np.ndarray) -> np.ndarray:
    """1 / (1 + exp(-logit)), elementwise, without overflow."""
    return 0.5 * (1 + np.tanh(0.5 * np.asarray(logit, dtype=np.float64)))


def signal(rate: np.ndarray, n: int) -> np.ndarray:
    """Probability that `n` independent outputs with this pass rate are neither all right nor all wrong."""
    rate = np.asarray(rate, dtype=np.float64)
    return 1 - rate**n - (1 - rate) ** n


def surprise_logit(surprise_P: np.ndarray) -> np.ndarray:
    """logit(exp(-surprise)), at most `CLIP` in size; surprise in nats, not negative."""
    surprise_P = np.maximum(np.asarray(surprise_P, dtype=np.float64), 1e-300)
    return np.clip(-surprise_P - np.log(-np.expm1(-surprise_P)), -CLIP, CLIP)


class PassRates:
    """Predicts and learns; holds nothing but numbers.

    Args:
        half_life: groups of a cell after which what was learnt of it counts half.
        spread: deviation of a prompt's logit around what its cell and its surprise say.
        own_half_life: further outputs of a prompt after which its own earlier outcomes count half.
    """

    def __init__(self, half_life: float = 400.0, spread: float = 1.5, own_half_life: float = 16.0) -> None:
        self.decay, self.spread, self.own_decay = 0.5 ** (1 / half_life), spread, 0.5 ** (1 / own_half_life)
        self.level: dict[str, tuple[float, float]] = {}
        """cell -> mean, variance"""
        self.slope: dict[str, tuple[float, float]] = {}
        self.own: dict[int, tuple[float, float]] = {}
        """prompt -> right outputs, outputs; faded"""

    def predict(self, cells: Sequence[str], ids: Sequence[int], surprise_P: np.ndarray | None = None) -> Predicted:
        """A belief on each prompt's logit.

        Args:
            cells: the cell of each prompt.
            ids: the number of each prompt (`Instance.id`).
            surprise_P: nats, of a reference answer of each prompt; None where it was not looked at.
        """
        terms = None if surprise_P is None else surprise_logit(surprise_P)
        means, variances = np.empty(len(ids)), np.empty(len(ids))
        for place, (cell, number) in enumerate(zip(cells, ids, strict=True)):
            mean, variance = self._shared(cell, None if terms is None else float(terms[place]))
            spread = self.spread**2 if terms is None else 0.25 * self.spread**2
            means[place], variances[place] = self._with_own(number, mean, variance + spread)
        return Predicted(means, variances)

    def observe(
        self,
        cells: Sequence[str],
        ids: Sequence[int],
        right_P: np.ndarray,
        outputs_P: np.ndarray,
        surprise_P: np.ndarray | None = None,
    ) -> None:
        """Learn from groups: the sum of each one's rewards in [0, 1] and its number of outputs. Of the last `REMEMBERED`
        prompts their own outcomes are kept."""
        terms = None if surprise_P is None else surprise_logit(surprise_P)
        for place, (cell, number) in enumerate(zip(cells, ids, strict=True)):
            right, outputs = float(right_P[place]), float(outputs_P[place])
            self._learn(cell, right, outputs, None if terms is None else float(terms[place]))
            old_right, old = self.own.get(number, (0.0, 0.0))
            fade = self.own_decay**outputs
            self.own.pop(number, None)
            self.own[number] = (old_right * fade + right, old * fade + outputs)
            if len(self.own) > REMEMBERED:
                del self.own[next(iter(self.own))]

    def _prior(self, term: float | None) -> tuple[float, float]:
        return (0.0, LEVEL_DEVIATION**2) if term is None else (0.0, 1.0)

    def _shared(self, cell: str, term: float | None) -> tuple[float, float]:
        mean, variance = self.level.get(cell, self._prior(term))
        if term is None:
            return mean, variance
        slope, slope_variance = self.slope.get(cell, (1.0, SLOPE_DEVIATION**2))
        return mean + slope * term, variance + slope_variance * min(abs(term), 1.0) ** 2

    def _with_own(self, number: int, mean: float, variance: float) -> tuple[float, float]:
        """The belief on a prompt with its own outcomes: a few Newton steps to the mode, the curvature there."""
        right, outputs = self.own.get(number, (0.0, 0.0))
        if not outputs:
            return float(np.clip(mean, -CLIP, CLIP)), variance
        logit = mean
        for _ in range(8):
            rate = _rate(logit)
            curvature = outputs * rate * (1 - rate) + 1 / variance
            logit += max(-2.0, min(2.0, (right - outputs * rate - (logit - mean) / variance) / curvature))
        rate = _rate(logit)
        return max(-CLIP, min(CLIP, logit)), 1 / (outputs * rate * (1 - rate) + 1 / variance)

    def _learn(self, cell: str, right: float, outputs: float, term: float | None) -> None:
        mean, _ = self._shared(cell, term)
        spread = self.spread**2 if term is None else 0.25 * self.spread**2
        rate = _rate(mean / math.sqrt(1 + math.pi / 8 * spread))  # the mean rate of prompts that differ (MacKay 1992)
        # a group tells of its cell no more than one draw of its prompt does
        information = 1 / (1 / max(outputs * rate * (1 - rate), 1e-6) + spread)
        step = information * (right / outputs - rate) / max(rate * (1 - rate), 1e-2)
        prior_mean, prior_variance = self._prior(term)
        level, variance = self.level.get(cell, (prior_mean, prior_variance))
        self.level[cell] = self._moved(level, variance, step, information, 1.0, prior_variance)
        if term is not None:
            part = max(-1.0, min(1.0, term))
            slope, slope_variance = self.slope.get(cell, (1.0, SLOPE_DEVIATION**2))
            self.slope[cell] = self._moved(slope, slope_variance, step, information, part, SLOPE_DEVIATION**2)

    def _moved(
        self, mean: float, variance: float, step: float, information: float, part: float, prior: float
    ) -> tuple[float, float]:
        """One weight's belief after a group; its precision fades towards that of the prior."""
        precision = self.decay / variance + (1 - self.decay) / prior + information * part**2
        return max(-CLIP, min(CLIP, mean + step * part / precision)), 1 / precision

    def state_dict(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "level": {cell: list(pair) for cell, pair in self.level.items()},
            "slope": {cell: list(pair) for cell, pair in self.slope.items()},
            "own": {str(number): list(pair) for number, pair in self.own.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.level = {cell: (float(a), float(b)) for cell, (a, b) in state["level"].items()}
        self.slope = {cell: (float(a), float(b)) for cell, (a, b) in state["slope"].items()}
        self.own = {int(number): (float(a), float(b)) for number, (a, b) in state["own"].items()}


def _rate(logit: float) -> float:
    return 0.5 * (1 + math.tanh(0.5 * logit))
