"""Names in pictures: at the right edge of a panel, moved apart so that none covers another, each with a line to where it
belongs; and none of them a formula."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from hardware.text import short

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.text import Annotation

SPACING = 1.04  # of the height of a name's box
NEAR = 0.25  # a name moved by less than this share of its height needs no line
LONGEST = 36  # characters of a name beside a panel
ROUNDS = 2  # names moved change the layout, which moves them again


@dataclass(frozen=True)
class EdgeLabel:
    """A name for the point (x, y), in the panel's data coordinates."""

    x: float
    y: float
    text: str
    colour: str


def edge_labels(ax: Axes, labels: Sequence[EdgeLabel], size: float = 8.0) -> list[Annotation]:
    """The names at the heights of their points, `size` points large; `settle` moves them apart once all is drawn."""
    return [
        ax.annotate(
            short(label.text, LONGEST),
            xy=(label.x, label.y),
            xytext=(1.03, 0.5),
            textcoords="axes fraction",
            color=label.colour,
            fontsize=size,
            va="center",
            annotation_clip=False,
            arrowprops={"arrowstyle": "-", "color": label.colour, "linewidth": 0.6, "shrinkA": 1, "shrinkB": 1,
                        "relpos": (0, 0.5), "clip_on": False},
        )
        for label in labels
    ]  # fmt: skip


def settle(picture: Figure, groups: Sequence[Sequence[Annotation]]) -> None:
    """Move the names of each panel as little as needed so that none covers another, inside the panel where they fit."""
    from matplotlib.text import Text

    plainly(picture)
    for _ in range(ROUNDS if any(groups) else 0):
        picture.draw_without_rendering()
        for group in filter(None, groups):
            ax = group[0].axes
            assert ax is not None
            tall = ax.bbox.height
            heights = [Text.get_window_extent(name).height * SPACING / tall for name in group]
            wanted = [float((ax.transData.transform(name.xy)[1] - ax.bbox.y0) / tall) for name in group]
            for name, place, want, height in zip(group, apart(wanted, heights), wanted, heights, strict=True):
                name.set_position((1.03, place))
                if name.arrow_patch is not None:
                    name.arrow_patch.set_visible(abs(place - want) > NEAR * height)


def apart(wanted: Sequence[float], sizes: Sequence[float], low: float = 0.0, high: float = 1.0) -> list[float]:
    """Centres of boxes of these sizes that do not overlap, in the order wanted and with the least sum of squared moves.

    They stay within `low` and `high` where all fit there, and are centred on it where they do not. The moves are an
    isotonic regression, solved by pooling adjacent violators (Ayer et al. 1955).
    """
    order = sorted(range(len(wanted)), key=lambda i: wanted[i])
    offsets, at = [], 0.0
    for i in order:
        offsets.append(at + sizes[i] / 2)
        at += sizes[i]
    pools: list[tuple[float, int]] = []  # (mean, count) of neighbours that touch
    for i, offset in zip(order, offsets, strict=True):
        mean, count = wanted[i] - offset, 1
        while pools and pools[-1][0] > mean:
            before, many = pools.pop()
            mean, count = (before * many + mean * count) / (many + count), many + count
        pools.append((mean, count))
    starts = [mean for mean, count in pools for _ in range(count)]
    room = high - low - at
    placed = [0.0] * len(wanted)
    for i, start, offset in zip(order, starts, offsets, strict=True):
        placed[i] = offset + (low + room / 2 if room < 0 else min(max(start, low), low + room))
    return placed


def plainly(figure: Figure) -> Figure:
    """The figure, with the dollar signs of its words as dollar signs: none of our texts is a formula, and a name with two
    of them would be read as one. Numbers at logarithmic axes, which are formulas of matplotlib's own, stay."""
    from matplotlib.text import Text
    from matplotlib.ticker import FixedFormatter

    ticks = set()
    for axes in figure.axes:
        for axis in (axes.xaxis, axes.yaxis):
            ticks |= {id(text) for text in axis.findobj(Text) if text is not axis.label}
            formatter = axis.get_major_formatter()
            if isinstance(formatter, FixedFormatter):
                formatter.seq = [re.sub(r"(?<!\\)\$", r"\\$", str(word)) for word in formatter.seq]
    for text in figure.findobj(Text):
        if id(text) not in ticks:
            text.set_parse_math(False)
    return figure
