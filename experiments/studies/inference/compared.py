"""A small size with a rule beside a larger size's likeliest answer, at no more counted FLOPs.

Shape letters: S seeds, Q questions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from experiments.studies.inference.rules import Outcome

DRAWS = 4000
Table = Mapping[str, Mapping[str, Sequence[Outcome]]]
"""Family of rules -> setting -> an outcome for each seed."""


@dataclass(frozen=True)
class Point:
    """Means over seeds and questions."""

    family: str
    setting: str
    accuracy: float
    flops: float
    outputs: float


def points(table: Table) -> list[Point]:
    """Every rule."""

    def mean(found: Sequence[Outcome], name: str) -> float:
        return float(np.mean([getattr(one, name) for one in found]))

    return [
        Point(family, setting, mean(found, "score_Q"), mean(found, "flops_Q"), mean(found, "outputs_Q"))
        for family, settings in table.items()
        for setting, found in settings.items()
    ]


def chosen(development: Table, family: str, at_most: float) -> str | None:
    """The setting of a family that is best on development questions within a mean cost; of equals the cheaper one. None
    where none is cheap enough."""
    found = [point for point in points(development) if point.family == family and point.flops <= at_most]
    return max(found, key=lambda point: (point.accuracy, -point.flops)).setting if found else None


def difference(ours: Sequence[Outcome], theirs: Sequence[Outcome], seed: int = 0) -> tuple[float, float, float]:
    """Mean difference of scores with its 95 % interval: a bootstrap over seeds, of both sides apart, and over questions,
    which both were asked alike."""
    ours_SQ, theirs_SQ = (np.stack([one.score_Q for one in side]) for side in (ours, theirs))
    rng = np.random.default_rng(seed)
    questions = ours_SQ.shape[1]
    drawn = []
    for _ in range(DRAWS):
        often_Q = np.bincount(rng.integers(0, questions, questions), minlength=questions) / questions
        means = (_share(rng, len(side)) @ (side @ often_Q) for side in (ours_SQ, theirs_SQ))
        drawn.append(next(means) - next(means))
    low, high = np.quantile(drawn, (0.025, 0.975))
    return float(ours_SQ.mean() - theirs_SQ.mean()), float(low), float(high)


def _share(rng: np.random.Generator, count: int) -> np.ndarray:
    """How often each of so many is drawn, with putting back, over their number."""
    return np.bincount(rng.integers(0, count, count), minlength=count) / count


def verdicts(small: tuple[Table, Table], large: tuple[Table, Table], names: tuple[str, str]) -> list[dict[str, Any]]:
    """For each family of rules: what the small size reaches at no more FLOPs than the large one's likeliest answer.

    Args:
        small, large: development and held-out tables.
    """
    base = {point.family: point for point in points(large[1])}["greedy"]
    limit = {point.family: point for point in points(large[0])}["greedy"].flops
    found: list[dict[str, Any]] = []
    for family in small[0]:
        setting = chosen(small[0], family, limit)
        if setting is None:
            found.append({"small": names[0], "large": names[1], "family": family, "setting": None})
            continue
        outcome = small[1][family][setting]
        mine = next(point for point in points(small[1]) if (point.family, point.setting) == (family, setting))
        mean, low, high = difference(outcome, large[1]["greedy"][""])
        found.append(
            {
                "small": names[0], "large": names[1], "family": family, "setting": setting, "point": asdict(mine),
                "against": asdict(base), "difference": mean, "low": low, "high": high,
                "flops_ratio": mine.flops / base.flops, "reached": bool(mean >= 0 and mine.flops <= base.flops),
                "beaten": bool(low > 0 and mine.flops <= base.flops),
            }
        )  # fmt: skip
    return found
