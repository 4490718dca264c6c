"""8-bit weights and inputs in the loop, straight-through: the arithmetic that the graded route converts to.

Weights count in max|w| / 127, inputs in a step fixed by calibration; both round to nearest and clip to -127..127. The
backward pass ignores the rounding and stops at the clip.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hardware.text import quoted
from neuro.analysis.tracing import Example
from neuro.conversion.calibration import DEFAULT_PERCENTILE, calibrate
from neuro.conversion.integers import INT8_MAX, scale_for
from neuro.training.insert import Gates


class _Rounded(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor) -> Tensor:
        q = x / scale
        ctx.save_for_backward(q.abs() <= INT8_MAX)
        return q.round().clamp(-INT8_MAX, INT8_MAX) * scale

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (inside,) = ctx.saved_tensors
        return gradient * inside, None


def rounded(x: Tensor, scale: float | Tensor) -> Tensor:
    """scale x clip(round(x / scale), -127, 127), with the gradient of the clip alone."""
    return _Rounded.apply(x, torch.as_tensor(scale, dtype=x.dtype, device=x.device))


class Quantised:
    """W8A8 arithmetic in linear layers of a module from `attach` to `detach`; weights stay float underneath."""

    def __init__(self, linears: Mapping[str, nn.Linear]) -> None:
        self.linears = dict(linears)
        self.scales: dict[str, float] = {}

    @property
    def attached(self) -> bool:
        """Whether the layers compute in 8 bits now."""
        return bool(self.scales)

    def calibrate(self, module: nn.Module, batches: Iterable[Example], gates: Gates | None = None) -> None:
        """Take input steps from training batches as the graded route does, and attach.

        With `gates`, no threshold may pass what would round to 0, so that a gate counts the events that are sent.
        Raises ValueError as `neuro.calibrate` does.
        """
        self.detach()
        found = calibrate(module, batches, percentile=DEFAULT_PERCENTILE).layers
        scales = {}
        for name in self.linears:
            if name not in found:
                raise ValueError(f"the calibration batches never reached layer {quoted(name)}")
            largest = found[name].input_percentile or found[name].input_max
            scales[name] = scale_for(largest, False)
        for layer in gates.layers if gates is not None else ():
            least = min(scales[other.name] for other in gates.layers if other.gate is layer.gate) if gates else 0.0
            layer.gate.floor.fill_(least / 2)
        self.attach(scales)

    def attach(self, scales: Mapping[str, float]) -> None:
        """Compute in 8 bits with these input steps from now on."""
        self.detach()
        self.scales = dict(scales)
        for name, layer in self.linears.items():
            layer.forward = _forward(layer, self.scales[name])  # type: ignore[method-assign]

    def detach(self) -> None:
        """Back to the layers' own arithmetic."""
        for layer in self.linears.values():
            layer.__dict__.pop("forward", None)
        self.scales = {}


def _forward(layer: nn.Linear, scale: float) -> Any:
    def forward(x: Tensor) -> Tensor:
        largest = layer.weight.detach().abs().max().clamp(min=1e-30)
        return F.linear(rounded(x, scale), rounded(layer.weight, largest / INT8_MAX), layer.bias)

    return forward
