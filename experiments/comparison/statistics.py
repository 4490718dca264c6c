"""Seeds to statements: intervals, paired one-sided tests, correction for many comparisons, time to a target.

Losses are nats per token, lower is better, unless a caller says otherwise. Nothing here turns one seed into a claim:
one value has a mean and no interval, and a test on one pair is refused.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass


class StatisticsError(ValueError):
    """Numbers no statement can be made from; the message names them and what would help."""


class TooFewSeeds(StatisticsError):
    """A test was asked for on fewer than two pairs."""


@dataclass(frozen=True)
class Interval:
    """Mean of `n` values; `low` and `high` bound it with Student's t at `level`, and are None where n = 1."""

    mean: float
    low: float | None
    high: float | None
    sd: float | None
    n: int
    level: float

    def text(self, digits: int = 4) -> str:
        if self.low is None or self.high is None:
            return f"{self.mean:.{digits}f} (n = 1)"
        return f"{self.mean:.{digits}f} [{self.low:.{digits}f}, {self.high:.{digits}f}]"


@dataclass(frozen=True)
class PairedTest:
    """One-sided paired test that the candidate lies below the baseline.

    `difference` is the mean of candidate - baseline over the `n` pairs, `low` and `high` its two-sided 95 % t-interval
    (None where all differences are equal); `p` is the one-sided p-value of `method`, chosen for the `reason` given;
    `wilcoxon_p` stands beside it (None where all differences are zero), with `smallest_wilcoxon_p` = 2^-n, the least an
    exact rank or sign test can give.
    """

    difference: float
    low: float | None
    high: float | None
    p: float
    method: str
    reason: str
    wilcoxon_p: float | None
    smallest_wilcoxon_p: float
    n: int
    wins: int
    """Pairs in which the candidate certainly lies below the baseline."""


@dataclass(frozen=True)
class Span:
    """A value known to lie between `low` and `high`; `high` may be infinite. Equal ends: it was measured."""

    low: float
    high: float

    @property
    def exact(self) -> bool:
        return self.low == self.high


def interval(values: Sequence[float], level: float = 0.95) -> Interval:
    """Mean and two-sided Student t-interval over seeds: mean +- t((1 + level) / 2, n - 1) sd / sqrt(n).

    Raises StatisticsError for no values, values that are not finite, or a level outside (0, 1).
    """
    from scipy import stats

    numbers = _finite(values, "values")
    if not 0.0 < level < 1.0:
        raise StatisticsError(f"level = {level}: must lie between 0 and 1")
    n, mean = len(numbers), math.fsum(numbers) / len(numbers)
    if n == 1:
        return Interval(mean, None, None, None, 1, level)
    sd = math.sqrt(math.fsum((x - mean) ** 2 for x in numbers) / (n - 1))
    half = float(stats.t.ppf(0.5 + level / 2.0, n - 1)) * sd / math.sqrt(n)
    return Interval(mean, mean - half, mean + half, sd, n, level)


