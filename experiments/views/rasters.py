"""Pictures of what goes on inside: spike rasters, the distribution of surprise, which blocks of weights were moved when.

Functions take plain arrays (or torch tensors) and return matplotlib figures; nothing here reads a file.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MUTED = "#6b6b6b"
UP, DOWN = "#0072B2", "#D55E00"
MOST_ROWS = 64  # neurons drawn of a population
MOST_STEPS = 256
MOST_POPULATIONS = 24
MOST_COLUMNS = 400  # of the heat map


def raster_figure(messages: Mapping[str, Any], title: str = "", *, most_rows: int = MOST_ROWS) -> Figure:
    """Spike raster: population -> messages, integers (steps, neurons) or (batch, steps, neurons), of which the first
    sample is drawn. A dot is a message that is not 0; its colour is the sign.

    Neurons beyond `most_rows` are thinned evenly, steps beyond the first 256 left out; the labels give the counts. Raises
    ValueError for no population, or an array of another number of dimensions.
    """
    if not messages:
        raise ValueError("a raster of no population: record spikes first")
    shown = list(messages.items())[:MOST_POPULATIONS]
    picture = _figure(9.0, 0.9 + sum(_height(_steps_by_neurons(name, value), most_rows) for name, value in shown))
    heights = [_height(_steps_by_neurons(name, value), most_rows) for name, value in shown]
    axes = picture.subplots(len(shown), 1, squeeze=False, sharex=True, gridspec_kw={"height_ratios": heights})
    for (name, value), ax in zip(shown, axes[:, 0], strict=True):
        all_TN = _steps_by_neurons(name, value)
        kept = np.unique(np.linspace(0, all_TN.shape[1] - 1, min(most_rows, all_TN.shape[1])).round().astype(int))
        seen_TN = all_TN[:MOST_STEPS, kept]
        for sign, colour in ((1, UP), (-1, DOWN)):
            steps, rows = np.nonzero(np.sign(seen_TN) == sign)
            ax.scatter(steps, rows, s=5, marker="s", linewidths=0, color=colour)
        rate = float((all_TN != 0).mean())
        thinned = f" ({len(kept)} drawn)" if len(kept) < all_TN.shape[1] else ""
        ax.set_ylabel(
            f"{_short(name)}\n{all_TN.shape[1]:,} neurons{thinned}\n{rate:.1%} active",
            rotation=0,
            ha="right",
            va="center",
            fontsize=7,
        )
        ax.set_ylim(len(kept) - 0.5, -0.5)
        ax.set_xlim(-0.5, max(1, len(seen_TN)) - 0.5)
        ax.set_yticks([])
        ax.tick_params(labelsize=8)
    left_out = len(messages) - len(shown)
    more = f"; {left_out} more populations not drawn" if left_out else ""
    axes[-1, 0].set_xlabel(f"step (blue: positive message, red: negative{more})", fontsize=8)
    picture.suptitle(title or "messages sent", fontsize=10, x=0.01, ha="left")
    return picture


def surprise_figure(scores: Any, title: str = "") -> Figure:
    """Histogram of the last scores, with their quartiles; scores that are not finite are counted, not drawn."""
    numbers = np.asarray(scores.detach().cpu() if hasattr(scores, "detach") else scores, dtype=np.float64).ravel()
    finite = numbers[np.isfinite(numbers)]
    picture = _figure(6.4, 3.6)
    ax = picture.subplots()
    ax.spines[["top", "right"]].set_visible(False)
    ax.set_xlabel("score (surprise in nats per token, where the signal is a loss)", fontsize=9)
    ax.set_ylabel("windows or tokens", fontsize=9)
    if finite.size:
        ax.hist(finite, bins=min(60, max(8, int(np.sqrt(finite.size)))), color=UP)
        for row, share in enumerate((25, 50, 75)):  # one under the other: quartiles may lie close
            place = float(np.percentile(finite, share))
            ax.axvline(place, color=DOWN, linewidth=1.0, linestyle=(0, (3, 2)))
            words = f" {share} %: {place:.3g}"
            height = 0.99 - 0.06 * row
            ax.text(place, height, words, transform=ax.get_xaxis_transform(), fontsize=7, color=DOWN, va="top")
        ax.margins(y=0.28)
    else:
        ax.text(0.5, 0.5, "no finite score", transform=ax.transAxes, ha="center", color=MUTED)
    lost = numbers.size - finite.size
    words = f"n = {finite.size:,}" + (f", {lost:,} not finite" if lost else "")
    ax.set_title(f"{title or 'surprise of the last choice'}; {words}", loc="left", fontsize=10)
    return picture


def blocks_figure(steps: Sequence[int], shares: Mapping[str, Sequence[float]], title: str = "") -> Figure:
    """Heat map: block of weights (rows, in the order given) by time; colour: share of its weights that the optimizer
    moved. `shares[block][i]` was seen at `steps[i]` and is drawn from the step before it.

    Raises ValueError where the lengths differ, steps do not rise, or there is nothing to draw.
    """
    if not steps or not shares:
        raise ValueError("no step to draw: log a step first")
    lengths = {name: len(values) for name, values in shares.items()}
    if set(lengths.values()) != {len(steps)}:
        raise ValueError(f"{len(steps)} steps, but blocks have {sorted(set(lengths.values()))} shares")
    if any(b <= a for a, b in itertools.pairwise((0, *steps))):
        raise ValueError(f"steps {list(steps)[:8]}...: they must rise, from 1 on")
    grid_LT = np.asarray([list(values) for values in shares.values()], dtype=np.float64)
    width = steps[1] - steps[0] if len(steps) > 1 else steps[0]
    edges = np.asarray([max(0, steps[0] - width), *steps], dtype=np.float64)
    if len(steps) > MOST_COLUMNS:  # means of neighbours: a block moved half of the time is half as dark
        cuts = np.linspace(0, len(steps), MOST_COLUMNS + 1).round().astype(int)
        grid_LT = np.stack([grid_LT[:, a:b].mean(axis=1) for a, b in itertools.pairwise(cuts)], axis=1)
        edges = edges[cuts]
    picture = _figure(8.0, 1.3 + 0.24 * len(shares))
    ax = picture.subplots()
    mesh = ax.pcolormesh(edges, np.arange(len(shares) + 1), grid_LT, cmap="YlGnBu", vmin=0, vmax=1)
    ax.set_yticks(np.arange(len(shares)) + 0.5, list(shares), fontsize=7)
    ax.invert_yaxis()
    ax.set_xlabel("step", fontsize=9)
    ax.tick_params(axis="x", labelsize=8)
    bar = picture.colorbar(mesh, ax=ax, pad=0.01)
    bar.set_label("share of weights moved", fontsize=8)
    bar.ax.tick_params(labelsize=7)
    ax.set_title(title or "weights moved, by block", loc="left", fontsize=10)
    return picture


def _figure(width: float, height: float) -> Figure:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    picture = Figure(figsize=(width, height), layout="constrained", facecolor="white")
    FigureCanvasAgg(picture)
    return picture


def _steps_by_neurons(name: str, value: Any) -> np.ndarray:
    array = np.asarray(value.detach().cpu() if hasattr(value, "detach") else value)
    if array.ndim == 3:
        array = array[0]
    if array.ndim != 2 or 0 in array.shape:
        raise ValueError(f"population {name!r}: messages of shape {array.shape}; (steps, neurons) is needed, neither 0")
    return array


def _height(messages_TN: np.ndarray, most_rows: int) -> float:
    return 0.55 + 0.018 * min(most_rows, messages_TN.shape[1])


def _short(name: str, most: int = 30) -> str:
    return name if len(name) <= most else f"...{name[-most + 3 :]}"
