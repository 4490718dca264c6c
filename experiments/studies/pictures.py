"""`spikegate study pictures`: a residual network for pictures, trained on several seeds, by each route on the chip.

Two convolutions, the second beside the way around it, average pooling and a dense layer, on scikit-learn's digits or on
Fashion-MNIST where it is installed. For each seed and route: the share of the multiply-accumulates that is mapped, the
accuracy of the float network and of the simulation on the same held-out pictures, synaptic operations, events, cores, and
what the same network would take with dense matrices in place of its convolutions.

The last line is JSON. Exit codes: 0 every route holds (at least 95 % mapped; at most 0.5 points of accuracy lost by the
graded route, 1 by sigma-delta, 2 by rate, in the mean over seeds); 1 one does not, or nothing could be measured; 2 the
command is wrong or the pictures are missing.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from experiments.comparison.statistics import interval
from experiments.runs.deploy_config import RouteConfig
from experiments.runs.output import add_json_argument, entry, finish
from experiments.runs.plain_json import write_json
from experiments.runs.samples.dense import dense_equivalent
from experiments.runs.samples.deployment import EXPECTED, measure
from experiments.samples.networks import ResidualCNN, fitted
from experiments.samples.records import DataError, Samples
from experiments.samples.sets import DIGITS, FASHION, load_samples
from neuro.conversion.rate import RateConfig
from neuro.deployment.deployed import deploy

LOST = {"graded": 0.005, "sigma_delta": 0.01, "rate": 0.02}
"""Route -> accuracy that may be lost."""
MAPPED = 0.95
PROFILES = ["loihi1_davies2018", "digital45_int8_sram"]
DENSE_SAMPLES = 8
NETWORKS = {DIGITS: {"size": 8}, FASHION: {"size": 28, "stride": 2}}
EPOCHS = {DIGITS: 15, FASHION: 2}


def one(samples: Samples, seed: int, routes: Sequence[str], args: argparse.Namespace) -> list[dict[str, Any]]:
    """Train one network and measure it by every route."""
    torch.manual_seed(seed)
    say(f"training on {len(samples.x_train):,} pictures, seed {seed}")
    model = fitted(ResidualCNN(**NETWORKS[args.data]), samples, epochs=args.epochs or EPOCHS[args.data], seed=seed)
    found = []
    for route in routes:
        cfg = RouteConfig(route=route, profiles=PROFILES, progress=args.progress, rate=RateConfig(args.time_steps))
        outcome = measure(model, samples, cfg, batch=args.batch, placing_samples=args.batch if args.batch < 16 else 16)
        assert outcome.plan is not None  # of these routes there is one
        simulated = deploy(model, outcome.plan)
        few = torch.from_numpy(samples.x[:DENSE_SAMPLES])
        dense = dense_equivalent(simulated, few, [c for c in outcome.counts if not c.host], cfg.chip)
        kept: tuple[str, ...] = (
            "accuracy",
            "less_float",
            "agreement",
            "mapped_mac_share",
            "macs_per_sample",
            "synops_per_sample",
        )
        kept += ("events_per_sample", "time_steps_per_sample", "host_crossings_per_sample", "cores", "chips", "samples")
        row = {key: outcome.document[key] for key in kept}
        energy = {e["profile"]: [e["low_j"], e["mid_j"], e["high_j"]] for e in outcome.document["energy"]}
        found.append({"route": route, "seed": seed, **row, "energy_j": energy, "as_dense": dense.record()})
        say(f"{route}, seed {seed}: {row['accuracy']['simulated']['value']:.4f} of {row['accuracy']['float']['value']:.4f}")
    return found


def summary(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Per route, over its seeds: means with 95 % t-intervals, and whether it holds."""
    found = []
    for route in dict.fromkeys(row["route"] for row in rows):
        mine = [row for row in rows if row["route"] == route]
        lost = interval([-row["less_float"]["simulated"]["value"] for row in mine])
        mapped = min(row["mapped_mac_share"] for row in mine)
        plain = interval([row["accuracy"]["float"]["value"] for row in mine])
        chip = interval([row["accuracy"]["simulated"]["value"] for row in mine])
        found.append(
            {
                "route": route,
                "seeds": len(mine),
                "mapped_mac_share": mapped,
                "accuracy_float": [plain.mean, plain.low, plain.high],
                "accuracy_simulated": [chip.mean, chip.low, chip.high],
                "lost": [lost.mean, lost.low, lost.high],
                "may_lose": LOST[route],
                "holds": bool(mapped >= MAPPED and lost.mean <= LOST[route] + 1e-9),
                "cores": mine[0]["cores"],
                "synops_per_sample": sum(row["synops_per_sample"] for row in mine) / len(mine),
                "events_per_sample": sum(row["events_per_sample"] for row in mine) / len(mine),
                "energy_uj": 1e6 * sum(row["as_dense"]["energy_j"]["own"][1] for row in mine) / len(mine),
                "dense_cores": mine[0]["as_dense"]["cores"]["dense"],
                "dense_synops_per_sample": sum(r["as_dense"]["synops_per_sample"]["dense"] for r in mine) / len(mine),
                "dense_energy_uj": 1e6 * sum(row["as_dense"]["energy_j"]["dense"][1] for row in mine) / len(mine),
            }
        )
    return found


