"""Floats that stand on the chip's grid: every value a whole number of a power of two, so that floats hold it exactly.

A projection's sum is shifted right on the chip, which rounds down; here it is `floor_to` the bits behind the point of the
population it feeds. Weights are 8-bit integers of mixed sign, which are even, times 2^-fraction. Training passes each
rounding as if it were not there. In float64, and in float32 as long as sums stay below 2^24 units, the values are those
of the chip, exactly.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

STREAM_BITS = 12  # bits behind the point: residual stream and what is added to it, drives, gates before they are cut
EVENT_BITS = 8  # messages into dense layers
KEEP_BITS = 9  # the share that a gated state keeps
MOST_KEPT = 508 / 512  # a state that kept all would grow with every token
CURRENT_BITS = 10  # sums into leaky neurons, hidden values of a graded MLP
VOLTAGE_BITS = CURRENT_BITS + 6  # a lif neuron's registers hold its sum << 6
DECAY_UNITS = 4096
LARGEST_WEIGHT = 254
DEEPEST_SHIFT = 7  # weight exponents -7..7, the chip's register
LOWEST_FRACTION = -7


class _Through(torch.autograd.Function):
    """A value in place of another, with the gradient of the other: x + (value - x) would round."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, value: Tensor) -> Tensor:
        return value

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


def through(x: Tensor, value: Tensor) -> Tensor:
    """`value`, exactly; its gradient goes to x."""
    result: Tensor = _Through.apply(x, value)
    return result


def floor_to(x: Tensor, bits: int) -> Tensor:
    """x rounded down to a multiple of 2^-bits; the gradient is 1."""
    return through(x, torch.floor(x.detach() * 2.0**bits).mul_(2.0**-bits))


def round_to(x: Tensor, bits: int) -> Tensor:
    """x rounded to the nearest multiple of 2^-bits, ties to even; the gradient is 1."""
    return through(x, torch.round(x.detach() * 2.0**bits).mul_(2.0**-bits))


class OnGrid(nn.Module):
    """A module that computes in floats, or on the chip's grid once `on_grid` is True.

    Attributes:
        excess: of the last forward pass in training mode: how far values went beyond the ranges that the chip's words are
            laid out for, as a mean square in units of the limit; what `range_penalty` adds up.
    """

    on_grid: bool = False
    excess: Tensor | float = 0.0

    def watch(self, *values: tuple[Tensor, float]) -> None:
        """Keep the excess of (values, limit) pairs; nothing in eval mode."""
        if self.training:
            self.excess = sum((functional.relu(x.abs() / limit - 1).square().mean() for x, limit in values), start=0.0)


def range_penalty(module: nn.Module) -> Tensor | float:
    """Sum of the `excess` of all parts, to be added to the loss.

    Nothing on the chip normalises a stream, and the host's normalisation hides how large it is: without this term it
    grows until sums leave their registers.
    """
    return sum((part.excess for part in module.modules() if isinstance(part, OnGrid)), start=0.0)


def use_grid(module: nn.Module, on: bool) -> None:
    """Switch every `OnGrid` below (and at) `module`; weights without a grid get one from their largest magnitude."""
    for part in module.modules():
        if isinstance(part, OnGrid):
            if on and isinstance(part, GridLinear) and not part.fitted:
                part.fit_grid()
            part.on_grid = on


