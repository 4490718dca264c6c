"""Energy against accuracy: what a token of each deployed model costs under each profile, and the frontier."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from experiments.comparison.record import Deployment, Stream
from experiments.comparison.statistics import interval
from experiments.views.labels import LONGEST, EdgeLabel, edge_labels
from hardware.text import short

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.text import Annotation

MUTED = "#6b6b6b"
FRONT = "#b8b8b8"
SMALLEST_RANGE_NATS = 0.04  # differences far below a hundredth of a nat must not fill the axis
MOST_UNDEPLOYED = 6


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


def energy_panel(ax: Axes, stream: Stream, colours: Mapping[str, str], shapes: Mapping[str, str]) -> list[Annotation]:
    """Joules per token (log) against loss; dotted lines for arms that are not deployed, whose names are returned (see
    `labels.settle`)."""
    from matplotlib.ticker import EngFormatter, LogLocator, NullFormatter

    plain_axes(
        ax,
        f"{short(stream.name, LONGEST)}: energy against accuracy",
        "inference energy per token",
        "held-out loss, nats per token",
    )
    found = seed_points(stream)
    if not found:
        ax.text(0.5, 0.5, "no deployed model", transform=ax.transAxes, ha="center", color=MUTED)
        ax.set_xticks([])
        ax.set_yticks([])
        return []
    ax.set_xscale("log")
    left, right = min(p.low_j for p in found) / 2, 2 * max(p.high_j for p in found)
    ax.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if right < 100 * left else (1.0,)))
    ax.xaxis.set_major_formatter(EngFormatter(unit="J", sep="\N{NARROW NO-BREAK SPACE}"))
    ax.xaxis.set_minor_formatter(NullFormatter())
    front = pareto(found)
    edge = [(front[0].mid_j, max(p.loss_nats for p in found) + 1.0), *((p.mid_j, p.loss_nats) for p in front)]
    edge.append((right, front[-1].loss_nats))
    ax.step([x for x, _ in edge], [y for _, y in edge], where="post", color=FRONT, linewidth=1.6, zorder=1)
    for point, dodge in zip(found, _dodges(found), strict=True):
        _energy_point(ax, point, dodge, colours[point.arm], shapes[point.profile])
    elsewhere = undeployed(stream)
    shown = dict(sorted(elsewhere.items(), key=lambda item: (item[0] != "dense", item[1]))[:MOST_UNDEPLOYED])
    ends = [end for point in found for end in (point.loss_low, point.loss_high) if end is not None]
    losses = [*(point.loss_nats for point in found), *ends, *shown.values()]
    low, high = min(losses), max(losses)
    half = max(SMALLEST_RANGE_NATS, 1.25 * (high - low)) / 2
    ax.set_ylim((low + high) / 2 - half, (low + high) / 2 + half)
    ax.set_xlim(left, right)
    for name, loss in shown.items():
        ax.axhline(loss, color=colours[name], linewidth=1.0, linestyle=(0, (1, 2)), zorder=0)
    if len(shown) < len(elsewhere):
        more = f"{len(elsewhere) - len(shown)} more arms not deployed, not drawn"
        ax.text(0.99, 0.01, more, transform=ax.transAxes, ha="right", va="bottom", fontsize=7, color=MUTED)
    return edge_labels(ax, [EdgeLabel(right, loss, f"{name} {loss:.3f}", colours[name]) for name, loss in shown.items()])


def _energy_point(ax: Axes, point: Point, dodge: float, colour: str, shape: str) -> None:
    from matplotlib.transforms import ScaledTranslation

    assert ax.figure is not None
    place = ax.transData + ScaledTranslation(0, dodge / 72, ax.figure.dpi_scale_trans)
    y = point.loss_nats
    if point.loss_low is not None and point.loss_high is not None:
        ends = [point.loss_low, point.loss_high]
        ax.plot([point.mid_j] * 2, ends, color=colour, linewidth=1.0, alpha=0.6, zorder=2, marker="_", markersize=6)
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


def undeployed(stream: Stream) -> dict[str, float]:
    """Held-out loss of the arms without a deployed model, where all were read on the same held-out tokens."""
    tokens = {item.record.get("val_tokens") for item in stream.deployments}
    deployed = {item.arm for item in stream.deployments}
    return {
        name: arm.loss.mean
        for name, arm in stream.arms.items()
        if name not in deployed and {run.result.get("val_tokens") for run in arm.runs} == tokens
    }


def energy_legend(
    picture: Figure, streams: Sequence[Stream], colours: Mapping[str, str], shapes: Mapping[str, str]
) -> None:
    """Above all panels: what shapes, colours, bars and lines mean."""
    from matplotlib.lines import Line2D

    everything = [point for stream in streams for point in seed_points(stream)]
    handles: list[Any] = []
    for profile, shape in shapes.items():
        first = next(point for point in everything if point.profile == profile)
        colour = MUTED if len({p.arm for p in everything}) > 1 else colours[first.arm]
        words = [first.kind, *(["hypothetical"] if first.hypothetical else [])]
        face = "white" if first.hypothetical else colour
        handles.append(Line2D([], [], linestyle="none", marker=shape, color=colour, markerfacecolor=face, markersize=8))
        handles[-1].set_label(f"{profile} ({', '.join(words)})")
    for arm in dict.fromkeys(point.arm for point in everything):
        handles.append(
            Line2D([], [], color=colours[arm], linewidth=1.6, label=f"{short(arm, LONGEST)}, deployed: low to high")
        )
    if any(point.lower_bound for point in everything):
        handles.append(Line2D([], [], linestyle="none", marker=">", color=MUTED, markersize=5))
        handles[-1].set_label("lower bound: at least this")
    if any(point.loss_low is not None for point in everything):
        handles.append(Line2D([], [], color=MUTED, linewidth=1.0, label="vertical: 95 % interval of the loss"))
    if any(undeployed(stream) for stream in streams if stream.deployments):
        handles.append(Line2D([], [], color=MUTED, linewidth=1.0, linestyle=(0, (1, 2)), label="in float, not deployed"))
    handles.append(Line2D([], [], color=FRONT, linewidth=1.6, label="frontier of the middle values"))
    ncols = max(1, min(3, len(handles), int(picture.get_figwidth() / 2.9)))
    style: dict[str, Any] = {"ncols": ncols, "frameon": False, "fontsize": 8, "columnspacing": 1.2}
    picture.legend(handles=handles, loc="outside upper center", **style)


def plain_axes(ax: Axes, title: str, x: str, y: str) -> None:
    """A panel's title, the names of its axes, a light grid, and no frame at the top and right."""
    ax.set_title(title, loc="left", fontsize=11)
    ax.set_xlabel(x)
    ax.set_ylabel(y)
    ax.spines[["top", "right"]].set_visible(False)
    ax.grid(True, color="#ececec", linewidth=0.8)
    ax.set_axisbelow(True)
    ax.tick_params(labelsize=9)


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
