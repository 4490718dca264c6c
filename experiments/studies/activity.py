"""How few synaptic operations cost how much loss: `python -m experiments.studies.activity RUN`.

Turns a trained run's residual stream to axes in which it is sparse, fine-tunes it towards falling shares of synaptic
operations (of the dense multiply-accumulates of all mapped layers, head included), converts each result, and measures it
on held-out text: float with gates, quantised twin, simulated. Beside it stand controls of the same extra steps, seeds
and batches: plain float training (its learning rate chosen on held-out windows that nothing is judged by), that model in
W8A8, float training with the same distillation, and float training with pruning alone.

Every point is a folder under --out with a record; the same command goes on where it stopped. Last line: JSON.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from experiments.comparison.statistics import interval
from experiments.runs.folder import RunError
from experiments.runs.output import add_json_argument, entry, finish
from experiments.runs.plain_json import write_json
from experiments.studies.frontier import OPTIMIZERS, PRUNING, TEACHERS, Frontier, Points
from sparse_update.data.records import CorpusError

GOAL_NATS = 0.05
GOAL_SHARE = 0.12
LOOKS = {
    "gated": ("o-", "thresholds and pruning"),
    "pruned": ("s--", "pruning alone"),
    "float": ("D", "float control in W8A8"),
    "distilled": ("v", "float control, distilled, in W8A8"),
}


def summary(points: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Means over seeds, one row a name: share, loss difference to the float control of the same seed, its largest."""
    rows = []
    for name in dict.fromkeys(p["name"] for p in points):
        group = [p for p in points if p["name"] == name]
        deltas = [p["delta_nats"] for p in group]
        rows.append(
            {
                "name": name,
                "kind": group[0]["kind"],
                "seeds": len(group),
                "share": statistics.fmean(p["share"] for p in group),
                "delta_nats": statistics.fmean(deltas),
                "delta_nats_each": deltas,
                "delta_interval": spread(deltas),
                "delta_float_nats": statistics.fmean(p["delta_float_nats"] for p in group),
                "simulated_nats": statistics.fmean(p["simulated_nats"] for p in group),
                "quantised_nats": statistics.fmean(p["quantised_nats"] for p in group),
                "float_nats": statistics.fmean(p["float_nats"] for p in group),
            }
        )
    return rows


def spread(values: Sequence[float]) -> tuple[float, float] | None:
    """95 % t-interval over seeds; None for a single seed."""
    found = interval(values)
    return None if found.low is None or found.high is None else (found.low, found.high)


