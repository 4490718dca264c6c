"""A graded graph on the virtual devices of BrainChip's akida package, laid out by the makers' own mapper.

What a device holds is the mapper's knowledge; no data file here repeats it, and what it refuses is given in its words.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

from hardware.text import quoted, short
from neuro.graph import SpikingGraph
from neuro.graph.akida import akida_network
from neuro.simulators.akida.process import ask, write

DEVICES: Mapping[str, str] = MappingProxyType(
    {
        "akida_two_nodes": "TwoNodesIPv2",
        "akida_four_nodes": "FourNodesIPv2",
        "akida_six_nodes": "SixNodesIPv2",
        "akida_twelve_nodes": "TwelveNodesIPv2",
    }
)
"""Our names of the virtual devices of Akida 2.0, and the package's."""


AKIDA_1 = ("akd1000", "akd1500")
AKIDA_1_REASON = (
    "a chip of Akida 1.0, whose layers send 4 bits without a sign; graphs of graded kinds have 8-bit inputs with one, and"
    " are laid out for virtual devices of Akida 2.0"
)
NOTE = (
    "nodes are neural processors, in the mapper's mode that takes the fewest. The limits are the mapper's own, so that no"
    " data file here has them. The package gives no energy and no time of a virtual device"
)


@dataclass(frozen=True)
class DeviceMapping:
    """A network on one virtual device, as the makers' mapper lays it out.

    Attributes:
        name: ours. refused: why it does not fit, in the mapper's words; "" where it fits.
        nodes: neural processors that it takes. program_bytes: size of the program that configures them.
        passes: how often the device is configured in one inference. layers: population -> type of processor -> how many.
    """

    name: str
    refused: str = ""
    nodes: int = 0
    program_bytes: int = 0
    passes: int = 0
    layers: Mapping[str, Mapping[str, int]] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """All of it as JSON types."""
        if self.refused:
            return {"fits": False, "refused": self.refused}
        layers = {name: dict(parts) for name, parts in self.layers.items()}
        return {
            "fits": True,
            "nodes": self.nodes,
            "program_bytes": self.program_bytes,
            "passes": self.passes,
            "layers": layers,
        }

    def __str__(self) -> str:
        if self.refused:
            return f"{self.name}: does not fit: {self.refused}"
        counted = {name: " + ".join(f"{n} {kind}" for kind, n in found.items()) for name, found in self.layers.items()}
        parts = "; ".join(f"{name}: {text}" for name, text in counted.items())
        return (
            f"{self.name}: fits, {self.nodes} nodes, program of {self.program_bytes:,} bytes, {self.passes}"
            f" pass{'es' if self.passes != 1 else ''} ({parts})"
        )


def map_on(
    graph: SpikingGraph, devices: Sequence[str] = tuple(DEVICES), *, python: Path | None = None, timeout_s: float = 300.0
) -> tuple[list[DeviceMapping], str]:
    """What a graph takes of virtual devices, by the makers' own mapper, and the version of the package.

    Args:
        devices: names of :data:`DEVICES`.
        graph, python, timeout_s: as `run`.

    Raises:
        GraphError, AkidaUnavailable, AkidaTimeout, AkidaRefused, AkidaError: as `run`.
    """
    network = akida_network(graph)
    with tempfile.TemporaryDirectory(prefix="spikegate-akida-", ignore_cleanup_errors=True) as name:
        folder = write(network, Path(name, "0"), devices=[DEVICES[device] for device in devices])
        (said,), version = ask("map", [folder], python, timeout_s)
    names = [layer.name for layer in network.layers]
    found = []
    for device in devices:
        one = said["devices"][DEVICES[device]]
        if "refused" in one:
            text = one["refused"]
            for number, own in enumerate(names):
                text = text.replace(f"'layer{number}'", quoted(own))
            found.append(DeviceMapping(device, refused=short(" ".join(text.split()), 300)))
            continue
        layers = dict(zip(names, one["layers"], strict=True))
        nodes = sum(sum(parts.values()) for parts in layers.values())
        found.append(DeviceMapping(device, "", nodes, one["program_bytes"], one["passes"], MappingProxyType(layers)))
    return found, version
