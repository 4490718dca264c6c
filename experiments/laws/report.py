"""A fit with its intervals, the three ways and the warnings, as one document, as a table and as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from experiments.laws.form import COEFFICIENTS
from experiments.laws.points import LawError, LeftOut, Point
from experiments.laws.resampling import DRAWS, LEVEL, Interval, Resampled, drawn, resample
from experiments.laws.ways import WAYS, BestSize, by_law, envelope, parabolas


@dataclass(frozen=True)
class Way:
    """One way's answer with the interval of its exponent, or why it has none."""

    best: BestSize | None
    exponent: Interval | None
    reason: str = ""


@dataclass(frozen=True)
class Report:
    points: tuple[Point, ...]
    left_out: tuple[LeftOut, ...]
    arm: str
    embeddings: bool
    resampled: Resampled
    ways: dict[str, Way]
    warnings: tuple[str, ...]

    @property
    def sizes_P(self) -> np.ndarray:
        return np.array([p.size(self.embeddings) for p in self.points], dtype=np.float64)


def report(
    points: Sequence[Point],
    left_out: Sequence[LeftOut] = (),
    *,
    arm: str = "",
    embeddings: bool = True,
    draws: int = DRAWS,
    level: float = LEVEL,
    irreducible_at_most: float | None = None,
) -> Report:
    """Fit one arm on one stream; `arm`: what it is called, where the points' own names are more than one.

    Raises LawError as `form.fit` and `Point.size` do. A way that these runs do not allow is no error: its reason is in the
    report.
    """
    n = np.array([p.size(embeddings) for p in points], dtype=np.float64)
    d = np.array([p.tokens for p in points], dtype=np.float64)
    c, loss = np.array([p.flops for p in points]), np.array([p.loss_nats for p in points])
    resampled = resample(n, d, loss, draws)
    ways = {}
    for way in WAYS:
        try:
            if way == "law":
                best = by_law(resampled.fit.law, n, d, c)
                exponents = [law.size_share for law in resampled.laws]
            else:
                of = envelope if way == "envelope" else parabolas
                best, exponents = of(n, c, loss), []
                for index in drawn(n, draws, 1):
                    try:
                        exponents.append(of(n[index], c[index], loss[index]).exponent)
                    except LawError:
                        continue
            sure = len(exponents) >= draws / 2
            interval = resampled.interval(exponents, best.exponent, level) if sure else None
            ways[way] = Way(best, interval, "" if sure else f"only {len(exponents)} of {draws} draws allow this way")
        except LawError as reason:
            ways[way] = Way(None, None, str(reason))
    return Report(
        tuple(points),
        tuple(left_out),
        arm or points[0].arm,
        embeddings,
        resampled,
        ways,
        tuple(_warn(resampled, irreducible_at_most)),
    )


def _warn(resampled: Resampled, irreducible_at_most: float | None) -> list[str]:
    found = []
    law, held = resampled.fit.law, resampled.coefficients()
    if irreducible_at_most is not None and law.irreducible_nats > irreducible_at_most:
        found.append(
            f"the irreducible loss of the fit, {law.irreducible_nats:.4f} nats, lies above {irreducible_at_most:.4f}, "
            "which a general compressor reaches: the runs do not show it; predictions far beyond them will be too high"
        )
    for name, interval in held.items():
        if name.endswith("exponent") and interval.low <= 0:
            found.append(f"{name.replace('_', ' ')} is not above zero for certain: the runs do not span enough of it")
    if held["irreducible_nats"].low < 0.05 * law.irreducible_nats or law.irreducible_nats < 1e-3:
        found.append("the irreducible loss is not told apart from zero: these runs lie too far above it")
    return found


