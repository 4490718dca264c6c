"""What a policy can be trained by in the place of one learned reward: several, or one whose liking of length is taken out.

All share one call, `rewards(prompts, answers)`: token rows in, float64 out. `Learned` is it for a reward model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from sparse_update.objectives.preference.errors import PreferenceError, VocabularyMismatch
from sparse_update.objectives.preference.reward import RewardModel
from sparse_update.objectives.preference.settings import RULES

Rows = Sequence[np.ndarray]


class Reward(Protocol):
    """A number for each answer."""

    def rewards(self, prompts: Rows, answers: Rows) -> np.ndarray:
        """float64 (rows,): answer i is one to prompt i."""


@dataclass(frozen=True, eq=False)
class Learned:
    """A reward model's."""

    model: RewardModel

    def rewards(self, prompts: Rows, answers: Rows) -> np.ndarray:
        return self.model.score([np.concatenate(row) for row in zip(prompts, answers, strict=True)])


class Ensemble:
    """Several reward models (Coste et al. 2023, arXiv 2310.02743): their mean, or the least of them.

    Members should be calibrated over the same rows (`RewardModel.calibrate`), so that their numbers mean the same.
    Raises PreferenceError for no members or an unknown rule, VocabularyMismatch for members that read different tokens.
    """

    def __init__(self, models: Sequence[RewardModel], rule: str = "least") -> None:
        if not models or rule not in RULES:
            raise PreferenceError(
                f"an ensemble of {len(models)} by the rule {rule!r}: at least one, by {' or '.join(RULES)}"
            )
        if any(model.tokenizer != models[0].tokenizer for model in models):
            raise VocabularyMismatch("the members of the ensemble read different tokens: train all with one tokenizer")
        self.models, self.rule = list(models), rule

    def rewards(self, prompts: Rows, answers: Rows) -> np.ndarray:
        rows = [np.concatenate(row) for row in zip(prompts, answers, strict=True)]
        found = np.stack([model.score(rows) for model in self.models])
        return found.mean(0) if self.rule == "mean" else found.min(0)


@dataclass(frozen=True, eq=False)
class WithoutLength:
    """Another reward less `slope` for each token of an answer beyond `usual` tokens."""

    reward: Reward
    slope: float
    usual: float

    def rewards(self, prompts: Rows, answers: Rows) -> np.ndarray:
        length = np.array([len(answer) for answer in answers], dtype=np.float64)
        return self.reward.rewards(prompts, answers) - self.slope * (length - self.usual)

    @staticmethod
    def of(reward: Reward, prompts: Rows, answers: Rows, n: int) -> WithoutLength:
        """Measure the slope on answers of the reference: least squares of reward on length within each prompt.

        Args:
            prompts, answers: rows; answers to one prompt stand together.
            n: answers of each prompt.

        Raises PreferenceError where rows are no multiple of n, or all answers to a prompt are of one length.
        """
        if n < 2 or not len(answers) or len(answers) % n:
            raise PreferenceError(f"{len(answers)} answers, {n} a prompt: a multiple of n, and n at least 2, is needed")
        length = np.array([len(answer) for answer in answers], dtype=np.float64).reshape(-1, n)
        value = reward.rewards(prompts, answers).reshape(-1, n)
        away = length - length.mean(1, keepdims=True)
        if not (away**2).sum() > 0:
            raise PreferenceError("all answers to a prompt are of one length: there is no liking of length to measure")
        return WithoutLength(reward, float((away * value).sum() / (away**2).sum()), float(length.mean()))
