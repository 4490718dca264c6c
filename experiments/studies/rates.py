"""Does the best learning rate stay put when the model grows? `spikegate study rates`.

Trains plain models of several shapes, LAYERSxWIDTH, at several rates for the same tokens, and reads off each shape's best
rate: the lowest point of the parabola through the best rate and its two neighbours, in octaves (log2). What a reader wants
to know stands beside it: how many nats a shape loses at the best rate of the first shape (tiny, as a rule). A growing model
needs a rate that suits few blocks and all of them, and whoever tunes small models needs one that suits a large one.

Every point is a file under --out; the same command goes on where it stopped. Last line: JSON.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from experiments.comparison.statistics import interval
from experiments.runs.folder import RunError, git_state, read_json
from experiments.runs.output import add_json_argument, entry, finish
from experiments.runs.plain_json import write_json
from sparse_update.clock.shipped import shipped_table
from sparse_update.data.corpus import DataConfig, load_corpus, val_windows
from sparse_update.data.records import Corpus, CorpusError
from sparse_update.data.stream import WindowStream
from sparse_update.loop.assembly import Arm, Place, Prices, Text, make_trainer
from sparse_update.loop.records import TrainerConfig
from sparse_update.transformer import ModelConfig, Transformer
from sparse_update.weights.settings import OptimConfig

RATES = {"muon": (0.005, 0.01, 0.02, 0.04, 0.08), "adamw": (0.001, 0.002, 0.004, 0.008, 0.016)}
SETTING = {"muon": "muon_lr", "adamw": "lr"}
"""Optimizer -> the rate that is varied: Muon's own, whose AdamW for embedding and head keeps its rate, or AdamW's."""
HEAD_WIDTH = 16
"""As at size tiny: heads of one width, so that width adds heads."""
Key = tuple[str, int]
"""Shape, seed."""


@dataclass(frozen=True)
class Point:
    """One model to train: all that its loss depends on."""

    optimizer: str
    shape: str
    rate: float
    seed: int
    tokens: int
    batch_windows: int
    context: int
    eval_tokens: int
    base_width: int = 0

    def __post_init__(self) -> None:
        layers, width = sizes(self.shape)
        if layers < 1 or width < HEAD_WIDTH or width % HEAD_WIDTH:
            raise ValueError(f"--shapes: {self.shape} is not LAYERSxWIDTH with a width that {HEAD_WIDTH} divides")
        if self.tokens < self.batch_windows * self.context:
            raise ValueError(f"--tokens {self.tokens}: less than one step of {self.batch_windows} x {self.context}")

    @property
    def name(self) -> str:
        based = f"-b{self.base_width}" if self.base_width else ""
        return f"{self.optimizer}-{self.shape}-r{self.rate:g}-s{self.seed}{based}"

    @property
    def model(self) -> ModelConfig:
        layers, width = sizes(self.shape)
        return ModelConfig(width=width, layers=layers, heads=width // HEAD_WIDTH, context=self.context, vocab_size=256)


def sizes(shape: str) -> tuple[int, int]:
    """(layers, width) of LAYERSxWIDTH. Raises ValueError for another form."""
    layers, _, width = shape.partition("x")
    if not (layers.isdigit() and width.isdigit()):
        raise ValueError(f"--shapes: {shape!r} is not LAYERSxWIDTH, for instance 3x64")
    return int(layers), int(width)


def train(point: Point, corpus: Corpus) -> dict[str, Any]:
    """Train one point on one pass of the text: its held-out loss in nats per token, and what it took."""
    cfg = point.model
    optim = OptimConfig(name=point.optimizer, schedule="wsd", base_width=point.base_width)
    setattr(optim, SETTING[point.optimizer], point.rate)
    table, device = shipped_table(), torch.device("cpu")
    times = table.times(cfg, optim, point.batch_windows, device, "fp32", False)
    cfg.attention = times.attention
    torch.manual_seed(point.seed)
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(
            Transformer(cfg),
            Arm(optim=optim),
            TrainerConfig(
                budget_offered_tokens=point.tokens, batch_windows=point.batch_windows, evaluations=1, compile="off"
            ),
            Text(
                WindowStream(corpus, point.context, point.seed),
                {"val": val_windows(corpus, point.context, point.eval_tokens)},
            ),
            Prices(times, lambda t, steps, components: table.extended(t, cfg, optim, steps, components)),
            Place(Path(folder)),
            point.seed,
        )
        result = trainer.run()
    if not result.finished:
        raise KeyboardInterrupt
    found = {"loss_nats": result.val_loss_nats, "reference_s": result.reference_s, "steps": result.step}
    return {**asdict(point), **found, "flops": result.flops, "git": git_state()}


def best_octave(losses: Mapping[float, float]) -> float | None:
    """log2 of the rate at the lowest point of the parabola through the best rate and its neighbours; None where the best
    is at an end of what was tried, so that the optimum may lie beyond."""
    rates = sorted(losses)
    at = min(range(len(rates)), key=lambda i: losses[rates[i]])
    if at in (0, len(rates) - 1):
        return None
    (x0, x1, x2), (y0, y1, y2) = ([f(r) for r in rates[at - 1 : at + 2]] for f in (math.log2, losses.__getitem__))
    left, right = (y1 - y0) / (x1 - x0), (y2 - y1) / (x2 - x1)
    curve = (right - left) / (x2 - x0)
    return x1 if curve <= 0 else (x0 + x1) / 2 - left / (2 * curve)


def summary(points: Sequence[Mapping[str, Any]], shapes: Sequence[str]) -> list[dict[str, Any]]:
    """One row a shape, over the seeds that have every rate: losses by rate, best rate, octaves from the first shape's, and
    the nats that a shape loses at the first shape's best rate of the same seed."""
    found: dict[Key, dict[float, float]] = {}
    for p in points:
        found.setdefault((p["shape"], p["seed"]), {})[p["rate"]] = p["loss_nats"]
    first = shapes[0]
    rows = []
    for shape in shapes:
        seeds = sorted(seed for at, seed in found if at == shape and (first, seed) in found)
        if not seeds:
            continue
        octaves = {seed: best_octave(found[shape, seed]) for seed in seeds}
        base = {seed: best_octave(found[first, seed]) for seed in seeds}
        shifts = [o - b for s in seeds if (o := octaves[s]) is not None and (b := base[s]) is not None]
        regrets = []
        for seed in seeds:
            own, theirs = found[shape, seed], found[first, seed]
            regrets.append(own.get(min(theirs, key=theirs.__getitem__), math.nan) - min(own.values()))
        inside = [o for o in octaves.values() if o is not None]
        rates = sorted(set.intersection(*(set(found[shape, seed]) for seed in seeds)))
        rows.append(
            {
                "shape": shape,
                "seeds": seeds,
                "losses": {f"{r:g}": statistics.fmean(found[shape, s][r] for s in seeds) for r in rates},
                "best_rate": 2 ** statistics.fmean(inside) if inside else None,
                "at_an_end": len(seeds) - len(inside),
                "octaves": shifts,
                "octaves_interval": spread(shifts),
                "regret_nats": statistics.fmean(regrets),
                "regret_interval": spread(regrets),
            }
        )
    return rows