def document(found: Report, level: float = LEVEL) -> dict[str, Any]:
    """As JSON: coefficients with intervals, the ways, the runs that were left out, warnings."""
    coefficients = found.resampled.coefficients(level)
    return {
        "coefficients": {name: vars(interval) for name, interval in coefficients.items()},
        "ways": {
            name: {
                "exponent": None if way.best is None else way.best.exponent,
                "interval": None if way.exponent is None else [way.exponent.low, way.exponent.high],
                "factor": None if way.best is None else way.best.factor,
                "reason": way.reason or None,
                "left_out": [] if way.best is None else list(way.best.left_out),
            }
            for name, way in found.ways.items()
        },
        "parameters": "all" if found.embeddings else "without embeddings",
        "runs": len(found.points),
        "arm": found.arm,
        "stream": found.points[0].stream,
        "largest_flops": max(p.flops for p in found.points),
        "residual_nats": float(
            np.sqrt(np.mean((np.array([p.loss_nats for p in found.points]) * found.resampled.fit.residuals_P) ** 2))
        ),
        "left_out": [vars(item) for item in found.left_out],
        "warnings": list(found.warnings),
    }


def table(found: Report, level: float = LEVEL) -> str:
    """For people."""
    shown = document(found, level)
    names = dict(zip(COEFFICIENTS, ("E, irreducible, nats", "A", "alpha, of size", "B", "beta, of tokens"), strict=True))
    lines = [
        f"L(N, D) = E + A / N^alpha + B / D^beta, {shown['arm']} on {shown['stream']}, {shown['runs']} runs, parameters: "
        f"{shown['parameters']}; {level:.0%} intervals",
        f"  {'':<22} {'fit':>10} {'low':>10} {'high':>10}",
    ]
    for name, interval in found.resampled.coefficients(level).items():
        lines.append(f"  {names[name]:<22} {interval.value:>10.4g} {interval.low:>10.4g} {interval.high:>10.4g}")
    lines.append("  best size grows like FLOPs to the power of")
    for name, way in found.ways.items():
        if way.best is None:
            lines.append(f"    {name:<10} not read: {way.reason}")
        else:
            held = (
                f" [{way.exponent.low:.2f}, {way.exponent.high:.2f}]" if way.exponent else f" (no interval: {way.reason})"
            )
            lines.append(f"    {name:<10} {way.best.exponent:.2f}{held}")
    lines.append(f"  off the law: {shown['residual_nats']:.4f} nats (root mean square)")
    lines += [f"  left out: {item.folder}: {item.reason}" for item in found.left_out]
    lines += [f"  warning: {text}" for text in found.warnings]
    return "\n".join(lines)


def draw(found: Report, path: Path) -> None:
    """Loss over FLOPs, a colour for each size, the law's curves through them; PNG or SVG by the file's name."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    picture = Figure(figsize=(6.4, 4.2), layout="constrained", facecolor="white")
    FigureCanvasAgg(picture)
    axes = picture.subplots()
    from matplotlib import colormaps

    law, sizes = found.resampled.fit.law, found.sizes_P
    levels = np.unique(sizes)
    colours = colormaps["viridis"](np.linspace(0, 0.9, len(levels)))
    for size, colour in zip(levels, colours, strict=True):
        mine = [p for p, n in zip(found.points, sizes, strict=True) if n == size]
        each = np.median([p.flops / p.tokens for p in mine])
        tokens = np.geomspace(min(p.tokens for p in mine) / 1.5, max(p.tokens for p in mine) * 1.5, 50)
        axes.plot(tokens * each, law.loss(size, tokens), color=colour, linewidth=1)
        axes.plot(
            [p.flops for p in mine], [p.loss_nats for p in mine], "o", color=colour, markersize=4, label=f"{size:,.0f}"
        )
    axes.set_xscale("log")
    axes.set_xlabel("counted FLOPs of training")
    axes.set_ylabel("held-out loss, nats per token")
    axes.legend(title="parameters", fontsize="small", frameon=False)
    axes.set_title(f"{found.arm} on {found.points[0].stream}: runs (dots) and the fitted law (lines)", fontsize="medium")
    picture.savefig(path, dpi=150)
