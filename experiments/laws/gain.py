"""How what a gate wins moves with scale: its gain at equal reference seconds over size and over tokens a parameter.

A pair is two runs of one size, budget and seed, one gated, one dense. Its gain is the dense loss minus the gated one, in
nats per token at equal seconds, the filter's cost included. The gains are a plane over log size and log tokens a parameter.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from experiments.laws.form import Law
from experiments.laws.points import LawError, Point
from experiments.laws.resampling import DRAWS, LEVEL, Interval, drawn

SAME_SECONDS = 0.02


@dataclass(frozen=True)
class Pair:
    parameters: int
    tokens_each: float
    """tokens of the dense run a parameter"""
    seed: int
    gain_nats: float
    time_ratio: float | None
    """Tokens of the dense run over those at which the dense law of that size has the gated run's loss: below 1 the gate is
    the quicker. 0 where dense training of that size never gets there; None without a law."""


@dataclass(frozen=True)
class GainLaw:
    """gain = at_middle + by_size log2(N / N0) + by_tokens log2((D/N) / (D/N)0), nats; zeros: the middle of the runs."""

    at_middle: Interval
    by_size: Interval
    """nats for each doubling of the parameters"""
    by_tokens: Interval
    """nats for each doubling of the tokens a parameter"""
    middle: tuple[float, float]
    """parameters, tokens a parameter"""
    pairs: tuple[Pair, ...]
    left_out: tuple[str, ...]

    def gain(self, parameters: float, tokens_each: float) -> float:
        """Nats per token."""
        x, y = math.log2(parameters / self.middle[0]), math.log2(tokens_each / self.middle[1])
        return self.at_middle.value + self.by_size.value * x + self.by_tokens.value * y

    def zero_at(self, tokens_each: float) -> float | None:
        """Parameters at which the gain crosses zero at so many tokens a parameter; None where it never does. Far outside
        the runs this is a plane's word and no measurement."""
        if self.by_size.value == 0:
            return None
        exponent = -self.gain(self.middle[0], tokens_each) / self.by_size.value
        return self.middle[0] * 2**exponent if abs(exponent) < 200 else None

    @property
    def verdict(self) -> str:
        """In words: does the gain grow, hold or fall with size?"""
        low, high = self.by_size.low, self.by_size.high
        moves = "grows" if low > 0 else "falls" if high < 0 else "neither grows nor falls for certain"
        here = "wins" if self.at_middle.low > 0 else "loses" if self.at_middle.high < 0 else "neither wins nor loses"
        return f"in the middle of the runs the gate {here}; its gain {moves} with the parameters"


def pairs(dense: Sequence[Point], gated: Sequence[Point], law: Law | None = None) -> tuple[list[Pair], list[str]]:
    """The pairs, and what found no partner. `law`: of the dense arm, in the same parameters, for the time ratio."""
    by_place = {(p.parameters, p.budget, p.seed): p for p in dense}
    found, left_out = [], []
    for run in gated:
        partner = by_place.get((run.parameters, run.budget, run.seed))
        if partner is None:
            left_out.append(f"{run.folder}: no dense run of its size, budget {run.budget} and seed {run.seed}")
            continue
        ratio = None
        if law is not None:
            had, needed = (law.tokens_for(run.parameters, loss) for loss in (partner.loss_nats, run.loss_nats))
            ratio = had / needed if math.isfinite(had) else None  # both by the law, so that its own error falls out
        each = partner.tokens / partner.parameters
        found.append(Pair(run.parameters, each, run.seed, partner.loss_nats - run.loss_nats, ratio))
    return found, left_out


def gain_law(
    dense: Sequence[Point], gated: Sequence[Point], law: Law | None = None, draws: int = DRAWS, level: float = LEVEL
) -> GainLaw:
    """Fit the plane, with intervals by drawing pairs within each size.

    Raises LawError for fewer than five pairs, or fewer than two sizes or two numbers of tokens a parameter.
    """
    found, left_out = pairs(dense, gated, law)
    sizes = np.array([p.parameters for p in found], dtype=np.float64)
    each = np.array([p.tokens_each for p in found])
    gain = np.array([p.gain_nats for p in found])
    if len(found) < 5 or len(np.unique(sizes)) < 2 or len(np.unique(each.round(6))) < 2:
        why = f" Without a partner: {'; '.join(left_out[:3])}" if left_out else ""
        raise LawError(
            f"{len(found)} pairs of {len(np.unique(sizes))} sizes: a law of the gain needs at least 5 pairs of 2 sizes and "
            f"2 numbers of tokens a parameter.{why}"
        )
    middle = math.exp(np.log(sizes).mean()), math.exp(np.log(each).mean())
    design = np.stack([np.ones_like(sizes), np.log2(sizes / middle[0]), np.log2(each / middle[1])], axis=-1)
    if np.linalg.matrix_rank(design) < 3:
        raise LawError("size and tokens a parameter move together in these pairs: no plane tells them apart; add budgets")
    value = np.linalg.lstsq(design, gain, rcond=None)[0]
    others = []
    for index in drawn(sizes, draws, 0):
        if np.linalg.matrix_rank(design[index]) == 3:
            others.append(np.linalg.lstsq(design[index], gain[index], rcond=None)[0])
    spread = math.sqrt(len(found) / max(1, len(found) - 3))
    low, high = np.quantile(value + spread * (np.array(others) - value), [(1 - level) / 2, (1 + level) / 2], axis=0)
    parts = [Interval(float(v), float(a), float(b), level) for v, a, b in zip(value, low, high, strict=True)]
    return GainLaw(parts[0], parts[1], parts[2], middle, tuple(found), tuple(left_out))
