"""`python -m experiments.studies.picture_network`: a residual network of convolutions for pictures, on every route.

Two convolutions with batch norms, a way around the second, poolings and a linear layer, trained on scikit-learn's digits
(or on Fashion-MNIST, where it is installed). Each route converts it, runs the held-out pictures on the integer simulator,
places it on a Loihi 2 and prices it, beside the same weights as dense layers.

The last line is JSON. Exit codes: 0 the accuracies hold (within 0.5 points of float on the graded route, 1 on
sigma-delta, 2 on rate) and at least 95 % of the multiply-accumulates are mapped; 1 they are not; 2 the command is wrong
or data are missing.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from experiments.runs.output import add_json_argument, entry, finish
from experiments.runs.placed import activity_of, put_on_cores, with_time_steps
from experiments.samples.pictures import load_digits, load_fashion_mnist
from experiments.samples.records import DataError
from hardware.energy.account import Counts, account, load_profile
from hardware.placement import Connection, Convolution, LayerDemand, place
from neuro.analysis.compatibility import analyse
from neuro.conversion.calibration import calibrate
from neuro.conversion.graded import GradedConfig
from neuro.conversion.rate import RateConfig
from neuro.conversion.routes import convert
from neuro.conversion.sigma_delta import SigmaDeltaConfig
from neuro.deployment.deployed import Deployed, deploy
from neuro.graph.demand import layer_demands

POINTS = {"graded": 0.005, "sigma_delta": 0.01, "rate": 0.02}
"""Route -> how much accuracy it may lose."""
LEAST_MAPPED = 0.95
PROFILE = "loihi1_davies2018"
CHIP = "loihi2"
BATCH = 90


class PictureNetwork(nn.Module):
    """(N, 1, size, size) -> (N, classes): a convolution, a residual one, poolings, one linear layer."""

    def __init__(self, size: int = 8, width: int = 16, classes: int = 10) -> None:
        super().__init__()
        self.first = nn.Conv2d(1, width, 3, padding=1, bias=False)
        self.first_norm = nn.BatchNorm2d(width)
        self.second = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.second_norm = nn.BatchNorm2d(width)
        self.pool = nn.AvgPool2d(size // 4)
        self.head = nn.Linear(width * 16, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.first_norm(self.first(x)))
        x = F.relu(self.second_norm(self.second(x)) + x)
        return self.head(self.pool(x).flatten(1))


@dataclass(frozen=True)
class RouteResult:
    """One row. `accuracy`: of the simulated integers; `quantised`: of the same integers in dense arithmetic; per picture:
    synaptic operations and joules by the profile; `dense_cores`: of the same populations with every kernel as a matrix.
    """

    route: str
    mapped: float
    accuracy: float
    quantised: float
    float_accuracy: float
    cores: int
    dense_cores: int | None
    synops: float
    dense_synops: float
    joules: float
    dense_joules: float
    host_crossings: float


def train(x: Tensor, y: Tensor, epochs: int, seed: int, width: int = 16) -> PictureNetwork:
    """Adam with one cycle up to 1e-2, batches of 64."""
    torch.manual_seed(seed)
    model = PictureNetwork(x.shape[-1], width)
    optimizer = torch.optim.Adam(model.parameters())
    steps = epochs * -(-len(x) // 64)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, total_steps=steps)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        for rows in torch.randperm(len(x), generator=generator).split(64):
            optimizer.zero_grad()
            F.cross_entropy(model(x[rows]), y[rows]).backward()
            optimizer.step()
            schedule.step()
    return model.eval()


def measured(model: nn.Module, x_train: Tensor, x: Tensor, y: Tensor, route: str, config: Any) -> RouteResult:
    """Convert, run and place on one route."""
    report = analyse(model, x[:2], chip=CHIP, route=route)
    plan = convert(model, calibrate(model, x_train.split(256)), report, config)
    deployed = deploy(model, plan)
    with torch.no_grad():
        wanted = _accuracy(model(x), y)
    got = _accuracy(torch.cat([deployed(part) for part in x.split(BATCH)]), y)
    counts = with_time_steps([item for item in deployed.counts() if not item.host], plan)
    twin = deploy(model, plan, "quantised")
    quantised = _accuracy(torch.cat([twin(part) for part in x.split(BATCH)]), y)
    placed = put_on_cores(deployed, counts, x[:4], CHIP)
    dense = _as_matrices(deployed, counts, x[:BATCH])
    profile = load_profile(PROFILE)
    return RouteResult(
        route=route,
        mapped=report.mac_share,
        accuracy=got,
        quantised=quantised,
        float_accuracy=wanted,
        cores=0 if placed.placement is None else len(placed.placement.cores),
        dense_cores=_dense_cores(deployed),
        synops=_synops(counts) / len(x),
        dense_synops=_synops(dense) / len(x),
        joules=account(counts, profile).total.mid.to("J") / len(x),
        dense_joules=account(dense, profile).total.mid.to("J") / len(x),
        host_crossings=report.crossings_per_token,
    )


def _accuracy(logits: Tensor, y: Tensor) -> float:
    return float((logits.argmax(dim=1) == y).double().mean())


def _synops(counts: Sequence[Counts]) -> int:
    return sum(item.synops for item in counts)


def _as_matrices(deployed: Deployed, counts: Sequence[Counts], x: Tensor) -> list[Counts]:
    """The counts, had every kernel been a matrix whose zeros are stored: a message then meets every neuron behind it."""
    (segment,), (layers,) = deployed.segments, deployed.layers
    traffic = activity_of(segment, x).projections
    found = []
    for item in counts:
        mine = [p for p in segment.graph.projections if p.target in layers[item.layer] and p.name.startswith("layer.")]
        more = sum(traffic[p.name].events * p.ends[0] - traffic[p.name].synops for p in mine)
        found.append(replace(item, synops=item.synops + round(more * item.tokens / len(x))))
    return found


def _dense_cores(deployed: Deployed) -> int | None:
    """Cores of the same graphs with every layer's kernel as a matrix; None where that does not fit the chip."""
    demands: list[LayerDemand] = []
    for segment in deployed.segments:
        weights = {(p.source, p.target) for p in segment.graph.projections if p.name.startswith("layer.")}
        for demand in layer_demands(segment.graph, prefix=f"{segment.name}/"):
            target = demand.name.removeprefix(f"{segment.name}/")
            connections = tuple(
                Connection(c.source, c.inputs, c.weight_bits)
                if isinstance(c, Convolution) and (c.source.removeprefix(f"{segment.name}/"), target) in weights
                else c
                for c in demand.connections
            )
            demands.append(replace(demand, connections=connections))
    try:
        return len(place(demands, CHIP).cores)
    except ValueError:
        return None


