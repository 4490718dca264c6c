"""What a placement says: cores with (used, limit) per resource, layers with their binding limit, a failure's remedies."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from hardware.placement.cost import Part

_BLOCK = re.compile(r"(?:.*[._])?(blocks?|layers?|h)[._]?(\d+)[._](.+)")


def plain_name(name: str) -> str:
    """``blocks.3.mlp.fc1`` in words: ``mlp.fc1 of block 3``; other names as they are."""
    found = _BLOCK.fullmatch(name)
    return f"{found[3]} of block {found[2]}" if found else name


@dataclass(frozen=True)
class Limit:
    """``used`` of ``limit`` of one resource."""

    resource: str
    used: int
    limit: int

    @property
    def share(self) -> float:
        """used / limit; infinite where the chip has none of it."""
        return self.used / self.limit if self.limit else math.inf

    def __str__(self) -> str:
        return f"{self.resource} {self.used:,} of {self.limit:,} ({100 * self.share:.2f} %)"


class DoesNotFit(ValueError):
    """A network that the chips do not hold.

    Attributes:
        what: the layer, or the network.
        binding: the limit that stands in the way.
        remedies: what would make it fit; those with a number of cores were tried.
    """

    def __init__(self, what: str, binding: Limit, remedies: tuple[str, ...]) -> None:
        fixes = "; ".join(remedies) if remedies else "a smaller network"
        super().__init__(
            f"{what} does not fit: {binding.resource} {binding.used:,} of {binding.limit:,}."
            f" What would make it fit: {fixes}"
        )
        self.what, self.binding, self.remedies = what, binding, remedies


@dataclass(frozen=True)
class Flow:
    """Messages per step from one core to another that go into one layer's synapses.

    Attributes:
        source: core that sends; -1 for inputs that the host injects.
        target: core that receives; the same one where a layer feeds itself.
        layer: layer of the synapses. A message goes once to every part of the layer that needs it.
        messages: per step.
    """

    source: int
    target: int
    layer: str
    messages: float


@dataclass(frozen=True)
class Core:
    """One core.

    Attributes:
        number: through all chips, in order of layers.
        chip, slot: which chip, and which core on it; slots are numbers, not places on the mesh.
        parts: what it holds.
        used: resource -> (used, limit).
        synops: synaptic operations per step.
        other_words: synaptic words of the same parts by the chip's other rules: budget name -> words.
        synops_of: ``synops`` by layer.
    """

    number: int
    chip: int
    slot: int
    parts: tuple[Part, ...]
    used: Mapping[str, Limit]
    synops: float
    other_words: Mapping[str, int]
    synops_of: Mapping[str, float] = field(default_factory=dict, repr=False)

    @property
    def binding(self) -> Limit:
        """The resource nearest to its limit."""
        return max(self.used.values(), key=lambda limit: limit.share)

    @property
    def share(self) -> float:
        """Utilisation: the binding resource's used / limit."""
        return self.binding.share


@dataclass(frozen=True)
class LayerPlacement:
    """One layer.

    Attributes:
        name: of the layer.
        neurons: how many.
        cores: numbers of the cores that hold a part of it.
        binding: what the whole layer would take of one core's scarcest resource: above the limit, the reason for a split.
        synops: synaptic operations per step.
        imbalance: largest part's synaptic operations over the mean of the layer's parts; 1 is perfect.
        partial_sums: whether it is split by inputs.
        events: messages per step that its sources send into it, each counted once per connection.
    """

    name: str
    neurons: int
    cores: tuple[int, ...]
    binding: Limit
    synops: float
    imbalance: float
    partial_sums: bool
    events: float = 0.0


