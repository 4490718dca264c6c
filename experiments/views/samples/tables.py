"""A deployment of any module as blocks: what was answered, what it took on the chip, joules, layers, health."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from experiments.views.blocks import Block
from experiments.views.terminal import block_text, in_lines
from hardware import markdown as markdown_text

METRIC = {"accuracy": ("accuracy, %", 100.0, 2), "nrmse": ("NRMSE", 1.0, 4)}
"""Metric -> how it is headed, what it is multiplied by, and its digits."""


def blocks_of(document: Mapping[str, Any]) -> list[Block]:
    """All tables in the order they are shown."""
    return [results(document), traffic(document), energy(document), layers(document), health(document)]


def results(document: Mapping[str, Any]) -> Block:
    """Accuracy or error of the float model, its quantised twin and the simulation, and what they lose."""
    metric = document["metric"]
    head, scale, digits = METRIC[metric]
    rows = []
    for name, found in document[metric].items():
        less = document["less_float"].get(name)
        agrees = document["agreement"].get(name)
        rows.append(
            [
                name,
                f"{scale * found['value']:.{digits}f}",
                bounds(found, scale, digits),
                "-" if less is None else f"{scale * less['value']:+.{digits}f}",
                "-" if less is None else bounds(less, scale, digits, "+"),
                "-" if agrees is None else f"{100 * agrees:.2f}",
            ]
        )
    paired = next(iter(document["less_float"].values()))
    notes = [
        f"{document['samples']:,} held-out samples of {document['source']}; {document['module']}",
        f"intervals: {document[metric]['float']['method']}; of differences: {paired['method']}",
        *document["notes"],
    ]
    header = ["model", head, "95 %", "less float", "95 %, paired", "same class as float, %"]
    return Block(f"{document['model']} on {document['data']}, {document['route']} route", header, rows, notes)


def traffic(document: Mapping[str, Any]) -> Block:
    """What a sample takes on the chip."""
    placed = document["cores"] is not None
    rows = [
        ["mapped share of multiply-accumulates", f"{document['mapped_mac_share']:.1%}", "counted"],
        ["multiply-accumulates, all", f"{document['macs_per_sample']:,.0f}", "counted"],
        ["synaptic operations", f"{document['synops_per_sample']:,.0f}", "counted"],
        ["synaptic operations per mapped multiply-accumulate", f"{document['synops_fraction']:.3f}", "counted"],
        ["events", f"{document['events_per_sample']:,.0f}", "counted"],
        ["neuron updates", f"{document['neuron_updates_per_sample']:,.0f}", "counted"],
        ["time steps", f"{document['time_steps_per_sample']:,}", "counted"],
        ["host crossings", f"{document['host_crossings_per_sample']:,.1f}", "counted"],
        ["cores", f"{document['cores']:,}" if placed else "-", f"modelled: placement on {document['chip']}"],
        ["chips", f"{document['chips']:,}" if placed else "-", f"modelled: placement on {document['chip']}"],
    ]
    for one in document.get("latency") or ():
        low, mid, high = one["token_us"]
        rows.append(
            ["time from first step to answer, us", f"{mid:,.1f} ({low:,.1f} to {high:,.1f})", f"modelled: {one['rates']}"]
        )
    notes = [] if placed else [f"not placed: {document['placement_reason']}"]
    return Block("A sample on the chip", ["what", "per sample", "how it is known"], rows, notes)


def energy(document: Mapping[str, Any]) -> Block:
    """Joules per profile, each modelled from the counts, with the source of its constants."""
    rows = []
    for one in document["energy"]:
        cells = [f"{1e6 * one[key]:,.4g}" for key in ("low_j", "mid_j", "high_j")]
        rows.append([one["profile"], *cells, str(one["kind"]), str(one["source"])])
    host = document.get("host_energy")
    if host:
        cells = [f"{1e6 * host[key]:,.4g}" for key in ("low_j", "mid_j", "high_j")]
        rows.append(["on the host", *cells, "modelled", str(host["source"])])
    labels = list(dict.fromkeys(label for one in document["energy"] for label in one["labels"]))
    unknown = list(dict.fromkeys(reason for one in document["energy"] for reason in one["unknown"]))
    notes = [*labels, *(f"not in it: {reason}" for reason in unknown), *(p["sentence"] for p in document["break_even"])]
    return Block("Energy of a sample, uJ", ["profile", "low", "middle", "high", "kind", "source"], rows, notes)


def layers(document: Mapping[str, Any]) -> Block:
    """Counts of every layer."""
    rows = [
        [
            one["layer"],
            "host" if one["host"] else "chip",
            f"{one['dense_macs_per_sample']:,.0f}",
            "-" if one["host"] else f"{one['synops_per_sample']:,.0f}",
            "-" if one["host"] else f"{one['events_per_sample']:,.0f}",
            f"{one['weight_bytes']:,}",
        ]
        for one in document["layers"]
    ]
    header = ["layer", "runs on", "MACs/sample", "synaptic operations/sample", "events/sample", "bytes of weights"]
    return Block("Layers", header, rows)


def health(document: Mapping[str, Any]) -> Block:
    """What was clipped or did not fit, per graph."""
    rows = [
        [
            one["segment"],
            f"{one['clipped_inputs']:,} of {one['inputs']:,}",
            f"{one['wraps']:,}",
            f"{one['wide']:,}",
            f"{one['payload_overflows']:,}",
            f"{max(one['max_payload_bits'].values(), default=0)}",
        ]
        for one in document["health"]
    ]
    header = ["graph", "inputs clipped", "wraps", "beyond 24 bits", "messages too wide", "widest message, bits"]
    return Block("Health", header, rows)


def bounds(found: Mapping[str, Any], scale: float, digits: int, sign: str = "") -> str:
    """[low, high]; a dash where there is none."""
    if found["low"] is None:
        return "-"
    return f"[{scale * found['low']:{sign}.{digits}f}, {scale * found['high']:{sign}.{digits}f}]"


def lines(document: Mapping[str, Any], width: int = 0) -> Iterator[str]:
    """For a terminal of so many columns, 0 for no limit: the answers, what a sample takes, the joules."""
    for block in (results(document), traffic(document), energy(document)):
        priced = block.header[0] == "profile"  # what a price takes for granted stands on the page
        if width:
            yield block_text(block, width, notes=not priced) + "\n"
            continue
        yield block.title
        yield from text(block.header, block.rows)
        if not priced:
            yield from (f"  {note}" for note in block.notes)
    yield from (in_lines(pair["sentence"], width) for pair in document["break_even"])


def text(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Columns of plain text."""
    widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in (header, *rows)
    ]


def markdown(block: Block) -> str:
    """The block for TensorBoard."""
    rows = [block.header, ["---"] * len(block.header), *block.rows]
    return "\n\n".join(
        ["\n".join(map(markdown_text.row, rows)), *(f"- {markdown_text.line(note)}" for note in block.notes)]
    )
