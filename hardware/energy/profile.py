"""Energy profiles: named sets of cost coefficients, each with interval, unit, source, method and date.

A profile is a YAML file in ``profiles/``. ``costs: spiking`` prices events (synaptic operations, neuron updates,
messages); ``costs: dense`` prices the multiply-accumulates of a dense evaluation and the weight read that each needs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from hardware import datafile
from hardware.datafile import DataFileError
from hardware.units import Quantity

METHODS = ("simulated", "fitted", "measured", "tabulated", "estimated", "data sheet")
"""How a coefficient was obtained: circuit simulation before silicon, fit to micro-benchmarks on silicon, a measured
system, a published table that gives no method, our own arithmetic on published figures, or a maker's data sheet (peak
rate and board power: a floor, never a measurement)."""


@dataclass(frozen=True)
class Term:
    """One priced thing: which field of ``Counts`` it multiplies, and what its coefficient is per."""

    field: str
    per: str


SPIKING_TERMS: Mapping[str, Term] = MappingProxyType(
    {
        "synapse": Term("synops", "synop"),
        "neuron_active": Term("neuron_updates_active", "update"),
        "neuron_inactive": Term("neuron_updates_inactive", "update"),
        "message": Term("events", "message"),
    }
)
PLACED_TERMS: Mapping[str, Term] = MappingProxyType(
    {
        "message_base": Term("deliveries", "message"),
        "hop_ew": Term("hops_ew", "hop"),
        "hop_ns": Term("hops_ns", "hop"),
    }
)
"""What ``message`` is made of, for those who know where cores are: one message per event and receiving core, and its hops
along the mesh, east-west and north-south. A profile has all three or none."""
OFF_CHIP = "off_chip"
"""Optional where a profile can be placed: a message that leaves its chip or comes from the host. No energy of one is
published, so that no shipped profile has it; one's own may."""
DENSE_TERMS: Mapping[str, Term] = MappingProxyType(
    {"mac": Term("dense_macs", "mac"), "weight_read": Term("dense_macs", "read")}
)
STATIC = "static"
_TERMS = {"spiking": SPIKING_TERMS, "dense": DENSE_TERMS}


@dataclass(frozen=True)
class Coefficient:
    """A cost per event (energy), or the static power per powered chip.

    Attributes:
        low, mid, high: the interval, or all None when the figure is not known; ``note`` then holds the reason.
        per: what one unit of cost pays for (``"synop"``, ``"mac"``, ``"chip"`` ...).
        source, method, date: where it comes from, how it was obtained (one of :data:`METHODS`, or ``"unknown"``),
            and the day it was taken from the source.
    """

    low: Quantity | None
    mid: Quantity | None
    high: Quantity | None
    per: str
    source: str
    method: str
    date: str
    note: str


@dataclass(frozen=True)
class Profile:
    """A named set of coefficients.

    Attributes:
        costs: ``"spiking"`` (events on a chip; host layers are not costed) or ``"dense"`` (every layer's dense MACs).
        payload: ``"binary"`` when the constants were obtained on one-bit spikes, else ``"any"``.
        assumptions: what the figures take for granted; repeated in every report's labels.
        not_modelled: costs that exist and that the profile has no figure for; every sum is then a lower bound.
        coefficients: term name -> coefficient; the terms of ``costs`` plus ``"static"``, and :data:`PLACED_TERMS` and
            :data:`OFF_CHIP` where the profile has them.
    """

    name: str
    title: str
    costs: str
    payload: str
    source: str
    assumptions: tuple[str, ...]
    not_modelled: tuple[str, ...]
    coefficients: Mapping[str, Coefficient]

    @property
    def terms(self) -> Mapping[str, Term]:
        """The per-event terms that this profile prices."""
        return _TERMS[self.costs]

    @property
    def placeable(self) -> bool:
        """Whether a placement can be priced: the profile has coefficients for deliveries and hops."""
        return all(term in self.coefficients for term in PLACED_TERMS)


def list_profiles() -> tuple[str, ...]:
    """Names of the shipped profiles."""
    return datafile.names("profiles")


def load_profile(name_or_path: str | Path) -> Profile:
    """Read a shipped profile by name, or one's own by path.

    Raises:
        FileNotFoundError: unknown name or path.
        DataFileError: unknown, missing or repeated key; an interval out of order; a wrong unit; no source.
    """
    where, entry = datafile.opened(name_or_path, "profiles", (*datafile.ABOUT, "costs", "payload", "coefficients"))
    costs = datafile.choice(f"{where}: costs", entry["costs"], tuple(_TERMS))
    required = (*_TERMS[costs], STATIC)
    optional = (*PLACED_TERMS, OFF_CHIP) if costs == "spiking" else ()
    raw = datafile.check_keys(f"{where}: coefficients", entry["coefficients"], required, optional)
    placed = [term for term in optional if term in raw]
    if placed and not set(PLACED_TERMS) <= set(placed):
        raise DataFileError(f"{where}: coefficients: {', '.join(placed)} without the rest of {', '.join(PLACED_TERMS)}")
    coefficients = {term: _coefficient(f"{where}: {term}", term, costs, raw[term]) for term in (*required, *placed)}
    return Profile(
        **datafile.about(where, entry),
        costs=costs,
        payload=datafile.choice(f"{where}: payload", entry["payload"], ("binary", "any")),
        coefficients=MappingProxyType(coefficients),
    )


def _coefficient(where: str, term: str, costs: str, raw: object) -> Coefficient:
    per = _per(term, costs)
    found = datafile.figure(where, raw, "power" if term == STATIC else "energy", per, METHODS)
    cost = found.value
    low, mid, high = (None, None, None) if cost is None else (cost.low, cost.mid, cost.high)
    return Coefficient(low, mid, high, per, found.source, found.method, found.date, found.note)


def _per(term: str, costs: str) -> str:
    if term in (STATIC, OFF_CHIP):
        return "chip" if term == STATIC else "message"
    return (PLACED_TERMS[term] if term in PLACED_TERMS else _TERMS[costs][term]).per
