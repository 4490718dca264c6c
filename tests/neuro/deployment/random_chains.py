"""Modules drawn at random: chains of 2 to 8 linear layers, with what people put around them."""

from __future__ import annotations

import random

import torch
import torch.nn.functional as F
from torch import Tensor, nn

WIDTHS = (6, 9)
ACTIVATIONS = ("relu", "relu", "relu", "relu2", "gelu", "tanh", "")


class Step(nn.Module):
    """A linear layer with what was drawn for it: a norm on either side, an activation, dropout, a skip around it all."""

    def __init__(self, rng: random.Random, linear: nn.Linear, activation: str, plain: bool) -> None:
        super().__init__()
        self.linear, self.activation = linear, activation
        self.dropout = nn.Dropout(0.5 if rng.random() < 0.3 else 0.0)
        width = linear.in_features
        norms = (nn.Identity(), nn.Identity(), nn.LayerNorm(width), nn.RMSNorm(width))
        self.norm = nn.Identity() if plain else rng.choice(norms)
        self.skip = not plain and width == linear.out_features and rng.random() < 0.6

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(self.norm(x))
        if self.activation:
            y = getattr(F, self.activation.removesuffix("2"))(y)
        y = self.dropout(y.square() if self.activation == "relu2" else y)
        return x + y if self.skip else y


class Chain(nn.Module):
    """Steps one after the other. `tied`: a last product on the first layer's weight; `branch`: torch.export cannot follow,
    and a layer that no example reaches.
    """

    def __init__(self, steps: list[nn.Module], tied: nn.Linear | None, branch: bool) -> None:
        super().__init__()
        self.steps = nn.Sequential(*steps)
        self.tied = tied
        self.rare = nn.Linear(WIDTHS[0], WIDTHS[0]) if branch else None

    def forward(self, x: Tensor) -> Tensor:
        if self.rare is not None and float(x.mean()) > 100:
            x = self.rare(x)
        x = self.steps(x)
        return x if self.tied is None else F.linear(x, self.tied.weight.T)


def random_chain(seed: int) -> tuple[Chain, Tensor]:
    """A module in eval mode and rows (batch, tokens, width) for it."""
    rng = random.Random(f"chain {seed}")
    torch.manual_seed(seed)
    count, plain, flat = rng.randint(2, 8), rng.random() < 0.4, rng.random() < 0.5
    shared = rng.random() < 0.4
    linears: list[nn.Linear] = []
    width = WIDTHS[0]
    for _ in range(count):
        again = [layer for layer in linears if layer.in_features == width]
        if shared and again and rng.random() < 0.5:
            linears.append(rng.choice(again))
        else:
            linears.append(nn.Linear(width, rng.choice(WIDTHS), bias=rng.random() < 0.7))
        width = linears[-1].out_features
    steps: list[nn.Module] = []
    for number, linear in enumerate(linears):
        activation = "relu" if plain else rng.choice(ACTIVATIONS)
        if number == count - 1:
            activation = ""
        if flat:  # neighbours in one nn.Sequential, as most people write them
            batch_norm = not plain and rng.random() < 0.2
            steps += [linear, *([Rows(linear.out_features)] if batch_norm else [])]
            steps += [nn.ReLU() if rng.random() < 0.8 else nn.GELU()] if activation else []
            steps += [nn.Dropout(0.1)] if rng.random() < 0.2 else []
        else:
            steps.append(Step(rng, linear, activation, plain))
    tied = linears[0] if width == linears[0].out_features and rng.random() < 0.5 else None
    return Chain(steps, tied, rng.random() < 0.2).eval(), torch.randn(2, 5, WIDTHS[0])


class Rows(nn.Module):
    """Batch norm over the last dimension."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(width)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x.flatten(0, -2)).reshape(x.shape)
