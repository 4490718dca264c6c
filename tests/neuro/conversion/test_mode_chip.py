"""A deployed model in the simulator's mode "chip", where exponents shift every synapse and registers wrap; and graphs whose
sums are shifted in neurons instead, which both modes compute alike.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import neuro
from neuro.conversion.narrowing import PREFIX, narrow_in_neurons, shifts_weights
from neuro.deployment.coding import encode as encode_stream
from neuro.deployment.generation import generate
from neuro.deployment.segments import encode, payloads
from neuro.simulators.fixed_point import simulate
from neuro.simulators.lava.client import LavaWorker
from neuro.simulators.schedule import PipelineError
from sparse_update.transformer import ModelConfig, Transformer


class SquaredRelu(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x).square()


def mlp(activation: str, bias: bool = True) -> nn.Sequential:
    if not activation:
        return nn.Sequential(nn.Linear(48, 24, bias=bias))
    middle = nn.ReLU() if activation == "relu" else SquaredRelu()
    found = nn.Sequential(nn.Linear(48, 96, bias=bias), middle, nn.Linear(96, 24, bias=bias))
    with torch.no_grad():
        found[0].weight *= torch.logspace(0, 1.5, 96, 2.0)[:, None]  # rows of unlike size: several groups
    return found


def planned(model: nn.Module, x: Tensor, route: str = "graded", **settings: object) -> neuro.Plan:
    config = {"graded": neuro.GradedConfig, "sigma_delta": neuro.SigmaDeltaConfig, "rate": neuro.RateConfig}[route]
    report = neuro.analyse(model, x, route=route)
    return neuro.convert(model, neuro.calibrate(model, [x]), report, config(**settings))


def relative(a: Tensor, b: Tensor) -> float:
    return float((a - b).square().mean().sqrt() / b.std())


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("activation", ["", "relu", "relu2"])
@pytest.mark.parametrize("settings", [{}, {"channel_groups": 3}, {"weight_bits": 4}], ids=str)
def test_shifts_in_neurons_give_the_same_integers_in_both_modes(activation: str, bias: bool, settings: dict) -> None:
    model, x = mlp(activation, bias), torch.randn(2, 15, 48)
    wanted = model(x).detach()
    by_synapses = planned(model, x, **settings)
    by_neurons = planned(model, x, narrow="neuron", **settings)
    (segment,) = by_neurons.segments
    assert not any(shifts_weights(p) for p in segment.graph.projections)
    if by_synapses.segments[0].shifts == segment.shifts:
        assert torch.equal(neuro.deploy(model, by_synapses)(x), neuro.deploy(model, by_neurons)(x))
    lava, chip = neuro.deploy(model, by_neurons), neuro.deploy(model, by_neurons, mode="chip")
    assert torch.equal(lava(x), chip(x))
    assert lava.counts() == chip.counts()
    twin = neuro.deploy(model, by_neurons, "quantised")
    assert relative(lava(x), twin(x)) < 0.01
    assert relative(lava(x), wanted) < (0.02 if not settings.get("weight_bits") else 0.15)


def test_the_graph_and_not_only_its_runner_computes_alike() -> None:
    """Step by step, with all delays, from rest."""
    model, x = mlp("relu2"), torch.randn(12, 48)
    old, new = (planned(model, x, narrow=narrow).segments[0] for narrow in ("synapse", "neuron"))
    assert old.shifts == new.shifts
    sent = []
    for segment, mode, depth in ((old, "lava", 3), (new, "lava", 5), (new, "chip", 5)):
        inputs = {name: torch.cat([v, v[:, -1:].expand(-1, 6, -1)], dim=1) for name, v in encode(segment, x)[0].items()}
        sent.append(simulate(segment.graph, inputs, mode=mode).spikes["out"][:, depth : depth + 12])
    assert torch.equal(sent[0], sent[1])
    assert torch.equal(sent[0], sent[2])


def test_whole_sums_fit_their_register_on_calibration_data() -> None:
    model, x = nn.Sequential(nn.Linear(32, 512), nn.ReLU(), nn.Linear(512, 8)), torch.randn(200, 32)
    with torch.no_grad():
        model[2].weight.abs_()  # hidden values are positive: sums grow with their number
    plan = planned(model, x, narrow="neuron")
    room = {h.population: h for h in plan.segments[0].headroom}
    assert {f"{PREFIX}fc1", f"{PREFIX}fc2"} <= room.keys()
    assert room[f"{PREFIX}fc2"].calibrated_bits >= 0.99  # twice what was seen
    assert planned(model, x).segments[0].shifts[0] < plan.segments[0].shifts[0]  # paid for with hidden bits
    chip = neuro.deploy(model, plan, mode="chip")
    assert relative(chip(x), model(x).detach()) < 0.02
    assert not any(h.wraps or h.wide for h in chip.health())


def test_exponents_on_every_synapse_cost_what_the_graph_says() -> None:
    model, x = mlp("relu"), torch.randn(30, 48)
    wanted = model(x).detach()
    plan = planned(model, x)
    lava, chip = neuro.deploy(model, plan), neuro.deploy(model, plan, mode="chip")
    assert relative(lava(x), wanted) < 0.02 < 0.2 < relative(chip(x), wanted)
    (segment,) = plan.segments
    fc1 = next(p for p in segment.graph.projections if p.name == "fc1")
    lost = int(np.count_nonzero(fc1.weight % 2**-fc1.weight_exp))
    note = f"0: fc1: weight_exp {fc1.weight_exp} acts on each synapse, and {lost} of {fc1.weight.size} weights lost bits"
    assert note in chip.notes()
    assert chip.notes()[-1].startswith("mode chip follows published emulators")
    assert lava.notes() == ()
    # a linear layer by hand: every product with its weight shifted, rounding down
    single = mlp("")
    plan = planned(single, x)
    (segment,) = plan.segments
    (fc,) = segment.graph.projections
    sent = torch.cat([payloads(segment, x).double(), torch.tensor(segment.constant_lines).expand(len(x), -1)], dim=1)
    shifted = torch.from_numpy(fc.weight.astype(np.int64) >> -fc.weight_exp).double()
    units = segment.input_scale * torch.tensor(segment.channel_scales[0], dtype=torch.float64) / 2 * 2.0**-fc.weight_exp
    expected = ((sent @ shifted.T) * units).float()
    assert torch.equal(neuro.deploy(single, plan, mode="chip")(x), expected)


@pytest.mark.parametrize("activation", ["", "relu"])
@pytest.mark.parametrize(
    ("route", "settings"),
    [
        ("sigma_delta", {}),
        ("sigma_delta", {"input_threshold": 3, "hidden_threshold": 2}),
        ("rate", {"time_steps": 8}),
        ("rate", {"time_steps": 8, "input_code": "analogue"}),
    ],
)
def test_other_routes_run_their_graphs_from_rest(route: str, settings: dict, activation: str) -> None:
    model, x = mlp(activation), torch.randn(2, 9, 48)
    plan = planned(model, x, route, **settings)
    (s,) = plan.segments
    chip = neuro.deploy(model, plan, mode="chip")
    out = chip(x)
    rows = x if s.code == "delta" else x.reshape(-1, 48)
    inputs = {name: torch.nn.functional.pad(v, (0, 0, 0, 8)) for name, v in encode_stream(s, rows)[0].items()}
    activity = simulate(s.graph, inputs, mode="chip", record=("spikes", "v"))
    if s.code == "delta":
        depth = {"": 1, "relu": 4}[activation]
        found = activity.spikes["out"][:, depth : depth + 9].double() * s.output_scale
    else:
        depth = len(s.graph.populations) - 1
        v = activity.states["out"]["v"][0].double()
        found = (v[depth + s.time_steps - 1 :: s.time_steps][:18] * s.output_scale).view(2, 9, -1)
    assert torch.equal(out, found.float())
    assert {c.layer for c in chip.counts()} == {c.layer for c in neuro.deploy(model, plan).counts()}
    assert {c.tokens for c in chip.counts()} == {18}
    assert next(c for c in chip.counts() if c.layer == "0").synops > 0


def test_text_in_mode_chip_reads_everything_again(tmp_path: Path) -> None:
    model = Transformer(ModelConfig(width=16, layers=1, heads=2, context=12, vocab_size=11)).double().eval()
    prompt = torch.randint(0, 11, (2, 4))
    for route in ("sigma_delta", "graded"):
        plan = planned(model, torch.randint(0, 11, (3, 12)), route)
        chip = neuro.deploy(model, plan, mode="chip")
        assert chip.keeps_state == (route == "graded")
        assert torch.equal(generate(chip, prompt, 5), generate(chip, prompt, 5, cache=False))
        again = neuro.load_deployed(neuro.save_deployed(chip, tmp_path / route), model)
        assert again.mode == "chip"
        assert torch.equal(again(prompt), chip(prompt))
    chip = neuro.deploy(model, planned(model, prompt, "sigma_delta"), mode="chip")
    with pytest.raises(RuntimeError, match="streams start from rest at every call"), chip.keep_state():
        pass


def test_wrong_words_and_graphs_are_refused() -> None:
    model, x = mlp(""), torch.randn(3, 48)
    plan = planned(model, x)
    with pytest.raises(ValueError, match="mode 'silicon' is unknown; known: lava, chip"):
        neuro.deploy(model, plan, mode="silicon")
    with pytest.raises(ValueError, match="backend 'quantised' has no events and no registers"):
        neuro.deploy(model, plan, "quantised", mode="chip")
    with pytest.raises(ValueError, match="narrow is 'axon'; it is one of synapse, neuron"):
        neuro.GradedConfig(narrow="axon")
    pair = [neuro.Population("x", "input", 2), neuro.Population("y", "sigma", 2)]
    weight = np.full((2, 2), 4)
    forward = neuro.Projection("w", "x", "y", "a_in", weight, -3, num_message_bits=8)
    loop = neuro.Projection("back", "y", "y", "a_in", weight, -3, num_message_bits=8)
    with pytest.raises(PipelineError):
        narrow_in_neurons(neuro.SpikingGraph(pair, [forward, loop], ["y"]))
    late = neuro.Projection(
        "w", "x", "y", "a_in", weight, -3, num_message_bits=8, kind="delay_dense", delays=np.zeros((2, 2), dtype=int)
    )
    with pytest.raises(ValueError, match="projection 'w' is delay_dense; only dense and sparse"):
        narrow_in_neurons(neuro.SpikingGraph(pair, [late], ["y"]))


@pytest.mark.lava
def test_lava_runs_the_narrowed_graph_with_the_same_bits(lava: LavaWorker) -> None:
    model, x = mlp("relu2"), torch.randn(10, 48)
    (segment,) = planned(model, x, narrow="neuron").segments
    inputs = encode(segment, x)[0]
    ours, theirs = simulate(segment.graph, inputs), lava.run(segment.graph, inputs)
    assert int(ours.spikes["out"].count_nonzero()) > 50
    assert torch.equal(ours.spikes["out"], theirs.spikes["out"].cpu())