def paired_test(candidate: Sequence[float], baseline: Sequence[float]) -> PairedTest:
    """Is `candidate` below `baseline`? The i-th values of both share a seed.

    Paired t, which needs about normal differences but can speak at small n: an exact rank or sign test cannot go below
    2^-n, so below n = 5 it can never reach p < 0.05. Where all differences are equal t has no spread to work with, and
    the exact sign test takes its place. Raises TooFewSeeds below two pairs, StatisticsError for unequal lengths or
    values that are not finite.
    """
    from scipy import stats

    if len(candidate) != len(baseline):
        raise StatisticsError(f"{len(candidate)} values against {len(baseline)}: a paired test needs one of each per seed")
    ours, theirs = _finite(candidate, "candidate"), _finite(baseline, "baseline")
    n = len(ours)
    if n < 2:
        raise TooFewSeeds("n = 1: no test possible; run at least two seeds of both (three to five to be believed)")
    differences = [a - b for a, b in zip(ours, theirs, strict=True)]
    mean = math.fsum(differences) / n
    ranks = _wilcoxon(differences) if any(differences) else None
    scale = max(map(abs, [*ours, *theirs]))
    if max(differences) - min(differences) <= 1e-12 * scale:
        wins, ties = sum(d < 0 for d in differences), sum(d == 0 for d in differences)
        p = float(stats.binomtest(wins, n - ties, 0.5, alternative="greater").pvalue) if n > ties else 1.0
        return PairedTest(mean, None, None, p, "sign test", "all differences are equal", ranks, 0.5**n, n, wins)
    spread = interval(differences)
    p = float(stats.ttest_rel(ours, theirs, alternative="less").pvalue)
    least = f"an exact rank test cannot go below p = {0.5**n:.3g} at n = {n}"
    below = sum(d < 0 for d in differences)
    return PairedTest(mean, spread.low, spread.high, p, "paired t", least, ranks, 0.5**n, n, below)


def paired_spans_test(candidate: Sequence[Span], baseline: Sequence[Span]) -> PairedTest:
    """Is `candidate` below `baseline`, where some of the values are only bounds? The i-th spans of both share a seed.

    Without bounds this is `paired_test`. With them it is the exact one-sided sign test, in which a pair counts as won
    only if it is won wherever in their spans the values lie, and every other pair as lost: the p-value is then never
    smaller than the one that the true values would give. (A t test on the bounds has no such guarantee: a bound hides
    spread.) `difference` is the mean of the pairs' smallest certain advantage, high of ours less low of theirs; it has no
    interval. Raises TooFewSeeds below two pairs, StatisticsError for unequal lengths.
    """
    from scipy import stats

    if all(span.exact for span in (*candidate, *baseline)):
        return paired_test([span.high for span in candidate], [span.high for span in baseline])
    if len(candidate) != len(baseline):
        raise StatisticsError(f"{len(candidate)} spans against {len(baseline)}: a paired test needs one of each per seed")
    n = len(candidate)
    if n < 2:
        raise TooFewSeeds("n = 1: no test possible; run at least two seeds of both (three to five to be believed)")
    wins = sum(ours.high < theirs.low for ours, theirs in zip(candidate, baseline, strict=True))
    difference = math.fsum(ours.high - theirs.low for ours, theirs in zip(candidate, baseline, strict=True)) / n
    p = float(stats.binomtest(wins, n, 0.5, alternative="greater").pvalue)
    return PairedTest(difference, None, None, p, "sign test", "some values are only bounds", None, 0.5**n, n, wins)


def holm(p_values: Sequence[float]) -> tuple[float, ...]:
    """Holm's step-down adjusted p-values, in the order given (Holm 1979): max over j <= i of min(1, (m - j + 1) p_(j)).

    Raises StatisticsError for a value outside [0, 1].
    """
    for i, p in enumerate(p_values):
        if not 0.0 <= p <= 1.0:
            raise StatisticsError(f"p_values[{i}] = {p}: must lie in [0, 1]")
    adjusted = [0.0] * len(p_values)
    highest = 0.0
    for rank, i in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[i]))
        adjusted[i] = highest
    return tuple(adjusted)


def time_to_target(curve: Sequence[tuple[float, float]], target: float) -> float | None:
    """First time at which `curve`, points (time, loss) in order of time, is at or below `target`; None: it never is.

    Linear between the points. Raises StatisticsError for an empty curve, a value that is not finite, or times that do
    not increase.
    """
    times = _finite([t for t, _ in curve], "times")
    losses = _finite([v for _, v in curve], "losses")
    for i in range(1, len(times)):
        if times[i] <= times[i - 1]:
            raise StatisticsError(f"times[{i}] = {times[i]} does not come after times[{i - 1}] = {times[i - 1]}")
    if losses[0] <= target:
        return times[0]
    for i in range(1, len(times)):
        if losses[i] <= target:
            share = (losses[i - 1] - target) / (losses[i - 1] - losses[i])
            return times[i - 1] + share * (times[i] - times[i - 1])
    return None


