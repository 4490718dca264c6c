"""`spikegate bench any_module`: prices of counted work for a model of one's own, out of steps timed on this machine.

Small networks of several kinds take whole steps, plain ones and gated ones in turn, each in the CPU seconds of one thread.
What the steps do is counted (`sparse_update.own.counting`). The prices are a least-squares fit, none of them negative, each
step weighed by its own time and the ratios to the plain step three times as much. A kind of gated step gets the largest
ratio of measured to priced time, both over the plain step's, as its factor: where the prices err, it looks dearer.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.optimize import nnls
from torch import nn

from experiments.benches import ratios
from experiments.runs.output import add_json_argument, entry, finish
from experiments.runs.plain_json import write_json
from hardware.meters.ratios import Until, load, processor
from sparse_update.own.arms import DENSE, OwnArm, gated
from sparse_update.own.counting import Count
from sparse_update.own.measure import OTHER, beside_dense, rehearse
from sparse_update.own.prices import FLOPS, MODELLED, SCHEMA
from sparse_update.own.task import UserTask
from sparse_update.transformer import ModelConfig, Transformer

GUESS: dict[str, float] = {"forward_flops": 15, "dx_flops": 20, "dw_flops": 15, "moved_bytes": 100, "hard_elements": 1500}
GUESS |= {"operations": 1.2e7, "step": 3e8}
"""Picoseconds, by rule of thumb."""
HOLD = 0.1
"""Weight of the guess against one measured step."""
RATIOS = 3.0
"""Weight of a ratio to the plain step against the step's own time."""
GATES: dict[str, dict[str, Any]] = {
    "token": {"backward": {"unit": "token", "keep_fraction": 0.5}},
    "token_quarter": {"backward": {"unit": "token", "keep_fraction": 0.25}},
    "token_exact": {"backward": {"unit": "token", "keep_fraction": 0.5, "below": "exact"}},
    "sequence": {"backward": {"unit": "sequence", "keep_fraction": 0.5}},
    "blocks": {"weights": {"kind": "blocks", "active_fraction": 0.25}},
    "token_blocks": {
        "backward": {"unit": "token", "keep_fraction": 0.5}, "weights": {"kind": "blocks", "active_fraction": 0.25},
    },
    "before": {"before": {"signal": "random", "policy": "uniform", "keep_fraction": 0.5, "pool": 32}},
}  # fmt: skip


class Encoder(nn.Module):
    """torch's own Transformer, causal."""

    def __init__(self, vocabulary: int, width: int, layers: int) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(width, 4, 3 * width, 0.0, batch_first=True)
        self.embed, self.body = nn.Embedding(vocabulary, width), nn.TransformerEncoder(layer, layers)
        self.head = nn.Linear(width, vocabulary)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Tokens (B, T) to logits (B, T, V)."""
        mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1])
        return self.head(self.body(self.embed(x), mask=mask, is_causal=True))


def mlp(vocabulary: int, width: int) -> nn.Module:
    """A token by itself, through two layers."""
    inner = [nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width), nn.LayerNorm(width)]
    return nn.Sequential(nn.Embedding(vocabulary, width), *inner, nn.Linear(width, vocabulary))


def ours(vocabulary: int, width: int, layers: int, context: int) -> nn.Module:
    """The package's own, as any module."""
    return Transformer(ModelConfig(width=width, layers=layers, heads=4, context=context, vocab_size=vocabulary))


@dataclass(frozen=True)
class Setting:
    """A model by name, and the batch of its steps."""

    name: str
    batch: int
    length: int
    vocabulary: int

    def task(self) -> UserTask:
        """Tokens at random: times do not depend on them."""
        kind, width = self.name.split("-")[0], int(self.name.split("-")[1])
        rows = torch.randint(0, self.vocabulary, (self.batch, self.length + 1))

        def model() -> nn.Module:
            if kind == "mlp":
                return mlp(self.vocabulary, width)
            layers = int(self.name.split("-")[2])
            return (
                ours(self.vocabulary, width, layers, self.length)
                if kind == "ours"
                else Encoder(self.vocabulary, width, layers)
            )

        return UserTask(model=model, train=[rows], held_out=[rows])


SETTINGS = (
    Setting("ours-32-2", 16, 32, 256), Setting("ours-64-4", 16, 64, 256), Setting("ours-128-4", 16, 64, 1024),
    Setting("ours-256-4", 4, 128, 4096), Setting("encoder-64-2", 16, 64, 256), Setting("encoder-128-4", 8, 128, 1024),
    Setting("mlp-64", 32, 32, 256), Setting("mlp-256", 16, 64, 2048),
)  # fmt: skip


@dataclass(frozen=True)
class Step:
    """One timed step: its counts by price, its seconds, and its ratio to the plain step of its setting."""

    setting: str
    gate: str
    kind: str
    counts: Mapping[str, float]
    seconds: float
    over_plain: float
    settled: bool = True
    """Whether that ratio is known as well as it was to be; it is taken either way."""


def counts_of(work: Mapping[str, Count]) -> dict[str, float]:
    """Counts of a step by the name of the price that is on them."""
    found = dict.fromkeys(GUESS, 0.0) | {"step": 1.0}
    for part, count in work.items():
        found[FLOPS.get(part, "forward_flops")] += count.flops
        for name in ("moved_bytes", "hard_elements", "operations"):
            found[name] += getattr(count, name)
    return found