class GridLinear(OnGrid):
    """A linear layer whose weights can stand on the grid of 8-bit synapses.

    `x W^T`, rounded down to `bits_out`, plus b, where x comes with `bits_in` bits behind the point.

    Args:
        n_in, n_out: sizes.
        bits_in, bits_out: bits behind the point of what comes in and of the sums.
        bias: whether b is there; it is a second projection, from a line that always sends 1.0 with EVENT_BITS.
        gain: standard deviation of the first weights, over 1 / sqrt(n_in); 0 starts with zeros.
    """

    def __init__(self, n_in: int, n_out: int, *, bits_in: int, bits_out: int, bias: bool = True, gain: float = 1.0) -> None:
        super().__init__()
        self.n_in, self.n_out, self.bits_in, self.bits_out = n_in, n_out, bits_in, bits_out
        self.weight = nn.Parameter(torch.randn(n_out, n_in) * (gain * n_in**-0.5))
        self.bias = nn.Parameter(torch.zeros(n_out)) if bias else None
        self.register_buffer("fractions", torch.zeros(2, dtype=torch.int64))  # of weight, of bias
        self.register_buffer("has_grid", torch.zeros((), dtype=torch.bool))

    @property
    def fitted(self) -> bool:
        """Whether the grid was chosen."""
        return bool(self.has_grid)

    def fit_grid(self) -> None:
        """Choose the finest grid that reaches the largest weight, within the exponents that a synapse has.

        Raises ValueError for weights that are not finite.
        """
        found = []
        for value, bits in ((self.weight, self.bits_in), (self.bias, EVENT_BITS)):
            largest = 0.0 if value is None else float(value.detach().abs().max())
            if not math.isfinite(largest):
                raise ValueError(f"weights of a {self.n_in} -> {self.n_out} layer are not finite; the training ran away")
            finest = self.bits_out - bits + DEEPEST_SHIFT
            found.append(max(min(finest, _fraction(largest)), finest - 2 * DEEPEST_SHIFT))
        self.fractions.copy_(torch.tensor(found))  # type: ignore[operator]
        self.has_grid.fill_(True)  # type: ignore[operator]

    def integers(self) -> tuple[Tensor, int, Tensor | None, int]:
        """Even weights int64 (n_out, n_in), their exponent, even biases (n_out,) or None, and theirs.

        Raises ValueError where no grid was chosen.
        """
        if not self.fitted:
            raise ValueError(f"a {self.n_in} -> {self.n_out} layer has no grid yet; call use_grid(module, True) first")
        first, second = (int(f) for f in self.fractions)  # type: ignore[union-attr]
        weight = _even(self.weight.detach().double(), first)
        bias = None if self.bias is None else _even(self.bias.detach().double(), second)
        return weight, self.bits_out - self.bits_in - first, bias, self.bits_out - EVENT_BITS - second

    def forward(self, x: Tensor) -> Tensor:
        if not self.on_grid:
            return functional.linear(x, self.weight, self.bias)
        first, second = (int(f) for f in self.fractions)  # type: ignore[union-attr]
        sums = floor_to(functional.linear(x, _held(self.weight, first)), self.bits_out)
        return sums if self.bias is None else sums + _held(self.bias, second)

    def extra_repr(self) -> str:
        return f"{self.n_in}, {self.n_out}, bits {self.bits_in} -> {self.bits_out}, bias={self.bias is not None}"


def _fraction(largest: float) -> int:
    """Most bits behind the point with which 254 units still reach `largest`."""
    return 64 if largest == 0 else math.floor(math.log2(LARGEST_WEIGHT / largest) + 1e-12)


def _even(value: Tensor, fraction: int) -> Tensor:
    return 2 * torch.round(value * 2.0 ** (fraction - 1)).clamp(-LARGEST_WEIGHT // 2, LARGEST_WEIGHT // 2).to(torch.int64)


def _held(value: Tensor, fraction: int) -> Tensor:
    """The value of the even integers that hold `value`; the gradient is 1."""
    scale = 2.0 ** (fraction - 1)
    limit = LARGEST_WEIGHT // 2
    return through(value, torch.round(value.detach() * scale).clamp_(-limit, limit) / scale)


def held_taps(taps_KD: Tensor, fraction: int = DEEPEST_SHIFT) -> tuple[Tensor, Tensor]:
    """Weights from channel to channel, no bits gained or lost: their values on the grid, and as even integers."""
    return _held(taps_KD, fraction), _even(taps_KD.detach().double(), fraction)


class EventGate(OnGrid):
    """Values whose magnitude exceeds a threshold; the others send no event. On the grid: EVENT_BITS behind the point.

    The gradient is that of the mask held fixed.

    Args:
        threshold: 0 or above, below 1 (the line that carries 1.0 must pass).
    """

    def __init__(self, threshold: float = 0.0) -> None:
        super().__init__()
        if not 0 <= threshold < 1:
            raise ValueError(f"event threshold is {threshold}; it must be at least 0 and below 1")
        self.threshold = round(threshold * 2**EVENT_BITS) / 2**EVENT_BITS

    def forward(self, x: Tensor) -> Tensor:
        held = floor_to(x, EVENT_BITS) if self.on_grid else x
        return held * (held.detach().abs() > self.threshold) if self.threshold or self.on_grid else held
