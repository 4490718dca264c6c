"""A placement's messages on the mesh of its chip: how far they travel, which link carries most, how deep the network is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from hardware.chips.mesh import Mesh
from hardware.placement.report import Flow, Placement


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
