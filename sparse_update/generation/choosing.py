"""Which of several outputs is the answer, and how many outputs a question gets: more compute at inference.

Votes: the answer that most outputs give (self-consistency; Wang et al. 2022, arXiv 2203.11171). A vote may stop as soon as
its leader is unlikely to be overtaken, so that questions on which the outputs agree cost little and uncertain ones get more
(adaptive consistency; Aggarwal et al. 2023, arXiv 2305.11860). Scores: the best output by a verifier or a reward model,
with the first good enough one ending the search. A question whose likeliest answer does not surprise the model may keep it.

Everything here is a function of what was sampled, in the order of the samples; nothing is drawn.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from sparse_update.generation.counting import needed_flops
from sparse_update.generation.settings import GenerationError
from sparse_update.transformer import ModelConfig


@dataclass(frozen=True)
class Chosen:
    """What came of the outputs of one question."""

    output: int
    """Number of the output whose answer is taken."""
    used: int
    """Outputs that were looked at: the first so many."""


def majority(answers: Sequence[str]) -> int:
    """Number of the first output that gives the most frequent answer; among equals the answer that came first.

    Raises GenerationError for no answer.
    """
    if not answers:
        raise GenerationError("a vote of no outputs: at least one is needed")
    counts = Counter(answers)
    return max(range(len(answers)), key=lambda number: (counts[answers[number]], -number))


def best(scores: Sequence[float]) -> int:
    """Number of the first output with the highest score. Raises GenerationError for none, and for NaN."""
    if not scores or any(math.isnan(score) for score in scores):
        raise GenerationError(f"scores of {len(scores)} outputs, NaN among them or none at all: there is no best one")
    return max(range(len(scores)), key=lambda number: (scores[number], -number))


def lead_is_safe(first: int, second: int) -> float:
    """Probability that the leading answer is likelier than the next one, given how often each was seen.

    With a uniform prior on the leader's share p of the two, p is Beta(first + 1, second + 1), and P(p > 1/2) is the
    probability of at most `first` heads of first + second + 1 fair coins (the binomial form of the incomplete beta
    function at whole numbers; Abramowitz and Stegun, 26.5.24).
    """
    tosses = first + second + 1
    return sum(math.comb(tosses, heads) for heads in range(first + 1)) / 2**tosses


def is_sure(answers: Sequence[str], sure: float) -> bool:
    """Whether the leading answer is likelier than the next one with that probability (`lead_is_safe`); never at 1."""
    counts = sorted(Counter(answers).values(), reverse=True)
    return lead_is_safe(counts[0], counts[1] if len(counts) > 1 else 0) >= sure


def vote(answers: Sequence[str], sure: float = 1.0, least: int = 1) -> Chosen:
    """The majority of the first outputs, as many as it takes.

    Args:
        answers: of one question, in the order of the samples.
        sure: the vote ends when `lead_is_safe` reaches this; 1 looks at all of them.
        least: outputs that are looked at in any case.

    Raises GenerationError for no answer.
    """
    for used in range(least, len(answers)):
        if is_sure(answers[:used], sure):
            return Chosen(majority(answers[:used]), used)
    return Chosen(majority(answers), len(answers))


def search(scores: Sequence[float], enough: float = 1.0) -> Chosen:
    """The first output that scores `enough`, and the best one where none does. Raises GenerationError as `best`."""
    for number, score in enumerate(scores):
        if score >= enough:
            return Chosen(number, number + 1)
    return Chosen(best(scores), len(scores))


def flops(cfg: ModelConfig, prompt: int, lengths: Sequence[int], used: int, greedy: int | None = None) -> int:
    """Needed FLOPs of the outputs that were looked at, the prompt read once.

    Args:
        prompt: tokens of the question.
        lengths: tokens of each output.
        used: how many of them were looked at.
        greedy: tokens of a likeliest output that was made before, from the same reading; None where there was none.
    """
    made = [*([] if greedy is None else [greedy]), *lengths[:used]]
    return needed_flops(cfg, prompt, made)
