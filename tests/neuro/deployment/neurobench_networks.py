"""Networks that our counts and NeuroBench's are taken of: plain torch and snnTorch, read by both environments."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class GridReLU(nn.ReLU):
    """What a graph's hidden neurons send: floor(sum x 2^-shift + 1/2), rectified."""

    def __init__(self, shift: int) -> None:
        super().__init__()
        self.shift = shift

    def forward(self, x: Tensor) -> Tensor:
        return torch.floor(x * 2.0**-self.shift + 0.5).clamp(min=0)


def mlp(inputs: int, hidden: int, outputs: int, shift: int | None = None) -> nn.Sequential:
    """Two linear layers without bias; with `shift` their integers on the chip's grid."""
    between = nn.ReLU() if shift is None else GridReLU(shift)
    return nn.Sequential(nn.Linear(inputs, hidden, bias=False), between, nn.Linear(hidden, outputs, bias=False)).double()


class Block(nn.Module):
    """One Transformer block: four projections, functional attention, an MLP. (B, T, D) to (B, T, D)."""

    def __init__(self, width: int, heads: int, functional_relu: bool) -> None:
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v, self.o = (nn.Linear(width, width, bias=False) for _ in range(4))
        self.fc1, self.fc2 = nn.Linear(width, 2 * width, bias=False), nn.Linear(2 * width, width, bias=False)
        self.activation = None if functional_relu else nn.ReLU()
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        shape = batch, length, self.heads, width // self.heads
        q, k, v = (layer(x).view(shape).transpose(1, 2) for layer in (self.q, self.k, self.v))
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(x.shape)
        x = x + self.o(mixed)
        hidden = self.fc1(x)
        return x + self.fc2(F.relu(hidden) if self.activation is None else self.activation(hidden))


def spiking(sizes: list[int], threshold: float) -> nn.Sequential:
    """Integrate-and-fire neurons of snnTorch that lose no charge and reset to zero at once."""
    import snntorch

    layers: list[nn.Module] = []
    for number, (a, b) in enumerate(pairwise(sizes)):
        neuron = snntorch.Leaky(
            beta=1.0,
            threshold=threshold,
            reset_mechanism="zero",
            reset_delay=False,
            init_hidden=True,
            output=number == len(sizes) - 2,
        )
        layers += [nn.Linear(a, b, bias=False), neuron]
    return nn.Sequential(*layers)  # snnTorch's own state is float32, where these integers are exact


BUILD: dict[str, Any] = {"mlp": mlp, "block": Block, "spiking": spiking}
