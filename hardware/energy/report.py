"""What an account says: joules per layer and term as (low, mid, high), what is missing, what is taken for granted."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from hardware.interval import Interval

Triple = tuple[float, float, float]

GROUPS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "synapse": ("synapse",),
        "neuron": ("neuron_active", "neuron_inactive"),
        "traffic": ("message", "message_base", "hop_ew", "hop_ns"),
        "digital": ("mac", "weight_read"),
        "dynamic": ("dynamic",),
        "static": ("static",),
        "idle chips": ("idle_chips",),
        "host": ("host_mac", "host_weight_read"),
        "off-chip traffic": ("off_chip",),
    }
)
"""Group -> its terms. ``dynamic`` is a whole network's dynamic energy that nobody has split further."""
_GROUP_OF = {term: group for group, terms in GROUPS.items() for term in terms}
DYNAMIC_GROUPS = ("synapse", "neuron", "traffic", "digital", "dynamic", "off-chip traffic")


@dataclass(frozen=True)
class EnergyLine:
    """Joules of one term of one layer: ``count`` events at the profile's coefficient.

    ``term``: synapse, neuron_active, neuron_inactive, message (or message_base, hop_ew, hop_ns where a placement is
    known), mac, weight_read, host_mac, host_weight_read, dynamic, off_chip; static and idle_chips have layer ``"chip"``
    and count chips.
    """

    layer: str
    term: str
    low_j: float
    mid_j: float
    high_j: float
    count: float

    @property
    def group(self) -> str:
        """One of :data:`GROUPS`."""
        return _GROUP_OF[self.term]


@dataclass(frozen=True)
class EnergyReport:
    """Modelled energy of one set of counts under one profile, in joules for all ``tokens`` tokens together.

    Attributes:
        kind: ``"modelled"`` (counts times coefficients) or ``"extrapolated"`` (scaled from a measured whole network);
            measured joules come from ``hardware.meters.meter``, and the three share no column.
        unknown: what is not in the sum, and why.
        lower_bound: True when ``unknown`` is not empty: print the total as "at least".
        labels: what the figure takes for granted; ``"hypothetical: ..."`` when a constant is used outside its domain.
        missing: group -> why it has no line (``host``: no host profile), for those who print a table by group.
    """

    profile: str
    source: str
    tokens: int
    lines: tuple[EnergyLine, ...]
    unknown: tuple[str, ...]
    labels: tuple[str, ...]
    kind: str = "modelled"
    missing: Mapping[str, str] = field(default_factory=dict)

    @property
    def lower_bound(self) -> bool:
        """Whether something that costs energy is missing from the sum."""
        return bool(self.unknown)

    @property
    def total_low_j(self) -> float:
        """Sum of the lines' low ends, joules."""
        return math.fsum(line.low_j for line in self.lines)

    @property
    def total_mid_j(self) -> float:
        """Sum of the lines' middle values, joules."""
        return math.fsum(line.mid_j for line in self.lines)

    @property
    def total_high_j(self) -> float:
        """Sum of the lines' high ends, joules."""
        return math.fsum(line.high_j for line in self.lines)

    @property
    def total(self) -> Interval:
        """The sum with its unit, which cannot be added to a time."""
        return Interval.of(self.total_low_j, self.total_mid_j, self.total_high_j, "J")

    def by_term(self) -> dict[str, Triple]:
        """Term -> (low, mid, high) joules over all layers."""
        return self._by(lambda line: line.term)

    def by_group(self) -> dict[str, Triple]:
        """Group of :data:`GROUPS` -> (low, mid, high) joules; only groups that have a line."""
        return self._by(lambda line: line.group)

    def by_layer(self) -> dict[str, dict[str, Triple]]:
        """Layer -> group -> (low, mid, high) joules: where each joule goes. Static and idle chips are layer ``"chip"``."""
        found: dict[str, dict[str, Triple]] = {}
        for (layer, group), triple in self._by(lambda line: (line.layer, line.group)).items():
            found.setdefault(layer, {})[group] = triple
        return found

    @property
    def dynamic_j(self) -> Triple:
        """(low, mid, high) joules of synapses, neurons, traffic and arithmetic: never the headline on its own."""
        groups = self.by_group()
        kept = [groups[group] for group in DYNAMIC_GROUPS if group in groups]
        return tuple(math.fsum(triple[i] for triple in kept) for i in range(3))  # type: ignore[return-value]

    def _by(self, key: Callable[[EnergyLine], Any]) -> dict[Any, Triple]:
        sums: dict[Any, list[EnergyLine]] = {}
        for line in self.lines:
            sums.setdefault(key(line), []).append(line)
        return {
            name: (
                math.fsum(line.low_j for line in lines),
                math.fsum(line.mid_j for line in lines),
                math.fsum(line.high_j for line in lines),
            )
            for name, lines in sums.items()
        }

    def to_dict(self) -> dict[str, Any]:
        """The JSON form: totals in joules, with what they leave out."""
        return {
            "profile": self.profile,
            "low_j": self.total_low_j,
            "mid_j": self.total_mid_j,
            "high_j": self.total_high_j,
            "kind": self.kind,
            "source": self.source,
            "lower_bound": self.lower_bound,
            "unknown": list(self.unknown),
            "labels": list(self.labels),
            "tokens": self.tokens,
        }

    def detail(self) -> dict[str, Any]:
        """:meth:`to_dict`, and joules by group and by layer and group, each as [low, mid, high]."""
        layers = {name: {g: list(t) for g, t in groups.items()} for name, groups in self.by_layer().items()}
        groups = {group: list(triple) for group, triple in self.by_group().items()}
        return self.to_dict() | {"groups": groups, "layers": layers, "missing": dict(self.missing)}

    def table(self, per_token: bool = True) -> str:
        """Lines of text: one per group, known or not, and the total. Microjoules per token, or for all tokens."""
        scale = 1e6 / self.tokens if per_token else 1e6
        groups = self.by_group()
        shown = [*groups, *(group for group in self.missing if group not in groups)]
        rows = []
        for group in (name for name in GROUPS if name in shown):
            if group in groups:
                low, mid, high = (scale * value for value in groups[group])
                rows.append(f"{group:<17}{low:>13.4g}{mid:>13.4g}{high:>13.4g}")
            else:
                rows.append(f"{group:<17}{'not known':>13}  {self.missing[group]}")
        unit = "uJ/token" if per_token else "uJ"
        low, mid, high = (scale * value for value in (self.total_low_j, self.total_mid_j, self.total_high_j))
        name = "total, at least" if self.lower_bound else "total"
        head = f"{unit:<17}{'low':>13}{'mid':>13}{'high':>13}   {self.profile}, {self.kind}"
        return "\n".join([head, *rows, f"{name:<17}{low:>13.4g}{mid:>13.4g}{high:>13.4g}"])
