"""Accuracy against inference FLOPs: a panel for each family of tasks, a curve for each size and family of rules."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.figure import Figure

from experiments.studies.inference.compared import Point

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7")
MARKS = {"greedy": "o", "majority": "v", "vote that stops": "^", "by surprise": "s", "likeliest": "x", "verifier": "*"}


def save(path: Path, found: Mapping[str, Mapping[str, Sequence[Point]]]) -> Path:
    """Draw `found` (task -> size -> points) into an image file; of each family the points that no cheaper one beats."""
    figure = Figure(figsize=(4.6 * len(found), 4.2), layout="constrained")
    panels = figure.subplots(1, len(found), squeeze=False)[0]
    for panel, (task, sizes) in zip(panels, found.items(), strict=True):
        for colour, (size, points) in zip(COLOURS, sizes.items(), strict=False):
            for family, mark in MARKS.items():
                front = frontier([point for point in points if point.family == family])
                x, y = [point.flops / 1e6 for point in front], [point.accuracy for point in front]
                panel.plot(x, y, color=colour, marker=mark, lw=1, ms=5, label=f"{size}, {family}")
        panel.set(
            title=task, xscale="log", xlabel="counted inference MFLOP of a question", ylabel="share solved", ylim=(0, 1.03)
        )
    panels[-1].legend(fontsize=6, loc="lower right")
    figure.savefig(path, dpi=110)
    return path


def frontier(points: Sequence[Point]) -> list[Point]:
    """Points that no other one of at most their cost beats, by cost."""
    found: list[Point] = []
    for point in sorted(points, key=lambda point: (point.flops, -point.accuracy)):
        if not found or point.accuracy > found[-1].accuracy:
            found.append(point)
    return found
