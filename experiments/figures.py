"""A Comparison: energy against accuracy above, loss over reference seconds below; a column per stream."""

from __future__ import annotations

import itertools
import math
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from experiments.comparison import Comparison, Deployment, Run, Stream
from experiments.statistics import interval, mean_curve
from experiments.targets import frontier

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's palette: distinct under the common colour-vision deficiencies and in grey.
ARM_COLOURS = {"dense": "#000000", "random": "#E69F00", "surprise": "#0072B2"}
MORE_COLOURS = ("#009E73", "#CC79A7", "#D55E00", "#56B4E9", "#8A6D00", "#5C4B99", "#7A7A7A", "#00606B")
MARKERS = ("o", "s", "D", "^", "v", "P", "X", "h", "p", "*")
MUTED = "#6b6b6b"
SMALLEST_RANGE_NATS = 0.04  # differences far below a hundredth of a nat must not fill the axis


@dataclass(frozen=True)
class Point:
    """One profile's energy for one deployed model: joules per token, and the loss of what the profile evaluates."""

    profile: str
    arm: str
    low_j: float
    mid_j: float
    high_j: float
    loss_nats: float
    kind: str
    lower_bound: bool
    hypothetical: bool
    loss_low: float | None = None
    loss_high: float | None = None


def points(deployments: Sequence[Deployment]) -> list[Point]:
    """Everything that has both joules and a loss."""
    found = []
    for item in deployments:
        for energy in item.energies():
            if energy.get("mid_j") is None or energy["mid_j"] <= 0:
                continue
            mid = float(energy["mid_j"])
            labels = map(str, energy.get("labels") or ())
            found.append(
                Point(
                    profile=str(energy["profile"]),
                    arm=item.arm,
                    low_j=float(energy.get("low_j") or mid),
                    mid_j=mid,
                    high_j=float(energy.get("high_j") or mid),
                    loss_nats=_evaluated_loss(item.record, energy),
                    kind=str(energy["kind"]),
                    lower_bound=bool(energy.get("lower_bound")),
                    hypothetical=any(label.startswith("hypothetical") for label in labels),
                    **_window_interval(item.record, energy),
                )
            )
    return [point for point in found if math.isfinite(point.loss_nats)]


def seed_points(stream: Stream) -> list[Point]:
    """The points of a stream's deployed models; seeds of one model are one point, with the t-interval of the loss over
    them (of a single one: its own interval over held-out windows, where that is recorded)."""
    found = []
    for group in stream.deployed:
        by_profile: dict[str, list[Point]] = {}
        for point in points(group.items):
            by_profile.setdefault(point.profile, []).append(point)
        for alike in by_profile.values():
            first = replace(alike[0], arm=group.label.replace(", deployed", ""))
            if len(alike) > 1:
                loss = interval([p.loss_nats for p in alike])
                low, mid, high = (
                    math.fsum(getattr(p, k) for p in alike) / len(alike) for k in ("low_j", "mid_j", "high_j")
                )
                first = replace(first, low_j=low, mid_j=mid, high_j=high)
                first = replace(first, loss_nats=loss.mean, loss_low=loss.low, loss_high=loss.high)
            found.append(first)
    return found


def pareto(candidates: Sequence[Point]) -> list[Point]:
    """The points no other one beats in both energy (middle value) and loss, in order of energy."""
    front: list[Point] = []
    for point in sorted(candidates, key=lambda p: (p.mid_j, p.loss_nats)):
        if not front or point.loss_nats < front[-1].loss_nats:
            front.append(point)
    return front


