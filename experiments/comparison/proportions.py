"""Shares and errors over samples, with their intervals.

Wilson's interval for a share, Newcombe's for two shares of the same samples, the bootstrap over samples for all else.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from experiments.comparison.statistics import StatisticsError

Z95 = 1.959963984540054  # standard normal at 0.975
RESAMPLES = 2000
AT_ONCE = 2**22  # indices drawn at a time


@dataclass(frozen=True)
class Estimate:
    """A value with its 95 % interval, how it was made, and over how many samples; bounds are None for one sample."""

    value: float
    low: float | None
    high: float | None
    method: str
    samples: int

    def text(self, scale: float = 1.0, digits: int = 4, sign: str = "") -> str:
        """value [low, high], each multiplied by `scale`."""
        value = f"{scale * self.value:{sign}.{digits}f}"
        if self.low is None or self.high is None:
            return f"{value} (one sample)"
        return f"{value} [{scale * self.low:{sign}.{digits}f}, {scale * self.high:{sign}.{digits}f}]"


def wilson(right: int, samples: int) -> Estimate:
    """A share of samples with its score interval (Wilson, J. Am. Stat. Assoc. 22:209, 1927).

    Raises StatisticsError for no sample, or more right ones than there are.
    """
    if samples < 1 or not 0 <= right <= samples:
        raise StatisticsError(f"{right} right of {samples}: a share needs at least one sample and no more right than that")
    p, n = right / samples, float(samples)
    middle = (p + Z95**2 / (2 * n)) / (1 + Z95**2 / n)
    half = Z95 / (1 + Z95**2 / n) * math.sqrt(p * (1 - p) / n + Z95**2 / (4 * n * n))
    return Estimate(p, max(0.0, middle - half), min(1.0, middle + half), "Wilson score", samples)


def paired_shares(ours: NDArray[np.bool_], theirs: NDArray[np.bool_]) -> Estimate:
    """Share of ours less share of theirs on the same samples (N,), with the interval of Newcombe's method 10 (Statistics in
    Medicine 17:2635, 1998), which holds its level where nearly all pairs agree.

    Raises StatisticsError for no sample or unequal numbers of them.
    """
    if ours.shape != theirs.shape or ours.ndim != 1 or not len(ours):
        raise StatisticsError(f"{ours.shape} results against {theirs.shape}: one of each for every sample is needed")
    n = len(ours)
    a, d = int((ours & theirs).sum()), int((~ours & ~theirs).sum())
    b, c = int((ours & ~theirs).sum()), int((~ours & theirs).sum())
    one, two = wilson(a + b, n), wilson(a + c, n)
    margins = (a + b) * (c + d) * (a + c) * (b + d)
    cross = a * d - b * c
    if cross > 0:
        cross = max(cross - n / 2, 0.0)  # type: ignore[assignment]
    phi = cross / math.sqrt(margins) if margins else 0.0
    down1, up1 = one.value - (one.low or 0.0), (one.high or 0.0) - one.value
    down2, up2 = two.value - (two.low or 0.0), (two.high or 0.0) - two.value
    below = math.sqrt(max(0.0, down1**2 - 2 * phi * down1 * up2 + up2**2))
    above = math.sqrt(max(0.0, up1**2 - 2 * phi * up1 * down2 + down2**2))
    difference = one.value - two.value
    return Estimate(difference, difference - below, difference + above, "Newcombe's method 10, paired", n)


def bootstrap(samples: int, statistic: Callable[[NDArray[np.int64]], NDArray[np.float64]], seed: int = 0) -> Estimate:
    """A statistic over samples with its percentile interval from 2,000 resamples of whole samples.

    Args:
        samples: N.
        statistic: indices int64 (R, N) of R resamples -> its value in each, float64 (R,).

    Raises StatisticsError for no sample.
    """
    if samples < 1:
        raise StatisticsError("no sample: nothing to resample")
    value = float(statistic(np.arange(samples)[None])[0])
    if samples == 1:
        return Estimate(value, None, None, "one sample", 1)
    rng = np.random.default_rng(seed)
    rows = max(1, AT_ONCE // samples)
    found = [statistic(rng.integers(0, samples, (min(rows, RESAMPLES - at), samples))) for at in range(0, RESAMPLES, rows)]
    low, high = np.quantile(np.concatenate(found), (0.025, 0.975))
    return Estimate(value, float(low), float(high), f"bootstrap over samples, {RESAMPLES:,} draws", samples)
