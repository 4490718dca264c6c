"""What one layer needs of a chip's cores against what a core has, before any conversion."""

from __future__ import annotations

from dataclasses import dataclass

from hardware.chips.chip import Chip
from hardware.placement import Connection, DoesNotFit, LayerDemand, Placement, place
from hardware.placement.cost import Part, resources
from hardware.text import quoted

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
        self._found: dict[tuple[int, int], Fit] = {}

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
            try:
                demands = self.demands("this layer", n_in, n_out)
                cores = len(place(demands, self.chip).cores)
                limits = next(iter(self.chip.budgets.values())).limits
                need = {k: v for k, v in self._whole(demands[1]).items() if k != "groups"}  # one group, whatever its size
                scarce = max(need, key=lambda resource: need[resource] / limits[resource])
                self._found[key] = Fit(scarce, need[scarce], limits[scarce], cores)
            except DoesNotFit as failure:
                limit = failure.binding
                remedy = "; ".join(failure.remedies) or "a smaller layer, or keep it on the host with mappable="
                self._found[key] = Fit(limit.resource, limit.used, limit.limit, 0, remedy)
        return self._found[key]

    def _whole(self, layer: LayerDemand) -> dict[str, int]:
        """What the layer would take of each resource on a single core."""
        part = Part(layer.name, ((0, layer.neurons), (0, 1), (0, 1)))
        return resources(layer, part, next(iter(self.chip.budgets.values())))

    def together(self, layers: dict[str, tuple[int, int]], chips: int) -> Placement:
        """All layers on so many chips. Raises DoesNotFit, which names the limit and what would help."""
        demands = [demand for name, (n_in, n_out) in layers.items() for demand in self.demands(name, n_in, n_out)]
        return place(demands, self.chip, chips)
