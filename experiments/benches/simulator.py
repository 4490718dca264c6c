"""`python -m experiments.bench simulator`: our simulator, called without options, against Lava in the same run, and against
its own matrix products. With `--peers`: beside float simulators too (`experiments.benches.peers.report`).

Two LIF layers n-n-n, 20 % input, thresholds set so that both layers fire at about 35 %. Times are wall clock per step and
sample, measured in turn (`hardware.meters.ratios`), each arm in a process of its own. Lava runs one sample on one thread,
already started, without monitors, its output read by a sink. Ours records the output layer and counts everything.

The products alone are `torch._int_mm` (int8 with int32 sums) or a float type, whichever the simulator takes, on messages
that the network really sends, with nothing around them.

The last line is JSON: {"n256": {"b1": {"lava": r, "products": p}, "b256": {...}}, "n1024": {...}, "targets": [...]}; r is
Lava's time over ours with its interval, p that of the products alone, which is our share of their speed. A ratio that is
too noisy is null.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from experiments.benches import ratios
from experiments.benches.peers import cases, report
from experiments.runs.output import add_json_argument, entry, finish
from hardware.meters.elsewhere import ElsewhereError
from neuro.graph import Population, Projection, SpikingGraph
from neuro.simulators.lava.client import LavaError

WIDTHS = (256, 1024)
BATCHES = (1, 256)
TARGETS = {("n256", "b1"): 30, ("n256", "b256"): 500, ("n1024", "b1"): 20, ("n1024", "b256"): 150}
"""How many times slower Lava should at least be."""
INPUT_RATE = 0.2
# Steps of one run at batch 1 and at batch 256; long enough that setting up does not count.
STEPS = {(256, 1): 8000, (256, 256): 128, (1024, 1): 4000, (1024, 256): 48}
ARMS = {"lava": "lava", "exact": "products"}
"""Arm of `report.worker` -> its name here."""


def network(n: int, vths: tuple[int, int] = (1, 1), seed: int = 0) -> SpikingGraph:
    """Two LIF layers of n neurons, mixed-sign 8-bit weights, decays 1/4 (u) and 1/8 (v)."""
    rng = np.random.default_rng(seed)
    populations = [Population("x", "input", n)]
    projections = []
    for layer, vth in enumerate(vths):
        weight = 2 * np.clip(np.rint(rng.normal(0, 40, (n, n))), -127, 127).astype(np.int32)
        populations.append(Population(f"layer{layer + 1}", "lif", n, {"du": 1023, "dv": 512, "vth": vth}))
        projections.append(Projection(f"w{layer}", populations[-2].name, populations[-1].name, "a_in", weight))
    return SpikingGraph(tuple(populations), tuple(projections), (populations[-1].name,))


def spikes(n: int, batch: int, steps: int, seed: int = 1) -> torch.Tensor:
    """Binary input, int8 (batch, steps, n)."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.rand(batch, steps, n, generator=generator) < INPUT_RATE).to(torch.int8)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(prog="spikegate bench simulator", description=str(__doc__).split("\n\n")[0])
    made.add_argument("--threads", type=int, default=torch.get_num_threads(), help="threads of ours (default: torch's)")
    made.add_argument("--widths", type=int, nargs="+", default=list(WIDTHS), help="n (default: 256 1024)")
    made.add_argument("--steps", type=int, default=None, help="steps of one run of ours (default: by width and batch)")
    made.add_argument("--peers", action="store_true", help="beside float simulators and Lava; --peers --help says how")
    made.set_defaults(clock="wall")
    ratios.add_arguments(made, most_s=120.0, warm_up=1)
    add_json_argument(made)
    return made


@entry
def main(argv: Sequence[str]) -> int:
    """Measure, print a table and the JSON line. Exit code 0 when it ran, whatever the numbers; 1 without Lava, 2 for bad
    arguments."""
    if "--peers" in argv:
        return report.main([word for word in argv if word != "--peers"])
    args = parser().parse_args(argv)
    try:
        ratios.until(args)
        if args.threads < 1 or min(args.widths) < 1 or (args.steps is not None and args.steps < 1):
            raise ValueError(f"--threads {args.threads}, --widths, --steps: must be at least 1")
    except ValueError as error:
        print(f"bench simulator: {error}", file=sys.stderr)
        return 2
    found: dict[str, dict[str, Any]] = {}
    try:
        with tempfile.TemporaryDirectory() as folder:
            for n in args.widths:
                for batch in BATCHES:
                    steps = args.steps or STEPS.get((n, batch), 100)
                    case = cases.dense(f"n{n}_b{batch}", n, batch, steps)
                    measured = report.row_measured(report.Row(case, tuple(ARMS), {}), args, Path(folder))
                    report.print_case(case.name, measured)
                    found.setdefault(f"n{n}", {})[f"b{batch}"] = measured
    except (LavaError, ElsewhereError) as error:
        print(f"bench simulator: {error}", file=sys.stderr)
        return 1
    reached = targets(found)
    for each in reached:
        times = "too noisy for a number" if each["ratio"] is None else f"{each['ratio']:.0f}x Lava"
        print(f"{each['of']}: {times}, target {each['target']}: {each['verdict']}")
    short = {n: {batch: compact(measured) for batch, measured in row.items()} for n, row in found.items()}
    document = {**short, "targets": reached, "threads": args.threads, "measured": found}
    finish(document, "bench-simulator", headline=(*short, "targets", "threads"))
    return 0


def compact(measured: Mapping[str, Any]) -> dict[str, Any]:
    """The two ratios of one case, each its median (null where noisy), interval and best."""
    kept = ("median", "low", "high", "best")
    return {name: {key: measured["ratios"][arm][key] for key in kept} for arm, name in ARMS.items()}


def targets(found: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Each goal beside what was reached."""
    reached = []
    for (n, batch), target in TARGETS.items():
        if batch in found.get(n, {}):
            ratio = found[n][batch]["ratios"]["lava"]
            verdict = report.judged(ratio, target)
            reached.append({"of": f"{n} {batch}", "ratio": ratio["median"], "target": target, "verdict": verdict})
    return reached


if __name__ == "__main__":
    sys.exit(main())
