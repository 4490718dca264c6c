"""How good a reward model's preferences are: accuracy, and whether its probabilities are right (calibration).

Of each pair the model prefers one answer, with a confidence of sigmoid(|difference|), from 0.5 to 1. Calibrated means:
among pairs of confidence c, it agrees with the annotators in a share c. The expected calibration error (Guo et al. 2017) is
the mean gap over bins of confidence, weighed by their pairs. Bins of finite size show a gap even for a perfect model, so
`floor` says what a model that is right about its own probabilities would show at this size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np
from torch import Tensor

from sparse_update.objectives.preference.errors import PreferenceError
from sparse_update.objectives.preference.pairs import Pair
from sparse_update.objectives.preference.reward import RewardModel

RESAMPLES = 1000


@dataclass(frozen=True)
class Bin:
    """Pairs of like confidence."""

    pairs: int
    confidence: float
    accuracy: float


@dataclass(frozen=True)
class Calibration:
    """Accuracy and expected calibration error, each with a 95 % interval over resampled pairs."""

    pairs: int
    accuracy: float
    accuracy_interval: tuple[float, float]
    error: float
    error_interval: tuple[float, float]
    floor: float
    """Mean error of a model whose probabilities are right, at this number of pairs and these confidences"""
    bins: tuple[Bin, ...]


def log_odds(model: RewardModel, pairs: Sequence[Pair]) -> np.ndarray:
    """The model's log-odds that the chosen answer is preferred, float64 (pairs,)."""
    scores = model.score([row for pair in pairs for row in pair.rows]) * float(cast(Tensor, model.scale))
    return scores[::2] - scores[1::2]


def calibration(odds: np.ndarray, bins: int = 10, seed: int = 0) -> Calibration:
    """Accuracy and calibration from log-odds of the answers that were chosen (`log_odds`).

    Bins hold equally many pairs. Log-odds of exactly 0 count as half right.

    Raises PreferenceError for fewer pairs than bins, or log-odds that are not finite.
    """
    odds = np.asarray(odds, dtype=np.float64)
    if odds.ndim != 1 or bins < 1 or len(odds) < bins or not np.isfinite(odds).all():
        raise PreferenceError(f"{odds.size} log-odds for {bins} bins: finite numbers, at least one a bin, are needed")
    confidence = 1 / (1 + np.exp(-np.abs(odds)))
    right = np.where(odds == 0, 0.5, odds > 0)
    order = np.argsort(confidence, kind="stable")
    confidence, right = confidence[order], right[order]
    generator = np.random.default_rng(seed)
    accuracies, errors, floors = [], [], []
    for _ in range(RESAMPLES):
        drawn = np.sort(generator.integers(0, len(odds), len(odds)))
        accuracies.append(right[drawn].mean())
        errors.append(_error(confidence[drawn], right[drawn], bins))
        floors.append(_error(confidence, generator.random(len(odds)) < confidence, bins))
    low, high = 2.5, 97.5
    return Calibration(
        len(odds),
        float(right.mean()),
        (float(np.percentile(accuracies, low)), float(np.percentile(accuracies, high))),
        _error(confidence, right, bins),
        (float(np.percentile(errors, low)), float(np.percentile(errors, high))),
        float(np.mean(floors)),
        tuple(
            Bin(len(part), float(confidence[part].mean()), float(right[part].mean()))
            for part in np.array_split(np.arange(len(odds)), bins)
        ),
    )


def _error(confidence: np.ndarray, right: np.ndarray, bins: int) -> float:
    """Expected calibration error of pairs in ascending order of confidence."""
    gap = np.cumsum(np.concatenate(([0.0], right - confidence)))
    edges = [0, *np.cumsum([len(part) for part in np.array_split(np.empty(len(right)), bins)])]
    return float(np.abs(np.diff(gap[edges])).sum() / len(right))
