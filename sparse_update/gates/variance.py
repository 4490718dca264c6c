"""The rates of VCAS (Chen et al., ICLR 2024, arXiv 2402.17227), as small as a test of variance allows; our trainer and
`attach` have them from here.

Shape letters: B sequences, L layers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

GRID = 8
"""Rates are multiples of 1 / GRID, so that shapes take few values and each can be timed."""
Gradients = Mapping[str, tuple[Tensor, ...]]


class VarianceRates:
    """Shares of the sequences at each layer, and of the rows of weight gradients.

    `s`: share of the gradient norm that the kept sequences hold; `rho`: share of the sequences for each layer from below;
    `nu`: share of the rows.
    """

    def __init__(self, layers: int, nu: float, tau: float, alpha: float, beta: float) -> None:
        self.tau, self.alpha, self.beta = tau, alpha, beta
        self.s, self.nu, self.rho = 1.0, nu, [1.0] * layers

    @property
    def sequences(self) -> tuple[float, ...]:
        """rho on the grid, () where every layer keeps all."""
        found = tuple(on_grid(r) for r in self.rho)
        return () if min(found) == 1 else found

    @property
    def rows(self) -> float:
        """nu on the grid."""
        return on_grid(self.nu)

    def update(self, noise: float, act: float, rows: float, norms: Sequence[Tensor]) -> None:
        """After a test.

        Args:
            noise: variance of the mini-batch gradient.
            act, rows: what sampling sequences, and rows, adds to it.
            norms: for one or more batches the norm of each sequence's activation gradient at each layer, (L, B).
        """
        self.s = min(1.0, max(0.0, self.s + self.alpha * (1 if act > self.tau * noise else -1)))
        self.nu = min(1.0, max(1 / GRID, self.nu * self.beta ** (-1 if rows > self.tau * noise else 1)))
        needed = [sum(share_holding(n[layer], self.s) for n in norms) / len(norms) for layer in range(len(self.rho))]
        self.rho = [max(needed[: layer + 1]) for layer in range(len(self.rho))]

    def state_dict(self) -> dict[str, Any]:
        return {"s": self.s, "nu": self.nu, "rho": list(self.rho)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.s, self.nu, self.rho = float(state["s"]), float(state["nu"]), [float(r) for r in state["rho"]]


def on_grid(rate: float) -> float:
    """The next multiple of 1 / GRID."""
    return min(GRID, max(1, -int(-rate * GRID // 1))) / GRID


def distance(a: Gradients, b: Gradients) -> float:
    """Squared distance; a parameter without an entry has gradient 0."""
    total = 0.0
    for name in dict.fromkeys((*a, *b)):  # in one order: a set's differs between processes, and so would the last bit
        one, other = a.get(name), b.get(name)
        for i in range(len(one or other or ())):
            left = one[i].double() if one is not None else 0.0
            right = other[i].double() if other is not None else 0.0
            total += float(torch.as_tensor(left - right).square().sum())
    return total


def share_holding(norms_B: Tensor, s: float) -> float:
    """Smallest share of sequences, largest norms first, that holds `s` of the norms' sum."""
    ordered = norms_B.sort(descending=True).values.double()
    held = ordered.cumsum(0) / ordered.sum().clamp(min=1e-300)
    return (int((held < s - 1e-12).sum()) + 1) / len(norms_B)
