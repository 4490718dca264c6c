"""Pictures of a deployment: which class was taken for which, and what was foretold beside what came.

Functions take plain arrays and return matplotlib figures.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLOURS = {"data": "#000000", "float": "#0072B2", "simulated": "#D55E00"}
MOST_WRITTEN = 20  # classes whose counts are written into the squares
MOST_POINTS = 400


def confusion_figure(matrices: Mapping[str, Sequence[Sequence[int]]]) -> Figure:
    """A square per model: row the true class, column the answer; colour the share of the true class, text the count."""
    picture = _figure(4.2 * len(matrices), 4.2)
    axes = picture.subplots(1, len(matrices), squeeze=False)[0]
    for ax, (name, rows) in zip(axes, matrices.items(), strict=True):
        counts = np.asarray(rows, dtype=np.float64)
        shares = counts / np.maximum(1, counts.sum(axis=1, keepdims=True))
        ax.imshow(shares, cmap="Blues", vmin=0, vmax=1)
        ax.set_title(name, fontsize=9, loc="left")
        ax.set_xlabel("class answered", fontsize=8)
        ax.set_ylabel("true class", fontsize=8)
        ax.tick_params(labelsize=7)
        if len(counts) > MOST_WRITTEN:
            continue
        ticks = range(len(counts))
        ax.set_xticks(ticks)
        ax.set_yticks(ticks)
        for i, j in np.argwhere(counts > 0):
            colour = "white" if shares[i, j] > 0.5 else "black"
            ax.text(j, i, f"{int(counts[i, j])}", ha="center", va="center", fontsize=6, color=colour)
    return picture


def values_figure(data: NDArray[np.generic], answers: Mapping[str, NDArray[np.generic]]) -> Figure:
    """The first held-out sample's values in their order, flattened, and what each model answered; at most 400 of them."""
    picture = _figure(9.0, 3.0)
    ax = picture.subplots()
    ax.spines[["top", "right"]].set_visible(False)
    ax.plot(np.ravel(data)[:MOST_POINTS], color=COLOURS["data"], linewidth=1.6, label="data")
    for name, values in answers.items():
        ax.plot(np.ravel(values)[:MOST_POINTS], color=COLOURS.get(name), linewidth=1.0, label=name)
    ax.set_xlabel("step", fontsize=8)
    ax.set_ylabel("value", fontsize=8)
    ax.tick_params(labelsize=7)
    ax.legend(fontsize=7, frameon=False, ncols=3)
    return picture


def _figure(width: float, height: float) -> Figure:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    made = Figure(figsize=(width, height), layout="constrained", facecolor="white")
    FigureCanvasAgg(made)
    return made
