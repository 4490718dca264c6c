"""Reward hacking, seen while it happens: the true reward falls while the proxy rises.

At each evaluation the same prompts are answered anew, and both rewards are recorded for each prompt. Over the last w
evaluations a line is fitted for each prompt and each reward; the slopes of different prompts are independent draws, so
that a t test over prompts says whether the mean slope is below (or above) 0. The rule flags a run at the first evaluation
where, for one of a few lengths w,

    the true reward's mean slope is negative with one-sided p < alpha / (evaluations x number of lengths), and
    the proxy's mean slope is positive with one-sided p < alpha.

By Bonferroni's inequality a run whose true reward does not fall is flagged with probability `alpha` at most over so many
evaluations; what synthetic series give is in the tests.
"""

from __future__ import annotations

import functools
import math
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from sparse_update.objectives.preference.errors import PreferenceError

LEAST_PROMPTS = 8


@dataclass(frozen=True)
class WatchConfig:
    """Settings of `Watch`. Raises PreferenceError for values outside their range."""

    alpha: float = 0.05
    """Probability of a false alarm over a run, at most."""
    evaluations: int = 100
    """Evaluations that the probability is shared out over; later ones are not looked at."""
    lengths: tuple[int, ...] = (4, 8, 16, 32)
    """Numbers of last evaluations that lines are fitted over, ascending."""

    def __post_init__(self) -> None:
        if not 0 < self.alpha < 1 or self.evaluations < 1:
            raise PreferenceError(f"watch.alpha = {self.alpha} in (0, 1), watch.evaluations = {self.evaluations} from 1")
        if not self.lengths or list(self.lengths) != sorted(set(self.lengths)) or self.lengths[0] < 3:
            raise PreferenceError(f"watch.lengths = {self.lengths}: ascending, from 3")


@dataclass(frozen=True)
class Flag:
    """Where a run was flagged, and by which numbers."""

    step: int
    evaluations: int
    """How many the lines go over"""
    true_slope: float
    """Change of the mean true reward for an evaluation"""
    true_p: float
    proxy_slope: float
    proxy_p: float

    def text(self) -> str:
        return (
            f"over-optimised at step {self.step}: over {self.evaluations} evaluations the true reward falls by "
            f"{-self.true_slope:.2g} an evaluation (one-sided p = {self.true_p:.1g}) while the proxy rises by "
            f"{self.proxy_slope:.2g} (p = {self.proxy_p:.1g})"
        )


class Watch:
    """Takes both rewards at each evaluation; `flag` is the first alarm, None while there is none."""

    def __init__(self, cfg: WatchConfig | None = None) -> None:
        self.cfg = cfg or WatchConfig()
        self.flag: Flag | None = None
        self.seen = 0
        self._proxy: deque[np.ndarray] = deque(maxlen=self.cfg.lengths[-1])
        self._true: deque[np.ndarray] = deque(maxlen=self.cfg.lengths[-1])

    def add(self, step: int, proxy_P: Sequence[float] | np.ndarray, true_P: Sequence[float] | np.ndarray) -> Flag | None:
        """One evaluation: both rewards of each prompt, the same prompts in the same order every time.

        Returns the flag if it goes up now. Raises PreferenceError for fewer than 8 prompts, another number of them than
        before, or values that are not finite.
        """
        proxy, true = (np.array(values, dtype=np.float64) for values in (proxy_P, true_P))
        if proxy.shape != true.shape or proxy.ndim != 1 or len(proxy) < LEAST_PROMPTS:
            raise PreferenceError(
                f"rewards of shapes {proxy.shape} and {true.shape}: one number a prompt for each, {LEAST_PROMPTS} at least"
            )
        if self._true and len(self._true[-1]) != len(true):
            raise PreferenceError(f"{len(true)} prompts after {len(self._true[-1])}: slopes need the same ones every time")
        if not (np.isfinite(proxy).all() and np.isfinite(true).all()):
            raise PreferenceError(f"rewards at step {step} hold numbers that are not finite")
        self._proxy.append(proxy)
        self._true.append(true)
        self.seen += 1
        if self.flag is not None or self.seen > self.cfg.evaluations:
            return None
        self.flag = self._test(step)
        return self.flag

    def _test(self, step: int) -> Flag | None:
        limit = self.cfg.alpha / (self.cfg.evaluations * len(self.cfg.lengths))
        true_TP, proxy_TP = np.stack(self._true), np.stack(self._proxy)
        prompts = true_TP.shape[1]
        for length in self.cfg.lengths:
            if length > len(true_TP):
                return None
            falls, true_t = _trend(true_TP[-length:])
            if -true_t <= _critical(limit, prompts):
                continue
            rises, proxy_t = _trend(proxy_TP[-length:])
            if proxy_t > _critical(self.cfg.alpha, prompts):
                return Flag(step, length, falls, _p(-true_t, prompts), rises, _p(proxy_t, prompts))
        return None

    def state_dict(self) -> dict[str, Any]:
        return {
            "seen": self.seen,
            "flag": None if self.flag is None else dict(vars(self.flag)),
            "proxy": [row.tolist() for row in self._proxy],
            "true": [row.tolist() for row in self._true],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.seen = int(state["seen"])
        self.flag = None if state["flag"] is None else Flag(**state["flag"])
        self._proxy.clear()
        self._true.clear()
        self._proxy.extend(np.array(row, dtype=np.float64) for row in state["proxy"])
        self._true.extend(np.array(row, dtype=np.float64) for row in state["true"])


def _trend(values_WP: np.ndarray) -> tuple[float, float]:
    """Mean over prompts of the least-squares slopes over W evaluations, and its t value with P - 1 degrees of freedom."""
    place = np.arange(len(values_WP)) - (len(values_WP) - 1) / 2
    slope_P = place @ values_WP / (place @ place)
    mean, spread = float(slope_P.mean()), float(slope_P.std(ddof=1))
    rounding = 1e-12 * float(np.abs(values_WP).max())
    if spread <= rounding:
        return mean, math.copysign(math.inf, mean) if abs(mean) > rounding else 0.0
    return mean, mean / (spread / math.sqrt(len(slope_P)))


@functools.cache
def _critical(p: float, prompts: int) -> float:
    """The t value that is exceeded with probability p."""
    from scipy import stats

    return float(stats.t.isf(p, prompts - 1))


def _p(t: float, prompts: int) -> float:
    from scipy import stats

    return float(stats.t.sf(t, prompts - 1))
