"""A float nn.Linear as the integers that synapses hold: weights on their grid, one scale per tensor or output channel.

Shape letters: O outputs, I inputs, G groups of output channels.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from hardware.text import quoted
from neuro.conversion.integers import (
    INT8_MAX,
    WHOLE_BIAS,
    on_grid,
    on_mantissa,
    scale_for,
    squared_error,
    weight_levels,
    weight_scales,
)
from neuro.graph.synapses import weight_step

SCALES = ("tensor", "power_of_two", "channel")


@dataclass(frozen=True)
class IntegerLayer:
    """A linear layer in integers: weight[o, i] = stored[o, i] / step x scale_O[o], and a sum counts in `unit_O`.

    `stored_OI`: int32, multiples of `step`; `bits`: width of a synapse; `largest`: highest |q| of both signs;
    `exponent_O`: for channels in power-of-two groups scale_O = scale x 2^-exponent_O, else all 0. `bias_O` float64.
    """

    name: str
    stored_OI: np.ndarray
    bits: int
    largest: int
    scale_O: np.ndarray
    exponent_O: np.ndarray
    bias_O: np.ndarray | None
    input_unit: float
    bias_bits: int = WHOLE_BIAS

    @property
    def step(self) -> int:
        """Spacing of the weights."""
        return weight_step("mixed", self.bits)

    @property
    def scale(self) -> float:
        """The largest scale: that of every channel where scales are per tensor."""
        return float(self.scale_O.max())

    @property
    def unit_O(self) -> np.ndarray:
        """What one step of each channel's sum is worth, float64 (O,)."""
        return self.input_unit * self.scale_O / self.step

    @property
    def unit(self) -> float:
        """The largest unit."""
        return self.input_unit * self.scale / self.step

    @property
    def row_sum_O(self) -> np.ndarray:
        """Sum of |stored| per output channel, int64 (O,)."""
        found: np.ndarray = np.abs(self.stored_OI.astype(np.int64)).sum(axis=1)
        return found

    @property
    def channels(self) -> tuple[float, ...]:
        """Scales per channel as a plan keeps them; empty where they are all the same."""
        return () if np.all(self.scale_O == self.scale_O[0]) else tuple(float(s) for s in self.scale_O)

    def bias_units(self) -> np.ndarray:
        """Bias in units of each channel's sum, rounded to multiples of the step, int64 (O,)."""
        return self.step * on_mantissa(rounded_bias(self.bias_O, self.step * self.unit_O), self.bias_bits)

    def reach_O(self) -> np.ndarray:
        """Largest possible |sum| per channel for int8 payloads, bias included."""
        reach: np.ndarray = self.row_sum_O * INT8_MAX + np.abs(self.bias_units())
        return reach


def rounded_bias(bias_O: np.ndarray | None, unit_O: np.ndarray) -> np.ndarray:
    """Bias in whole units, int64 (O,); zeros where there is none."""
    if bias_O is None:
        return np.zeros(len(unit_O), dtype=np.int64)
    whole: np.ndarray = np.rint(bias_O / unit_O).astype(np.int64)
    return whole


