"""What do more instruction tasks teach about tasks never trained on? `spikegate study transfer`.

A small model is tuned on the first K tasks of an order that the seed shuffles, for the same reference seconds whatever K
is. Then it is judged on tasks that were in none of the orders: by the loss of their reference answers as it is ("at
once"), and by loss and share of questions solved after a short tuning on them ("after"), the same for all. K = 0 is that
short tuning from random weights. Every seed has an order of its own and gives each K a first task of its own kind, so
differences between numbers of tasks are taken within a seed.

Every point is a file under --out; the same command goes on where it stopped. Last line: JSON. Needs the extra `tasks`.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import linear_regression
from typing import Any

import torch

from experiments.comparison.statistics import interval
from experiments.runs.folder import RunError, git_state, read_json
from experiments.runs.output import add_json_argument, entry, finish
from experiments.runs.plain_json import write_json
from sparse_update.clock.shipped import shipped_table
from sparse_update.data.tokens import ByteTokenizer
from sparse_update.loop.assembly import Arm, Place, Prices, Text, make_trainer
from sparse_update.loop.evaluation import start_from
from sparse_update.loop.records import RunResult, TrainerConfig
from sparse_update.objectives.examples.examples import Examples
from sparse_update.objectives.examples.settings import TaskConfig
from sparse_update.objectives.instruction.instruct import Instruct
from sparse_update.tasks.base import TaskError
from sparse_update.tasks.draw import Draw
from sparse_update.transformer import ModelConfig, Transformer
from sparse_update.weights.settings import OptimConfig

POOL = (
    "brackets:1-3", "sorting:1-2", "modular:1", "edits:1", "countdown:1", "gym:basic_arithmetic:1", "gym:number_sequence:1",
    "gym:chain_sum:1", "gym:lcm:1", "gym:simple_equations:1", "gym:complex_arithmetic:1", "gym:count_bits:1",
    "gym:count_primes:1", "gym:decimal_chain_sum:1", "gym:aiw:1", "gym:gcd:1", "gym:letter_counting:1",
    "gym:fraction_simplification:1", "gym:decimal_arithmetic:1", "gym:leg_counting:1", "gym:prime_factorization:1",
    "gym:family_relationships:1", "gym:time_intervals:1", "gym:syllogism:1", "gym:base_conversion:1",
    "gym:power_function:1",
)  # fmt: skip
"""Tasks to tune on: a seed shuffles them and takes the first K."""
UNSEEN = ("sums:1-2", "gym:products:1", "gym:calendar_arithmetic:1")
"""Tasks to be judged by."""
COUNTS = (0, 1, 2, 4, 8, 16, 26)
MODEL = ModelConfig(name="study", width=64, layers=2, heads=4, context=256, vocab_size=256)


@dataclass(frozen=True)
class Point:
    """One model: tuned on so many tasks, then on the unseen ones."""

    count: int
    seed: int
    tuning_s: float
    after_s: float
    batch_windows: int
    judged: int

    @property
    def name(self) -> str:
        return f"k{self.count}-s{self.seed}"

    @property
    def tasks(self) -> list[str]:
        return Draw("transfer", self.seed).shuffled(POOL)[: self.count]


def tuned(model: Transformer, task: TaskConfig, budget_s: float, point: Point, folder: Path) -> RunResult:
    """Tune `model` on tasks for so many reference seconds."""
    optim, table, device = OptimConfig(name="muon", lr=8e-3, muon_lr=0.04), shipped_table(), torch.device("cpu")
    times = table.times(model.cfg, optim, point.batch_windows, device, "fp32", False)
    examples = Examples(task, ByteTokenizer(), model.cfg.context, point.seed)
    trainer = make_trainer(
        model,
        Arm(optim=optim),
        TrainerConfig(budget_reference_s=budget_s, batch_windows=point.batch_windows, evaluations=1, compile="off"),
        Text(examples.examples(), {name: rows.tokens_NT1 for name, rows in examples.held_out.items()}),
        Prices(times, lambda t, steps, components: table.extended(t, model.cfg, optim, steps, components)),
        Place(folder),
        point.seed,
        objective=lambda given: Instruct(given, examples),
    )
    result = trainer.run()
    if not result.finished:
        raise KeyboardInterrupt
    return result


def measured(point: Point, folder: Path) -> dict[str, Any]:
    """A point's losses and shares of questions solved."""
    shape = MODEL
    shape.attention = shipped_table().times(
        shape, OptimConfig(name="muon"), point.batch_windows, torch.device("cpu"), "fp32", False
    ).attention  # fmt: skip
    torch.manual_seed(point.seed)
    model = Transformer(shape)
    found: dict[str, Any] = {"count": point.count, "seed": point.seed, "tasks": point.tasks, "git": git_state()}
    if point.count:
        task = TaskConfig(tasks=point.tasks, unseen=list(UNSEEN), judged=point.judged)
        result = tuned(model, task, point.tuning_s, point, folder / "tuned")
        found["own"] = {"loss_nats": result.val_loss_nats, "solved": result.scores["task/accuracy"]}
        labels = [label for label in result.held_out if f"task/accuracy/{label}" in result.scores]
        new = [label for label in labels if label in _labels(UNSEEN)]
        found["at_once"] = {
            "loss_nats": sum(result.held_out[label] for label in new) / len(new),
            "solved": result.scores["task/accuracy_unseen"],
        }
        fresh = Transformer(shape)
        start_from(fresh, folder / "tuned")
        model = fresh
    after = TaskConfig(tasks=list(UNSEEN), judged=point.judged)
    result = tuned(model, after, point.after_s, point, folder / "after")
    each = [result.held_out[label] for label in _labels(UNSEEN)]
    found["after"] = {"loss_nats": sum(each) / len(each), "solved": result.scores["task/accuracy"]}
    return found


