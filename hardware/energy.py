"""Counts of events become joules through a named profile, as an interval, with everything left out named.

``E = sum over layers and terms of count x coefficient + static power x powered time``

Low ends add to the low end and high ends to the high end: the layers share their coefficients, so their errors do not
cancel.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from hardware.profile import STATIC, Profile, list_profiles, load_profile
from hardware.units import Quantity

__all__ = ["Counts", "EnergyLine", "EnergyReport", "Profile", "account", "list_profiles", "load_profile"]

_COUNT_FIELDS = (
    "tokens",
    "synops",
    "events",
    "neuron_updates_active",
    "neuron_updates_inactive",
    "dense_macs",
    "weight_bytes",
    "payload_bits",
)


@dataclass(frozen=True)
class Counts:
    """Events of one layer over ``tokens`` tokens (one token = one time step of one sample).

    Attributes:
        layer: the layer's name, unique within one account.
        tokens: tokens that the counts cover.
        synops: synaptic operations: one weight applied because one event arrived.
        events: spikes or graded messages sent into this layer's synapses; each costs a message.
        neuron_updates_active: neuron updates that sent a message.
        neuron_updates_inactive: neuron updates that sent none.
        dense_macs: multiply-accumulates that a dense evaluation of the same layer needs.
        weight_bytes: bytes of weights held.
        graded: the layer's payloads are wider than one bit.
        payload_bits: widest payload seen, sign included.
        host: the layer runs on the host; only ``dense_macs`` is used then.

    Raises:
        ValueError: a count is negative, not finite or no whole number; a binary layer with a wide payload.
    """

    layer: str
    tokens: int
    synops: int
    events: int
    neuron_updates_active: int
    neuron_updates_inactive: int
    dense_macs: int
    weight_bytes: int
    graded: bool
    payload_bits: int
    host: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.layer, str) or not self.layer:
            raise ValueError(f"Counts: layer must be a name, got {self.layer!r}")
        for field in _COUNT_FIELDS:
            value = getattr(self, field)
            if isinstance(value, float) and not math.isfinite(value):
                raise ValueError(f"layer {self.layer!r}: {field} is {value}; a count must be finite")
            try:
                whole = operator.index(value)
            except TypeError:
                raise ValueError(f"layer {self.layer!r}: {field} is {value!r}; a count must be a whole number") from None
            if whole < 0:
                raise ValueError(f"layer {self.layer!r}: {field} is {whole}; a count cannot be negative")
            object.__setattr__(self, field, whole)
        if not self.host and not self.graded and self.payload_bits > 1:
            raise ValueError(
                f"layer {self.layer!r}: graded is False, but payload_bits is {self.payload_bits}; set graded=True"
            )


@dataclass(frozen=True)
class EnergyLine:
    """Joules of one term of one layer: ``count`` events at the profile's coefficient.

    ``term``: synapse, neuron_active, neuron_inactive, message, mac, weight_read, or static (layer ``"chip"``, count 1).
    """

    layer: str
    term: str
    low_j: float
    mid_j: float
    high_j: float
    count: int


@dataclass(frozen=True)
class EnergyReport:
    """Modelled energy of one set of counts under one profile, in joules for all ``tokens`` tokens together.

    Attributes:
        kind: always ``"modelled"``; measured joules come from ``hardware.meters``, and the two share no column.
        unknown: what is not in the sum, and why.
        lower_bound: True when ``unknown`` is not empty: print the total as "at least".
        labels: what the figure takes for granted; ``"hypothetical: ..."`` when a constant is used outside its domain.
    """

    profile: str
    source: str
    tokens: int
    lines: tuple[EnergyLine, ...]
    unknown: tuple[str, ...]
    labels: tuple[str, ...]
    kind: str = "modelled"

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

    def by_term(self) -> dict[str, tuple[float, float, float]]:
        """Term -> (low, mid, high) joules over all layers."""
        return {
            term: (
                math.fsum(line.low_j for line in self.lines if line.term == term),
                math.fsum(line.mid_j for line in self.lines if line.term == term),
                math.fsum(line.high_j for line in self.lines if line.term == term),
            )
            for term in dict.fromkeys(line.term for line in self.lines)
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


def account(counts: Sequence[Counts], profile: Profile, *, powered: Quantity | None = None) -> EnergyReport:
    """Price ``counts`` with ``profile``.

    Args:
        counts: one record per layer, all over the same tokens.
        profile: from :func:`load_profile`.
        powered: time the chips were powered, summed over chips (3 chips for 2 s: ``Quantity(6, "s")``). Without it the
            static term is unknown and the total is a lower bound.

    Raises:
        ValueError: no counts, no tokens, a layer named twice, layers over different tokens, or nothing to price
            (every layer on the host under a chip profile, or no known coefficient).
        UnitError: ``powered`` is not a time.
    """
    _check(counts)
    lines: list[EnergyLine] = []
    unknown: list[str] = []
    priced = [item for item in counts if not (profile.costs == "spiking" and item.host)]
    for item in priced:
        for term, rule in profile.terms.items():
            coefficient = profile.coefficients[term]
            count = getattr(item, rule.field)
            if coefficient.low is None or coefficient.mid is None or coefficient.high is None:
                entry = f"{term}: {coefficient.note}"
                if count and entry not in unknown:
                    unknown.append(entry)
                continue
            low_j, mid_j, high_j = ((q * count).to("J") for q in (coefficient.low, coefficient.mid, coefficient.high))
            lines.append(EnergyLine(item.layer, term, low_j, mid_j, high_j, count))
    if not lines:
        raise ValueError(
            f"profile {profile.name!r} prices nothing here: {len(counts) - len(priced)} of {len(counts)} layers run on "
            "the host, and no known coefficient applies to the others; a total would look like 0 J without being it"
        )
    _static(profile, powered, lines, unknown)
    on_host = [item for item in counts if item.host]
    if on_host and profile.costs == "spiking":
        macs, every = (sum(item.dense_macs for item in group) for group in (on_host, counts))
        share = f"{100 * macs / every:.1f} % of all MACs" if every else "of none in all"
        unknown.append(f"host share: {macs} MACs on the host are not costed ({share})")
    unknown += profile.not_modelled
    return EnergyReport(
        profile=profile.name,
        source=profile.source,
        tokens=counts[0].tokens,
        lines=tuple(lines),
        unknown=tuple(unknown),
        labels=_labels(priced, profile),
    )


def _check(counts: Sequence[Counts]) -> None:
    if not counts:
        raise ValueError("no counts to account for: run the layers before asking for their energy")
    seen: set[str] = set()
    for item in counts:
        if item.layer in seen:
            raise ValueError(f"layer {item.layer!r} appears twice in the counts; it would be paid for twice")
        seen.add(item.layer)
        if item.tokens == 0:
            raise ValueError(f"layer {item.layer!r}: tokens is 0; run the layers before asking for their energy")
        if item.tokens != counts[0].tokens:
            raise ValueError(
                f"layer {item.layer!r} covers {item.tokens} tokens, layer {counts[0].layer!r} {counts[0].tokens}; "
                "reset and count all layers over the same input"
            )


def _static(profile: Profile, powered: Quantity | None, lines: list[EnergyLine], unknown: list[str]) -> None:
    coefficient = profile.coefficients[STATIC]
    if powered is not None and (powered.to("s") <= 0):
        raise ValueError(f"powered is {powered}; a powered time must be above zero")
    if coefficient.low is None or coefficient.mid is None or coefficient.high is None:
        unknown.append(f"{STATIC}: {coefficient.note}")
    elif powered is None:
        unknown.append(
            f"{STATIC}: {coefficient.mid} ({coefficient.low} to {coefficient.high}) per powered chip, for a time and a "
            "number of chips that are not known"
        )
    else:
        low_j, mid_j, high_j = ((q * powered).to("J") for q in (coefficient.low, coefficient.mid, coefficient.high))
        lines.append(EnergyLine("chip", STATIC, low_j, mid_j, high_j, 1))


def _labels(priced: Sequence[Counts], profile: Profile) -> tuple[str, ...]:
    labels: list[str] = []
    graded = [item for item in priced if item.graded and not item.host]
    if graded and profile.costs == "spiking" and profile.payload == "binary":
        bits = max(item.payload_bits for item in graded)
        labels.append(
            "hypothetical: binary-spike constants applied to graded payloads "
            f"({len(graded)} of {len(priced)} layers, up to {bits} bits)"
        )
    return (*labels, *(f"assumes: {assumption}" for assumption in profile.assumptions))
