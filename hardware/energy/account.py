"""Counts of events become joules through a named profile, as an interval, with everything left out named.

``E = sum over layers and terms of count x coefficient + static power x time of every powered chip + the host's share``

Low ends add to the low end and high ends to the high end: the layers share their coefficients, so their errors do not
cancel. A placement turns events into messages per receiving core and hops on the mesh; a time and a board turn static
power into joules of used and of idle chips; a host profile prices what stays on the host. What is not given is named.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from hardware.chips.chip import load_chip
from hardware.energy.counts import Counts, check_counts
from hardware.energy.profile import OFF_CHIP, PLACED_TERMS, STATIC, Coefficient, Profile, list_profiles, load_profile
from hardware.energy.report import EnergyLine, EnergyReport
from hardware.interval import Interval
from hardware.placement.report import Placement
from hardware.placement.routing import LayerTraffic, layer_traffic
from hardware.text import listed, quoted
from hardware.units import Quantity

__all__ = ["Board", "Counts", "EnergyLine", "EnergyReport", "Profile", "account", "list_profiles", "load_profile"]

UNPLACED = "no placement given"


@dataclass(frozen=True)
class Board:
    """Chips that are powered, and chips that the network uses; the rest burn static power for nothing.

    Raises:
        ValueError: no chip used, or more used than powered.
    """

    powered: int
    used: int

    def __post_init__(self) -> None:
        if not 1 <= self.used <= self.powered:
            raise ValueError(f"board: {self.used} chips used of {self.powered} powered; 1 <= used <= powered is needed")


def account(
    counts: Sequence[Counts],
    profile: Profile,
    *,
    powered: Quantity | None = None,
    placement: Placement | None = None,
    time: Quantity | Interval | None = None,
    board: Board | None = None,
    host_profile: Profile | None = None,
    unplaced: str = UNPLACED,
) -> EnergyReport:
    """Price ``counts`` with ``profile``.

    Args:
        counts: one record per layer, all over the same tokens.
        profile: from :func:`load_profile`.
        powered: time the chips were powered, summed over chips (3 chips for 2 s: ``Quantity(6, "s")``), for those who
            know only the product; else ``time`` and ``board``.
        placement: where the layers sit: messages per receiving core and hops instead of one message per event.
        time: how long all the counted tokens took, from ``hardware.latency.estimate`` or a clock.
        board: chips powered and used; without it the placement's chips, all used.
        host_profile: a dense profile (a CPU, GPU or digital reference) that prices the layers on the host. Without it the
            host's share is named, not costed.
        unplaced: why there is no placement, for the report.

    Raises:
        ValueError: counts that do not belong together, nothing to price (every layer on the host under a chip profile,
            or no known coefficient), both ``powered`` and ``time``, a time without any chips, a host profile that is not
            dense or that meets a dense profile, a board smaller than the placement, a layer that is not placed.
        UnitError: a time that is none.
    """
    check_counts(counts)
    lines: list[EnergyLine] = []
    unknown: list[str] = []
    missing: dict[str, str] = {}
    spiking = profile.costs == "spiking"
    if host_profile is not None and (host_profile.costs != "dense" or not spiking):
        raise ValueError(
            f"host profile {quoted(host_profile.name)} with {quoted(profile.name)}: a host is priced by a dense profile, "
            "and only beside a chip profile (a dense one prices host layers itself)"
        )
    priced = [item for item in counts if not (spiking and item.host)]
    traffic = _traffic(priced, profile, placement) if placement is not None and spiking else {}
    for item in priced:
        for term, count in _terms(item, profile, traffic).items():
            _price(lines, unknown, item.layer, term, count, profile.coefficients[term])
    if not lines:
        raise ValueError(
            f"profile {quoted(profile.name)} prices nothing here: {len(counts) - len(priced)} of {len(counts)} "
            "layers run on "
            "the host, and no known coefficient applies to the others; a total would look like 0 J without being it"
        )
    _static(profile, powered, time, _board(board, placement), lines, unknown, missing)
    if spiking:
        _host(counts, host_profile, lines, unknown, missing)
        _off_chip(priced, profile, placement, traffic, lines, unknown, missing, unplaced)
    unknown += profile.not_modelled
    return EnergyReport(
        profile=profile.name,
        source=profile.source,
        tokens=counts[0].tokens,
        lines=tuple(lines),
        unknown=tuple(unknown),
        labels=_labels(priced, profile, placement if traffic else None, host_profile, unplaced),
        missing=missing,
    )


def _traffic(priced: Sequence[Counts], profile: Profile, placement: Placement) -> Mapping[str, LayerTraffic]:
    placed = {layer.name for layer in placement.layers}
    lost = [item.layer for item in priced if item.layer not in placed]
    if lost:
        raise ValueError(
            f"layer {quoted(lost[0])} is counted but not in the placement, which holds: {listed(sorted(placed))}; "
            "place what was counted"
        )
    mesh = load_chip(placement.chip).mesh
    if mesh is None or not profile.placeable:
        return {}
    return layer_traffic(placement, mesh)


def _terms(item: Counts, profile: Profile, traffic: Mapping[str, LayerTraffic]) -> dict[str, float]:
    """Term -> count."""
    found: dict[str, float] = {term: getattr(item, rule.field) for term, rule in profile.terms.items()}
    if traffic:
        del found["message"]
        flow = traffic.get(item.layer, LayerTraffic(0.0, 0.0, 0.0, 0.0, 0.0))
        found |= {term: item.events * getattr(flow, rule.field) for term, rule in PLACED_TERMS.items()}
    return found


def _price(
    lines: list[EnergyLine], unknown: list[str], layer: str, term: str, count: float, cost: Coefficient, prefix: str = ""
) -> None:
    if cost.low is None or cost.mid is None or cost.high is None:
        entry = f"{prefix.replace('_', ' ')}{term}: {cost.note}"
        if count and entry not in unknown:
            unknown.append(entry)
        return
    low_j, mid_j, high_j = ((q * count).to("J") for q in (cost.low, cost.mid, cost.high))
    lines.append(EnergyLine(layer, prefix + term, low_j, mid_j, high_j, count))


def _board(board: Board | None, placement: Placement | None) -> Board | None:
    if placement is None:
        return board
    if board is None:
        return Board(placement.chips, placement.chips)
    if board.used < placement.chips:
        raise ValueError(f"board: {board.used} chips used, the placement takes {placement.chips}")
    return board


def _static(
    profile: Profile,
    powered: Quantity | None,
    time: Quantity | Interval | None,
    board: Board | None,
    lines: list[EnergyLine],
    unknown: list[str],
    missing: dict[str, str],
) -> None:
    cost = profile.coefficients[STATIC]
    if powered is not None and time is not None:
        raise ValueError("powered is time x chips: give powered, or time and board, not both")
    if powered is not None and (powered.to("s") <= 0):
        raise ValueError(f"powered is {powered}; a powered time must be above zero")
    span = Interval.exact(time) if isinstance(time, Quantity) else time
    if span is not None and span.to("s")[0] <= 0:
        raise ValueError(f"time is {time}; a time must be above zero")
    if cost.low is None or cost.mid is None or cost.high is None:
        unknown.append(f"{STATIC}: {cost.note}")
        missing["static"] = cost.note
        return
    power = Interval(cost.low, cost.mid, cost.high)
    if powered is not None:
        lines.append(_line(STATIC, power * Interval.exact(powered), 1))
    elif span is not None:
        if board is None:
            raise ValueError("time is given, but neither a board nor a placement: how many chips were powered?")
        lines.append(_line(STATIC, power * span * board.used, board.used))
        idle = board.powered - board.used
        lines.append(_line("idle_chips", power * span * idle, idle))
    else:
        chips = "a number of chips that are not known" if board is None else f"{board.powered} powered chips"
        reason = f"{cost.mid} ({cost.low} to {cost.high}) per powered chip, for a time and {chips}"
        reason += "" if board is None else "; the time is not known"
        unknown.append(f"{STATIC}: {reason}")
        missing["static"] = reason


def _line(term: str, energy: Interval, count: int) -> EnergyLine:
    return EnergyLine("chip", term, *energy.to("J"), count)


def _host(
    counts: Sequence[Counts],
    host_profile: Profile | None,
    lines: list[EnergyLine],
    unknown: list[str],
    missing: dict[str, str],
) -> None:
    on_host = [item for item in counts if item.host]
    if not on_host:
        return
    if host_profile is None:
        macs, every = (sum(item.dense_macs for item in group) for group in (on_host, counts))
        share = f"{100 * macs / every:.1f} % of all MACs" if every else "of none in all"
        missing["host"] = f"{macs} MACs on the host are not costed ({share})"
        unknown.append(f"host share: {missing['host']}")
        return
    for item in on_host:
        for term, rule in host_profile.terms.items():
            count = getattr(item, rule.field)
            _price(lines, unknown, item.layer, term, count, host_profile.coefficients[term], "host_")
    unknown += [f"host: {entry}" for entry in (host_profile.coefficients[STATIC].note, *host_profile.not_modelled) if entry]


def _off_chip(
    priced: Sequence[Counts],
    profile: Profile,
    placement: Placement | None,
    traffic: Mapping[str, LayerTraffic],
    lines: list[EnergyLine],
    unknown: list[str],
    missing: dict[str, str],
    unplaced: str,
) -> None:
    """Messages between chips and from the host: priced where the profile can, else counted where it is known and named."""
    cost = profile.coefficients.get(OFF_CHIP)
    if traffic and cost is not None and cost.mid is not None:
        for item in (item for item in priced if item.layer in traffic):
            flow = traffic[item.layer]
            _price(lines, unknown, item.layer, OFF_CHIP, item.events * (flow.between_chips + flow.from_host), cost)
        return
    if placement is None:
        why = "not counted without a placement" if unplaced == UNPLACED else f"not counted ({unplaced})"
        reason = why + ("" if cost else ", and no energy per message is published")
    elif not traffic:
        reason = "the chip's mesh or the profile's hops are not known"
    else:
        far, host = (
            sum(item.events * getattr(traffic[item.layer], name) for item in priced if item.layer in traffic)
            for name in ("between_chips", "from_host")
        )
        tokens = priced[0].tokens
        reason = f"{far / tokens:,.1f} messages a token between chips, {host / tokens:,.1f} from the host"
        reason += f"; {cost.note if cost else 'no energy is published'}"
    missing["off-chip traffic"] = reason
    unknown.append(f"off-chip traffic: {reason}")


def _labels(
    priced: Sequence[Counts],
    profile: Profile,
    placement: Placement | None,
    host_profile: Profile | None,
    unplaced: str,
) -> tuple[str, ...]:
    labels: list[str] = []
    graded = [item for item in priced if item.graded and not item.host]
    if graded and profile.costs == "spiking" and profile.payload == "binary":
        bits = max(item.payload_bits for item in graded)
        labels.append(
            "hypothetical: binary-spike constants applied to graded payloads "
            f"({len(graded)} of {len(priced)} layers, up to {bits} bits)"
        )
    if profile.costs == "spiking" and placement is None:
        labels.append(f"assumes: one message per event and two hops ({unplaced}: each event goes to one core)")
    if placement is not None:
        labels.append(
            f"assumes: cores of the {placement.chip} placement ({placement.budget}) fill the mesh column by column of tiles"
        )
        if not placement.measured:
            labels.append("assumes: a layer's messages spread over its senders as the placement's rates, not measured, say")
    labels += [f"assumes: {assumption}" for assumption in profile.assumptions]
    if host_profile is not None:
        labels += [f"host, {host_profile.name}: {assumption}" for assumption in host_profile.assumptions]
    return tuple(labels)
