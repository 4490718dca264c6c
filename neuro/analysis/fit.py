"""What one layer needs of a chip's cores against what a core has, before any conversion."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace

from torch import nn

from hardware.chips.chip import Chip
from hardware.placement import Connection, Convolution, DoesNotFit, LayerDemand, Placement, place
from hardware.placement.cost import Part, resources
from hardware.text import quoted
from neuro.conversion.convolutions.geometry import in_graph_order

WEIGHT_BITS = 8
MESSAGE_BITS = 16  # graded messages, sign included


@dataclass(frozen=True)
class Fit:
    """The resource a layer is nearest to (or beyond) the limit of.

    `need`: what the whole layer takes of `limit`; `have`: what one core holds of it. `cores`: how many it takes, 0 where
    it does not fit at all; `remedy` then says what would help.
    """

    limit: str
    need: int
    have: int
    cores: int
    remedy: str = ""

    @property
    def fits(self) -> bool:
        """Whether some number of cores holds the layer."""
        return self.cores > 0


class Fitter:
    """Fits layers to one chip, each shape once.

    The demand is that of the weights and neurons alone: constant lines for biases come with the conversion, and
    `hardware.placement` counts them in the finished graph.
    """

    def __init__(self, chip: Chip, *, graded: bool) -> None:
        self.chip, self._graded = chip, graded
        self._found: dict[Hashable, Fit] = {}

    def demands(self, name: str, n_in: int, n_out: int) -> tuple[LayerDemand, LayerDemand]:
        """The layer's input on the host, and the layer."""
        source = f"{name}:input"
        layer = LayerDemand(
            name,
            n_out,
            (Connection(source, n_in, WEIGHT_BITS),),
            payload_bits=min(MESSAGE_BITS, self.chip.payload_bits) if self._graded else 1,
            programmable=self._graded,
        )
        return LayerDemand(source, n_in, on_chip=False), layer

    def linear(self, n_in: int, n_out: int) -> Fit:
        """A dense layer of 8-bit weights."""
        if not self.chip.budgets:
            raise ValueError(f"chip {quoted(self.chip.name)} has no budgets: nothing can be placed on it; see loihi2.yaml")
        key = (n_in, n_out)
        if key not in self._found:
            self._found[key] = self._fit(self.demands("this layer", n_in, n_out))
        return self._found[key]

    def convolution_demands(
        self, name: str, layer: nn.Conv1d | nn.Conv2d, shape: tuple[int, ...]
    ) -> tuple[LayerDemand, LayerDemand]:
        """The layer's input on the host, samples of `shape` in torch's order, and the layer."""
        kernel, geometry = in_graph_order(layer, layer.weight.detach(), shape)
        source = f"{name}:input"
        convolution = Convolution(
            source,
            geometry.input_shape,
            channels=kernel.shape[0],
            kernel=(kernel.shape[1], kernel.shape[2]),
            stride=geometry.stride,
            padding=geometry.padding,
            dilation=geometry.dilation,
            groups=geometry.groups,
            weight_bits=WEIGHT_BITS,
        )
        inputs, dense = self.demands(name, convolution.inputs, math.prod(convolution.output_shape))
        return inputs, replace(dense, connections=(convolution,), shape=convolution.output_shape)

    def convolution(self, layer: nn.Conv1d | nn.Conv2d, shape: tuple[int, ...]) -> Fit:
        """A convolution of 8-bit weights, on samples of `shape` in torch's order."""
        key = (shape, tuple(layer.weight.shape), layer.stride, layer.padding, layer.dilation, layer.groups)
        if key not in self._found:
            self._found[key] = self._fit(self.convolution_demands("this layer", layer, shape))
        return self._found[key]

    def _fit(self, demands: tuple[LayerDemand, LayerDemand]) -> Fit:
        try:
            cores = len(place(demands, self.chip).cores)
            limits = next(iter(self.chip.budgets.values())).limits
            need = {k: v for k, v in self._whole(demands[1]).items() if k != "groups"}  # one group, whatever its size
            scarce = max(need, key=lambda resource: need[resource] / limits[resource])
            return Fit(scarce, need[scarce], limits[scarce], cores)
        except DoesNotFit as failure:
            limit = failure.binding
            remedy = "; ".join(failure.remedies) or "a smaller layer, or keep it on the host with mappable="
            return Fit(limit.resource, limit.used, limit.limit, 0, remedy)

    def _whole(self, layer: LayerDemand) -> dict[str, int]:
        """What the layer would take of each resource on a single core."""
        width, height, channels = layer.box
        part = Part(layer.name, ((0, width), (0, height), (0, channels)))
        return resources(layer, part, next(iter(self.chip.budgets.values())))

    def together(self, demands: Sequence[LayerDemand], chips: int) -> Placement:
        """All these layers on so many chips. Raises DoesNotFit, which names the limit and what would help."""
        return place(demands, self.chip, chips)
