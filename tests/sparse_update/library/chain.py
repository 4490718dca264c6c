"""A chain of layers under a gate, and its gradient by hand.

A gate that keeps the half of each sequence with the highest losses has, on a chain, the gradient of the mean cross-entropy
over these tokens: nothing of the package is needed to form it.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from sparse_update import attach

V, B, T, D = 11, 4, 6, 8
HALF = {"backward": {"unit": "token", "keep_fraction": 0.5, "policy": "top"}}
STRIPS = {"weights": {"kind": "blocks", "active_fraction": 0.5, "block_rows": 4}}


def make(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Embedding(V, D), nn.Linear(D, 16), nn.ReLU(), nn.Linear(16, V))


def data(batch=B, length=T, seed=1):
    x = torch.randint(0, V, (batch, length), generator=torch.Generator().manual_seed(seed))
    return x, (x * 3 + 1) % V


def by_hand(x, y, seed=0, model=None):
    """Gradients of the mean loss of the upper half of each sequence's tokens."""
    model = make(seed) if model is None else model
    losses = F.cross_entropy(model(x).flatten(0, 1), y.flatten(), reduction="none").view(y.shape)
    losses.topk(max(1, round(y.shape[1] / 2)), 1).values.mean().backward()
    return grads(model)


def grads(model):
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def same(found, expected, tolerance=1e-6):
    assert found.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=tolerance, atol=tolerance)


def gated(seed=0, config=HALF):
    model = make(seed)
    return model, attach(model, config)


def plus(a, b):
    return {n: a[n] + b[n] for n in a}