@entry
def main(argv: Sequence[str] | None = None) -> int:
    """Entry point."""
    parser = argparse.ArgumentParser(prog="spikegate study picture_network", description="a network of convolutions")
    parser.add_argument("--data", choices=("digits", "fashion_mnist"), default="digits", help="pictures (default: digits)")
    parser.add_argument("--epochs", type=int, default=12, help="passes over the training pictures (default: 12)")
    parser.add_argument("--width", type=int, default=16, help="channels (default: 16)")
    parser.add_argument("--held-out", type=int, default=450, help="held-out pictures that are run (default: 450)")
    parser.add_argument("--training", type=int, default=60_000, help="training pictures, at most (default: 60,000)")
    parser.add_argument("--steps", type=int, default=32, help="steps a picture on the rate route (default: 32)")
    parser.add_argument("--seed", type=int, default=0, help="of weights, order and split (default: 0)")
    add_json_argument(parser)
    args = parser.parse_args(argv)
    for key in ("epochs", "width", "held_out", "training", "steps"):
        if getattr(args, key) < 1:
            parser.error(f"--{key.replace('_', '-')} is {getattr(args, key)}; the lowest is 1")
    try:
        samples = load_digits(args.seed) if args.data == "digits" else load_fashion_mnist()
    except DataError as error:
        print(f"picture_network: {error}", file=sys.stderr)
        return 2
    x_train = torch.from_numpy(samples.x_train)[: args.training]
    y_train = torch.from_numpy(samples.y_train)[: args.training]
    x, y = torch.from_numpy(samples.x)[: args.held_out], torch.from_numpy(samples.y)[: args.held_out]
    model = train(x_train, y_train, args.epochs, args.seed, args.width)
    configs = {"graded": GradedConfig(), "sigma_delta": SigmaDeltaConfig(), "rate": RateConfig(args.steps)}
    rows = [measured(model, x_train, x, y, route, config) for route, config in configs.items()]
    print(table(rows))
    good = all(r.mapped >= LEAST_MAPPED and r.float_accuracy - r.accuracy <= POINTS[r.route] for r in rows)
    document = {"holds": good, "data": args.data, "pictures": len(x), "routes": [asdict(row) for row in rows]}
    finish(document, "picture_network")
    return 0 if good else 1


def table(rows: Sequence[RouteResult]) -> str:
    """Markdown."""
    lines = [
        "| route | MACs mapped | accuracy (float) | quantised | cores (as matrices) | "
        "synaptic operations a picture (as matrices) | uJ a picture (as matrices) |",
        "|---|---|---|---|---|---|---|",
    ]
    for r in rows:
        dense = "-" if r.dense_cores is None else f"{r.dense_cores}"
        lines.append(
            f"| {r.route} | {r.mapped:.1%} | {r.accuracy:.2%} ({r.float_accuracy:.2%}) | {r.quantised:.2%} | "
            f"{r.cores} ({dense}) | {r.synops:,.0f} ({r.dense_synops:,.0f}) | "
            f"{1e6 * r.joules:.2f} ({1e6 * r.dense_joules:.2f}) |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
