"""The picture of over-optimisation: true reward and proxy over sqrt(KL), best-of-n beside reinforcement."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from experiments.studies.rewards.summary import NAMES, WAYS, fit_points, flagged, mean_points
from experiments.views.energy_figure import plain_axes

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = {"learned": "#0072B2", "kl": "#009E73", "no_length": "#8A6D00", "ensemble": "#5C4B99"}
FLAG = "#D55E00"
DPO = "#7A7A7A"


def draw(seeds: Sequence[Mapping[str, Any]]) -> Figure:
    """Upper row: true reward, seeds as dots, the mean as a line, the form fitted to "learned" dashed. Lower row: the proxy.
    Flags are triangles, DPO's ends crosses."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    picture = Figure(figsize=(11, 7.4), layout="constrained", facecolor="white")
    FigureCanvasAgg(picture)
    axes = picture.subplots(2, 2, squeeze=False)
    for column, (way, name) in enumerate(WAYS.items()):
        plain_axes(axes[0, column], f"{name}: true reward", "d = sqrt(KL), sqrt(nats)", "share of right answers")
        plain_axes(axes[1, column], f"{name}: proxy", "d = sqrt(KL), sqrt(nats)", "learned reward, deviations")
        for arm in COLOURS:
            curves = [_points(seed, way, arm) for seed in seeds if arm in seed[way]]
            if curves:
                _arm(axes[0, column], axes[1, column], way, arm, curves)
    for seed in seeds:
        run = seed["reinforcement"].get("learned")
        if run and (flag := flagged(run)):
            label = "flag: true falls while proxy rises" if seed is seeds[0] else None
            axes[0, 1].plot(flag["d"], flag["true"], "v", color=FLAG, markersize=9, zorder=5, label=label)
        for number, point in enumerate(seed["dpo"]):
            label = "DPO, three betas" if seed is seeds[0] and not number else None
            axes[0, 1].plot(point["d"], point["true"], "x", color=DPO, label=label)
            axes[1, 1].plot(point["d"], point["proxy"], "x", color=DPO)
    for ax in axes[0]:
        ax.set_ylim(bottom=0)
        if ax.has_data():
            ax.legend(fontsize=8, frameon=False, loc="best")
    return picture


def _points(seed: Mapping[str, Any], way: str, arm: str) -> Sequence[Mapping[str, float]]:
    return seed[way][arm] if way == "best_of_n" else seed[way][arm]["points"]


def _arm(above: Axes, below: Axes, way: str, arm: str, curves: Sequence[Sequence[Mapping[str, float]]]) -> None:
    colour, mean = COLOURS[arm], mean_points(curves)
    for ax, key in ((above, "true"), (below, "proxy")):
        for curve in curves:
            ax.plot([p["d"] for p in curve], [p[key] for p in curve], ".", color=colour, alpha=0.25, markersize=4)
        ax.plot([p["d"] for p in mean], [p[key] for p in mean], color=colour, linewidth=1.6, label=NAMES[arm])
    fit = fit_points(way, mean) if arm == "learned" else None
    if fit is None:
        return
    d = np.linspace(0, max(p["d"] for p in mean), 200)
    form = "d (alpha - beta d)" if way == "best_of_n" else "d (alpha - beta log d)"
    label = f"fit {form}, {fit.explained:.1%} explained"
    above.plot(d, mean[0]["true"] + fit.at(d), "--", color="#000000", linewidth=1, label=label)
    if fit.turning_point is not None and fit.turning_point <= d[-1]:
        above.axvline(fit.turning_point, color="#b8b8b8", linewidth=1, zorder=0)