@dataclass(frozen=True)
class Placement:
    """Layers on cores on chips.

    Attributes:
        chip, title: which chip.
        budget, budget_title: the accounting used; its title says so where values are inferred.
        chips: chips used; ``chips_available``: as asked, None for any number.
        cores_per_chip: cores of one chip.
        cores, layers: the result.
        messages_between_cores, messages_between_chips, messages_from_host: per step.
        measured: rates were measured, in every layer.
        notes: what is inferred, assumed or left out.
        shapes: layer -> (W, H, C).
        flows: who sends how much to whom.
    """

    chip: str
    title: str
    budget: str
    budget_title: str
    chips: int
    chips_available: int | None
    cores_per_chip: int
    cores: tuple[Core, ...]
    layers: tuple[LayerPlacement, ...]
    messages_between_cores: float
    messages_between_chips: float
    messages_from_host: float
    measured: bool
    notes: tuple[str, ...]
    shapes: Mapping[str, tuple[int, int, int]] = field(repr=False)
    flows: tuple[Flow, ...] = field(default=(), repr=False)

    @property
    def synops(self) -> float:
        """Synaptic operations per step, all cores."""
        return math.fsum(core.synops for core in self.cores)

    def core_of(self, layer: str) -> list[int]:
        """Core number of every neuron of a layer, (neurons,); of a layer split by inputs, the core that sums.

        Raises:
            KeyError: no such layer on the chip.
        """
        shape = self.shapes[layer]
        found = [-1] * math.prod(shape)
        for core in self.cores:
            for part in core.parts:
                if part.layer == layer and part.role != "partial":
                    (w0, w1), (h0, h1), (c0, c1) = part.box
                    for w in range(w0, w1):
                        for h in range(h0, h1):
                            start = (w * shape[1] + h) * shape[2]
                            found[start + c0 : start + c1] = [core.number] * (c1 - c0)
        return found

    def to_dict(self) -> dict[str, Any]:
        """All of it as JSON types."""
        return {
            "chip": self.chip,
            "budget": self.budget,
            "budget_title": self.budget_title,
            "chips": self.chips,
            "chips_available": self.chips_available,
            "cores_per_chip": self.cores_per_chip,
            "cores_used": len(self.cores),
            "synops_per_step": self.synops,
            "messages_per_step": {
                "between_cores": self.messages_between_cores,
                "between_chips": self.messages_between_chips,
                "from_host": self.messages_from_host,
            },
            "measured": self.measured,
            "layers": [
                {
                    "name": layer.name,
                    "neurons": layer.neurons,
                    "cores": list(layer.cores),
                    "binding": _limit(layer.binding),
                    "synops_per_step": layer.synops,
                    "imbalance": layer.imbalance,
                    "partial_sums": layer.partial_sums,
                }
                for layer in self.layers
            ],
            "cores": [
                {
                    "core": core.number,
                    "chip": core.chip,
                    "slot": core.slot,
                    "share": core.share,
                    "binding": core.binding.resource,
                    "used": {name: [limit.used, limit.limit] for name, limit in core.used.items()},
                    "synapse_words_by_other_rules": dict(core.other_words),
                    "synops_per_step": core.synops,
                    "parts": [
                        {
                            "layer": part.layer,
                            "role": part.role,
                            "box": [list(span) for span in part.box],
                            "inputs": None if part.inputs is None else [list(span) for span in part.inputs],
                        }
                        for part in core.parts
                    ],
                }
                for core in self.cores
            ],
            "notes": list(self.notes),
        }

    def __str__(self) -> str:
        rows = [("layer", "neurons", "cores", "fullest core", "one core would take")]
        for layer in self.layers:
            fullest = max((self.cores[n] for n in layer.cores), key=lambda core: core.share)
            rows.append(
                (layer.name, f"{layer.neurons:,}", f"{len(layer.cores):,}", str(fullest.binding), str(layer.binding))
            )
        widths = [max(len(row[i]) for row in rows) for i in range(5)]
        lines = [
            "  ".join(
                cell.rjust(width) if 0 < i < 3 else cell.ljust(width)
                for i, (cell, width) in enumerate(zip(row, widths, strict=True))
            ).rstrip()
            for row in rows
        ]
        many = "s" * (self.chips > 1)
        head = f"{self.title}, {self.budget}: {len(self.cores):,} of {self.chips * self.cores_per_chip:,} cores"
        head += f" on {self.chips:,} chip{many}"
        tail = [
            f"synaptic operations per step: {self.synops:,.0f}; fullest core of a layer at most"
            f" {max(layer.imbalance for layer in self.layers):.2f} times the layer's mean",
            f"messages per step: {self.messages_between_cores:,.0f} between cores,"
            f" {self.messages_between_chips:,.0f} between chips, {self.messages_from_host:,.0f} from the host",
        ]
        return "\n".join([head, *lines, *tail, *(f"note: {note}" for note in self.notes)])


def _limit(limit: Limit) -> dict[str, Any]:
    return {"resource": limit.resource, "used": limit.used, "limit": limit.limit}
