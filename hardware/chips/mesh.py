"""The mesh of tiles on a chip: where a core sits, how far a message travels, which link carries most.

Core slot ``n`` sits on tile ``n // cores_per_tile``, tiles numbered column by column, as SANA-FE numbers them. That is a
choice: a placement numbers slots and knows nothing of the mesh. Messages go first along the row, then along the column.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from hardware import datafile
from hardware.datafile import DataFileError
from hardware.text import quoted

if TYPE_CHECKING:
    from hardware.placement.report import Flow, Placement

_KEYS = ("columns", "rows", "cores_per_tile")


@dataclass(frozen=True)
class Mesh:
    """``columns`` x ``rows`` tiles of ``cores_per_tile`` cores; ``source`` says who says so."""

    columns: int
    rows: int
    cores_per_tile: int
    source: str

    def tile(self, slot: int) -> tuple[int, int]:
        """(column, row) of a core slot.

        Raises:
            ValueError: the mesh has no such slot.
        """
        number = slot // self.cores_per_tile
        if slot < 0 or number >= self.columns * self.rows:
            most = self.columns * self.rows * self.cores_per_tile
            raise ValueError(f"core slot {slot}: the mesh has {most} slots")
        return number // self.rows, number % self.rows

    def hops(self, source: int, target: int) -> tuple[int, int]:
        """(east-west, north-south) hops between two core slots of one chip."""
        (x0, y0), (x1, y1) = self.tile(source), self.tile(target)
        return abs(x1 - x0), abs(y1 - y0)

    def links(self, source: int, target: int) -> list[tuple[int, int, int, int]]:
        """Links from tile to tile, (column, row, column, row), that a message between two slots takes."""
        (x, y), (x1, y1) = self.tile(source), self.tile(target)
        found = []
        while (x, y) != (x1, y1):
            step = (x + (1 if x1 > x else -1), y) if x != x1 else (x, y + (1 if y1 > y else -1))
            found.append((x, y, *step))
            x, y = step
        return found


@dataclass(frozen=True)
class LayerTraffic:
    """What one event into a layer's synapses becomes on the mesh, averaged over the placement's rates.

    Attributes:
        deliveries: messages per event: one for each core that needs it.
        hops_ew, hops_ns: hops per event on the mesh, all its messages together; those within chips only.
        between_chips: messages per event that leave their chip.
        from_host: messages per event that the host injects.
    """

    deliveries: float
    hops_ew: float
    hops_ns: float
    between_chips: float
    from_host: float


def layer_traffic(placement: Placement, mesh: Mesh) -> dict[str, LayerTraffic]:
    """Layer -> its traffic per event; layers that nothing is sent to are left out."""
    sums: dict[str, list[float]] = {}
    for flow in placement.flows:
        ew, ns, far, host = _distance(flow, placement, mesh)
        entry = sums.setdefault(flow.layer, [0.0] * 5)
        for i, value in enumerate((1.0, ew, ns, far, host)):
            entry[i] += flow.messages * value
    events = {layer.name: layer.events for layer in placement.layers}
    return {
        name: LayerTraffic(*(value / events[name] for value in entry)) for name, entry in sums.items() if events[name] > 0
    }


def _distance(flow: Flow, placement: Placement, mesh: Mesh) -> tuple[float, float, float, float]:
    """(hops east-west, hops north-south, 1 if it leaves its chip, 1 if it comes from the host)."""
    if flow.source < 0:
        return 0.0, 0.0, 0.0, 1.0
    source, target = placement.cores[flow.source], placement.cores[flow.target]
    if source.chip != target.chip:
        return 0.0, 0.0, 1.0, 0.0
    ew, ns = mesh.hops(source.slot, target.slot)
    return float(ew), float(ns), 0.0, 0.0


def heaviest_link(placement: Placement, mesh: Mesh, weights: Mapping[str, float]) -> tuple[float, float]:
    """Messages on the busiest link, east-west and north-south, chips apart; the way from and to the host is left out.

    Args:
        placement: who sends to whom.
        mesh: of each chip.
        weights: layer -> factor on its flows (words per message, counted over assumed events).
    """
    loads: dict[tuple[int, ...], float] = {}
    for flow in placement.flows:
        if flow.source < 0:
            continue
        source, target = placement.cores[flow.source], placement.cores[flow.target]
        if source.chip != target.chip:
            continue
        for link in mesh.links(source.slot, target.slot):
            key = (source.chip, *link)
            loads[key] = loads.get(key, 0.0) + flow.messages * weights.get(flow.layer, 1.0)
    ew = max((load for (_, x0, _, x1, _), load in loads.items() if x0 != x1), default=0.0)
    ns = max((load for (_, _, y0, _, y1), load in loads.items() if y0 != y1), default=0.0)
    return ew, ns


def depth(placement: Placement) -> int:
    """Layers in series on the longest way through the network, loops cut: steps from the first layer to the last."""
    sources: dict[str, set[str]] = {layer.name: set() for layer in placement.layers}
    for flow in placement.flows:
        if flow.source >= 0:
            names = {part.layer for part in placement.cores[flow.source].parts}
            sources[flow.layer] |= names - {flow.layer}
    found: dict[str, int] = {}

    def longest(name: str, above: tuple[str, ...]) -> int:
        if name not in found:
            ways = [longest(source, (*above, name)) for source in sorted(sources[name]) if source not in (*above, name)]
            value = 1 + max(ways, default=0)
            if above:
                return value  # a cut loop may have shortened it: only a way that starts here is final
            found[name] = value
        return found[name]

    return max((longest(layer.name, ()) for layer in placement.layers), default=0)


def read_mesh(where: str, raw: object, methods: Sequence[str]) -> Mesh:
    """A chip file's ``mesh`` entry.

    Raises:
        DataFileError: unknown, missing or repeated key; no whole number above zero; no source.
    """
    entry = datafile.check_keys(f"{where}: mesh", raw, _KEYS)
    values, sources = [], []
    for key in _KEYS:
        spot = f"{where}: mesh: {key}"
        item = datafile.check_keys(spot, entry[key], ("value", "source", "method", "date"), ("note",))
        value = item["value"]
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise DataFileError(f"{spot}: expected a whole number above zero, got {quoted(value)}")
        datafile.choice(f"{spot}: method", item["method"], methods)
        datafile.iso_date(f"{spot}: date", item["date"])
        values.append(value)
        sources.append(datafile.text(f"{spot}: source", item["source"]))
    columns, rows, cores_per_tile = values
    return Mesh(columns, rows, cores_per_tile, "; ".join(dict.fromkeys(sources)))
