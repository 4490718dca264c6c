"""The best size for a budget, three ways (Hoffmann et al. 2022, arXiv 2203.15556): from the envelope of the losses, from
parabolas at equal FLOPs, and from the law of the loss. Each gives N_opt = factor C^exponent with C in counted FLOPs.

The first way reads the end points of runs, never a training curve on its way: a run whose learning rate has not come down
yet is worse than one that was planned to end there, which biases the way (the same paper, and Porian et al. 2024, arXiv
2406.19146).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.interpolate import PchipInterpolator

from experiments.laws.form import Law
from experiments.laws.points import LawError

SAME_FLOPS = 0.05
"""Runs whose counted FLOPs differ by no more than this share had an equal budget."""
GRID = 64
"""Budgets at which the envelope is read."""
WAYS = ("envelope", "parabolas", "law")


@dataclass(frozen=True)
class BestSize:
    """N_opt = factor FLOPs^exponent, and the (FLOPs, parameters) that it was read from."""

    way: str
    exponent: float
    factor: float
    read_at: tuple[tuple[float, float], ...]
    left_out: tuple[str, ...] = ()

    def at(self, flops: float) -> float:
        return float(self.factor * flops**self.exponent)


def envelope(parameters_P: np.ndarray, flops_P: np.ndarray, loss_P: np.ndarray) -> BestSize:
    """For each size the loss over FLOPs, between its runs; at each budget the size of the least loss.

    Raises LawError where fewer than three sizes have two budgets or more, or the best size never changes.
    """
    n, c, loss = (np.asarray(v, dtype=np.float64) for v in (parameters_P, flops_P, loss_P))
    curves = {}
    for size in np.unique(n):
        mine = n == size
        budgets, where = np.unique(np.log(c[mine]), return_inverse=True)
        if len(budgets) >= 2:
            mean = np.bincount(where, np.log(loss[mine])) / np.bincount(where)
            curves[float(size)] = budgets, PchipInterpolator(budgets, mean, extrapolate=False)
    if len(curves) < 3:
        raise LawError(f"the envelope: {len(curves)} sizes have runs at two budgets or more; at least 3 are needed")
    low, high = min(b[0] for b, _ in curves.values()), max(b[-1] for b, _ in curves.values())
    at = np.linspace(low, high, GRID)
    sizes = np.array(list(curves))
    values = np.stack([np.nan_to_num(curve(at), nan=np.inf) for _, curve in curves.values()])
    several = np.isfinite(values).sum(0) >= 2  # one size alone is no choice
    best = sizes[values.argmin(0)]
    inside = several & ~_at_an_edge(values, several)
    if len(np.unique(best[inside])) < 2:
        raise LawError(
            "the envelope: within the budgets that several sizes share, no two different sizes are best with smaller and "
            "larger ones beside them; add sizes or budgets"
        )
    return _line("envelope", at[inside], np.log(best[inside]))


def _at_an_edge(values_SG: np.ndarray, several_G: np.ndarray) -> np.ndarray:
    """Whether the best size is the smallest or largest one that reaches a budget: the true best may lie beyond it."""
    edge = np.zeros(values_SG.shape[1], dtype=bool)
    for column in np.flatnonzero(several_G):
        there = np.flatnonzero(np.isfinite(values_SG[:, column]))
        edge[column] = values_SG[:, column].argmin() in (there[0], there[-1])
    return edge


def parabolas(parameters_P: np.ndarray, flops_P: np.ndarray, loss_P: np.ndarray, same: float = SAME_FLOPS) -> BestSize:
    """At each budget of equal FLOPs a parabola of the loss over log size, and its lowest point.

    Raises LawError where fewer than two budgets have three sizes with a lowest point between them.
    """
    n, c, loss = (np.asarray(v, dtype=np.float64) for v in (parameters_P, flops_P, loss_P))
    found, left_out = [], []
    for group in _equal(c, same):
        budget, sizes = float(np.exp(np.log(c[group]).mean())), np.log(n[group])
        name = f"{budget:.3g} FLOPs"
        if len(np.unique(sizes)) < 3:
            left_out.append(f"{name}: {len(np.unique(sizes))} sizes")
            continue
        middle = sizes.mean()
        square, slope, _ = np.polyfit(sizes - middle, loss[group], 2)
        lowest = middle - slope / (2 * square) if square > 0 else np.nan
        if not sizes.min() <= lowest <= sizes.max():
            left_out.append(f"{name}: the lowest point lies beyond the sizes that were run")
            continue
        found.append((np.log(budget), lowest))
    if len(found) < 2:
        why = f" ({'; '.join(left_out)})" if left_out else ""
        raise LawError(f"parabolas: {len(found)} budgets of equal FLOPs have a lowest point{why}; at least 2 are needed")
    budgets_G, lowest_G = np.array(found).T
    return _line("parabolas", budgets_G, lowest_G, left_out)


def _equal(c: np.ndarray, same: float) -> list[np.ndarray]:
    """Indices of runs by equal FLOPs: a group begins where a run lies more than `same` above the group's first."""
    order = np.argsort(c, kind="stable")
    groups: list[list[int]] = []
    for index in order:
        if groups and c[index] <= c[groups[-1][0]] * (1 + same):
            groups[-1].append(int(index))
        else:
            groups.append([int(index)])
    return [np.array(group) for group in groups]


def by_law(law: Law, parameters_P: np.ndarray, tokens_P: np.ndarray, flops_P: np.ndarray) -> BestSize:
    """From the law, with C = k N D where k is the runs' own median of FLOPs a parameter and token."""
    k = float(np.median(flops_P / (np.asarray(parameters_P, dtype=np.float64) * tokens_P)))
    factor = law.best_size(1.0) * k**-law.size_share
    ends = [float(np.min(flops_P)), float(np.max(flops_P))]
    return BestSize("law", law.size_share, factor, tuple((c, factor * c**law.size_share) for c in ends))


def _line(way: str, log_c: np.ndarray, log_n: np.ndarray, left_out: Sequence[str] = ()) -> BestSize:
    exponent, offset = np.polyfit(log_c, log_n, 1)
    read = tuple((float(np.exp(x)), float(np.exp(y))) for x, y in zip(log_c, log_n, strict=True))
    return BestSize(way, float(exponent), float(np.exp(offset)), read, tuple(left_out))
