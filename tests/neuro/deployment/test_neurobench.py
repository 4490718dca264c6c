"""Our counts beside NeuroBench's on the same networks; what NeuroBench's hooks do not see is shown by the difference.

NeuroBench 2.3.0 runs in an environment of its own (constraints-neurobench.txt), without the data sets that its package
asks for. Its `Effective_*` count nonzero inputs times nonzero weights per sample; `Dense` all of them.
"""

from __future__ import annotations

import json
import subprocess
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import neuro
from neuro.deployment.segments import encode
from neuro.graph import Population, Projection, SpikingGraph
from neuro.simulators.fixed_point import simulate
from tests.neuro.deployment import neurobench_networks as networks_

pytest.importorskip("snntorch")
ROOT = Path(__file__).resolve().parents[3]


class Jobs:
    """Collects networks with their inputs and runs NeuroBench on all of them at once."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.jobs: list[dict[str, Any]] = []

    def add(self, name: str, kind: str, settings: dict[str, Any], weights: dict[str, Any], samples: Tensor) -> None:
        np.savez(
            self.folder / f"{name}.npz", **{key: np.asarray(value, dtype=np.float64) for key, value in weights.items()}
        )
        np.save(self.folder / f"{name}-in.npy", samples.numpy())
        self.jobs.append({"name": name, "kind": kind, "settings": settings, "input": f"{name}-in"})

    def run(self, python: Path) -> dict[str, dict[str, Any]]:
        (self.folder / "jobs.json").write_text(json.dumps(self.jobs))
        command = [str(python), str(Path(__file__).with_name("neurobench_job.py")), str(self.folder)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, env={"PATH": ""})
        assert done.returncode == 0, done.stderr
        found: dict[str, dict[str, Any]] = json.loads((self.folder / "results.json").read_text())
        return found


def deployed_mlp(pruned: bool) -> tuple[neuro.Deployed, Tensor]:
    """A deployed MLP pair and its input, with some inputs 0 and, pruned, four in ten weights."""
    torch.manual_seed(1)
    model: nn.Sequential = networks_.mlp(24, 48, 10)
    with torch.no_grad():
        for layer in (model[0], model[2]):
            size = torch.rand(layer.weight.shape, dtype=torch.float64) * 0.8 + 0.2  # none so small that it becomes 0
            sign = torch.where(torch.rand(layer.weight.shape) < 0.5, -1.0, 1.0)
            keep = torch.rand(layer.weight.shape) > (0.4 if pruned else -1.0)
            layer.weight.copy_(size * sign * keep)
    x = torch.randn(40, 24, dtype=torch.float64)
    x[torch.rand(x.shape) < 0.3] = 0
    plan = neuro.convert(model, neuro.calibrate(model, [x]), neuro.analyse(model, x))
    assert [s.activation for s in plan.segments] == ["relu"]
    return neuro.deploy(model, plan), x


def charges(sizes: list[int], sparse: bool) -> tuple[SpikingGraph, list[np.ndarray]]:
    """Layers of neurons that fire above a charge of 300, integer weights; sparse: four in ten are 0 and not stored."""
    rng = np.random.default_rng(4)
    weights = []
    for a, b in pairwise(sizes):
        weight = rng.integers(1, 127, (b, a)) * np.where(rng.random((b, a)) < 0.35, -1, 1)
        weights.append(weight * (rng.random((b, a)) > 0.4) if sparse else weight)
    names = ["x", *(f"layer{i + 1}" for i in range(len(weights)))]
    lif = {"du": 4095, "dv": 0, "vth": 300}
    populations = [Population("x", "input", sizes[0])]
    populations += [Population(name, "lif", n, lif) for name, n in zip(names[1:], sizes[1:], strict=True)]
    projections = [
        Projection(
            f"w{i}", names[i], names[i + 1], "a_in", 2 * w.astype(np.int32), -1, kind="sparse" if sparse else "dense"
        )
        for i, w in enumerate(weights)
    ]
    return SpikingGraph(tuple(populations), tuple(projections), (names[-1],)), weights


def test_counts_equal_neurobench(neurobench_python: Path, tmp_path: Path) -> None:
    jobs = Jobs(tmp_path)
    ours: dict[str, Any] = {}
    for name, pruned in (("mlp", False), ("mlp pruned", True)):
        deployed, x = deployed_mlp(pruned)
        (segment,) = deployed.segments
        fc1, fc2 = (next(p for p in segment.graph.projections if p.name == n) for n in ("fc1", "fc2"))
        assert {fc1.kind, fc2.kind} == {"sparse" if pruned else "dense"}
        deployed(x)
        first, second = (c for c in deployed.counts() if not c.host)
        lines = fc1.weight[:, 24:]  # the constant line that rounds has a synapse per neuron, and no counterpart there
        constant = len(x) * (np.count_nonzero(lines) if pruned else lines.size)
        assert constant > 0
        ours[name] = {
            "synops": first.synops + second.synops - constant,
            "dense": first.dense_macs + second.dense_macs,
            "hidden": 1 - second.events / (48 * len(x)),
        }
        payloads = encode(segment, x)[0]["x"][0, :, :24]
        weights = {"0.weight": fc1.weight[:, :24], "2.weight": fc2.weight}
        jobs.add(name, "mlp", {"inputs": 24, "hidden": 48, "outputs": 10, "shift": -fc1.weight_exp}, weights, payloads)

    sizes, steps = [20, 30, 30, 6], 25
    spikes = (torch.rand(8, steps, 20, generator=torch.Generator().manual_seed(2)) < 0.3).to(torch.int32)
    for name, sparse in (("snn", False), ("snn sparse", True)):
        graph, weights_ = charges(sizes, sparse)
        silent = torch.zeros(8, len(weights_), 20, dtype=torch.int32)  # the last messages travel one layer a step
        activity = simulate(graph, {"x": torch.cat((spikes, silent), dim=1)}, record=("layer1.spikes", "layer2.spikes"))
        fired = [int(activity.spikes[f"layer{i}"].count_nonzero()) for i in (1, 2, 3)]
        assert min(fired) > 0
        ours[name] = {
            "synops": sum(activity.projections[f"w{i}"].synops for i in range(3)),
            "dense": 8 * steps * sum(a * b for a, b in pairwise(sizes)),
            "hidden": 1 - sum(fired) / (8 * steps * sum(sizes[1:])),
        }
        stored = {f"{2 * i}.weight": w for i, w in enumerate(weights_)}
        jobs.add(name, "spiking", {"sizes": sizes, "threshold": 300.0}, stored, spikes)

    theirs = jobs.run(neurobench_python)
    for name, own in ours.items():
        found, samples = theirs[name]["SynapticOperations"], 40 if name.startswith("mlp") else 8
        kind, other = ("MAC", "AC") if name.startswith("mlp") else ("AC", "MAC")
        assert round(found[f"Effective_{kind}s"] * samples) == own["synops"], name
        assert found[f"Effective_{other}s"] == 0, name
        assert round(found["Dense"] * samples) == own["dense"], name
        assert theirs[name]["ActivationSparsity"] == pytest.approx(own["hidden"], abs=1e-12), name
    assert ours["mlp pruned"]["synops"] < 0.7 * ours["mlp"]["synops"]


@pytest.mark.parametrize("functional", [False, True])
def test_products_of_attention_are_what_neurobench_does_not_see(
    functional: bool, neurobench_python: Path, tmp_path: Path
) -> None:
    """Its hooks sit on modules. Q K^T, A V and a functional ReLU are none, so 2 T^2 D MACs a sample are in no count of it,
    and its sparsity of a model without activation modules is 0. Ours come from the traced operations.
    """
    width, length, heads = 16, 10, 2
    torch.manual_seed(0)
    settings = {"width": width, "heads": heads, "functional_relu": functional}
    block = networks_.Block(**settings).eval()
    x = torch.randn(3, length, width, dtype=torch.float64)
    jobs = Jobs(tmp_path)
    jobs.add("block", "block", settings, {name: value.numpy() for name, value in block.state_dict().items()}, x)
    found = jobs.run(neurobench_python)["block"]
    dense = found["SynapticOperations"]["Dense"]

    report = neuro.analyse(block, x)
    plan = neuro.convert(block, neuro.calibrate(block, [x]), report)
    deployed = neuro.deploy(block, plan)
    deployed(x)
    mapped = [c for c in deployed.counts() if not c.host]
    assert report.tokens == 3 * length
    assert sum(c.dense_macs for c in mapped) == dense * len(x) == 8 * width * width * length * len(x)
    missing = report.macs_per_token * length - dense  # per sample of `length` tokens
    assert missing == 2 * length * length * width
    seen = {op.kind: op.macs_per_token * length for op in report.operations if op.runs_on == "host" and op.macs_per_token}
    assert seen == {"attention scores": missing / 2, "attention x value": missing / 2}
    with torch.no_grad():
        hidden: list[Tensor] = []
        handle = block.fc2.register_forward_pre_hook(lambda _, args: hidden.append(args[0]))
        block(x)
        handle.remove()
    silent = float((hidden[0] == 0).double().mean())
    assert found["ActivationSparsity"] == (0.0 if functional else pytest.approx(silent))
    zeros = int((hidden[0] == 0).sum()) * width / len(x)  # what the ReLU saves behind it, seen either way
    assert found["SynapticOperations"]["Effective_MACs"] == pytest.approx(dense - zeros)
