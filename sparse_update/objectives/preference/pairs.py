"""Pairs of answers of which one is preferred, and annotators that prefer: simulated ones, with a flaw that is stated."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from sparse_update.objectives.preference.errors import PreferenceError


@dataclass(frozen=True, eq=False)
class Pair:
    """Two answers to a prompt, as tokens, int64; closing tokens included."""

    prompt: np.ndarray
    chosen: np.ndarray
    rejected: np.ndarray

    @property
    def rows(self) -> tuple[np.ndarray, np.ndarray]:
        """Prompt with the chosen answer, prompt with the rejected one."""
        return np.concatenate((self.prompt, self.chosen)), np.concatenate((self.prompt, self.rejected))


@dataclass(frozen=True)
class Annotator:
    """Prefers an answer with Bradley and Terry's probability, sigmoid of the difference of two utilities.

    Utility of an answer: `quality_weight` times the quality that the annotator sees, plus `length_weight` for each token.
    Raises PreferenceError at construction for weights that are no numbers or all 0.
    """

    quality_weight: float = 4.0
    length_weight: float = 0.0
    """Above 0: likes long answers, whether they are better or not."""
    longest: int = 0
    """Tokens beyond which length is no more liked; 0 for no limit."""

    def __post_init__(self) -> None:
        weights = (self.quality_weight, self.length_weight)
        if not all(np.isfinite(weights)) or not any(weights) or self.longest < 0:
            raise PreferenceError(
                f"annotator with quality_weight = {weights[0]}, length_weight = {weights[1]}, longest = {self.longest}: "
                "finite weights, not both 0, and a length of at least 0"
            )

    def utility(self, quality: np.ndarray, tokens: np.ndarray) -> np.ndarray:
        """Utilities, float64, of answers with these qualities and lengths in tokens (same shape)."""
        length = np.minimum(tokens, self.longest) if self.longest else tokens
        return self.quality_weight * np.asarray(quality, dtype=np.float64) + self.length_weight * length

    def prefers(self, first: np.ndarray, second: np.ndarray, generator: np.random.Generator) -> np.ndarray:
        """bool: whether the first of two is preferred, by their utilities; one uniform number each."""
        probability = 0.5 * (1 + np.tanh(0.5 * (np.asarray(first) - np.asarray(second))))  # the sigmoid, without overflow
        return generator.random(probability.shape) < probability


def sampled_pairs(
    prompts: Sequence[np.ndarray],
    answers: Sequence[Sequence[np.ndarray]],
    quality: Sequence[Sequence[float]],
    annotator: Annotator,
    seed: int,
) -> list[Pair]:
    """Pairs out of several answers to each prompt: neighbours of a random order, judged by the annotator.

    Two equal answers make no pair. An even number of answers gives half as many pairs, at most.

    Args:
        answers: for each prompt, rows of tokens.
        quality: for each answer, what the annotator sees of it.

    Raises PreferenceError for lists of different lengths, and where no two answers differ.
    """
    if not len(prompts) == len(answers) == len(quality) or any(
        len(a) != len(q) for a, q in zip(answers, quality, strict=False)
    ):
        raise PreferenceError("prompts, answers and qualities do not belong together: one list of each a prompt is needed")
    generator = np.random.default_rng(seed)
    found: list[Pair] = []
    for prompt, rows, seen in zip(prompts, answers, quality, strict=True):
        utility = annotator.utility(np.asarray(seen), np.array([len(row) for row in rows]))
        order = generator.permutation(len(rows))
        for first, second in zip(order[::2], order[1::2], strict=False):
            wins = bool(annotator.prefers(utility[first], utility[second], generator))
            if np.array_equal(rows[first], rows[second]):
                continue
            chosen, rejected = (first, second) if wins else (second, first)
            found.append(Pair(prompt, rows[chosen], rows[rejected]))
    if not found:
        raise PreferenceError(
            f"{len(prompts)} prompts gave no pair: no two answers differ; sample more of them, at a higher temperature"
        )
    return found