def qualifying(rows: Sequence[dict[str, Any]], limit: float = GOAL_NATS) -> float | None:
    """Smallest share of all rows whose mean loss difference is within `limit`; None if there is none."""
    return min((row["share"] for row in rows if row["delta_nats"] <= limit), default=None)


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The frontier as text; losses in nats per token on held-out text."""
    lines = [
        f"{'model':<16}{'seeds':>6}{'synops':>9}{'float':>9}{'quantised':>11}{'simulated':>11}{'vs control':>12}  95 %"
    ]
    for r in rows:
        lines.append(
            f"{r['name']:<22}{r['seeds']:>6}{r['share']:>9.1%}{r['float_nats']:>9.4f}{r['quantised_nats']:>11.4f}"
            f"{r['simulated_nats']:>11.4f}{r['delta_nats']:>+12.4f}"
            + ("" if r["delta_interval"] is None else "  [{:+.4f}, {:+.4f}]".format(*r["delta_interval"]))
        )
    return "\n".join(lines)


def picture(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Loss difference over share of synaptic operations, bars from the least to the largest seed; grey: the goal."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    FigureCanvasAgg(figure)
    ax = figure.subplots()
    low = min(0.0, *(min(r["delta_nats_each"]) for r in rows)) - 0.005
    ax.fill_between([0, 100 * GOAL_SHARE], low, GOAL_NATS, color="0.9", lw=0, zorder=0)
    ax.text(100 * GOAL_SHARE / 2, low + 0.002, "goal", ha="center", color="0.4")
    for kind, (look, label) in LOOKS.items():
        some = sorted((r for r in rows if r["kind"] == kind), key=lambda r: r["share"])
        if some:
            off = [
                [r["delta_nats"] - min(r["delta_nats_each"]) for r in some],
                [max(r["delta_nats_each"]) - r["delta_nats"] for r in some],
            ]
            x, y = [100 * r["share"] for r in some], [r["delta_nats"] for r in some]
            ax.errorbar(x, y, yerr=off, fmt=look, capsize=3, label=label)
    ax.set_xlim(left=0)
    ax.set_ylim(bottom=low)
    ax.set_xlabel("synaptic operations, % of dense multiply-accumulates")
    ax.set_ylabel("simulated loss less float control, nats per token")
    ax.legend(frameon=False)
    figure.savefig(path, dpi=150)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(prog="spikegate study activity", description="loss over operations")
    made.add_argument("run", help="folder of a finished training run")
    made.add_argument("--out", default="", help="folder of the points (default: RUN/activity)")
    made.add_argument("--targets", type=numbers, default=Frontier.targets, help="shares of dense operations, by comma")
    made.add_argument("--seeds", type=integers, default=Frontier.seeds, help="by comma (default: 0)")
    made.add_argument("--steps", type=int, default=Frontier.steps, help="further steps of every model (default: 1000)")
    made.add_argument("--batch", type=int, default=Frontier.batch, help="windows a step (default: 16)")
    made.add_argument("--optimizer", choices=OPTIMIZERS, default="muon", help="of gated models (default: muon)")
    made.add_argument("--lr", type=float, default=Frontier.lr, help="AdamW's rate for gated models (default: 4e-3)")
    made.add_argument(
        "--controls",
        type=pairs,
        default=Frontier.controls,
        help="OPTIMIZER:RATE by comma, tried for the float control",
    )
    made.add_argument("--threshold-lr", type=float, default=Frontier.threshold_lr, help="(default: 0.03)")
    made.add_argument("--anneal-until", type=float, default=Frontier.anneal_until, help="share of the steps (default: 0.5)")
    made.add_argument(
        "--pruning", type=float, default=PRUNING, help="weights kept = this x sqrt(target); 0: no pruning (default: 1.15)"
    )
    made.add_argument("--distil", type=float, default=0.0, help="weight of distillation from RUN (default: 0)")
    made.add_argument("--teacher", choices=TEACHERS, default="start", help="RUN or its float control (default: start)")
    made.add_argument("--one-sided", action="store_true", help="ReLU after the norms instead of two-sided thresholds")
    made.add_argument("--no-turn", dest="turn", action="store_false", help="leave the residual stream's axes as trained")
    made.add_argument("--from-scratch", action="store_true", help="train from random weights instead")
    made.add_argument("--eval-tokens", type=int, default=Frontier.eval_tokens, help="held-out tokens (default: 32768)")
    made.add_argument("--calibration-tokens", type=int, default=Frontier.calibration_tokens, help="(default: 8192)")
    made.add_argument("--threads", type=int, default=0, help="of torch; 0: its own choice")
    add_json_argument(made)
    return made


def numbers(text: str) -> tuple[float, ...]:
    return tuple(float(word) for word in text.split(","))


def pairs(text: str) -> tuple[tuple[str, float], ...]:
    found = tuple((name, float(rate)) for name, rate in (word.split(":") for word in text.split(",")))
    if not all(name in OPTIMIZERS and rate > 0 for name, rate in found):
        raise ValueError(text)
    return found


def integers(text: str) -> tuple[int, ...]:
    return tuple(int(word) for word in text.split(","))


@entry
def main(argv: Sequence[str] | None = None) -> int:
    """Entry point: 0 done, 2 settings or folders that cannot be used."""
    args = vars(parser().parse_args(argv))
    threads = args.pop("threads")
    args.pop("json")  # `entry` has taken care of it
    if threads:
        torch.set_num_threads(threads)
    try:
        cfg = Frontier(**args)
        points = Points(cfg).all()
    except (ValueError, RunError, CorpusError) as error:
        print(f"activity: {error}", file=sys.stderr)
        return 2
    rows = summary(points)
    document = {
        "run": cfg.run,
        "steps": cfg.steps,
        "from_scratch": cfg.from_scratch,
        "goal_nats": GOAL_NATS,
        "synops_fraction_at_0.05": qualifying(rows),
        "rows": rows,
    }
    write_json(cfg.folder / "frontier.json", document | {"points": points})
    picture(rows, cfg.folder / "frontier.png")
    print(table(rows))
    finish(document, "activity", file=cfg.folder / "frontier.json")
    return 0


if __name__ == "__main__":
    sys.exit(main())