def table(found: Sequence[dict[str, Any]]) -> list[str]:
    """The summary as Markdown."""
    head = (
        "| route | mapped MACs | float, % | simulated, % | lost, points (95 %) | may lose | cores | synaptic operations |"
    )
    lines = [f"{head} energy, uJ | as dense: cores | operations | energy, uJ |", "|---" * 12 + "|"]
    for one_ in found:
        mean, low, high = (None if v is None else 100 * v for v in one_["lost"])
        spread = "" if low is None else f" [{low:+.2f}, {high:+.2f}]"
        lines.append(
            f"| {one_['route']} | {one_['mapped_mac_share']:.1%} | {100 * one_['accuracy_float'][0]:.2f} | "
            f"{100 * one_['accuracy_simulated'][0]:.2f} | {mean:+.2f}{spread} | {100 * one_['may_lose']:.1f} | "
            f"{one_['cores'] or '-'} | {one_['synops_per_sample']:,.0f} | {one_['energy_uj']:.2f} | "
            f"{one_['dense_cores'] or '-'} | {one_['dense_synops_per_sample']:,.0f} | {one_['dense_energy_uj']:.2f} |"
        )
    return lines


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


@entry
def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; see the module for exit codes."""
    parser = argparse.ArgumentParser(prog="spikegate study pictures", description="a residual network on the chip")
    parser.add_argument("--data", choices=(DIGITS, FASHION), default=DIGITS, help="(default: digits)")
    parser.add_argument("--routes", default=",".join(LOST), help="(default: all three)")
    parser.add_argument("--seeds", default="0,1,2", help="(default: 0,1,2)")
    parser.add_argument("--epochs", type=int, default=0, help="over the training pictures (default: 15 and 2)")
    parser.add_argument("--train", type=int, default=0, help="training pictures (default: all)")
    parser.add_argument("--eval", type=int, default=0, help="held-out pictures, spread evenly (default: all)")
    parser.add_argument("--time-steps", type=int, default=32, help="of the rate route (default: 32)")
    parser.add_argument("--batch", type=int, default=32, help="pictures in a call (default: 32)")
    parser.add_argument("--out", type=Path, default=None, help="write everything there, as JSON")
    parser.add_argument("--no-progress", dest="progress", action="store_false")
    add_json_argument(parser)
    args = parser.parse_args(argv)
    try:
        routes = [word for word in args.routes.split(",") if word]
        seeds = [int(word) for word in args.seeds.split(",")]
        if unknown := [route for route in routes if route not in LOST]:
            raise ValueError(f"--routes {unknown[0]}: known are {', '.join(LOST)}")
        if min(args.epochs, args.train, args.eval) < 0 or args.batch < 1 or args.time_steps < 1:
            raise ValueError("--epochs, --train and --eval are at least 0, --batch and --time-steps at least 1")
        samples = load_samples(args.data).held_out(args.eval).trained_on(args.train)
    except (ValueError, DataError) as error:
        print(f"pictures: {error}", file=sys.stderr)
        return 2
    try:
        rows = [row for seed in seeds for row in one(samples, seed, routes, args)]
    except EXPECTED as error:
        print(f"pictures: {error}", file=sys.stderr)
        return 1
    found = summary(rows)
    print(f"{args.data}: {len(samples.x_train):,} pictures to train on, {len(samples.x):,} held out, seeds {args.seeds}")
    print(*table(found), sep="\n")
    document = {"holds": all(one_["holds"] for one_ in found), "data": args.data, "routes": found, "rows": rows}
    if args.out is not None:
        write_json(args.out, document)
    finish(document, "pictures", headline=("holds", "data", "routes"))
    return 0 if document["holds"] else 1


if __name__ == "__main__":
    sys.exit(main())
