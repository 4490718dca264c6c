"""A Comparison as blocks: tables of words with the remarks under them, the same for terminal, Markdown and page.

Every joule says how it was got (counted and modelled, or measured) and from where; a sum with a part missing is printed
with ">=", and what was not measured says so.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from experiments.comparison import overview
from experiments.comparison.accounts import joules, layer_energies, token_times, utilisation
from experiments.comparison.overview import DASH, NOT_MEASURED
from experiments.comparison.record import Arm, Comparison, DeployedGroup, Deployment, Stream
from experiments.comparison.statistics import Interval, interval, p_text
from experiments.comparison.targets import Reached, frontier, times_to_dense


@dataclass(frozen=True)
class Block:
    """One table: title, header, rows, and notes under it."""

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    notes: Sequence[str] = field(default=())
    level: int = 2
    raw: Sequence[Sequence[Any]] = ()
    """The numbers behind the cells, as comparison.json has them; none where the cells say all."""
    meanings: Sequence[str] = ()


def blocks(comparison: Comparison, *, layers: bool = True) -> list[Block]:
    """All tables in the order they are printed; `layers`: the joules of every layer too."""
    found = []
    for stream in comparison.streams.values():
        if stream.arms or stream.deployments:
            found.append(arms_block(stream))
        if stream.arms:
            found += [*held_out_block(stream), *budgets_block(stream), *frontier_block(stream)]
        for group in stream.deployed:
            found.append(deployed_block(stream, group.items[0]))
            found += layers_block(stream, group) if layers else []
            found += [*energy_blocks(group.items[0]), *threshold_blocks(group.items[0])]
    return found


def arms_block(stream: Stream, *, headline: bool = False) -> Block:
    """One row per training arm and, under them, per deployed model; `headline`: with the remarks needed to read them alone,
    those on missing meters left to the tables."""
    found = overview.rows(stream)
    shown = overview.columns(found)
    notes = [f"Note: {note}." for note in stream.notes]
    notes += [f"Missing: {run}." for run in stream.missing]
    notes += [] if headline else [f"Energy: {reason}." for reason in _energy_reasons(found)]
    notes += [f"{remark}." for remark in overview.notes(found)]
    what = "training arms" if not stream.deployments else "training arms and deployed models"
    return Block(
        f"Stream {stream.name}: {what}, held-out loss ({_seeds(stream)})",
        [column.header for column in shown],
        [[column.text(row) for column in shown] for row in found],
        notes,
        raw=[[row[column.key] for column in shown] for row in found],
        meanings=[column.meaning for column in shown],
    )


def _energy_reasons(found: Sequence[Mapping[str, Any]]) -> list[str]:
    """Why runs have no measured energy, arms with the same reason together."""
    counted: dict[str, list[int]] = {}
    for row in found:
        if row["energy_reason"]:
            part = re.match(r"measured in (\d+) of (\d+) runs(?:; )?", str(row["energy_reason"]))
            reason = str(row["energy_reason"])[part.end() if part else 0 :].removeprefix(f"{NOT_MEASURED}: ")
            seen = counted.setdefault(reason, [0, 0])
            seen[0] += int(part[1]) if part else 0
            seen[1] += int(part[2]) if part else int(row["n"])
    return [f"measured in {seen} of {of} runs" + (f"; {why}" if why else "") for why, (seen, of) in counted.items()]


def held_out_block(stream: Stream) -> list[Block]:
    """Losses on held-out sets beside the headline one, and their distance from dense; none where there is only one set."""
    sets = dict.fromkeys(name for arm in stream.arms.values() for run in arm.runs for name in run.held_out)
    if not sets:
        return []
    dense = stream.arms.get("dense")
    base = _set_losses(dense, sets) if dense else {}
    rows = []
    for arm in stream.arms.values():
        losses = _set_losses(arm, sets)
        cells = []
        for name in sets:
            loss, plain = losses[name], base.get(name)
            beside = "" if arm is dense or loss is None or plain is None else f" ({loss.mean - plain.mean:+.4f})"
            cells.append(NOT_MEASURED if loss is None else f"{loss.text()}{beside}")
        rows.append([arm.name, _n(arm), *cells])
    title = f"Stream {stream.name}: other held-out text at the full budget, nats (against dense)"
    return [Block(title, ["arm", "n", *sets], rows)]


def _set_losses(arm: Arm, sets: Iterable[str]) -> dict[str, Interval | None]:
    found: dict[str, Interval | None] = {}
    for name in sets:
        numbers = [run.held_out[name] for run in arm.runs if name in run.held_out]
        found[name] = interval(numbers) if numbers and len(numbers) == len(arm.runs) else None
    return found


def budgets_block(stream: Stream) -> list[Block]:
    """End loss by budget, the time to the dense end loss, and what other held-out text costs at that very budget; none
    where all arms had one budget. A time that is only a bound says so."""
    reached = times_to_dense(stream)
    if not reached:
        return []
    sets = dict.fromkeys(name for item in reached for name in item.prices)
    rows = []
    for item in reached:
        ladder = stream.ladders[item.arm]
        budgets = sorted({run.budget for run in ladder if run.budget is not None})
        losses = [
            f"{b:.3g} s: {interval([float(r.result['loss_nats']) for r in ladder if r.budget == b]).mean:.4f}"
            for b in budgets
        ]
        notes = [f"seed {s}: at most {item.shares[s]:.3f}" for s in item.at_most]
        notes += [f"seed {s}: not by {tried:.3f}" for s, tried in item.tried.items()]
        tests = ", ".join(f"{name} {p_text(test.p)} ({test.method})" for name, test in item.against.items()) or DASH
        prices = [_price(item, name) for name in sets]
        rows.append([item.arm, item.share.text(3), *prices, tests, ", ".join(notes) or DASH, "; ".join(losses)])
    beside = [f"{name} there, nats against dense" for name in sets]
    header = ["arm", "share of dense time", *beside, "against (unadjusted)", "bounds", "mean end loss by budget"]
    return [Block(f"Stream {stream.name}: reference seconds to the dense end loss", header, rows)]


def _price(item: Reached, name: str) -> str:
    price = item.price(name)
    if price is None:
        return DASH
    spread = "" if price.low is None else f" [{price.low:+.4f}, {price.high:+.4f}]"
    return f"{price.mean:+.4f}{spread}"


def frontier_block(stream: Stream) -> list[Block]:
    """Prequential loss against counted FLOPs; none where it was not measured."""
    rows = []
    for point in frontier(stream):
        test = point.against_random
        against = DASH if test is None else f"{test.difference:+.4f} ({p_text(test.p)}, n = {test.n})"
        rows.append(
            [point.arm, f"{point.flops * 1e-12:.3f}", point.loss.text(), against, "yes" if point.on_frontier else "no"]
        )
    header = ["arm", "TFLOP", "prequential loss, nats", "against random at equal FLOPs", "on the frontier"]
    title = f"Stream {stream.name}: prequential loss against FLOPs (scoring, forward, backward, optimizer)"
    return [Block(title, header, rows)] if rows else []


def deployed_block(stream: Stream, item: Deployment) -> Block:
    """Loss before and after deployment, and what was counted per token."""
    record = item.record
    base = float(record["loss_float_nats"])
    rows = [["loss, float", f"{base:.4f} nats", ""]]
    for key, name in (("loss_quantised_nats", "loss, quantised"), ("loss_simulated_nats", "loss, simulated spikes")):
        value = float(record[key])
        rows.append([name, f"{value:.4f} nats", f"{value - base:+.4f} against float"])
    rows.append(["MACs mapped", f"{float(record['mapped_mac_share']):.1%}", "the rest runs on the host"])
    macs = float(record["macs_per_token"])
    for key, name in (
        ("events_per_token", "events per token"),
        ("synops_per_token", "synaptic operations per token"),
        ("neuron_updates_per_token", "neuron updates per token"),
        ("macs_per_token", "dense MACs per token"),
    ):
        if record.get(key) is not None:
            note = f"{float(record[key]) / macs:.1%} of the dense MACs" if key == "synops_per_token" and macs else ""
            rows.append([name, f"{float(record[key]):,.0f}", note])
    if record.get("max_payload_bits") is not None:
        clipped = f"saturations {record.get('saturations', '?')}, wraps {record.get('wraps', '?')}"
        rows.append(["widest payload", f"{record['max_payload_bits']} bits", clipped])
    more, notes = _cores_and_time(record)
    rows += more
    ran_on = record.get("ran_on", "not said where")
    tokens = f", {record['val_tokens']:,} held-out tokens" if isinstance(record.get("val_tokens"), int) else ""
    seed = "" if item.seed is None else f", seed {item.seed}"
    return Block(f"Stream {stream.name}: deployed {item.arm}{seed}; {ran_on}{tokens}", ["", "value", ""], rows, notes)


def _cores_and_time(record: Mapping[str, Any]) -> tuple[list[list[str]], list[str]]:
    """Rows of cores and latency, or what the record says of their absence; and notes on where the times come from."""
    found, notes = [], []
    cores = utilisation(record)
    if cores is not None:
        found.append(["cores", f"{cores.cores:,} of {cores.available:,}", f"{cores.chips} {cores.chip}, {cores.budget}"])
        fullest = f"mean share of the scarcest resource; the fullest core {cores.highest_share:.0%}"
        found.append(["filled", f"{cores.mean_share:.0%}", fullest])
    else:
        found.append(["cores", DASH, str(record.get("placement_reason") or "no placement recorded")])
    times = token_times(record)
    for item in times:
        low, mid, high = item.token_us
        bound = ">= " if item.lower_bound else ""
        beside = f"{low:.3g} to {high:.3g}; set by {item.binding}; {item.tokens_per_s[1]:,.0f} tokens/s pipelined"
        found.append(["time per token", f"{bound}{mid:.3g} us", beside])
        notes.append(f"Time: {item.rates}, modelled; {item.source}.")
        notes += [f"{item.rates}: {remark}." for remark in item.remarks]
    if not times:
        found.append(["time per token", DASH, str(record.get("latency_reason") or "no latency recorded")])
    return found, notes


def layers_block(stream: Stream, group: DeployedGroup) -> list[Block]:
    """Where each joule goes: layers by profile, middle values; none where no record has counts by layer."""
    energies, missing = layer_energies(group.items[0].record)
    if not energies:
        return []
    names = dict.fromkeys(name for energy in energies for name in energy.layers)
    cells, raw = [], []
    for name in names:
        values = [energy.of(name)[1] if name in energy.layers else None for energy in energies]
        pairs = zip(values, energies, strict=True)
        shares = [DASH if v is None else f"{joules(v)} ({v / energy.total[1]:.0%})" for v, energy in pairs]
        cells.append([name, *shares])
        raw.append([name, *values])
    seed = "" if group.items[0].seed is None else f", seed {group.items[0].seed}"
    origins = dict.fromkeys(energy.origin for energy in energies)
    notes = [f"Joules by layer: {' and '.join(origins)}.", *(f"{reason}." for reason in missing)]
    title = f"Stream {stream.name}: where each joule goes, {group.label}{seed} (middle values per token, share of the sum)"
    return [Block(title, ["layer", *(energy.profile for energy in energies)], cells, notes, level=3, raw=raw)]


def energy_blocks(item: Deployment) -> list[Block]:
    """Inference energy per token under each profile, with kind, source and what the sum leaves out.

    Modelled and measured joules never share a table.
    """
    kinds = dict.fromkeys(str(energy["kind"]) for energy in item.energies())
    return [_energy_block(kind, [e for e in item.energies() if e["kind"] == kind]) for kind in kinds]


def _energy_block(kind: str, energies: Sequence[Mapping[str, Any]]) -> Block:
    header = ["profile", "low", "mid", "high", "kind", "hypothetical", "source"]
    rows = []
    notes: dict[str, list[str]] = {}  # the same remark on several profiles is printed once
    for energy in energies:
        profile = str(energy["profile"])
        at_least = ">= " if energy.get("lower_bound") else ""
        labels = [str(label) for label in energy.get("labels") or ()]
        remarks = list(labels)
        if energy.get("mid_j") is None:
            figures = [NOT_MEASURED, DASH, DASH]
        else:
            figures = [at_least + joules(energy[key]) for key in ("low_j", "mid_j", "high_j")]
        hypothetical = "hypothetical" if any(label.startswith("hypothetical") for label in labels) else DASH
        rows.append([profile, *figures, kind, hypothetical, str(energy["source"])])
        if energy.get("reason"):
            remarks.append(str(energy["reason"]))
        remarks += [f"not in the sum: {item}" for item in energy.get("unknown") or ()]
        for remark in remarks:
            notes.setdefault(remark, []).append(profile)
    every = len(energies)
    said = [f"{'all' if len(on) == every > 1 else ', '.join(on)}: {remark}." for remark, on in notes.items()]
    return Block(f"Inference energy per token, {kind}", header, rows, said, level=3)


def threshold_blocks(item: Deployment) -> list[Block]:
    """Below which density of events the chip costs less than each reference, what would have to change, and where the model
    stands against published thresholds; none where the record says nothing of it.
    """
    found = []
    pairs = item.record.get("break_even") or ()
    if pairs:
        header = ["chip", "reference", "density", "wins below", "low to high", "energy", "verdict", "to break even"]
        rows = [_break_even_row(pair) for pair in pairs]
        notes = [
            "Density: synaptic operations over dense MACs of the mapped layers; static power and host are on neither side.",
            "Verdict: from the intervals of both sides, undecided where they overlap.",
        ]
        found.append(Block("Break-even against dense references", header, rows, notes, level=3))
    standings = item.record.get("standings") or ()
    if standings:
        rows = []
        for s in standings:
            limit = f"{s['low']:.3g}" if s["low"] == s["high"] else f"{s['low']:.3g} to {s['high']:.3g}"
            rows.append([s["unit"], f"{s['value']:.3g}", s["verdict"], limit, s["source"], s["caution"] or DASH])
        header = ["quantity", "here", "is", "threshold", "source", "caution"]
        below = ["Below the threshold spiking pays, according to its source."]
        found.append(Block("Published thresholds", header, rows, below, level=3))
    return found


def _break_even_row(pair: Mapping[str, Any]) -> list[str]:
    low, mid, high = (float(end) for end in pair["break_even_with_neurons"])
    limits = f"{low:.1%} to {high:.1%}"
    return [
        str(pair["chip"]),
        str(pair["reference"]),
        f"{float(pair['density']):.1%}",
        f"{mid:.1%}" if mid else "never",
        limits,
        f"{float(pair['factor']):.3g} x",
        str(pair["verdict"]),
        str(pair["sentence"]).partition("; ")[2],
    ]


def _n(arm: Arm) -> str:
    return f"{len(arm.runs)} ({arm.diverged} diverged)" if arm.diverged else str(len(arm.runs))


def _seeds(stream: Stream) -> str:
    counts = sorted({len(arm.runs) for arm in stream.arms.values()} or {len(group.items) for group in stream.deployed})
    if counts == [1]:
        return "n = 1, a demonstration"
    alone = "; a row with n = 1 is a demonstration" if counts[0] == 1 else ""
    return f"n = {' to '.join(map(str, dict.fromkeys((counts[0], counts[-1]))))} seeds, mean [95 % t-interval]{alone}"
