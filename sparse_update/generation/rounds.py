"""Votes that sample as they go: uncertain questions get more outputs, in rounds.

Shape letters: P prompts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from sparse_update.generation.choosing import is_sure, majority
from sparse_update.generation.sampler import Sampler
from sparse_update.generation.settings import GenerationError


@dataclass(frozen=True, eq=False)
class Voted:
    """Answers of prompts."""

    answers: list[str]
    """the winner of each vote"""
    shares: np.ndarray
    """float64 (P,): share of its outputs that gave the answer"""
    outputs_P: np.ndarray
    """int64: outputs that were sampled"""
    flops: int
    """of all rounds; a prompt is read once in each round that it takes part in"""


def vote_in_rounds(
    sampler: Sampler,
    prompts: Sequence[np.ndarray],
    text: Callable[[np.ndarray], str],
    *,
    ids: Sequence[int] | None = None,
    first: int = 4,
    most: int = 32,
    sure: float = 0.95,
) -> Voted:
    """Sample `first` outputs of every prompt, then as many again of those whose vote is not sure, up to `most`.

    The samples are those that `most` outputs at once would have, so a round more or less changes no sample.

    Args:
        sampler: its `cfg.n` is not used; its temperature is above 0.
        text: an output's tokens -> the answer that is voted on.
        sure: as in `choosing.vote`; 1 samples `most` of all.

    Raises GenerationError for fewer than two outputs or less than `first` at most, and as `Sampler.sample`.
    """
    if not 2 <= first <= most:
        raise GenerationError(f"rounds of first = {first} outputs, most = {most}: at least 2 first, and no more than most")
    if sampler.cfg.temperature == 0:
        raise GenerationError("a vote at temperature 0: all outputs would be the same; set a temperature above 0")
    found: list[list[str]] = [[] for _ in prompts]
    open_now, done, flops, cfg = list(range(len(prompts))), 0, 0, sampler.cfg
    count = first
    try:
        while open_now and done < most:
            sampler.cfg = replace(cfg, n=count)
            outputs = sampler.sample(
                [prompts[p] for p in open_now], None if ids is None else [ids[p] for p in open_now], first=done
            )
            flops += outputs.flops
            for row, tokens in enumerate(outputs):
                found[open_now[row // count]].append(text(tokens))
            done += count
            count = min(done, most - done)
            open_now = [p for p in open_now if not is_sure(found[p], sure)]
    finally:
        sampler.cfg = cfg
    winners = [answers[majority(answers)] for answers in found]
    shares = [answers.count(winner) / len(answers) for answers, winner in zip(found, winners, strict=True)]
    return Voted(winners, np.array(shares), np.array([len(answers) for answers in found]), flops)
