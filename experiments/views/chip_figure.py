"""A picture of the chips: every core a square, its fill the utilisation of its scarcest resource, its letter the layer."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING

from hardware.placement import Core, Placement

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colors import Colormap
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

COLUMNS = 16
MOST_CHIPS = 12
MOST_NAMES = 24
COLOURS = "YlGnBu"  # light to dark: reads in grey too
MUTED = "#6b6b6b"
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"


def chip_figure(placement: Placement) -> Figure:
    """At most `MOST_CHIPS` chips, drawn in the order of their slots; slots are numbers, not places on the mesh."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize
    from matplotlib.figure import Figure

    shown = min(placement.chips, MOST_CHIPS)
    columns = min(3, shown)
    rows = math.ceil(shown / columns)
    high = math.ceil(placement.cores_per_chip / COLUMNS)
    names = placement.layers[:MOST_NAMES]
    height = max(rows * (0.34 * high + 0.5), 0.19 * (len(names) + 6)) + 0.9
    picture = Figure(figsize=(5.4 * columns + 4.2, height), layout="constrained", facecolor="white")
    FigureCanvasAgg(picture)
    axes = picture.subplots(rows, columns, squeeze=False)
    colours = ScalarMappable(Normalize(0, 1), COLOURS)
    letter = {layer.name: LETTERS[i % len(LETTERS)] for i, layer in enumerate(placement.layers)}
    for number, ax in enumerate(axes.flat):
        if number >= shown:
            ax.set_axis_off()
            continue
        mine = [core for core in placement.cores if core.chip == number]
        _chip(ax, mine, placement.cores_per_chip, colours.cmap, letter)
        ax.set_title(f"chip {number}: {len(mine)} of {placement.cores_per_chip} cores", loc="left", fontsize=10)
    bar = picture.colorbar(colours, ax=axes, location="bottom", shrink=0.5, aspect=40, pad=0.02)
    bar.set_label("used share of the core's scarcest resource", fontsize=9)
    bar.ax.tick_params(labelsize=8)
    lines: list[str] = []
    for layer in names:
        fullest = max((placement.cores[n] for n in layer.cores), key=lambda core: core.share)
        cores = f"{len(layer.cores)} core{'s' * (len(layer.cores) > 1)}"
        what = fullest.binding.resource.replace("_", " ")
        lines.append(f"{letter[layer.name]}  {_short(layer.name)}: {cores}, {what} {100 * fullest.share:.0f} %")
    if len(placement.layers) > len(names):
        lines.append(f"and {len(placement.layers) - len(names)} more layers")
    if placement.chips > shown:
        lines.append(f"{placement.chips - shown} more chips not drawn")
    picture.legend(
        handles=[_blank() for _ in lines],
        labels=lines,
        loc="outside right upper",
        frameon=False,
        fontsize=8,
        handlelength=0,
    )
    picture.suptitle(
        f"{placement.title}, accounting: {placement.budget}\n{len(placement.cores)} cores;"
        f" {placement.messages_between_chips:,.0f} messages per step between chips",
        fontsize=10,
        x=0.01,
        ha="left",
    )
    return picture


def save_chip_figure(placement: Placement, path: str | Path) -> Path:
    """Write the picture; the ending names the format.

    Raises:
        ValueError: an ending that matplotlib does not know.
        OSError: the place cannot be written.
    """
    path = Path(path)
    chip_figure(placement).savefig(path, dpi=150)
    return path


def _chip(ax: Axes, cores: list[Core], per_chip: int, colours: Colormap, letter: dict[str, str]) -> None:
    from matplotlib.patches import Rectangle

    at = {core.slot: core for core in cores}
    high = math.ceil(per_chip / COLUMNS)
    for slot in range(per_chip):
        x, y = slot % COLUMNS, slot // COLUMNS
        core = at.get(slot)
        fill = "#f4f4f4" if core is None else colours(core.share)
        ax.add_patch(Rectangle((x + 0.05, y + 0.05), 0.9, 0.9, facecolor=fill, edgecolor="#c8c8c8", linewidth=0.5))
        if core is not None:
            held = "".join(dict.fromkeys(letter[part.layer] for part in core.parts))
            text = held if len(held) < 4 else f"{held[:2]}+"
            ink = "white" if core.share > 0.55 else "black"
            ax.text(x + 0.5, y + 0.5, text, ha="center", va="center", fontsize=7, color=ink)
    ax.set_xlim(0, COLUMNS)
    ax.set_ylim(high, 0)
    ax.set_aspect("equal", anchor="NW")
    ax.set_xticks([])
    ax.set_yticks([])
    for side in ax.spines.values():
        side.set_color(MUTED)


def _short(name: str, most: int = 34) -> str:
    return name if len(name) <= most else f"...{name[-most + 3 :]}"


def _blank() -> Line2D:
    from matplotlib.lines import Line2D

    return Line2D([], [], linestyle="none")
