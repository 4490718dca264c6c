"""Loihi 2: no energy per operation is published, so whole-network joules are scaled from a measured network.

``E = static power of the anchor's chip x time x chips + the anchor's dynamic energy x (work here / work of the anchor)``

Nobody knows which work the anchor's dynamic energy went into. The interval asks all of it of one kind at a time:
synaptic operations, neuron updates with a message, without one, or messages; low is the smallest answer, high the
largest. The middle mixes the four as a Loihi 1 profile would. Nothing here is a figure per operation; every report has
kind ``"extrapolated"``, and the anchor itself says nothing about the error.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from hardware.energy.account import Board
from hardware.energy.counts import Counts, check_counts
from hardware.energy.measured_networks import Network
from hardware.energy.profile import SPIKING_TERMS, Profile
from hardware.energy.report import EnergyLine, EnergyReport
from hardware.interval import Interval
from hardware.text import quoted
from hardware.units import Quantity


def extrapolate(
    counts: Sequence[Counts],
    anchor: Network,
    mixture: Profile,
    *,
    time: Quantity | Interval | None = None,
    board: Board | None = None,
) -> EnergyReport:
    """Scale ``anchor`` to ``counts``.

    Args:
        counts: one record per layer; layers on the host are left out and named.
        anchor: a measured network with published or recomputed activity, static power and dynamic energy.
        mixture: a chip profile whose coefficients weigh the four kinds of work for the middle value; only their ratios
            are used.
        time: how long all the counted tokens took. Without it, or without a board, the static part is named, not costed.
        board: chips powered and used.

    Raises:
        ValueError: counts that do not belong together, all of them on the host, an anchor without counts or without
            measured static power and dynamic energy, a mixture that is no chip profile or lacks a coefficient.
    """
    check_counts(counts)
    mine = [item for item in counts if not item.host]
    if not mine:
        raise ValueError("every layer runs on the host: there is nothing to extrapolate")
    for name in ("static_power", "dynamic_energy"):
        if name not in anchor.measured:
            raise ValueError(f"anchor {quoted(anchor.name)}: {name} was not measured; take another anchor")
    weights = _weights(mixture)
    whole = {term: _sum(anchor.counts(), SPIKING_TERMS[term].field) for term in SPIKING_TERMS}
    mixed = math.fsum(weights[term] * whole[term] for term in SPIKING_TERMS)
    dynamic_j = anchor.measured["dynamic_energy"].to("J")
    lines = []
    for item in mine:
        work = {term: getattr(item, rule.field) for term, rule in SPIKING_TERMS.items()}
        ratios = [work[term] / whole[term] for term in SPIKING_TERMS if whole[term]]
        middle = math.fsum(weights[term] * work[term] for term in SPIKING_TERMS) / mixed
        ends = min(*ratios, middle), middle, max(*ratios, middle)  # rounding may put a mean outside its parts
        low_j, mid_j, high_j = (ratio * joules for ratio, joules in zip(ends, dynamic_j, strict=True))
        lines.append(EnergyLine(item.layer, "dynamic", low_j, mid_j, high_j, 1))
    unknown, missing = [], {}
    if time is not None and board is not None:
        span = Interval.exact(time) if isinstance(time, Quantity) else time
        energy = anchor.measured["static_power"] * span
        lines.append(EnergyLine("chip", "static", *(energy * board.used).to("J"), board.used))
        idle = board.powered - board.used
        lines.append(EnergyLine("chip", "idle_chips", *(energy * idle).to("J"), idle))
    else:
        missing["static"] = f"{anchor.measured['static_power']} per powered chip; time or board not given"
        unknown.append(f"static: {missing['static']}")
    on_host = [item for item in counts if item.host]
    if on_host:
        missing["host"] = f"{_sum(on_host, 'dense_macs'):,} MACs on the host are not costed"
        unknown.append(f"host share: {missing['host']}")
    return EnergyReport(
        profile=f"loihi2, extrapolated from {anchor.name}",
        source=f"{anchor.source} ({anchor.method}); activity: {anchor.counts_source} ({anchor.counts_method})",
        tokens=mine[0].tokens,
        lines=tuple(lines),
        unknown=(*unknown, "off-chip traffic and the host beyond what the anchor's meter saw"),
        labels=_labels(mine, anchor, mixture),
        kind="extrapolated",
        missing=missing,
    )


def _sum(counts: Sequence[Counts], field: str) -> int:
    return sum(getattr(item, field) for item in counts)


def _weights(mixture: Profile) -> dict[str, float]:
    if mixture.costs != "spiking":
        raise ValueError(
            f"profile {quoted(mixture.name)} prices dense MACs; a chip profile is needed to weigh a chip's work"
        )
    found = {}
    for term in SPIKING_TERMS:
        middle = mixture.coefficients[term].mid
        if middle is None:
            raise ValueError(
                f"profile {quoted(mixture.name)} has no coefficient for {term}; take another to weigh the work"
            )
        found[term] = middle.to("pJ")
    return found


def _labels(counts: Sequence[Counts], anchor: Network, mixture: Profile) -> tuple[str, ...]:
    labels = [
        f"extrapolated: scaled from one measured network ({anchor.title}); no energy per operation of Loihi 2 is public",
        f"assumes: the middle value weighs kinds of work as {mixture.name} does, for want of Loihi 2 figures",
    ]
    if anchor.counts_note:
        labels.append(f"anchor's activity: {anchor.counts_note}")
    if any(item.graded for item in counts):
        labels.append("assumes: a graded message costs what the anchor's binary one does")
    return tuple(labels)
