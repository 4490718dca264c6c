"""Below which event density a chip costs less than a dense reference, where a network stands, what would have to change.

Density is synaptic operations over the dense multiply-accumulates of the same layers: spikes per synapse and inference
where a token is one inference of T steps.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from hardware import datafile
from hardware.datafile import DataFileError
from hardware.energy.account import account
from hardware.energy.counts import Counts, check_counts
from hardware.energy.profile import METHODS, Profile
from hardware.energy.report import Triple
from hardware.interval import Interval
from hardware.placement.report import Placement
from hardware.text import quoted

QUANTITIES: Mapping[str, str] = MappingProxyType(
    {
        "spike_rate": "messages per neuron and step",
        "spikes_per_synapse": "synaptic operations per dense MAC",
        "spikes_per_neuron": "messages per neuron and inference",
    }
)


@dataclass(frozen=True)
class BreakEven:
    """A chip against one dense reference, on the layers of the chip alone.

    Attributes:
        chip, reference: profile names.
        density: where the network stands.
        simple: E_MAC / E_synop, (low, mid, high): synaptic operations alone.
        whole: the same with neuron updates paid for: (low, mid, high); 0 where the neurons alone cost more than the
            reference. Messages fall with the density, neuron updates do not.
        chip_j, reference_j: (low, mid, high) joules for all tokens, static power and host left out of both.
        sentence: where it stands and what would have to change.
    """

    chip: str
    reference: str
    density: float
    simple: Triple
    whole: Triple
    chip_j: Triple
    reference_j: Triple
    sentence: str

    @property
    def factor(self) -> float:
        """Chip joules over reference joules, middle values; below 1 the chip wins."""
        return self.chip_j[1] / self.reference_j[1]

    @property
    def verdict(self) -> str:
        """``"chip wins"`` or ``"reference wins"`` where the intervals do not overlap, else ``"undecided"``."""
        if self.chip_j[2] < self.reference_j[0]:
            return "chip wins"
        return "reference wins" if self.chip_j[0] > self.reference_j[2] else "undecided"

    def to_dict(self) -> dict[str, Any]:
        """The JSON form."""
        return {
            "chip": self.chip,
            "reference": self.reference,
            "density": self.density,
            "break_even_synops_alone": list(self.simple),
            "break_even_with_neurons": list(self.whole),
            "factor": self.factor,
            "verdict": self.verdict,
            "sentence": self.sentence,
        }


@dataclass(frozen=True)
class Standing:
    """A network against one published threshold.

    Attributes:
        name, quantity, unit, against, source: of the threshold.
        value: where the network stands.
        low, high: the threshold.
        verdict: ``"below"``, ``"within"`` or ``"above"``: below is where spiking pays according to the source.
        caution: why the comparison may not hold, or "".
    """

    name: str
    quantity: str
    value: float
    low: float
    high: float
    unit: str
    against: str
    source: str
    verdict: str
    caution: str

    def __str__(self) -> str:
        limit = f"{self.low:.3g}" if self.low == self.high else f"{self.low:.3g} to {self.high:.3g}"
        tail = f"; {self.caution}" if self.caution else ""
        return f"{self.value:.3g} {self.unit}, {self.verdict} {limit} ({self.source}){tail}"


def break_even(
    counts: Sequence[Counts], chip: Profile, reference: Profile, *, placement: Placement | None = None
) -> BreakEven:
    """The density at which ``chip`` and ``reference`` cost the same.

    Args:
        counts: one record per layer; layers on the host are left out on both sides.
        chip: a chip profile.
        reference: a dense profile.
        placement: as in :func:`hardware.energy.account`.

    Raises:
        ValueError: no layer on the chip, no dense MACs or no events in them, profiles of the wrong kind or without the
            coefficients that this needs.
    """
    check_counts(counts)
    mine = [item for item in counts if not item.host]
    macs, synops = sum(item.dense_macs for item in mine), sum(item.synops for item in mine)
    if not macs or not synops:
        raise ValueError(f"{macs} dense MACs and {synops} synaptic operations on the chip: a density needs both")
    if chip.costs != "spiking" or reference.costs != "dense":
        raise ValueError(
            f"{quoted(chip.name)} against {quoted(reference.name)}: a chip profile and a dense one are needed, in "
            "that order"
        )
    mac, synop = _per(reference, ("mac", "weight_read")), _per(chip, ("synapse",))
    spent = account(mine, chip, placement=placement).by_group()
    falling = _triple(spent, ("synapse", "traffic", "off-chip traffic"))
    fixed = _triple(spent, ("neuron",))
    dense = _triple(account(mine, reference).by_group(), ("digital",))
    density = synops / macs
    mac_pj, synop_pj = mac.to("pJ"), synop.to("pJ")
    simple = (mac_pj[0] / synop_pj[2], mac_pj[1] / synop_pj[1], mac_pj[2] / synop_pj[0])
    whole = tuple(max(0.0, density * (dense[i] - fixed[2 - i]) / falling[2 - i]) for i in range(3))
    chip_j = tuple(a + b for a, b in zip(falling, fixed, strict=True))
    sentence = _sentence(chip, reference, density, whole[1], chip_j[1] / dense[1], (dense[1] - fixed[1], fixed[1], synops))
    return BreakEven(chip.name, reference.name, density, simple, whole, chip_j, dense, sentence)  # type: ignore[arg-type]


def _sentence(
    chip: Profile, reference: Profile, density: float, limit: float, factor: float, left: tuple[float, float, int]
) -> str:
    room_j, fixed_j, synops = left
    head = f"{chip.name} against {reference.name}: {factor:.2f} times its energy at a density of {100 * density:.1f} %"
    if room_j <= 0:
        return f"{head}; neuron updates alone cost {fixed_j / (room_j + fixed_j):.2f} times as much: fewer neurons or steps"
    if factor <= 1:
        return f"{head}; it wins below {100 * limit:.1f} %, middle values"
    return (
        f"{head}; to break even the density would have to fall to {100 * limit:.1f} % ({density / limit:.1f} times fewer"
        f" events), or a synaptic operation with its message to cost {1e12 * room_j / synops:.3g} pJ"
    )


def _per(profile: Profile, terms: tuple[str, ...]) -> Interval:
    found = None
    for term in terms:
        cost = profile.coefficients[term]
        if cost.low is None or cost.mid is None or cost.high is None:
            continue
        own = Interval(cost.low, cost.mid, cost.high)
        found = own if found is None else found + own
    if found is None or found.to("pJ")[0] <= 0:
        raise ValueError(f"profile {quoted(profile.name)} has no figure above zero for {', '.join(terms)}")
    return found


def _triple(groups: Mapping[str, Triple], names: tuple[str, ...]) -> Triple:
    kept = [groups[name] for name in names if name in groups]
    return tuple(math.fsum(triple[i] for triple in kept) for i in range(3))  # type: ignore[return-value]


def standings(counts: Sequence[Counts]) -> tuple[Standing, ...]:
    """The layers on the chip against the published thresholds.

    Raises:
        ValueError: no neuron update or no dense MAC on the chip.
    """
    check_counts(counts)
    mine = [item for item in counts if not item.host]
    active, updates = sum(item.neuron_updates_active for item in mine), sum(item.neuron_updates for item in mine)
    macs, synops = sum(item.dense_macs for item in mine), sum(item.synops for item in mine)
    if not updates or not macs:
        raise ValueError(f"{updates} neuron updates and {macs} dense MACs on the chip: a rate needs both")
    steps = mine[0].time_steps
    rate = active / updates
    values = {"spike_rate": rate, "spikes_per_synapse": synops / macs, "spikes_per_neuron": rate * steps}
    graded = any(item.graded for item in mine)
    return tuple(_standing(name, raw, values, steps, graded) for name, raw in _thresholds().items())


def _standing(name: str, raw: Mapping[str, Any], values: Mapping[str, float], steps: int, graded: bool) -> Standing:
    value, low, high = values[raw["quantity"]], float(raw["low"]), float(raw["high"])
    cautions = []
    if "steps" in raw and not raw["steps"][0] <= steps <= raw["steps"][1]:
        cautions.append(f"found for {raw['steps'][0]} to {raw['steps'][1]} steps, this network takes {steps}")
    if graded:
        cautions.append("found for binary spikes, these messages are graded")
    return Standing(
        name=name,
        quantity=raw["quantity"],
        value=value,
        low=low,
        high=high,
        unit=raw["unit"],
        against=raw["against"],
        source=raw["source"],
        verdict="below" if value < low else "above" if value > high else "within",
        caution="; ".join(cautions),
    )


def _thresholds() -> dict[str, dict[str, Any]]:
    found = {}
    for file in datafile.names("thresholds"):
        where = f"{file}.yaml"
        entry = datafile.check_keys(where, datafile.read(datafile.locate(file, "thresholds")), ("schema", "thresholds"))
        if entry["schema"] != 1:
            raise DataFileError(f"{where}: schema {quoted(entry['schema'])} is not known; this version reads schema 1")
        keys = ("quantity", "low", "value", "high", "unit", "against", "source", "method", "date")
        for name, raw in entry["thresholds"].items():
            spot = f"{where}: {name}"
            item = datafile.check_keys(spot, raw, keys, ("steps",))
            datafile.choice(f"{spot}: quantity", item["quantity"], QUANTITIES)
            datafile.choice(f"{spot}: method", item["method"], METHODS)
            datafile.iso_date(f"{spot}: date", item["date"])
            for key in ("unit", "against", "source"):
                item[key] = datafile.text(f"{spot}: {key}", item[key])
            low, mid, high = (datafile.number(f"{spot}: {key}", item[key]) for key in ("low", "value", "high"))
            if not low <= mid <= high:
                raise DataFileError(f"{spot}: interval out of order: low {low}, value {mid}, high {high}")
            found[str(name)] = item
    return found
