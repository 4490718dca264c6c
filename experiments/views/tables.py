"""A Comparison as text: aligned columns for the terminal, the same blocks as Markdown.

Every joule says how it was got (counted and modelled, or measured) and from where; a sum with a part missing is printed
with ">=", and what was not measured says so.
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from experiments.comparison import overview
from experiments.comparison.accounts import joules, layer_energies, token_times, utilisation
from experiments.comparison.overview import DASH, NOT_MEASURED
from experiments.comparison.record import Arm, Comparison, DeployedGroup, Deployment, Stream
from experiments.comparison.statistics import Interval, interval, p_text
from experiments.comparison.targets import frontier, times_to_dense

LEAST_WORDS = 24  # columns that a wrapped cell of words keeps
VERDICT = re.compile(r": (yes|no)(?=[;,]| \()")
MOST_UNTESTED = 8  # sentences that say no more than a difference


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


def table(comparison: Comparison, width: int = 0) -> str:
    """The comparison for a terminal: one block of arms per stream, the deployed models under it.

    `width`: columns of the terminal. A table that is wider goes on below, each part with its first column; sentences are
    wrapped. 0 is no limit. A remark that stands further up already is not repeated.
    """
    parts, said = [], set[str]()
    for block in blocks(comparison, layers=False):
        new = [note for note in block.notes if note not in said]
        again = ["Other remarks: as above."] if len(new) < len(block.notes) else []
        said.update(new)
        parts += [_as_text(part, width) for part in _fit(replace(block, notes=[*new, *again]), width)]
    return "\n\n".join([*parts, *_left_out(comparison, "{}\n{}", "  {}: {}")]) + "\n"


def parted(sentences: Sequence[str]) -> tuple[list[str], list[str]]:
    """Sentences with a verdict, and those without."""
    tested = [sentence for sentence in sentences if VERDICT.search(sentence)]
    return tested, [sentence for sentence in sentences if not VERDICT.search(sentence)]


def verdict_lines(sentences: Sequence[str], width: int = 0) -> list[str]:
    """The sentences for a terminal; where many hold no verdict, their number stands for them."""
    tested, untested = parted(sentences)
    if len(untested) <= MOST_UNTESTED:
        return [wrapped(sentence, width) for sentence in sentences]
    rest = f"{len(untested)} more differences have no test (one seed, or not comparable): see comparison.md."
    return [wrapped(sentence, width) for sentence in (*tested, rest)]


def wrapped(sentence: str, width: int, indent: str = "") -> str:
    """The sentence in lines of at most `width` columns (0: one line); words are not broken."""
    if not width:
        return indent + sentence
    lines = textwrap.wrap(
        sentence, max(LEAST_WORDS, width), initial_indent=indent, subsequent_indent=indent + "  ",
        break_long_words=False, break_on_hyphens=False,
    )  # fmt: skip
    return "\n".join(lines)


def markdown(comparison: Comparison, *, most_columns: int = 0) -> str:
    """The comparison as a Markdown document: verdicts first. `most_columns`: tables with more are cut into several, each
    with the first column (TensorBoard breaks words rather than scroll); 0 cuts none."""
    verdicts = "\n".join(f"- {sentence}" for sentence in comparison.verdicts())
    parts = [_as_markdown(part) for block in blocks(comparison) for part in _narrow(block, most_columns)]
    left_out = _left_out(comparison, "## {}\n\n{}", "- `{}`: {}")
    return "\n\n".join(["# Comparison", verdicts, *parts, *left_out]) + "\n"


def energy_markdown(comparison: Comparison) -> str:
    """Where each joule of the deployed models comes from; `step` is the profile's place in the energy chart."""
    parts = []
    for stream in comparison.streams.values():
        for item in stream.deployments:
            for block in energy_blocks(item):
                steps = [str([e["profile"] for e in item.energies()].index(row[0])) for row in block.rows]
                rows = [[step, *row] for step, row in zip(steps, block.rows, strict=True)]
                title = f"{stream.name}, {item.arm}: {block.title}"
                parts.append(_as_markdown(Block(title, ["step", *block.header], rows, block.notes, level=3)))
    return "\n\n".join(parts) or "No deployed model."


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


def arms_block(stream: Stream) -> Block:
    """One row per training arm and, under them, per deployed model."""
    found = overview.rows(stream)
    shown = overview.columns(found)
    notes = [f"Note: {note}." for note in stream.notes]
    notes += [f"Energy: {reason}." for reason in _energy_reasons(found)]
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
    sets = dict.fromkeys(
        name
        for arm in stream.arms.values()
        for run in arm.runs
        for name in run.result.get("held_out") or ()
        if name != "val"
    )
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
    title = f"Stream {stream.name}: other held-out text, nats (against dense)"
    return [Block(title, ["arm", "n", *sets], rows)]


def _set_losses(arm: Arm, sets: Iterable[str]) -> dict[str, Interval | None]:
    found: dict[str, Interval | None] = {}
    for name in sets:
        values = [(run.result.get("held_out") or {}).get(name, {}).get("loss_nats") for run in arm.runs]
        numbers = [float(value) for value in values if isinstance(value, int | float)]
        found[name] = interval(numbers) if numbers and len(numbers) == len(values) else None
    return found


