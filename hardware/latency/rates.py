"""Rate files: how long each operation of a chip takes, each figure with interval, unit, source, method and date."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from types import MappingProxyType

from hardware import datafile
from hardware.datafile import DataFileError
from hardware.energy.profile import METHODS
from hardware.interval import Interval
from hardware.text import quoted

TERMS: Mapping[str, str] = MappingProxyType(
    {
        "neuron_active": "update",
        "neuron_inactive": "update",
        "synapse": "synop",
        "message_in": "message",
        "message_out": "message",
        "hop_ew": "word",
        "hop_ns": "word",
        "memory_read": "read",
    }
)
"""Rate -> what it is a time per. ``memory_read`` is left out of a file whose synaptic operation contains the read."""
OPTIONAL = ("memory_read",)


@dataclass(frozen=True)
class Rate:
    """Time of one operation, or None with the reason in ``note``."""

    time: Interval | None
    source: str
    method: str
    date: str
    note: str


@dataclass(frozen=True)
class Rates:
    """Times of one chip.

    Attributes:
        chip: name of the chip.
        rates: by :data:`TERMS`.
        barrier: tiles in use -> time of one barrier; straight lines between, ends held.
        published_steps: time per step seen on silicon: an estimate outside says so.
        assumptions, not_modelled: as in a profile.
    """

    name: str
    title: str
    chip: str
    source: str
    assumptions: tuple[str, ...]
    not_modelled: tuple[str, ...]
    rates: Mapping[str, Rate]
    barrier: Mapping[int, Interval]
    barrier_source: str
    published_steps: Interval
    published_source: str

    def barrier_time(self, tiles: int) -> Interval:
        """Time of one barrier over so many tiles."""
        points = sorted(self.barrier)
        if tiles <= points[0]:
            return self.barrier[points[0]]
        for left, right in pairwise(points):
            if tiles <= right:
                share = (tiles - left) / (right - left)
                return self.barrier[left] * (1 - share) + self.barrier[right] * share
        return self.barrier[points[-1]]


def list_rates() -> tuple[str, ...]:
    """Names of the shipped rate files."""
    return datafile.names("rates")


def load_rates(name_or_path: str | Path) -> Rates:
    """Read shipped rates by name, or one's own by path.

    Raises:
        FileNotFoundError: unknown name or path.
        DataFileError: unknown, missing or repeated key; an interval out of order; a wrong unit; no source.
    """
    where, entry = datafile.opened(name_or_path, "rates", (*datafile.ABOUT, "chip", "rates", "barrier", "published_steps"))
    required = [term for term in TERMS if term not in OPTIONAL]
    raw = datafile.check_keys(f"{where}: rates", entry["rates"], required, OPTIONAL)
    barrier, barrier_source = _barrier(f"{where}: barrier", entry["barrier"])
    spot = f"{where}: published_steps"
    steps = datafile.check_keys(spot, entry["published_steps"], ("low", "high", "unit", "source", "method", "date"))
    datafile.choice(f"{spot}: method", steps["method"], METHODS)
    datafile.iso_date(f"{spot}: date", steps["date"])
    return Rates(
        **datafile.about(where, entry),
        chip=datafile.text(f"{where}: chip", entry["chip"]),
        rates=MappingProxyType({term: _rate(f"{where}: {term}", term, raw[term]) for term in TERMS if term in raw}),
        barrier=barrier,
        barrier_source=barrier_source,
        published_steps=datafile.interval(spot, (steps["low"], steps["low"], steps["high"]), str(steps["unit"]), "time"),
        published_source=datafile.text(f"{spot}: source", steps["source"]),
    )


def _rate(where: str, term: str, raw: object) -> Rate:
    found = datafile.figure(where, raw, "time", TERMS[term], METHODS)
    return Rate(found.value, found.source, found.method, found.date, found.note)


def _barrier(where: str, raw: object) -> tuple[Mapping[int, Interval], str]:
    entry = datafile.check_keys(where, raw, ("unit", "points", "source", "method", "date"), ("note",))
    datafile.choice(f"{where}: method", entry["method"], METHODS)
    datafile.iso_date(f"{where}: date", entry["date"])
    points = entry["points"]
    if not isinstance(points, dict) or not points:
        raise DataFileError(f"{where}: points: expected tiles: [low, value, high], got {quoted(points)}")
    found = {}
    for tiles, triple in points.items():
        if isinstance(tiles, bool) or not isinstance(tiles, int) or tiles < 1:
            raise DataFileError(f"{where}: points: {quoted(tiles)} is no number of tiles")
        if not isinstance(triple, list) or len(triple) != 3:
            raise DataFileError(f"{where}: points: {tiles}: expected [low, value, high], got {quoted(triple)}")
        found[tiles] = datafile.interval(f"{where}: points: {tiles}", tuple(triple), str(entry["unit"]), "time")
    return MappingProxyType(found), datafile.text(f"{where}: source", entry["source"])
