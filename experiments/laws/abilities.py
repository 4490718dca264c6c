"""Does an ability jump with size, or does only its metric? Share solved to the letter beside the likelihood of the answer.

An answer of T tokens that each come out right with the likelihood exp(-loss) is right as a whole with about exp(-T loss),
so that a share solved can jump where the loss falls evenly (Schaeffer and others 2023, arXiv 2304.15004).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
from scipy.optimize import minimize_scalar

from experiments.laws.points import LawError, Point
from experiments.runs.folder import read_json

ACCURACY = "task/accuracy"
LEAST_SIZES = 3


@dataclass(frozen=True)
class Ability:
    """One size: means over its seeds, with the standard deviation over them (nan for a single one)."""

    parameters: int
    runs: int
    solved: float
    solved_sd: float
    loss_nats: float
    loss_sd: float


@dataclass(frozen=True)
class Abilities:
    """`solved_jump`, `loss_jump`: the largest step between neighbouring sizes, as a share of the way from the smallest to
    the largest size; with even steps it is one over their number. `tokens`: T of solved = exp(-T loss), fitted; `off`: root
    mean square of what this leaves of the share solved."""

    sizes: tuple[Ability, ...]
    solved_jump: float
    solved_jump_at: tuple[int, int]
    loss_jump: float
    loss_jump_at: tuple[int, int]
    tokens: float
    off: float

    @property
    def verdict(self) -> str:
        even = 1 / (len(self.sizes) - 1)
        way = abs(self.sizes[-1].solved - self.sizes[0].solved)
        if any(one.runs > 1 and one.solved_sd > way * even for one in self.sizes):
            return "no answer: seeds of one size differ by more than an even step between sizes; add seeds"
        if self.solved_jump < 2 * even:
            return "the share solved does not jump: no step takes twice its even part of the way"
        if self.loss_jump < 2 * even:
            return "the share solved jumps where the loss of the answers does not: the metric makes the jump"
        return "both jump: this is not made by the metric alone"


def abilities(points: Sequence[Point]) -> Abilities:
    """Of runs on tasks. Raises LawError for fewer than three sizes, runs without a share solved, or one that stays."""
    by_size: dict[int, list[tuple[float, float]]] = {}
    for point in points:
        task = read_json(Path(point.folder) / "result.json").get("task") or {}
        solved = task.get(ACCURACY)
        if not isinstance(solved, int | float) or not math.isfinite(solved):
            raise LawError(f"{point.folder}: result.json has no {ACCURACY}; abilities take runs on tasks")
        by_size.setdefault(point.parameters, []).append((float(solved), point.loss_nats))
    if len(by_size) < LEAST_SIZES:
        raise LawError(f"{len(by_size)} sizes in {len(points)} runs: at least {LEAST_SIZES} are needed to speak of a jump")
    sizes = []
    for parameters, seeds in sorted(by_size.items()):
        s = np.array(seeds)
        sd = s.std(axis=0, ddof=1) if len(s) > 1 else np.full(2, math.nan)
        sizes.append(Ability(parameters, len(s), float(s[:, 0].mean()), float(sd[0]), float(s[:, 1].mean()), float(sd[1])))
    solved, loss = np.array([one.solved for one in sizes]), np.array([one.loss_nats for one in sizes])
    if solved[-1] == solved[0] or loss[-1] == loss[0]:
        raise LawError(
            "the smallest and the largest size are equally able: there is no way from one to the other to divide"
        )
    (solved_jump, i), (loss_jump, j) = _largest(solved), _largest(-loss)
    tokens = _tokens(solved, loss)
    off = float(np.sqrt(np.mean((solved - np.exp(-tokens * loss)) ** 2)))
    at = [(a.parameters, b.parameters) for a, b in pairwise(sizes)]
    return Abilities(tuple(sizes), solved_jump, at[i], loss_jump, at[j], tokens, off)


def _largest(value: np.ndarray) -> tuple[float, int]:
    steps = np.diff(value) / (value[-1] - value[0])
    return float(steps.max()), int(steps.argmax())


def _tokens(solved: np.ndarray, loss: np.ndarray) -> float:
    """T >= 0 with the least squares of solved - exp(-T loss)."""
    found = minimize_scalar(lambda t: float(np.sum((solved - np.exp(-t * loss)) ** 2)), bounds=(0, 200), method="bounded")
    return float(found.x)