def figure(comparison: Comparison, *, flat: bool = False) -> Figure:
    """Upper row: energy per token (log) against held-out loss, with the frontier; below: the training curves, with the end
    loss of every budget as a dot; below that: prequential loss against FLOPs.

    Without a deployed model there is no upper row, without prequential losses no last one. `flat`: a row per stream.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    streams = list(comparison.streams.values())
    columns = max(1, len(streams))
    profiles = {p.profile: None for s in streams for p in seed_points(s)}
    drifting = any(frontier(stream) for stream in streams)
    rows = 1 + bool(profiles) + drifting
    wide, high = (rows, columns) if flat else (columns, rows)
    size = (1.6 + 4.6 * wide, 4.1 * high)
    picture = Figure(figsize=size, layout="constrained", facecolor="white")
    FigureCanvasAgg(picture)
    if not streams:
        picture.text(0.5, 0.5, "no finished run to show", ha="center", va="center", color=MUTED)
        return picture
    axes = picture.subplots(high, wide, squeeze=False)
    axes = axes.T if flat else axes
    colours = _colours(comparison)
    shapes = {name: MARKERS[i % len(MARKERS)] for i, name in enumerate(profiles)}
    for column, stream in enumerate(streams):
        _training_panel(axes[-2 if drifting else -1][column], stream, colours)
        if drifting:
            _frontier_panel(axes[-1][column], stream, colours)
        if profiles:
            _energy_panel(axes[0][column], stream, colours, shapes)
    if profiles:
        _energy_legend(picture, streams, colours, shapes)
    return picture


def _energy_panel(ax: Axes, stream: Stream, colours: Mapping[str, str], shapes: Mapping[str, str]) -> None:
    _plain(ax, f"{stream.name}: energy against accuracy")
    ax.set_xlabel("inference energy, joules per token")
    ax.set_ylabel("held-out loss, nats per token")
    found = seed_points(stream)
    if not found:
        ax.text(0.5, 0.5, "no deployed model", transform=ax.transAxes, ha="center", color=MUTED)
        ax.set_xticks([])
        ax.set_yticks([])
        return
    ax.set_xscale("log")
    front = pareto(found)
    right = 4 * max(p.high_j for p in found)
    edge = [(front[0].mid_j, max(p.loss_nats for p in found) + 1.0), *((p.mid_j, p.loss_nats) for p in front)]
    edge.append((right, front[-1].loss_nats))
    ax.step([x for x, _ in edge], [y for _, y in edge], where="post", color="#b8b8b8", linewidth=1.2, zorder=1)
    for point, dodge in zip(found, _dodges(found), strict=True):
        _energy_point(ax, point, dodge, colours[point.arm], shapes[point.profile])
    elsewhere = _undeployed(stream)
    ends = [end for point in found for end in (point.loss_low, point.loss_high) if end is not None]
    losses = [*(point.loss_nats for point in found), *ends, *elsewhere.values()]
    low, high = min(losses), max(losses)
    half = max(SMALLEST_RANGE_NATS, 1.4 * (high - low)) / 2
    ax.set_ylim((low + high) / 2 - half, (low + high) / 2 + half)
    ax.set_xlim(min(p.low_j for p in found) / 2, right)
    heights = _apart(list(elsewhere.values()), 0.11 * half)
    for (name, loss), height in zip(elsewhere.items(), heights, strict=True):
        ax.axhline(loss, color=colours[name], linewidth=1.0, linestyle=(0, (1, 2)), zorder=0)
        ax.annotate(
            f"{name}, float,\nnot deployed",
            xy=(right, loss),
            xytext=(1.1 * right, height),
            color=colours[name],
            fontsize=8,
            va="center",
            annotation_clip=False,
        )


def _energy_point(ax: Axes, point: Point, dodge: float, colour: str, shape: str) -> None:
    from matplotlib.transforms import ScaledTranslation

    assert ax.figure is not None
    place = ax.transData + ScaledTranslation(0, dodge / 72, ax.figure.dpi_scale_trans)
    y = point.loss_nats
    if point.loss_low is not None and point.loss_high is not None:
        ax.plot([point.mid_j] * 2, [point.loss_low, point.loss_high], color=colour, linewidth=0.8, alpha=0.55, zorder=2)
    ax.plot([point.low_j, point.high_j], [y, y], color=colour, linewidth=1.4, zorder=2, transform=place)
    ax.plot(point.low_j, y, marker="|", color=colour, markersize=7, zorder=2, transform=place)
    end, size = (">", 5) if point.lower_bound else ("|", 7)
    ax.plot(point.high_j, y, marker=end, color=colour, markersize=size, zorder=2, transform=place)
    face = "white" if point.hypothetical else colour
    style: dict[str, Any] = {
        "markersize": 7,
        "markeredgewidth": 1.5,
        "markeredgecolor": colour,
        "markerfacecolor": face,
    }
    ax.plot(point.mid_j, y, marker=shape, linestyle="none", zorder=3, transform=place, **style)


def _dodges(found: Sequence[Point]) -> list[float]:
    """Vertical shifts in typographic points, so that bars at one loss do not cover each other (about 0.0005 nats)."""
    shifts = []
    for point in found:
        level = [p for p in found if p.arm == point.arm and p.loss_nats == point.loss_nats]
        alike = [p.profile for p in level if p.low_j <= point.high_j and point.low_j <= p.high_j]
        shifts.append(7.0 * (alike.index(point.profile) - (len(alike) - 1) / 2))
    return shifts


def _undeployed(stream: Stream) -> dict[str, float]:
    """Held-out loss of the arms without a deployed model, where all were read on the same held-out tokens."""
    tokens = {item.record.get("val_tokens") for item in stream.deployments}
    deployed = {item.arm for item in stream.deployments}
    return {
        name: arm.loss.mean
        for name, arm in stream.arms.items()
        if name not in deployed and {run.result.get("val_tokens") for run in arm.runs} == tokens
    }


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


def _frontier_panel(ax: Axes, stream: Stream, colours: Mapping[str, str]) -> None:
    _plain(ax, f"{stream.name}: prequential loss against FLOPs")
    ax.set_xlabel("counted TFLOP, scoring included")
    ax.set_ylabel("prequential loss, nats per token")
    found = frontier(stream)
    if not found:
        ax.text(0.5, 0.5, "no prequential loss recorded", transform=ax.transAxes, ha="center", color=MUTED)
        return
    for point in found:
        x, y = point.flops * 1e-12, point.loss.mean
        half = 0.0 if point.loss.high is None else point.loss.high - y
        ax.errorbar([x], [y], yerr=[half], marker="o", markersize=5, color=colours[point.arm], capsize=2)
        ax.annotate(point.arm, (x, y), xytext=(5, 4), textcoords="offset points", fontsize=8, color=colours[point.arm])
    edge = [(point.flops * 1e-12, point.loss.mean) for point in found if point.on_frontier]
    ax.plot([x for x, _ in edge], [y for _, y in edge], color="#b8b8b8", linewidth=1.0, zorder=0)


def _training_panel(ax: Axes, stream: Stream, colours: Mapping[str, str]) -> None:
    _plain(ax, f"{stream.name}: training ({_seeds(stream)})")
    ax.set_xlabel("reference seconds")
    ax.set_ylabel("held-out loss, nats per token")
    ends: list[tuple[float, float, str]] = []
    for arm in stream.arms.values():
        colour = colours[arm.name]
        curves = [[(t, v) for t, v in run.curve if math.isfinite(v)] for run in arm.runs]
        if len(curves) > 1:
            for curve in curves:
                ax.plot([t for t, _ in curve], [v for _, v in curve], color=colour, linewidth=0.6, alpha=0.35)
        middle = mean_curve(curves)
        if middle:
            ax.plot([t for t, _ in middle], [v for _, v in middle], color=colour, linewidth=1.8)
            ends.append((middle[-1][0], middle[-1][1], arm.name))
        for x, y in budget_ends(stream, arm.name):
            ax.plot([x], [y], marker="o", markersize=4.5, color=colour, linestyle="none", zorder=3)
    if not ends:
        ax.text(0.5, 0.5, "no held-out curve recorded", transform=ax.transAxes, ha="center", color=MUTED)
        return
    last = max(t for t, _, _ in ends)
    points_seen = [(t, v) for arm in stream.arms.values() for run in arm.runs for t, v in run.curve if math.isfinite(v)]
    floor = min(v for _, v in points_seen)
    ceiling = max(v for t, v in points_seen if t >= 0.2 * last)  # the first fall would flatten all the rest
    margin = 0.06 * (ceiling - floor) + 0.01
    ax.set_ylim(floor - margin, ceiling + margin)
    ax.set_xlim(0, 1.02 * last)
    heights = _apart([v for _, v, _ in ends], 0.055 * (ceiling - floor + 2 * margin))
    for (_, value, name), height in zip(ends, heights, strict=True):
        loss = stream.arms[name].loss
        label = f"{name} {loss.mean:.3f}" + ("" if loss.high is None else f" \u00b1{loss.high - loss.mean:.3f}")
        ax.annotate(
            label,
            xy=(last, value),
            xytext=(1.04 * last, height),
            color=colours[name],
            fontsize=9,
            va="center",
            annotation_clip=False,
        )
    if stream.notes:
        text = "\n".join(line for note in stream.notes for line in textwrap.wrap(note, 58))
        ax.text(0.98, 0.97, text, transform=ax.transAxes, ha="right", va="top", fontsize=7, color=MUTED)


def _energy_legend(
    picture: Figure, streams: Sequence[Stream], colours: Mapping[str, str], shapes: Mapping[str, str]
) -> None:
    from matplotlib.lines import Line2D

    everything = [point for stream in streams for point in seed_points(stream)]
    handles: list[Any] = []
    for profile, shape in shapes.items():
        first = next(point for point in everything if point.profile == profile)
        colour = MUTED if len({p.arm for p in everything}) > 1 else colours[first.arm]
        words = ["counted, modelled" if first.kind == "modelled" else first.kind]
        words += ["hypothetical"] if first.hypothetical else []
        face = "white" if first.hypothetical else colour
        handles.append(Line2D([], [], linestyle="none", marker=shape, color=colour, markerfacecolor=face, markersize=8))
        handles[-1].set_label(f"{profile} ({', '.join(words)})")
    for arm in dict.fromkeys(point.arm for point in everything):
        handles.append(Line2D([], [], color=colours[arm], linewidth=1.6, label=f"deployed {arm}, low to high"))
    if any(point.lower_bound for point in everything):
        handles.append(Line2D([], [], linestyle="none", marker=">", color=MUTED, markersize=5))
        handles[-1].set_label("lower bound: at least this")
    if any(point.loss_low is not None for point in everything):
        handles.append(Line2D([], [], color=MUTED, linewidth=0.8, label="vertical: 95 % interval of the loss"))
    handles.append(Line2D([], [], color="#b8b8b8", linewidth=1.2, label="frontier of the middle values"))
    ncols = max(1, min(3, len(handles), int(picture.get_figwidth() / 3.2)))
    picture.legend(handles=handles, loc="outside upper center", ncols=ncols, frameon=False, fontsize=8)


def _plain(ax: Axes, title: str) -> None:
    ax.set_title(title, loc="left", fontsize=11)
    ax.spines[["top", "right"]].set_visible(False)
    ax.grid(True, color="#ececec", linewidth=0.8)
    ax.set_axisbelow(True)
    ax.tick_params(labelsize=9)


def _seeds(stream: Stream) -> str:
    counts = sorted({len(arm.runs) for arm in stream.arms.values()}) or [0]
    ends = " to ".join(map(str, dict.fromkeys((counts[0], counts[-1]))))
    return f"n = {ends}" + (", 95 % interval" if counts[0] > 1 else "")


def _colours(comparison: Comparison) -> dict[str, str]:
    names = dict.fromkeys(
        name for stream in comparison.streams.values() for name in (*stream.arms, *(p.arm for p in seed_points(stream)))
    )
    others = [name for name in names if name not in ARM_COLOURS]
    return {**ARM_COLOURS, **{name: MORE_COLOURS[i % len(MORE_COLOURS)] for i, name in enumerate(others)}}


def _apart(heights: Sequence[float], gap: float) -> list[float]:
    """The heights moved as little as needed so that neighbours are at least `gap` apart; order kept."""
    if not heights:
        return []
    order = sorted(range(len(heights)), key=lambda i: heights[i])
    placed = list(heights)
    for before, after in itertools.pairwise(order):
        placed[after] = max(placed[after], placed[before] + gap)
    shift = sum(placed) / len(placed) - sum(heights) / len(heights)
    return [height - shift for height in placed]


def _evaluates(energy: Mapping[str, Any]) -> str:
    """float, quantised or simulated: `evaluates` of the entry, or what its profile's name implies.

    A digital reference evaluates the dense model, in float or at 8 bits; everything else runs the spikes.
    """
    profile = str(energy["profile"])
    implied = "float" if "fp32" in profile or "fp16" in profile else "quantised" if "int8" in profile else "simulated"
    return str(energy.get("evaluates", implied))


def _evaluated_loss(record: Mapping[str, Any], energy: Mapping[str, Any]) -> float:
    """Loss of the model the energy belongs to."""
    return float(record[f"loss_{_evaluates(energy)}_nats"])


def _window_interval(record: Mapping[str, Any], energy: Mapping[str, Any]) -> dict[str, Any]:
    bounds = record.get(f"loss_{_evaluates(energy)}_interval") or {}
    low, high = bounds.get("low"), bounds.get("high")
    return {"loss_low": low, "loss_high": high} if isinstance(low, float) and isinstance(high, float) else {}