def integer_layer(
    name: str,
    layer: nn.Linear,
    input_unit: float,
    *,
    weight_bits: int | str = 8,
    scales: str = "tensor",
    search: bool = False,
    groups: int = 0,
    bias_bits: int = WHOLE_BIAS,
) -> IntegerLayer:
    """Integers of one layer.

    Args:
        name: for messages.
        layer: its weights are read in float64.
        input_unit: what a payload of 1 at its input is worth.
        weight_bits: 8, 4, 3, 2 or "ternary".
        scales: "tensor", "power_of_two" (per tensor) or "channel".
        search: scales of least squared error instead of those that reach the largest weight.
        groups: with "channel": round every channel's scale to the largest one times 2^-e, e below `groups`, so that one
            shift more brings its sum to the common unit. 0: every channel has its own float scale.
        bias_bits: width that `on_mantissa` rounds biases in units of the step to.

    Raises:
        ValueError: NaN or infinite weights.
    """
    weight_OI = layer.weight.detach().double().cpu()
    bias_O = None if layer.bias is None else layer.bias.detach().double().cpu().numpy()
    if not bool(torch.isfinite(weight_OI).all()) or (bias_O is not None and not np.isfinite(bias_O).all()):
        raise ValueError(f"layer {quoted(name)} has NaN or infinite weights; integers cannot be made of them")
    bits, low, high = weight_levels(weight_bits)
    n_out = len(weight_OI)
    exponent_O = torch.zeros(n_out, dtype=torch.int64)
    if scales == "channel":
        scale_O = weight_scales(weight_OI, low, high, search=search)
        if groups:
            present_O = weight_OI.abs().amax(dim=1) > 0
            largest = float(scale_O[present_O].max()) if bool(present_O.any()) else _bias_scale(bias_O, input_unit)
            exponent_O = _group_exponents(weight_OI, scale_O, largest, groups, low, high, search) * present_O
            scale_O = largest * torch.exp2(-exponent_O.double())
        else:
            scale_O = _without_weights(scale_O, weight_OI, bias_O, input_unit)
    else:
        scale = weight_scales(weight_OI.reshape(1, -1), low, high, search=search, power_of_two=scales == "power_of_two")
        if not bool(weight_OI.any()):
            scale = scale * _bias_scale(bias_O, input_unit, scales == "power_of_two")
        scale_O = scale.expand(n_out)
    stored = on_grid(weight_OI, scale_O[:, None], low, high) * weight_step("mixed", bits)
    return IntegerLayer(
        name=name,
        stored_OI=stored.to(torch.int32).numpy(),
        bits=bits,
        largest=min(-low, high),
        scale_O=scale_O.numpy().copy(),
        exponent_O=exponent_O.numpy(),
        bias_O=bias_O,
        input_unit=input_unit,
        bias_bits=bias_bits,
    )


def _bias_scale(bias: np.ndarray | None, input_unit: float, power_of_two: bool = False) -> float:
    """Scale of a layer or channel without weights: its bias takes two digits of its constant lines; 1 where it has none."""
    largest = 0.0 if bias is None else float(np.abs(bias).max())
    return scale_for(largest / (INT8_MAX * input_unit), power_of_two)


def _without_weights(scale_O: Tensor, weight_OI: Tensor, bias_O: np.ndarray | None, input_unit: float) -> Tensor:
    """Channels whose weights are all 0 (padding tokens, pruned neurons) as fine as their bias asks for, and never coarser
    than the others, whose half step they would else be given in a unit of their own.
    """
    absent_O = ~weight_OI.any(dim=1)
    if not bool(absent_O.any()):
        return scale_O
    others = float(scale_O[~absent_O].max()) if not bool(absent_O.all()) else _bias_scale(bias_O, input_unit)
    wanted_O = torch.full_like(scale_O, others)
    if bias_O is not None:
        fine_O = torch.from_numpy(np.abs(bias_O)) / (INT8_MAX**2 * input_unit)
        wanted_O = torch.where(fine_O > 0, fine_O.clamp_max(others), wanted_O)
    return torch.where(absent_O, wanted_O, scale_O)


def _group_exponents(
    weight_OI: Tensor, wanted_O: Tensor, largest: float, groups: int, low: int, high: int, search: bool
) -> Tensor:
    """e per channel, 0..groups - 1: the finest scale that still reaches the channel's weights, or of least error."""
    if not search:
        return torch.floor(torch.log2(largest / wanted_O) + 1e-12).clamp(0, groups - 1).to(torch.int64)
    tried = [torch.full((len(weight_OI),), largest * 2.0**-e, dtype=torch.float64) for e in range(groups)]
    return torch.stack([squared_error(weight_OI, scale_O, low, high) for scale_O in tried]).argmin(dim=0)
