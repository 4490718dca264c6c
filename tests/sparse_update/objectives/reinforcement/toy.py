"""A softmax policy small enough to sum over all of its outputs: the expectation of an estimator, exactly.

Tokens are 0, 1 and the end, 2; an output ends with it or after three tokens. Each prefix has logits of its own.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

END, LONGEST, VOCABULARY = 2, 3, 3


def outputs() -> list[tuple[int, ...]]:
    """Every output."""
    found = []
    for length in range(1, LONGEST + 1):
        for tokens in itertools.product(range(VOCABULARY), repeat=length):
            ended = tokens[-1] == END or length == LONGEST
            if ended and END not in tokens[:-1]:
                found.append(tokens)
    return found


OUTPUTS = outputs()
PREFIXES = sorted({output[:place] for output in OUTPUTS for place in range(len(output))})
MASK = torch.tensor([[place < len(output) for place in range(LONGEST)] for output in OUTPUTS])


def logits(seed: int, scale: float = 1.0) -> Tensor:
    """float64 (prefixes, vocabulary) with a graph."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(len(PREFIXES), VOCABULARY, generator=generator, dtype=torch.float64)
    return (scale * drawn).requires_grad_()


def log_probabilities(logits_SV: Tensor) -> Tensor:
    """Of every token of every output, (outputs, LONGEST); 0 behind an output's end."""
    logp_SV = torch.log_softmax(logits_SV, dim=-1)
    rows = []
    for output in OUTPUTS:
        tokens = [logp_SV[PREFIXES.index(output[:place]), token] for place, token in enumerate(output)]
        rows.append(torch.stack(tokens + [torch.zeros((), dtype=torch.float64)] * (LONGEST - len(tokens))))
    return torch.stack(rows)


def rewards(seed: int) -> Tensor:
    """float64 (outputs,): 0 or 1."""
    generator = torch.Generator().manual_seed(100 + seed)
    return (torch.rand(len(OUTPUTS), generator=generator) < 0.4).double()
