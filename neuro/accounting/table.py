"""The table of an account: populations, then every figure with low, mid, high, its unit, its kind and its source."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from hardware.text import short

if TYPE_CHECKING:
    from neuro.accounting.account import GraphAccount

HEAD = ("figure", "low", "mid", "high", "unit", "kind", "source")
POPULATIONS = ("population", "kind", "neurons", "cores", "messages in", "synaptic ops", "updates sending", "updates silent")
SOURCE_LIMIT = 96
Row = tuple[str, ...]


def account_table(found: GraphAccount) -> str:
    """Lines of text: what every population did per sample, what all of it takes and costs, and what was assumed."""
    lines = [head(found), *_aligned([POPULATIONS, *population_rows(found)], range(2, 8))]
    lines += ["", *_aligned([HEAD, *figure_rows(found)], range(1, 4)), ""]
    return "\n".join([*lines, *sentences(found)])


def head(found: GraphAccount) -> str:
    """How much was run, where, and what the counts are of."""
    activity = found.activity
    return f"{found.samples} samples of {activity.steps} steps, {activity.ran_on}; counts are per sample"


def sentences(found: GraphAccount) -> list[str]:
    """What stands under the tables: zeros, break-even, what is missing and why, notes and assumptions."""
    lines = [entry.sentence(found.samples) for entry in found.zeros]
    for often, compared in found.break_evens.items():
        lines += [f"break-even, dense {often}, static power left out: {one.sentence}" for one in compared]
    if found.pools is not None:
        lines.append(str(found.pools))
    elif found.placement is None:
        lines.append(f"not placed: {found.placement_reason}")
    if found.pools is not None:
        lines.append(found.latency_reason)
    elif not found.latencies:
        lines.append(f"no time: {found.latency_reason}")
    if found.break_even_reason:
        lines.append(f"no break-even: {found.break_even_reason}")
    lines += [f"note: {note}" for note in found.activity.notes]
    return [*lines, *_remarks(found)]


def population_rows(found: GraphAccount) -> list[Row]:
    """Cells under :data:`POPULATIONS`."""
    placed = found.placement
    cores = {} if placed is None else {layer.name: f"{len(layer.cores):,}" for layer in placed.layers}
    rows = []
    for item in found.counts:
        population = found.graph.population(item.layer)
        work = (item.events, item.synops, item.neuron_updates_active, item.neuron_updates_inactive)
        each = (_number(value / found.samples) for value in work)
        rows.append((item.layer, population.kind, f"{population.size:,}", cores.get(item.layer, "-"), *each))
    return rows


def figure_rows(found: GraphAccount) -> list[Row]:
    """Cells under :data:`HEAD`."""
    source = found.activity.ran_on
    rows = [
        _counted(name, found.total(field), source)
        for name, field in (
            ("messages", "events"),
            ("synaptic operations", "synops"),
            ("neuron updates that send", "neuron_updates_active"),
            ("neuron updates that do not", "neuron_updates_inactive"),
        )
    ]
    rows.append(
        ("dense equivalent, once", "", _number(found.total("dense_macs")), "", "MAC/sample", "counted", "the graph")
    )
    placed = found.placement
    if placed is not None:
        where = f"{placed.chip}, budget {placed.budget}: {placed.budget_title}"
        total = placed.chips * placed.cores_per_chip
        rows.append(("cores", "", f"{len(placed.cores):,}", "", f"of {total:,}", "modelled", short(where, SOURCE_LIMIT)))
        rows.append(("chips", "", f"{placed.chips:,}", "", "", "modelled", short(where, SOURCE_LIMIT)))
    for priced in found.energies:
        report = priced.report
        name = f"energy, {report.profile}" + (f", dense {priced.dense}" if priced.dense else "")
        kind = report.kind + (", at least" if report.lower_bound else "")
        if any(label.startswith("hypothetical") for label in report.labels):
            kind += ", hypothetical"
        microjoules = tuple(f"{1e6 * value:.4g}" for value in priced.per_sample_j)
        rows.append((name, *microjoules, "uJ/sample", kind, short(report.source, SOURCE_LIMIT)))
        if static := report.by_group().get("static"):
            microjoules = tuple(f"{1e6 * value / report.tokens:.4g}" for value in static)
            rows.append(("  of it static power", *microjoules, "uJ/sample", report.kind, "over the modelled time"))
    for network in found.published:
        for what, value in network.measured.items():
            low, mid, high = value.to(unit := value.mid.unit)
            name = f"{what.replace('_', ' ')} of another network: {network.title}"
            rows.append((name, *_spread(low, mid, high), unit, network.method, network.source))
    for latency in found.latencies:
        kind = "modelled" + (", at least" if latency.lower_bound else "")
        for name, span, unit in (("time", latency.token, "us/sample"), ("time of a step", latency.step, "us")):
            values = tuple(f"{value:.4g}" for value in span.to("us"))
            rows.append((f"{name}, {latency.rates}", *values, unit, kind, short(latency.source, SOURCE_LIMIT)))
    for often, compared in found.break_evens.items():
        for one in compared:
            values = tuple(f"{100 * value:.4g}" for value in one.whole)
            name = f"break-even density, {one.chip}, dense {often}"
            rows.append((name, *values, "%", "modelled", f"here {100 * one.density:.4g} %; against {one.reference}"))
    return rows


def _spread(low: float, mid: float, high: float) -> tuple[str, str, str]:
    """Three columns; the outer ones are empty where no spread was published."""
    return ("" if low == mid else f"{low:.4g}", f"{mid:.4g}", "" if high == mid else f"{high:.4g}")


def _counted(name: str, value: float, source: str) -> Row:
    return (name, "", _number(value), "", "per sample", "counted", source)


def _number(value: float) -> str:
    return f"{value:,.0f}" if value == round(value) or abs(value) >= 1e4 else f"{value:,.4g}"


def _remarks(found: GraphAccount) -> list[str]:
    """What the figures take for granted and what is not in them, each said once with those that say it."""
    said: dict[str, list[str]] = {}
    for name, labels, unknown in (
        *((p.report.profile, p.report.labels, p.report.unknown) for p in found.energies),
        *((f"time, {one.rates}", one.labels, one.unknown) for one in found.latencies),
    ):
        for text in (*labels, *(f"not in it: {entry}" for entry in unknown)):
            if name not in (names := said.setdefault(text, [])):
                names.append(name)
    return [f"{' / '.join(names)}: {text.replace(' a token', ' a sample')}" for text, names in said.items()]


def _aligned(rows: Sequence[Row], right: range) -> list[str]:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return [
        "  ".join(cell.rjust(widths[i]) if i in right else cell.ljust(widths[i]) for i, cell in enumerate(row)).rstrip()
        for row in rows
    ]
