"""A Comparison as one picture: energy against accuracy above, loss over reference seconds below; a column per stream."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from experiments.comparison.record import Comparison, Run, Stream
from experiments.comparison.statistics import mean_curve
from experiments.comparison.targets import frontier
from experiments.views.energy_figure import (
    FRONT,
    MUTED,
    SMALLEST_RANGE_NATS,
    energy_legend,
    energy_panel,
    plain_axes,
    seed_points,
)
from experiments.views.labels import LONGEST, EdgeLabel, edge_labels, settle
from hardware.text import short

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.text import Annotation

# Okabe and Ito's palette: distinct under the common colour-vision deficiencies and in grey.
ARM_COLOURS = {"dense": "#000000", "random": "#E69F00", "surprise": "#0072B2"}
MORE_COLOURS = ("#009E73", "#CC79A7", "#D55E00", "#56B4E9", "#8A6D00", "#5C4B99", "#7A7A7A", "#00606B")
DASHES: tuple[Any, ...] = ("-", (0, (5, 1.5)), (0, (1.5, 1)), (0, (5, 1.5, 1.5, 1.5)))  # for more arms than colours
MARKERS = ("o", "s", "D", "^", "v", "P", "X", "h", "p", "*")
MOST_COLUMNS = 2  # streams beside each other: more could not be read at the width of a README
PANEL_INCHES = (5.4, 4.1)
NAME_INCHES = 0.155  # height of an arm's name at the edge
FALL = 0.2  # the first part of the training time, whose steep fall would flatten all the rest


def figure(comparison: Comparison, *, flat: bool = False) -> Figure:
    """Upper row: energy per token (log) against held-out loss, with the frontier; below: the training curves, with the end
    loss of every budget as a dot; below that: prequential loss against FLOPs.

    Without a deployed model there is no upper row, without prequential losses no last one. Streams beyond `MOST_COLUMNS`
    follow below. `flat`: a row per stream.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    streams = list(comparison.streams.values())
    profiles = {p.profile: None for s in streams for p in seed_points(s)}
    drifting = any(frontier(stream) for stream in streams)
    kinds = [*(["energy"] if profiles else []), "training", *(["prequential"] if drifting else [])]
    columns = len(kinds) if flat else max(1, min(MOST_COLUMNS, len(streams)))
    bands = [[s] for s in streams] if flat else [streams[i : i + columns] for i in range(0, len(streams), columns)]
    heights = [h for band in bands for h in ([_inches(band)] if flat else [_inches(band, kind) for kind in kinds])]
    size = (0.6 + PANEL_INCHES[0] * columns, sum(heights) or PANEL_INCHES[1])
    picture = Figure(figsize=size, layout="constrained", facecolor="white")
    FigureCanvasAgg(picture)
    if not streams:
        picture.text(0.5, 0.5, "no finished run to show", ha="center", va="center", color=MUTED)
        return picture
    axes = picture.subplots(len(heights), columns, squeeze=False, height_ratios=heights)
    colours, dashes = _styles(comparison)
    shapes = {name: MARKERS[i % len(MARKERS)] for i, name in enumerate(profiles)}
    groups: list[list[Annotation]] = []
    for number, stream in enumerate(streams):
        for k, kind in enumerate(kinds):
            at = (number, k) if flat else (number // columns * len(kinds) + k, number % columns)
            if kind == "energy":
                groups.append(energy_panel(axes[at], stream, colours, shapes))
            elif kind == "training":
                groups.append(_training_panel(axes[at], stream, colours, dashes))
            else:
                groups.append(_prequential_panel(axes[at], stream, colours))
    for ax in axes.flat:
        if not ax.has_data() and not ax.texts:
            ax.set_axis_off()
    if profiles:
        energy_legend(picture, streams, colours, shapes)
    settle(picture, groups)
    return picture


def _inches(band: Sequence[Stream], kind: str = "") -> float:
    """Height of a row of panels: enough for the names of all arms, one under the other."""
    names = 0 if kind == "energy" else max(len(stream.arms) for stream in band)
    return max(PANEL_INCHES[1], 1.0 + NAME_INCHES * names)


def budget_ends(stream: Stream, arm: str) -> list[tuple[float, float]]:
    """(reference seconds, mean end loss) of each budget of an arm that was run at several; none otherwise."""
    by_budget: dict[float, list[Run]] = {}
    for run in stream.ladders.get(arm, ()):
        if run.budget is not None:
            by_budget.setdefault(run.budget, []).append(run)
    if len(by_budget) < 2:
        return []
    means = [
        tuple(math.fsum(float(r.result[key]) for r in runs) / len(runs) for key in ("reference_s", "loss_nats"))
        for _, runs in sorted(by_budget.items())
    ]
    return [(x, y) for x, y in means]


def _prequential_panel(ax: Axes, stream: Stream, colours: Mapping[str, str]) -> list[Annotation]:
    title = f"{short(stream.name, LONGEST)}: prequential loss against FLOPs"
    plain_axes(ax, title, "counted TFLOP, scoring included", "prequential loss, nats per token")
    found = frontier(stream)
    if not found:
        ax.text(0.5, 0.5, "no prequential loss recorded", transform=ax.transAxes, ha="center", color=MUTED)
        return []
    spots = [(point.flops * 1e-12, point.loss.mean) for point in found]
    for point, (x, y) in zip(found, spots, strict=True):
        half = 0.0 if point.loss.high is None else point.loss.high - y
        ax.errorbar([x], [y], yerr=[half], marker="o", markersize=5, color=colours[point.arm], capsize=2)
    edge = [spot for point, spot in zip(found, spots, strict=True) if point.on_frontier]
    ax.plot([x for x, _ in edge], [y for _, y in edge], color=FRONT, linewidth=1.6, zorder=0)
    least, most = min(x for x, _ in spots), max(x for x, _ in spots)
    margin = max(0.08 * (most - least), 0.05 * most)  # FLOPs that differ by less than a few percent do not fill the axis
    ax.set_xlim(least - margin, most + margin)
    ax.ticklabel_format(axis="both", useOffset=False)
    return edge_labels(ax, [EdgeLabel(x, y, p.arm, colours[p.arm]) for p, (x, y) in zip(found, spots, strict=True)])


def _training_panel(ax: Axes, stream: Stream, colours: Mapping[str, str], dashes: Mapping[str, Any]) -> list[Annotation]:
    plain_axes(
        ax,
        f"{short(stream.name, LONGEST)}: training ({_seeds(stream)})",
        "reference seconds",
        "held-out loss, nats per token",
    )
    ends: list[tuple[float, float, str]] = []
    seen: list[tuple[float, float]] = []
    for arm in stream.arms.values():
        colour = colours[arm.name]
        curves = [[(t, v) for t, v in run.curve if math.isfinite(v)] for run in arm.runs]
        if len(curves) > 1:
            for curve in curves:
                _curve(ax, curve, color=colour, linewidth=0.6, alpha=0.35)
        middle = mean_curve(curves)
        if middle:
            _curve(ax, middle, color=colour, linewidth=1.8, linestyle=dashes[arm.name])
            ends.append((*middle[-1], arm.name))
        dots = budget_ends(stream, arm.name)
        for x, y in dots:
            ax.plot([x], [y], marker="o", markersize=4.5, color=colour, linestyle="none", zorder=3)
        seen += [point for curve in curves for point in curve] + dots
    if not ends:
        ax.text(0.5, 0.5, "no held-out curve recorded", transform=ax.transAxes, ha="center", color=MUTED)
        return []
    first, last = min(t for t, _ in seen), max(t for t, _ in seen)
    floor = min(v for _, v in seen)
    ceiling = max([v for t, v in seen if t >= FALL * last])
    middle_nats, half = (ceiling + floor) / 2, max(SMALLEST_RANGE_NATS, 1.12 * (ceiling - floor)) / 2
    ax.set_ylim(middle_nats - half, middle_nats + half)
    ax.set_xlim(0.92 * first if first > FALL * last else 0, 1.02 * last)
    if stream.notes:
        text = "\n".join(line for note in stream.notes for line in textwrap.wrap(note, 58))
        ax.text(0.98, 0.97, text, transform=ax.transAxes, ha="right", va="top", fontsize=7, color=MUTED)
    labels = []
    for x, y, name in ends:
        loss = stream.arms[name].loss
        words = f"{name} {loss.mean:.3f}" + ("" if loss.high is None else f" \u00b1{loss.high - loss.mean:.3f}")
        labels.append(EdgeLabel(x, y, words, colours[name]))
    return edge_labels(ax, labels)


def _curve(ax: Axes, points: Sequence[tuple[float, float]], **style: Any) -> None:
    """A line, or a dot where there is one evaluation only."""
    alone: dict[str, Any] = {"marker": "o", "markersize": 4.5} if len(points) == 1 else {}
    ax.plot([t for t, _ in points], [v for _, v in points], **style, **alone)


def _seeds(stream: Stream) -> str:
    counts = sorted({len(arm.runs) for arm in stream.arms.values()}) or [0]
    ends = " to ".join(map(str, dict.fromkeys((counts[0], counts[-1]))))
    return f"n = {ends}" + (", 95 % interval" if counts[0] > 1 else "")


def _styles(comparison: Comparison) -> tuple[dict[str, str], dict[str, Any]]:
    """Arm -> colour, and arm -> line: arms that share a colour differ in their dashes."""
    names = dict.fromkeys(
        name for stream in comparison.streams.values() for name in (*stream.arms, *(p.arm for p in seed_points(stream)))
    )
    others = [name for name in names if name not in ARM_COLOURS]
    colours = {name: MORE_COLOURS[i % len(MORE_COLOURS)] for i, name in enumerate(others)}
    dashes = {name: DASHES[i // len(MORE_COLOURS) % len(DASHES)] for i, name in enumerate(others)}
    return {**ARM_COLOURS, **colours}, {**dict.fromkeys(ARM_COLOURS, "-"), **dashes}
