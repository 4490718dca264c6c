"""Small tasks of somebody's own, in every form that a batch may have."""

from __future__ import annotations

import torch
from torch import nn

from sparse_update.own.task import UserTask

B, T, V, D = 8, 12, 19, 16


class Recurrent(nn.Module):
    """A GRU between embedding and head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.body, self.head = nn.Embedding(V, D), nn.GRU(D, D, batch_first=True), nn.Linear(D, V)

    def forward(self, x):
        return self.head(self.body(self.embed(x))[0])


class Mixed(nn.Module):
    """A causal block of somebody's own, with dropout: random, so that generators matter."""

    def __init__(self, dropout: float = 0.1) -> None:
        super().__init__()
        self.embed, self.qkv, self.out = nn.Embedding(V, D), nn.Linear(D, 3 * D), nn.Linear(D, D)
        self.norm = nn.LayerNorm(D)
        self.up, self.down, self.head = nn.Linear(D, 2 * D), nn.Linear(2 * D, D), nn.Linear(D, V)
        self.drop = nn.Dropout(dropout)

    def forward(self, x):
        h = self.embed(x)
        q, k, v = self.qkv(h).chunk(3, -1)
        h = h + self.out(nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True))
        return self.head(h + self.down(self.drop(torch.relu(self.up(self.norm(h))))))


def mlp():
    return nn.Sequential(nn.Embedding(V, D), nn.Linear(D, 2 * D), nn.ReLU(), nn.Linear(2 * D, D), nn.Linear(D, V))


def rows(n=64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 3, (n, T + 1), generator=generator).cumsum(1) % V


def shuffled():
    return torch.utils.data.DataLoader(rows(), batch_size=B, shuffle=True)


def task(model=Mixed, **parts):
    given = {"train": shuffled(), "held_out": [rows(16, 1)], "name": "small"} | parts
    return UserTask(model=model, **given)
