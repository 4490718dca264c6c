"""Whether a network fits into the fixed pools of a chip such as Xylo, what of each it takes, and what stands in the way."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from hardware.chips.pooled import PooledChip, list_pooled, load_pooled
from hardware.placement.report import DoesNotFit, Limit

RESOURCES = (
    "inputs",
    "hidden",
    "readouts",
    "synapses_per_neuron",
    "fanout",
    "recurrent_entries",
    "input_reach",
    "output_reach",
)
_REMEDIES: Mapping[str, str] = MappingProxyType(
    {
        "inputs": "fewer input channels, for instance by summing neighbouring ones before the chip",
        "hidden": "fewer or smaller hidden layers",
        "readouts": "fewer read-outs, for instance classes coded by several of them",
        "synapses_per_neuron": "one synapse per hidden neuron",
        "fanout": "sparser recurrent weights, or narrower hidden layers",
        "recurrent_entries": "sparser recurrent weights, or narrower hidden layers",
        "input_reach": "a narrower first layer",
        "output_reach": "a narrower last hidden layer",
    }
)


@dataclass(frozen=True)
class PooledDemand:
    """What a network takes of each of :data:`RESOURCES`.

    Attributes:
        name: of the network. used: resource -> how many; of fan-out that of the widest neuron.
        at: resource -> which neuron or population takes most, where one can be named.
    """

    name: str
    used: Mapping[str, int]
    at: Mapping[str, str]


@dataclass(frozen=True)
class PooledPlacement:
    """A network that fits: resource -> (used, limit)."""

    chip: str
    title: str
    used: Mapping[str, Limit]
    notes: tuple[str, ...]

    @property
    def binding(self) -> Limit:
        """The resource nearest to its limit; whether a second synapse is used says nothing of room."""
        return max((x for name, x in self.used.items() if name != "synapses_per_neuron"), key=lambda limit: limit.share)

    def to_dict(self) -> dict[str, Any]:
        """All of it as JSON types."""
        return {
            "chip": self.chip,
            "binding": self.binding.resource,
            "used": {name: [limit.used, limit.limit] for name, limit in self.used.items()},
            "notes": list(self.notes),
        }

    def __str__(self) -> str:
        lines = [f"{self.title}: fits, nearest to its limit in {self.binding}"]
        lines += [f"  {limit}" for limit in self.used.values()]
        return "\n".join([*lines, *(f"note: {note}" for note in self.notes)])


def place_pooled(demand: PooledDemand, chip: PooledChip | str) -> PooledPlacement:
    """Hold a network against a chip's pools.

    Raises:
        DoesNotFit: the first resource that is short, who takes it, and what would help: other chips were tried.
    """
    chip = chip if isinstance(chip, PooledChip) else load_pooled(chip)
    limits = _limits(demand, chip)
    short = [limit for limit in limits.values() if limit.used > limit.limit]
    if short:
        first = short[0]
        where = demand.at.get(first.resource)
        others = [load_pooled(name) for name in list_pooled() if name != chip.name]
        fitting = [f"chip {o.name}" for o in others if all(x.used <= x.limit for x in _limits(demand, o).values())]
        remedies = (_REMEDIES[first.resource], *fitting, *(f"{_REMEDIES[x.resource]} ({x} too)" for x in short[1:]))
        what = f"{demand.name}{f' ({where})' if where else ''} on {chip.title}"
        raise DoesNotFit(what, first, remedies)
    inferred = [name for name in RESOURCES if chip.provenance[name].method == "inferred"]
    notes = tuple(f"the limit of {name} is inferred: {chip.provenance[name].note}" for name in inferred)
    return PooledPlacement(chip.name, chip.title, MappingProxyType(limits), notes)


def _limits(demand: PooledDemand, chip: PooledChip) -> dict[str, Limit]:
    return {name: Limit(name, demand.used[name], getattr(chip, name)) for name in RESOURCES}
