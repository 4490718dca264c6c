"""Small networks for pictures and streams, trained on the spot, as `module=experiments.samples.networks:digits_cnn`.

Shape letters: N samples, C channels, H rows, W columns, T steps.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from experiments.samples.mackey_glass import load_mackey_glass
from experiments.samples.pictures import load_digits, load_fashion_mnist
from experiments.samples.records import CLASSES, Samples

TAPS = 20  # steps that the foreteller of Mackey-Glass sees


class ResidualCNN(nn.Module):
    """Two convolutions, the second beside the way around it, average pooling, a dense layer: (N, 1, H, W) -> (N, classes).

    Args:
        size: H and W, the same.
        channels: of both convolutions.
        stride: of the first.
        pool: edge of a pooled square.
        classes: of the answer.
    """

    def __init__(self, size: int, channels: int = 16, stride: int = 1, pool: int = 2, classes: int = 10) -> None:
        super().__init__()
        self.first = nn.Conv2d(1, channels, 3, stride=stride, padding=1)
        self.second = nn.Conv2d(channels, channels, 3, padding=1)
        self.relu = nn.ReLU()
        self.pool = nn.AvgPool2d(pool)
        edge = -(-size // stride) // pool
        self.dense = nn.Linear(channels * edge * edge, classes)

    def forward(self, x_NCHW: Tensor) -> Tensor:
        h = self.relu(self.first(x_NCHW))
        h = self.relu(self.second(h) + h)
        answer: Tensor = self.dense(torch.flatten(self.pool(h), 1))
        return answer


class Foreteller(nn.Module):
    """Two dense layers on the last 20 values of a stream: (N, T, 1) -> (N, T, 1)."""

    def __init__(self, hidden: int = 64) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(TAPS, hidden), nn.Linear(hidden, 1)

    def forward(self, x_NT1: Tensor) -> Tensor:
        taps_NTK = F.pad(x_NT1[..., 0], (TAPS - 1, 0)).unfold(1, TAPS, 1)
        answer: Tensor = self.second(torch.relu(self.first(taps_NTK)))
        return answer


def fitted(
    model: nn.Module, samples: Samples, *, epochs: int, seed: int = 0, rate: float = 3e-3, batch: int = 64
) -> nn.Module:
    """`model` trained on the training samples with Adam, the rate falling to 0 as a cosine; in eval mode.

    Cross entropy for classes, mean squared error for values. `seed` is of the order of the samples.
    """
    x, y = torch.from_numpy(samples.x_train), torch.from_numpy(np.asarray(samples.y_train))
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(model.parameters(), lr=rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * -(-len(x) // batch))
    model.train()
    for _ in range(epochs):
        for rows in torch.randperm(len(x), generator=generator).split(batch):
            out = model(x[rows])
            loss = F.cross_entropy(out, y[rows]) if samples.task == CLASSES else F.mse_loss(out, y[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return model.eval()


def digits_cnn(seed: int = 0) -> nn.Module:
    """The residual network on scikit-learn's digits, 15 epochs: some seconds."""
    torch.manual_seed(seed)
    return fitted(ResidualCNN(8), load_digits(), epochs=15, seed=seed)


def fashion_cnn(seed: int = 0) -> nn.Module:
    """The residual network on Fashion-MNIST, its first convolution at a stride of 2, 2 epochs: a minute or two."""
    torch.manual_seed(seed)
    return fitted(ResidualCNN(28, stride=2), load_fashion_mnist(), epochs=2, seed=seed)


def foreteller(seed: int = 0) -> nn.Module:
    """Two dense layers that foretell Mackey-Glass ten units ahead, 300 epochs: some seconds."""
    torch.manual_seed(seed)
    return fitted(Foreteller(), load_mackey_glass(), epochs=300, seed=seed)