def spread(values: Sequence[float]) -> tuple[float, float] | None:
    """95 % t-interval over seeds; None for fewer than two."""
    found = interval(values) if len(values) > 1 else None
    return None if found is None or found.low is None or found.high is None else (found.low, found.high)


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows as text; losses in nats per token on held-out text, means over the seeds."""
    rates = list(dict.fromkeys(rate for row in rows for rate in row["losses"]))
    lines = [
        f"{'shape':<8}{'seeds':>6}" + "".join(f"{r:>9}" for r in rates) + f"{'best':>10}{'octaves':>9}  95 %    nats lost"
    ]
    for row in rows:
        cells = "".join(f"{row['losses'][r]:9.4f}" if r in row["losses"] else " " * 9 for r in rates)
        best = f"{row['best_rate']:10.4g}" if row["best_rate"] else f"{'at an end':>10}"
        shift = f"{statistics.fmean(row['octaves']):+9.2f}" if row["octaves"] else " " * 9
        within = "[{:+.2f}, {:+.2f}]".format(*row["octaves_interval"]) if row["octaves_interval"] else ""
        lines.append(f"{row['shape']:<8}{len(row['seeds']):>6}{cells}{best}{shift}  {within}  {row['regret_nats']:+.4f}")
    return "\n".join(lines)


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(prog="spikegate study rates", description="the best learning rate over width and depth")
    made.add_argument("--optimizer", choices=sorted(RATES), default="muon")
    made.add_argument("--shapes", default="3x64,3x128,3x256,1x64,6x64", help="LAYERSxWIDTH; the first is compared with")
    made.add_argument("--rates", default="", help="rates to try (default: five, a factor of 2 apart)")
    made.add_argument("--seeds", default="10,11")
    made.add_argument("--tokens", type=int, default=65536, help="tokens of a point, one pass")
    made.add_argument("--batch-windows", type=int, default=8)
    made.add_argument("--context", type=int, default=128)
    made.add_argument("--eval-tokens", type=int, default=32768)
    made.add_argument("--base-width", type=int, default=0, help="optim.base_width: AdamW by base over width")
    made.add_argument("--out", type=Path, default=Path("runs/rates"))
    add_json_argument(made)
    return made


@entry
def main(argv: Sequence[str]) -> int:
    """Train what is missing, print the table; 2 for settings that cannot be used, 130 after Ctrl-C."""
    args = parser().parse_args(list(argv))
    try:
        shapes = list(filter(None, args.shapes.split(",")))
        rates = [float(r) for r in args.rates.split(",") if r] or list(RATES[args.optimizer])
        seeds = [int(s) for s in args.seeds.split(",") if s]
        common = (args.tokens, args.batch_windows, args.context, args.eval_tokens, args.base_width)
        wanted = [Point(args.optimizer, shape, r, seed, *common) for seed in seeds for shape in shapes for r in rates]
        if not wanted:
            raise ValueError("--shapes, --seeds: give at least one of each")
        corpus = load_corpus(DataConfig())
        torch.set_num_threads(1)
        points = [found(point, corpus, args.out) for point in wanted]
    except (ValueError, CorpusError, RunError) as error:
        say(f"rates: {error}")
        return 2
    except KeyboardInterrupt:
        say("stopped; the same command goes on from here")
        return 130
    rows = summary(points, shapes)
    print(table(rows))
    seconds = sum(p["reference_s"] for p in points)
    print(
        f"{len(points)} points, {seconds:.0f} reference seconds; best: lowest point of a parabola; octaves from {shapes[0]}"
    )
    document = {"optimizer": args.optimizer, "rows": rows, "points": len(points), "reference_s": seconds}
    finish(document, "rates", file=write_json(args.out / f"{args.optimizer}.json", {**document, "all": points}))
    return 0


def found(point: Point, corpus: Corpus, out: Path) -> dict[str, Any]:
    """A point's record, trained or read back. Raises RunError where its file is of other settings."""
    path = out / f"{point.name}.json"
    if path.exists():
        record = read_json(path)
        if {key: record.get(key, 0) for key in asdict(point)} != asdict(point):
            raise RunError(f"{path} was made with other settings; choose another folder with --out")
        return record
    record = train(point, corpus)
    write_json(path, record)
    say(f"{point.name}: {record['loss_nats']:.4f} nats, {record['steps']} steps, {record['reference_s']:.1f} reference s")
    return record


if __name__ == "__main__":
    sys.exit(main())