def budgets_block(stream: Stream) -> list[Block]:
    """End loss by budget, and the time to the dense end loss; none where all arms had one budget."""
    reached = times_to_dense(stream)
    if not reached:
        return []
    rows = []
    for item in reached:
        ladder = stream.ladders[item.arm]
        budgets = sorted({run.budget for run in ladder if run.budget is not None})
        losses = [
            f"{b:.3g} s: {interval([float(r.result['loss_nats']) for r in ladder if r.budget == b]).mean:.4f}"
            for b in budgets
        ]
        share = "not reached" if item.ratio is None else item.ratio.text(3)
        notes = [f"seed {s}: at most" for s in item.at_most] + [f"seed {s}: never" for s in item.never]
        tests = ", ".join(f"{name} {p_text(test.p)}" for name, test in item.against.items()) or DASH
        rows.append([item.arm, share, tests, "; ".join(losses), ", ".join(notes) or DASH])
    header = ["arm", "share of dense time", "against (unadjusted)", "mean end loss by budget", "bounds"]
    return [Block(f"Stream {stream.name}: reference seconds to the dense end loss", header, rows)]


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


def _as_text(block: Block, width: int = 0) -> str:
    widths = [max(len(row[i]) for row in (block.header, *block.rows)) for i in range(len(block.header))]
    left = [all(not _numeric(row[i]) for row in block.rows) for i in range(len(block.header))]
    if width and left[-1]:  # words in the last column are wrapped
        widths[-1] = min(widths[-1], max(LEAST_WORDS, width - sum(widths[:-1]) - 2 * len(widths)))

    def line(cells: Sequence[str]) -> str:
        first, *more = textwrap.wrap(cells[-1], widths[-1], break_on_hyphens=False) or [""] if width else [cells[-1]]
        whole = zip([*cells[:-1], first], widths, left, strict=True)
        aligned = "  ".join(c.ljust(w) if flush else c.rjust(w) for c, w, flush in whole)
        blank = " " * (sum(widths[:-1]) + 2 * len(widths))
        return "\n".join([("  " + aligned).rstrip(), *(blank + rest for rest in more)])

    head = [line(block.header), "  " + "  ".join("-" * width for width in widths)] if any(block.header[0]) else []
    notes = [wrapped(note, width, "  ") for note in block.notes]
    return "\n".join([wrapped(block.title, width), *head, *map(line, block.rows), *notes])


def _fit(block: Block, width: int) -> list[Block]:
    """The block, or parts that are no wider than `width`: the first column and as many of the next ones as go beside it."""
    if not width:
        return [block]
    widths = [2 + max(len(row[i]) for row in (block.header, *block.rows)) for i in range(len(block.header))]
    if all(not _numeric(row[-1]) for row in block.rows):
        widths[-1] = min(widths[-1], 2 + LEAST_WORDS)
    cuts: list[list[int]] = [[0]]
    for i in range(1, len(widths)):
        if len(cuts[-1]) > 1 and sum(widths[j] for j in cuts[-1]) + widths[i] > width:
            cuts.append([0])
        cuts[-1].append(i)
    return _parts(block, cuts)


def _narrow(block: Block, most: int) -> list[Block]:
    """The block, or parts of at most `most` columns: the first column and the next ones in turn; the last has the notes."""
    if not most or len(block.header) <= most:
        return [block]
    starts = range(1, len(block.header), most - 1)
    return _parts(block, [[0, *range(start, min(start + most - 1, len(block.header)))] for start in starts])


def _parts(block: Block, cuts: Sequence[Sequence[int]]) -> list[Block]:
    """The block's columns by group; the last part has the notes."""
    if len(cuts) < 2:
        return [block]
    parts = [
        replace(
            block,
            header=[block.header[i] for i in cut],
            rows=[[row[i] for i in cut] for row in block.rows],
            raw=(),
            notes=(),
        )
        for cut in cuts
    ]
    parts[1:] = [replace(part, title=f"{block.title}, continued", level=block.level + 1) for part in parts[1:]]
    return [*parts[:-1], replace(parts[-1], notes=block.notes)]


def _as_markdown(block: Block) -> str:
    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"

    right = [any(_numeric(row[i]) for row in block.rows) for i in range(len(block.header))]
    rule = "|" + "|".join("---:" if flush else "---" for flush in right) + "|"
    notes = ["", *(f"- {note}" for note in block.notes)] if block.notes else []
    return "\n".join(["#" * block.level + f" {block.title}", "", line(block.header), rule, *map(line, block.rows), *notes])


def _left_out(comparison: Comparison, whole: str, each: str) -> list[str]:
    if not comparison.excluded:
        return []
    lines = "\n".join(each.format(item.folder, item.reason) for item in comparison.excluded)
    return [whole.format("Left out", lines)]


def _numeric(cell: str) -> bool:
    return cell.lstrip(">=+- ")[:1].isdigit()


def _n(arm: Arm) -> str:
    return f"{len(arm.runs)} ({arm.diverged} diverged)" if arm.diverged else str(len(arm.runs))


def _seeds(stream: Stream) -> str:
    counts = sorted({len(arm.runs) for arm in stream.arms.values()})
    if counts == [1]:
        return "n = 1, a demonstration"
    alone = "; a row with n = 1 is a demonstration" if counts[0] == 1 else ""
    return f"n = {' to '.join(map(str, dict.fromkeys((counts[0], counts[-1]))))} seeds, mean [95 % t-interval]{alone}"