def measured(setting: Setting, until: Until) -> list[Step]:
    """The plain step of a setting, and every gated one timed in turn with it."""
    task, device = setting.task(), torch.device("cpu")
    plain = rehearse(task, OwnArm(DENSE), 0, device)
    steps: list[Step] = []
    seconds: list[float] = []
    for name, config in GATES.items():
        arm = gated(name, config)
        other = rehearse(task, arm, 0, device)
        found = beside_dense(plain.take, other.take, device, until)
        ratio = found.ratios[OTHER]
        seconds += found.seconds[DENSE]
        counts, typical = counts_of(other.work), statistics.median(found.seconds[OTHER])
        steps.append(Step(setting.name, name, arm.kind, counts, typical, ratio.typical, ratio.settled))
    return [Step(setting.name, DENSE, DENSE, counts_of(plain.work), statistics.median(seconds), 1.0), *steps]


def fit(steps: Sequence[Step]) -> tuple[dict[str, float], dict[str, float], list[list[Any]]]:
    """(prices in picoseconds, factor by kind, [setting, gate, measured over plain, priced over plain] of each step)."""
    plain = {step.setting: step for step in steps if step.kind == DENSE}
    unit = np.array(list(GUESS.values()))
    rows = {_key(step): np.array([step.counts[name] for name in GUESS]) * unit for step in steps}
    own = {_key(step): rows[_key(step)] / (step.seconds * 1e12) for step in steps}
    told, wanted = list(own.values()), [1.0] * len(own)
    for step in steps:
        if step.kind != DENSE:
            # priced(step) / priced(plain) is to be the measured ratio: linear once both are over the plain step's time
            base = plain[step.setting]
            scale = base.seconds * 1e12
            told.append(RATIOS * (rows[_key(step)] / scale - step.over_plain * rows[_key(base)] / scale))
            wanted.append(0.0)
    told += list(HOLD * np.eye(len(GUESS)))
    wanted += [HOLD] * len(GUESS)
    found, _ = nnls(np.array(told), np.array(wanted))
    prices = {name: float(f"{value:.3g}") for name, value in zip(GUESS, found * unit, strict=True)}
    priced = {key: float(row @ found) for key, row in rows.items()}
    factors: dict[str, float] = {}
    check = []
    for step in steps:
        if step.kind == DENSE:
            continue
        ratio = priced[_key(step)] / priced[_key(plain[step.setting])]
        factors[step.kind] = max(factors.get(step.kind, 1.0), step.over_plain / ratio)
        check.append([step.setting, step.gate, round(step.over_plain, 3), round(ratio, 3)])
    return prices, {kind: float(f"{value:.3g}") for kind, value in factors.items()}, check


def _key(step: Step) -> tuple[str, str]:
    return step.setting, step.gate


@entry
def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of `spikegate bench any_module`."""
    parser = argparse.ArgumentParser(prog="spikegate bench any_module", description=(__doc__ or "").splitlines()[0])
    ratios.add_arguments(parser, most_rounds=60, most_s=120.0, beside=1)
    parser.add_argument("--settings", default="", help="names of settings with commas between them (all)")
    parser.add_argument("--out", type=Path, default=None, help="file for the table of prices")
    add_json_argument(parser)
    given = parser.parse_args(argv)
    torch.set_num_threads(1)
    wanted = [s for s in SETTINGS if not given.settings or s.name in given.settings.split(",")]
    if not wanted:
        print(f"any_module: settings are {', '.join(s.name for s in SETTINGS)}", file=sys.stderr)
        return 2
    try:
        until = ratios.until(given)
    except ValueError as error:
        print(f"any_module: {error}", file=sys.stderr)
        return 2
    load_before = load()
    steps = [step for setting in wanted for step in measured(setting, until)]
    if noisy := [f"{step.setting} {step.gate}" for step in steps if not step.settled]:
        print(f"too noisy, and taken as measured: {', '.join(noisy)}")
    prices, factors, check = fit(steps)
    for setting, gate, took, priced in check:
        print(f"{setting:<14} {gate:<14} {took:.3f} of a plain step, {priced:.3f} by the prices")
    about = {
        "machine": f"{processor()}, load {load_before} before and {load()} after", "threads": 1, "torch": torch.__version__,
        "precision": "fp32", "date": time.strftime("%Y-%m-%d"), "clock": "CPU seconds of one thread, beside other work",
        "command": f"spikegate bench any_module --rounds {given.rounds}", "too_noisy": noisy,
        "check_columns": ["setting", "gate", "measured over the plain step", "priced over the plain step"], "check": check,
    }  # fmt: skip
    table = {"schema": SCHEMA, "source": MODELLED, "name": "any_module_x86_1_thread", "prices_ps": prices}
    table |= {"factors": factors, "about": about}
    file = None if given.out is None else write_json(given.out, table)
    finish(json.loads(json.dumps(table)), "bench-any_module", file=file, headline=["prices_ps", "factors"])
    return 0


if __name__ == "__main__":
    sys.exit(main())