def _labels(specs: Sequence[str]) -> list[str]:
    return [task.label for task, _ in TaskConfig().made(list(specs))]


def summary(points: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One row a number of tasks: means with 95 % t-intervals over seeds, and what is gained over the number before it,
    within each seed."""
    rows: list[dict[str, Any]] = []
    by_seed = {(int(p["count"]), int(p["seed"])): p for p in points}
    counts = sorted({count for count, _ in by_seed})
    for place, count in enumerate(counts):
        seeds = sorted(seed for at, seed in by_seed if at == count)
        row: dict[str, Any] = {"tasks": count, "seeds": seeds}
        for when in ("at_once", "after"):
            for what in ("loss_nats", "solved"):
                values = [by_seed[count, seed][when][what] for seed in seeds if when in by_seed[count, seed]]
                row[f"{when}_{what}"] = _interval(values)
        before = counts[place - 1] if place else None
        shared = [seed for seed in seeds if before is not None and (before, seed) in by_seed]
        row["gain_nats"] = _interval(
            [by_seed[before, s]["after"]["loss_nats"] - by_seed[count, s]["after"]["loss_nats"] for s in shared]  # type: ignore[index]
        )
        rows.append(row)
    return rows


def diminishing(points: Sequence[Mapping[str, Any]], when: str) -> dict[str, Any]:
    """Whether a task more takes less off the loss where there are many already, within seeds: nats a task from the first
    number of tasks to the middle one, from there to the last, and the difference of the two; nats for each doubling, by
    least squares. Empty for fewer than three numbers of tasks above 0.

    Args:
        when: "at_once" or "after".
    """
    by_seed = {(int(p["count"]), int(p["seed"])): float(p[when]["loss_nats"]) for p in points if when in p}
    counts = sorted({count for count, _ in by_seed if count})
    if len(counts) < 3:
        return {}
    first, middle, last = counts[0], counts[len(counts) // 2], counts[-1]
    seeds = [seed for seed in sorted({seed for _, seed in by_seed}) if all((count, seed) in by_seed for count in counts)]

    def each(seed: int, few: int, many: int) -> float:
        return (by_seed[few, seed] - by_seed[many, seed]) / (many - few)

    early, late = ([each(seed, *ends) for seed in seeds] for ends in ((first, middle), (middle, last)))
    log2 = [math.log2(count) for count in counts]
    slopes = [linear_regression(log2, [by_seed[count, seed] for count in counts]).slope for seed in seeds]
    return {
        "counts": [first, middle, last],
        "seeds": seeds,
        "early_nats_per_task": _interval(early),
        "late_nats_per_task": _interval(late),
        "early_less_late": _interval([a - b for a, b in zip(early, late, strict=True)]),
        "nats_per_doubling": _interval([-slope for slope in slopes]),
    }


def _interval(values: Sequence[float]) -> dict[str, float | None]:
    if not values:
        return dict.fromkeys(("mean", "low", "high"))
    found = interval(values)
    return {"mean": found.mean, "low": found.low, "high": found.high}


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows for people."""

    def shown(cell: Mapping[str, float | None], form: str) -> str:
        if cell["mean"] is None:
            return "-"
        bounds = "" if cell["low"] is None else f" [{cell['low']:{form}}, {cell['high']:{form}}]"
        return f"{cell['mean']:{form}}{bounds}"

    lines = ["tasks  seeds  loss at once           loss after             solved after           gain over the row above"]
    for row in rows:
        cells = [
            shown(row["at_once_loss_nats"], ".3f"), shown(row["after_loss_nats"], ".3f"), shown(row["after_solved"], ".1%"),
            shown(row["gain_nats"], "+.3f"),
        ]  # fmt: skip
        lines.append(f"{row['tasks']:5d}  {len(row['seeds']):5d}  " + "  ".join(f"{cell:21s}" for cell in cells))
    return "\n".join(lines)


@entry
def main(argv: Sequence[str] | None = None) -> int:
    """Entry point. Exit codes: 0 done; 2 settings that cannot be, or reasoning-gym missing."""
    parser = argparse.ArgumentParser(prog="spikegate study transfer", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--counts", type=int, nargs="+", default=list(COUNTS), help="numbers of tasks")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--tuning-s", type=float, default=24.0, help="reference seconds on the first K tasks")
    parser.add_argument("--after-s", type=float, default=4.0, help="reference seconds on the unseen tasks")
    parser.add_argument("--batch-windows", type=int, default=4)
    parser.add_argument("--judged", type=int, default=128, help="questions of each task that a model is judged by")
    parser.add_argument("--out", type=Path, default=Path("runs/transfer"))
    add_json_argument(parser)
    args = parser.parse_args(argv)
    if bad := [count for count in args.counts if not 0 <= count <= len(POOL)]:
        print(f"study transfer: --counts {bad[0]}: from 0 to {len(POOL)} tasks", file=sys.stderr)
        return 2
    points = []
    try:
        for seed in args.seeds:
            for count in args.counts:
                point = Point(count, seed, args.tuning_s, args.after_s, args.batch_windows, args.judged)
                path = args.out / point.name / "point.json"
                if not path.exists():
                    print(f"{point.name}: {', '.join(point.tasks) or 'no tasks'}", file=sys.stderr, flush=True)
                    write_json(path, measured(point, path.parent))
                points.append(read_json(path))
    except (TaskError, RunError) as error:
        print(f"study transfer: {error}", file=sys.stderr)
        return 2
    rows = summary(points)
    print(table(rows))
    returns = {when: diminishing(points, when) for when in ("at_once", "after")}
    for when, found in returns.items():
        if found:
            few, middle, many = found["counts"]
            early, late = (found[f"{which}_nats_per_task"]["mean"] for which in ("early", "late"))
            print(
                f"{when.replace('_', ' ')}: one more task takes {early:.3f} off from {few} to {middle} tasks, {late:.3f} "
                f"from {middle} to {many}; each doubling {found['nats_per_doubling']['mean']:.3f}"
            )
    document = {"rows": rows, "returns": returns, "pool": list(POOL), "unseen": list(UNSEEN), "settings": {
        "tuning_s": args.tuning_s, "after_s": args.after_s, "batch_windows": args.batch_windows, "judged": args.judged,
    }}  # fmt: skip
    write_json(args.out / "transfer.json", document)
    finish(document, "study transfer", file=args.out / "transfer.json", headline=["rows", "returns"])
    return 0


if __name__ == "__main__":
    sys.exit(main())
