"""Networks of convolutions drawn at random: geometries, groups, norms, poolings, residual adds, with samples for them."""

from __future__ import annotations

import random

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Block(nn.Module):
    """A convolution with what was drawn for it, and perhaps a way around it."""

    def __init__(self, rng: random.Random, width: int, lines: bool, relu: bool) -> None:
        super().__init__()
        convolution, norm = (nn.Conv1d, nn.BatchNorm1d) if lines else (nn.Conv2d, nn.BatchNorm2d)
        self.skip = rng.random() < 0.4
        groups = rng.choice([n for n in (1, 1, 2, width) if width % n == 0])
        out = width if self.skip else groups * rng.randint(1, 3)
        if self.skip:
            kernel, dilation = rng.choice((1, 3)), rng.choice((1, 2))
            more = {"padding": rng.choice(("same", dilation * (kernel // 2))), "dilation": dilation}
        else:
            kernel: int | tuple[int, int] = rng.randint(1, 3) if lines else (rng.randint(1, 3), rng.randint(1, 3))
            more = {"padding": rng.choice(("valid", 0, 1)), "stride": rng.choice((1, 1, 2)), "dilation": 1}
            more["stride"] = 1 if more["padding"] == "valid" and lines else more["stride"]
        layers = [convolution(width, out, kernel, groups=groups, bias=rng.random() < 0.7, **more)]
        if rng.random() < 0.5:
            layers.append(norm(out, affine=rng.random() < 0.7))
        self.layers = nn.Sequential(*layers)
        self.side = convolution(width, out, 1) if self.skip and rng.random() < 0.4 else None
        self.relu, self.pool, self.out = relu, rng.random() < 0.5, out
        padded = rng.random() < 0.3
        self.window = nn.AvgPool2d(
            2, stride=rng.choice((1, 2)), padding=int(padded), divisor_override=rng.choice((None, 1))
        )

    def forward(self, x: Tensor) -> Tensor:
        y = self.layers(x)
        if self.skip:
            y = y + (x if self.side is None else self.side(x))
        y = F.relu(y) if self.relu else y
        if self.pool and y.shape[-1] > 3:
            y = F.avg_pool1d(y, 2) if y.dim() == 3 else self.window(y)
        return y


class Network(nn.Module):
    """Blocks one after the other, then a global average, a flattening and a linear layer, or what is left of these."""

    def __init__(self, rng: random.Random, lines: bool) -> None:
        super().__init__()
        width, blocks = rng.choice((1, 2, 4)), []
        self.shape = (width, 17) if lines else (width, rng.randint(9, 12), rng.randint(9, 12))
        for _ in range(rng.randint(1, 3)):
            blocks.append(Block(rng, width, lines, rng.random() < 0.8))
            width = blocks[-1].out
        self.blocks = nn.ModuleList(blocks)
        self.last = rng.choice(("none", "global", "flat"))
        with torch.no_grad():
            features = self.features(torch.zeros(1, *self.shape)).shape[1]
        self.head = nn.Linear(features, 5) if self.last != "none" else None

    def features(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x.mean(dim=tuple(range(2, x.dim()))) if self.last == "global" else x.flatten(1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.features(x)
        return y if self.head is None else self.head(y)


def random_network(seed: int) -> tuple[Network, Tensor]:
    """A module in eval mode, with norms that are not those of a new one, and samples."""
    module = None
    for attempt in range(20):  # a few draws shrink a picture below the next kernel, or to the one pixel that no norm takes
        rng = random.Random(f"pictures {seed}" + f" {attempt}" * (attempt > 0))
        torch.manual_seed(seed)
        try:
            module = Network(rng, lines=rng.random() < 0.3)
            break
        except (RuntimeError, ValueError) as error:
            if "Kernel size" not in str(error) and "more than 1 value" not in str(error):
                raise
    assert module is not None
    for part in module.modules():
        if isinstance(part, nn.BatchNorm1d | nn.BatchNorm2d):
            part.running_mean.normal_(0, 0.2)
            part.running_var.uniform_(0.3, 2.0)
    return module.eval(), torch.randn(3, *module.shape)
