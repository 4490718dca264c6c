"""Where each joule goes, layer by layer: a panel per profile, a bar per layer, stacked by what costs the joule."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from experiments.comparison.accounts import UNITS, LayerEnergy, folded, joules

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's palette.
GROUP_COLOURS = {
    "synapse": "#0072B2",
    "neuron": "#E69F00",
    "traffic": "#009E73",
    "digital": "#7A7A7A",
    "dynamic": "#56B4E9",
    "static": "#CC79A7",
    "idle chips": "#D55E00",
    "host": "#8A6D00",
    "off-chip traffic": "#5C4B99",
}
MUTED = "#6b6b6b"
MOST_LAYERS = 36
COLUMNS = 3


def layer_figure(energies: Sequence[LayerEnergy], title: str, columns: int = COLUMNS) -> Figure:
    """Middle values stacked by group, a thin line from each layer's low to its high end; every panel has its own scale.

    More than `MOST_LAYERS` layers are joined by their names' front parts.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    shown = [folded(energy, MOST_LAYERS) for energy in energies]
    columns = max(1, min(columns, len(shown)))
    rows = max(1, math.ceil(len(shown) / columns))
    names = list(dict.fromkeys(name for energy in shown for name in energy.layers))
    picture = Figure(
        figsize=(1.7 + 3.6 * columns, 1.0 + rows * (0.9 + 0.2 * max(3, len(names)))),
        layout="constrained",
        facecolor="white",
    )
    FigureCanvasAgg(picture)
    if not shown:
        picture.text(0.5, 0.5, "no joules by layer", ha="center", va="center", color=MUTED)
        return picture
    axes = picture.subplots(rows, columns, squeeze=False, sharey=True)
    for ax, energy in zip(axes.flat, shown, strict=False):
        _panel(ax, energy, names)
    for ax in list(axes.flat)[len(shown) :]:
        ax.set_axis_off()
    groups = [group for group in GROUP_COLOURS if any(group in energy.groups for energy in shown)]
    handles = [Patch(facecolor=GROUP_COLOURS[group], label=group) for group in groups]
    picture.legend(handles=handles, loc="outside lower center", ncols=min(5, len(handles)), frameon=False, fontsize=8)
    picture.suptitle(title, fontsize=11, x=0.01, ha="left")
    return picture


def _panel(ax: Axes, energy: LayerEnergy, names: Sequence[str]) -> None:
    largest = max((energy.of(name)[2] for name in energy.layers), default=0.0)
    unit, size = next(((u, s) for u, s in UNITS if largest >= s), UNITS[-1])
    words = [energy.kind, *(["hypothetical"] if energy.hypothetical else [])]
    low, mid, high = energy.total
    bound = "at least " if energy.lower_bound else ""
    total = f"{bound}{joules(mid)} ({joules(low)} to {joules(high)})"
    ax.set_title(f"{energy.profile} ({', '.join(words)})\n{total}", loc="left", fontsize=8)
    for row, name in enumerate(names):
        left = 0.0
        for group in energy.groups:
            value = energy.layers.get(name, {}).get(group, (0.0, 0.0, 0.0))[1] / size
            ax.barh(row, value, left=left, height=0.74, color=GROUP_COLOURS[group])
            left += value
        if name in energy.layers:
            least, _, most = (value / size for value in energy.of(name))
            ax.plot([least, most], [row, row], color="#000000", linewidth=0.8)
    ax.set_yticks(range(len(names)), names, fontsize=7)
    ax.set_ylim(len(names) - 0.4, -0.6)
    ax.set_xlim(left=0)
    ax.set_xlabel(f"{unit} per token", fontsize=8)
    ax.tick_params(axis="x", labelsize=7)
    ax.spines[["top", "right"]].set_visible(False)
    ax.grid(True, axis="x", color="#ececec", linewidth=0.8)
    ax.set_axisbelow(True)