def mean_curve(curves: Sequence[Sequence[tuple[float, float]]]) -> list[tuple[float, float]]:
    """Mean of several curves of points (time, value), at the first one's times that all of them cover; linear between.

    Empty where one of them is. Values that are not finite stay so at their time.
    """
    import numpy as np

    if not curves or not all(curves):
        return []
    start, end = max(curve[0][0] for curve in curves), min(curve[-1][0] for curve in curves)
    slack = 0.02 * end  # the arms' last steps overshoot the budget a little, each by its own
    times = [min(t, end) for t, _ in curves[0] if start - slack <= t <= end + slack]
    values = [np.interp(times, [t for t, _ in curve], [v for _, v in curve]) for curve in curves]
    return [(float(t), float(v)) for t, v in zip(times, np.mean(values, axis=0), strict=True)]


def verdict(
    candidate: str,
    control: str,
    test: PairedTest,
    *,
    adjusted_p: float | None = None,
    alpha: float = 0.05,
    unit: str = "nats",
) -> str:
    """One plain sentence: does `candidate` beat `control`, by how much, on how many seeds, and how sure.

    Where a sign test has too few seeds to say yes at all, the sentence does not say no either.
    """
    if test.method == "sign test" and test.smallest_wilcoxon_p >= alpha:
        wins = f"lower in {test.wins} of {test.n} seeds, which {test.n} seeds cannot prove"
        return f"{candidate} against {control}: {_by(test.difference, unit)}; {wins} (exact sign test, {p_text(test.p)})"
    p = test.p if adjusted_p is None else adjusted_p
    answer = "yes" if p < alpha else "no"
    spread = "" if test.low is None or test.high is None else f", 95 % interval {test.low:+.4f} to {test.high:+.4f}"
    label = "" if adjusted_p is None else "Holm-adjusted "
    return (
        f"{candidate} beats {control}: {answer}; {_by(test.difference, unit)}{spread} "
        f"(n = {test.n}, one-sided {test.method}, {label}{p_text(p)})"
    )


def verdict_without_test(candidate: str, control: str, difference: float, *, unit: str = "nats") -> str:
    """The sentence for one seed: the difference, and that nothing follows from it."""
    return f"{candidate} against {control}: {_by(difference, unit)}; n = 1: no test possible"


def p_text(p: float) -> str:
    """p = 0.031, or p < 0.0001."""
    return "p < 0.0001" if p < 1e-4 else f"p = {p:.2g}"


def _by(difference: float, unit: str) -> str:
    if difference == 0:
        return "no difference"
    return f"{abs(difference):.4f} {unit} {'lower' if difference < 0 else 'higher'}"


def _wilcoxon(differences: Sequence[float]) -> float:
    """One-sided signed-rank p, zeros dropped. Ties void the exact tables: all signs (normal form from 14 on)."""
    from scipy import stats

    kept = [d for d in differences if d]
    if len({abs(d) for d in kept}) == len(kept):
        return float(stats.wilcoxon(kept, alternative="less", method="exact").pvalue)
    if len(kept) > 13:
        return float(stats.wilcoxon(kept, alternative="less", method="asymptotic").pvalue)
    every_sign = stats.PermutationMethod(n_resamples=2**14)
    return float(stats.wilcoxon(kept, alternative="less", method=every_sign).pvalue)


def _finite(values: Sequence[float], name: str) -> list[float]:
    numbers = [float(x) for x in values]
    if not numbers:
        raise StatisticsError(f"{name} is empty: nothing to summarise")
    for i, x in enumerate(numbers):
        if not math.isfinite(x):
            raise StatisticsError(f"{name}[{i}] = {x}: leave the run out by name, or find out why it diverged")
    return numbers
