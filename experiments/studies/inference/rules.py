"""Rules that turn a question's outputs into an answer, each with its score and counted FLOPs.

A family of rules has one dial (outputs, or how sure a vote must be); a rule is a family at a setting. The dial is chosen on
development questions and read on held-out ones.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import numpy as np

from experiments.studies.inference.answers import Answered
from sparse_update.generation.choosing import best, flops, majority, search, vote
from sparse_update.transformer import ModelConfig

SURE = (0.75, 0.9, 0.97)
"""Of votes that may stop."""
SHARES = (0.25, 0.5, 0.75)
"""Questions whose likeliest answer is kept, those that surprise least."""


@dataclass(frozen=True, eq=False)
class Outcome:
    """Of every question: the score of the answer that was taken, counted FLOPs, and outputs that were made."""

    score_Q: np.ndarray
    flops_Q: np.ndarray
    outputs_Q: np.ndarray


Rule = Callable[[ModelConfig, Answered], Outcome]


def greedy(cfg: ModelConfig, asked: Answered) -> Outcome:
    """The likeliest output."""
    cost = [flops(cfg, int(p), [int(n)], 1) for p, n in zip(asked.prompt_Q, asked.greedy_length_Q, strict=True)]
    return Outcome(asked.greedy_Q, np.array(cost), np.ones(len(asked)))


def voted(n: int, sure: float, cfg: ModelConfig, asked: Answered) -> Outcome:
    """The majority of n outputs, or of as many as it takes to be sure."""
    score, cost, used = [], [], []
    for q in range(len(asked)):
        found = vote(asked.text_QN[q][:n], sure, min(2, n))
        score.append(asked.score_QN[q, found.output])
        cost.append(flops(cfg, int(asked.prompt_Q[q]), asked.length_QN[q].tolist(), found.used))
        used.append(found.used)
    return Outcome(np.array(score), np.array(cost), np.array(used))


def likeliest(n: int, cfg: ModelConfig, asked: Answered) -> Outcome:
    """Of n samples the one that the model itself gives most probability: a score that needs no judge."""
    taken = [best(asked.logp_QN[q, :n].tolist()) for q in range(len(asked))]
    score = [asked.score_QN[q, number] for q, number in enumerate(taken)]
    lengths = asked.length_QN.tolist()
    cost = [flops(cfg, int(asked.prompt_Q[q]), lengths[q], n) for q in range(len(asked))]
    return Outcome(np.array(score), np.array(cost), np.full(len(asked), n))


def verified(n: int, cfg: ModelConfig, asked: Answered) -> Outcome:
    """The likeliest output, then samples, until the verifier accepts one; n outputs at most."""
    score, cost, used = [], [], []
    for q in range(len(asked)):
        found = search([asked.greedy_Q[q], *asked.score_QN[q, : n - 1]])
        score.append([asked.greedy_Q[q], *asked.score_QN[q]][found.output])
        lengths = asked.length_QN[q].tolist()
        cost.append(flops(cfg, int(asked.prompt_Q[q]), lengths, found.used - 1, greedy=int(asked.greedy_length_Q[q])))
        used.append(found.used)
    return Outcome(np.array(score), np.array(cost), np.array(used))


def surprised(n: int, limit_nats: float, cfg: ModelConfig, asked: Answered) -> Outcome:
    """The likeliest output where it surprises the model by at most so much, else the vote of it and n samples."""
    score, cost, used = [], [], []
    for q in range(len(asked)):
        few = 0 if asked.surprise_Q[q] <= limit_nats else n
        texts = [asked.greedy_text[q], *asked.text_QN[q][:few]]
        score.append([asked.greedy_Q[q], *asked.score_QN[q, :few]][majority(texts)])
        lengths = asked.length_QN[q].tolist()
        cost.append(flops(cfg, int(asked.prompt_Q[q]), lengths, few, greedy=int(asked.greedy_length_Q[q])))
        used.append(few + 1)
    return Outcome(np.array(score), np.array(cost), np.array(used))


def rules(most: int, development: Answered) -> Mapping[str, Mapping[str, Rule]]:
    """Families of rules by name, each rule by its setting. Limits of surprise are shares of the development questions."""
    counts = [2**power for power in range(1, 12) if 2**power <= most]
    limits = {share: float(np.quantile(development.surprise_Q, share)) for share in SHARES}
    return {
        "greedy": {"": greedy},
        "majority": {f"n={n}": partial(voted, n, 1.0) for n in counts},
        "vote that stops": {f"n<={n}, sure {sure}": partial(voted, n, sure) for n in counts[1:] for sure in SURE},
        "by surprise": {
            f"n={n}, greedy for {share:.0%}": partial(surprised, n, limit)
            for n in counts
            for share, limit in limits.items()
        },
        "likeliest": {f"n={n}": partial(likeliest, n) for n in counts},
        "verifier": {f"n<={n}": partial(verified, n) for n in [1, *counts]},
    }
