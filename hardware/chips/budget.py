"""What one core holds and how synapses are counted in it: a named set of limits, each with source, method and date.

Resources:
    neurons: compartments.
    axon_in: sources whose messages the core receives.
    synapse_words: 64-bit words of synaptic memory.
    words_per_axon: most words behind one input axon.
    axon_out: output-axon entries, one per neuron and receiving core, two if that core is on another chip.
    axon_out_far: those entries that lead to another chip.
    axon_map: entries that map neurons to their receivers; where convolutions alone read a layer, one per position (W, H).
    groups: neuron groups.
    pool: words of one memory shared by axon_in, neurons, synapse_words and axon_map.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from hardware import datafile
from hardware.datafile import DataFileError, Provenance
from hardware.text import quoted

RULES = ("nengo", "nxtf", "netx")
RESOURCES = (
    "neurons",
    "axon_in",
    "synapse_words",
    "words_per_axon",
    "axon_out",
    "axon_out_far",
    "axon_map",
    "groups",
    "pool",
)
_SETTINGS = ("rule", "encoding", "entry_synapses", "index_fields", "weight_fields", "delay_bits", "max_delay")


@dataclass(frozen=True)
class Budget:
    """How one core is accounted.

    Attributes:
        name, title: for people; the title says so when values are inferred.
        rule: how synapses become words: ``"nengo"`` (blocks, each rounded up), ``"nxtf"`` (entries packed, one spare
            word at an awkward remainder, all axons of a connection padded to the longest), ``"netx"`` (one entry per
            input axon or kernel position).
        encoding: of a connection that names none.
        entry_synapses: most synapses in one block or entry; 0 for no bound.
        index_fields: widths that an index can have.
        weight_fields: widths that a weight can have; a weight takes the next wider one.
        delay_bits: width of the delay field of a synapse that has one.
        max_delay: longest delay in steps.
        limits: resource -> most that a core holds; a resource that is not named is not limited.
        provenance: setting or resource -> where it comes from.
    """

    name: str
    title: str
    rule: str
    encoding: str
    entry_synapses: int
    index_fields: tuple[int, ...]
    weight_fields: tuple[int, ...]
    delay_bits: int
    max_delay: int
    limits: Mapping[str, int]
    provenance: Mapping[str, Provenance]

    @property
    def inferred(self) -> tuple[str, ...]:
        """Names of the values that are our reading of published tool output, not a statement of the maker."""
        return tuple(name for name, where in self.provenance.items() if where.method == "inferred")

    def weight_field(self, bits: int) -> int | None:
        """The narrowest field that holds a weight of so many bits; None if there is none."""
        return next((width for width in self.weight_fields if width >= bits), None)

    def index_field(self, places: int) -> int:
        """Bits of an index that names one of so many places; the widest field if none is wide enough."""
        needed = max(0, places - 1).bit_length()
        return next((width for width in self.index_fields if width >= needed), self.index_fields[-1])


def read_budgets(where: str, entry: object, methods: tuple[str, ...]) -> Mapping[str, Budget]:
    """The ``budgets`` of a chip file, the default one first.

    Raises:
        DataFileError: unknown or missing key, a value of the wrong kind, no source.
    """
    if not isinstance(entry, Mapping) or not entry:
        raise DataFileError(f"{where}: budgets must be a mapping with at least one entry")
    return MappingProxyType(
        {str(name): _budget(f"{where}: {name}", str(name), raw, methods) for name, raw in entry.items()}
    )


def _budget(where: str, name: str, raw: object, methods: tuple[str, ...]) -> Budget:
    entry = datafile.check_keys(where, raw, ("title", "settings", "limits"))
    settings = datafile.check_keys(f"{where}: settings", entry["settings"], _SETTINGS)
    limits = datafile.check_keys(f"{where}: limits", entry["limits"], ("neurons", "synapse_words"), RESOURCES)
    provenance: dict[str, Provenance] = {}
    values: dict[str, Any] = {}
    for key, item in {**settings, **limits}.items():
        spot = f"{where}: {key}"
        value, provenance[key] = datafile.sourced(spot, item, methods)
        values[key] = _value(spot, key, value)
    return Budget(
        name=name,
        title=datafile.text(f"{where}: title", entry["title"]),
        limits=MappingProxyType({key: values[key] for key in RESOURCES if key in limits}),
        provenance=MappingProxyType(provenance),
        **{key: values[key] for key in _SETTINGS},
    )


def _value(spot: str, key: str, value: object) -> object:
    if key == "rule":
        return datafile.choice(spot, value, RULES)
    if key == "encoding":
        return datafile.choice(spot, value, ("dense", "sparse"))
    if key.endswith("_fields"):
        if not isinstance(value, list) or not value or any(not isinstance(n, int) or n < 0 for n in value):
            raise DataFileError(f"{spot}: expected a list of widths in bits, got {quoted(value)}")
        return tuple(sorted(value))
    if isinstance(value, bool) or not isinstance(value, int) or value < (0 if key in _SETTINGS else 1):
        raise DataFileError(f"{spot}: expected a whole number above zero, got {quoted(value)}")
    return value
