"""Small networks for the tests of the graded route, their plans, and their integers worked out by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from neuro.analysis.compatibility import CompatibilityReport, analyse
from neuro.conversion.calibration import calibrate
from neuro.conversion.graded import GradedConfig, convert
from neuro.conversion.plan import Plan, Segment
from neuro.deployment.deployed import Deployed, deploy
from neuro.modules.thresholds import EventThreshold

WIDTHS: list[int | str] = [8, 4, 3, 2, "ternary"]
SCALES = ["tensor", "power_of_two", "channel"]


class Mlp(nn.Module):
    """fc1, ReLU or its square, perhaps event thresholds, fc2; rows of fc1 are of very different size."""

    def __init__(
        self,
        activation: str = "relu",
        bias: bool = True,
        theta: float | None = None,
        sizes: tuple[int, int, int] = (24, 40, 10),
        seed: int = 0,
    ) -> None:
        super().__init__()
        n_in, n_hidden, n_out = sizes
        generator = torch.Generator().manual_seed(seed)
        self.activation = activation
        self.fc1, self.fc2 = nn.Linear(n_in, n_hidden, bias=bias), nn.Linear(n_hidden, n_out, bias=bias)
        for p in self.parameters():
            nn.init.normal_(p, std=0.3, generator=generator)
        with torch.no_grad():
            self.fc1.weight.mul_(2.0 ** -(torch.arange(n_hidden) % 4)[:, None])
        self.gate: nn.Module = nn.Identity()
        if theta is not None:
            self.gate = EventThreshold(n_hidden, two_sided=activation != "gate")
            self.gate.set_theta(theta * torch.rand(n_hidden, generator=generator))

    def forward(self, x: Tensor) -> Tensor:
        h = self.fc1(x) if self.activation == "gate" else torch.relu(self.fc1(x))
        return self.fc2(self.gate(h * h if self.activation == "relu2" else h))


def rows(n: int, width: int, seed: int = 0) -> Tensor:
    return torch.randn(n, width, generator=torch.Generator().manual_seed(seed))


REPORTS: dict[tuple[Any, ...], CompatibilityReport] = {}


def report_of(module: nn.Module, batch: Tensor) -> CompatibilityReport:
    """`analyse`, once for all modules of one structure and size: what it maps does not depend on weights."""
    kind = tuple((name, type(part)) for name, part in module.named_modules())
    key = (*kind, *(p.shape for p in module.parameters()), getattr(module, "activation", ""))
    if key not in REPORTS:
        REPORTS[key] = analyse(module, batch[:2])
    return REPORTS[key]


def planned(module: nn.Module, batch: Tensor, method: str = "percentile", **config: Any) -> Plan:
    return convert(module, calibrate(module, [batch], method=method), report_of(module, batch), GradedConfig(**config))


def by_hand(segment: Segment, x: Tensor) -> tuple[np.ndarray, int]:
    """Output integers and the number of hidden events in numpy int64, from the graph's weights, shifts and thresholds."""
    weight = {p.name: (p.weight.astype(np.int64), -p.weight_exp) for p in segment.graph.projections}
    q = np.clip(np.rint(x.numpy() / np.float32(segment.input_scale)), -127, 127).astype(np.int64)
    q[np.abs(q) <= segment.input_threshold] = 0
    lines = np.broadcast_to(np.array(segment.constant_lines, dtype=np.int64), (len(q), len(segment.constant_lines)))
    s = np.concatenate([q, lines], axis=1)
    if not segment.n_hidden:
        w, shift = weight["fc"]
        return s @ w.T >> shift, 0
    out, events = np.zeros((len(q), segment.n_out), dtype=np.int64), 0
    for name in [p.name for p in segment.graph.populations if p.kind == "graded_relu"]:
        w, shift = weight[name.replace("hidden", "fc1")]
        hidden = s @ w.T >> shift
        hidden = hidden * (hidden > segment.graph.population(name).params["vth"])
        if segment.activation == "relu2":
            hidden = hidden * hidden >> segment.square_shift
        events += int(np.count_nonzero(hidden))
        w, shift = weight[name.replace("hidden", "fc2")]
        out += hidden @ w.T >> shift
    if segment.bias_lines:
        out += weight["bias"][0] @ np.array(segment.bias_lines, dtype=np.int64) >> 1
    return out, events


def units(segment: Segment) -> np.ndarray | float:
    """Worth of an output payload, from the plan's scales alone."""
    scales = (
        segment.channel_scales[-1] if segment.channel_scales and segment.channel_scales[-1] else segment.weight_scales[-1]
    )
    step = {8: 2, 4: 32, 3: 64, 2: 128}[segment.weight_bits]
    source = segment.hidden_scale if segment.n_hidden else segment.input_scale
    return source * np.array(scales) / step * 2.0 ** segment.shifts[-1]


def hidden_of(deployed: Deployed, x: Tensor) -> Tensor:
    """What the MLP's first layer sends, as the host sees it."""
    name = deployed.segments[0].modules[0]
    found: Any = deployed.module.get_submodule(name)
    hidden: Tensor = found.runner.run(x)[1]
    return hidden


def twins(module: nn.Module, plan: Plan) -> tuple[Deployed, Deployed]:
    return deploy(module, plan), deploy(module, plan, "quantised")


# Weights
