"""Modules that stand where mapped layers stood: they hand floats to a segment's runner and its floats on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from hardware.text import quoted
from neuro.conversion.convolutions.geometry import Layer
from neuro.deployment.networks import NetworkRunner
from neuro.deployment.runner import SegmentRunner


class SingleLinear(nn.Module):
    """Stands in for one nn.Linear.

    Code around it may go on reading `weight`, `bias`, `in_features` and `out_features`, for a product of its own or only
    for a dtype: these are the host's float copies. They are no parameters: neither listed, nor saved, nor on the chip.
    """

    def __init__(self, runner: SegmentRunner, layer: nn.Linear) -> None:
        super().__init__()
        self.runner = runner
        self._original = (layer,)  # inside a tuple, so that it is no part of this module

    @property
    def weight(self) -> Tensor:
        """(out_features, in_features), as the float layer had it."""
        return self._original[0].weight

    @property
    def bias(self) -> Tensor | None:
        """(out_features,), or None."""
        return self._original[0].bias

    @property
    def in_features(self) -> int:
        return self._original[0].in_features

    @property
    def out_features(self) -> int:
        return self._original[0].out_features

    def _apply(self, fn: Callable[..., Tensor], recurse: bool = True) -> SingleLinear:
        self._original[0]._apply(fn, recurse)
        super()._apply(fn, recurse)
        return self

    def forward(self, input: Tensor) -> Tensor:  # as nn.Linear names it
        return self.runner.run(input)[0]

    def extra_repr(self) -> str:
        s = self.runner.segment
        return f"{s.n_in}, {s.n_out}, segment={quoted(s.name)}, backend={quoted(self.runner.backend)}"


class NetworkLayer(nn.Module):
    """Stands in for one layer of a network of convolutions; what else the layer has (`weight`, `stride`, ...) can be
    read.
    """

    def __init__(self, runner: NetworkRunner, layer: Layer, name: str) -> None:
        super().__init__()
        self.runner, self.name = runner, name
        self._original = (layer,)  # inside a tuple, so that it is no part of this module

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name.startswith("_"):
                raise
            return getattr(self._original[0], name)

    def _apply(self, fn: Callable[..., Tensor], recurse: bool = True) -> NetworkLayer:
        self._original[0]._apply(fn, recurse)
        super()._apply(fn, recurse)
        return self

    def forward(self, input: Tensor) -> Tensor:  # as torch's layers name it
        return self.runner.call(self.name, input)

    def extra_repr(self) -> str:
        return f"{self._original[0]}, segment={quoted(self.runner.segment.name)}, backend={quoted(self.runner.backend)}"


class PairFirst(SingleLinear):
    """Stands in for fc1 of an MLP: runs the whole graph, keeps its output for `PairLast`, returns the rectified values.

    The activation between the two stays where the module has it and acts on values that are rectified already.
    """

    def forward(self, input: Tensor) -> Tensor:
        out, hidden = self.runner.run(input)
        assert hidden is not None
        expected = hidden * hidden if self.runner.segment.activation == "relu2" else hidden
        self.runner.pending = (expected, out)
        return hidden


class PairLast(SingleLinear):
    """Stands in for fc2: hands out the graph's output, after checking that only the activation came in between."""

    def forward(self, input: Tensor) -> Tensor:
        hidden = input
        pending, self.runner.pending = self.runner.pending, None
        segment = self.runner.segment
        if pending is None:
            raise RuntimeError(
                f"segment {quoted(segment.name)}: {quoted(segment.modules[1])} was called without "
                f"{quoted(segment.modules[0])} before it"
            )
        expected, out = pending
        tolerance = 1e-5 if hidden.dtype in (torch.float32, torch.float64) else 1e-2
        same = torch.equal(hidden, expected) or (
            hidden.shape == expected.shape and torch.allclose(hidden, expected, rtol=tolerance, atol=0.0)
        )
        if not same:
            raise RuntimeError(
                f"segment {quoted(segment.name)}: something other than {segment.activation} happened between "
                f"{quoted(segment.modules[0])} and {quoted(segment.modules[1])}, so they are no MLP pair; analyse "
                "the module again with inputs that take this path, or keep one of them on the host with mappable="
            )
        return out
