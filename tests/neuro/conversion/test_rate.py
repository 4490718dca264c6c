"""The rate route: closed forms, its graph step by step, its runner, Lava, and the T-level network beside it."""

from __future__ import annotations

import dataclasses
import warnings
from functools import cache

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import neuro
from neuro.conversion.rate import RateConfig
from neuro.deployment.coding import encode, levels, spike_trains, spikes_of
from neuro.graph import Population, SpikingGraph
from neuro.simulators.activity import compare
from neuro.simulators.fixed_point import run_pipelined, simulate
from neuro.simulators.lava.client import LavaUnsupported, LavaWorker, unsupported


@cache
def prepared(name: str) -> tuple[nn.Module, Tensor, neuro.Calibration, neuro.CompatibilityReport]:
    torch.manual_seed(3)
    module: nn.Module = nn.Linear(10, 7, bias="no bias" not in name)
    if "relu" in name:
        module = nn.Sequential(nn.Linear(10, 24), nn.ReLU(), nn.Linear(24, 7))
    if "wide" in name:  # sums so large that shifts drop bits of every step's sum
        module = nn.Sequential(nn.Linear(10, 700), nn.ReLU(), nn.Linear(700, 7))
        nn.init.uniform_(module[2].weight, 0.5, 1.0)  # type: ignore[arg-type]
    x = torch.randn(40, 10)
    return module, x, neuro.calibrate(module, [x]), neuro.analyse(module, x)


def plan_of(name: str, **config: object) -> neuro.Plan:
    module, _, ranges, report = prepared(name)
    return neuro.convert(module, ranges, report, RateConfig(**config))  # type: ignore[arg-type]


@settings(max_examples=60, deadline=None)
@given(st.integers(-3000, 9000), st.integers(1, 120), st.integers(1, 40), st.booleans())
def test_constant_drive_has_a_closed_form(drive: int, vth: int, steps: int, soft: bool) -> None:
    """Against the simulator's neuron, and against floor((T I - 1) / theta), clipped to T, for soft reset."""
    drive = int(np.clip(drive, -4096, 4095))
    kind = "lif_soft" if soft else "lif_reset"
    params = {"du": 4095, "dv": 0, "vth": vth, "bias_mant": drive, **({} if soft else {"reset_interval": 60000})}
    graph = SpikingGraph((Population("x", "input", 1), Population("n", kind, 1, params)), (), ("n",))
    sent = int(simulate(graph, {"x": np.zeros((1, steps, 1), dtype=int)}).spikes["n"].sum())
    assert int(spikes_of(torch.tensor(drive), vth << 6, steps, soft)) == sent
    if soft and drive > 0:
        assert sent == min(steps, (steps * drive - 1) // (vth << 6))


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 40), st.data())
def test_spike_trains_hold_n_of_t_evenly_spaced(steps: int, data: st.DataObject) -> None:
    level = torch.tensor([data.draw(st.lists(st.integers(-steps, steps), min_size=1, max_size=5))])
    trains = spike_trains(level, steps)
    assert torch.equal(trains.sum(0, dtype=torch.int64), level)
    assert int(trains.abs().max()) <= 1
    for neuron, n in enumerate(level[0].tolist()):
        at = torch.nonzero(trains[:, 0, neuron]).flatten()
        if abs(n) > 1:
            gaps = torch.diff(at)
            assert int(gaps.max()) - int(gaps.min()) <= 1


CASES = [
    ("relu", "spikes", "soft", {}),
    ("relu", "spikes", "hard", {"per_channel": True}),
    ("relu", "analogue", "soft", {"per_channel": True}),
    ("relu", "analogue", "hard", {}),
    ("relu, wide", "spikes", "soft", {}),
    ("relu, wide", "spikes", "hard", {}),
    ("relu, wide", "analogue", "soft", {}),
    ("relu, wide", "analogue", "hard", {}),
    ("linear", "spikes", "soft", {}),
    ("linear, no bias", "spikes", "hard", {}),
    ("linear", "analogue", "hard", {}),
]


@pytest.mark.parametrize("steps", [5, 16])
@pytest.mark.parametrize(("name", "code", "reset", "more"), CASES)
def test_the_runner_gives_the_graphs_bits_and_counts(
    name: str, code: str, reset: str, more: dict[str, bool], steps: int
) -> None:
    module = prepared(name)[0]
    plan = plan_of(name, time_steps=steps, reset=reset, input_code=code, **more)
    (s,) = plan.segments
    assert (s.shifts[-1] > 0) == ("wide" in name or (name.startswith("linear") and code == "analogue"))
    fresh = 2.5 * torch.randn(23, 10, generator=torch.Generator().manual_seed(steps))
    deployed = neuro.deploy(module, plan)
    out = deployed(fresh)
    inputs, clipped = encode(s, fresh)
    whole = run_pipelined(s.graph, inputs, record=("out.v", *(("hidden.spikes",) if s.n_hidden else ())))
    v = whole.states["out"]["v"][0, s.time_steps - 1 :: s.time_steps]
    assert torch.equal(out, (v.double() * s.output_scale).float())
    if s.n_hidden:
        n = whole.spikes["hidden"][0].view(23, steps, -1).sum(1)
        shares = torch.tensor(s.channel_scales[0], dtype=torch.float64) / s.weight_scales[0] if s.channel_scales else 1.0
        runner = deployed.module[0].runner  # type: ignore[index]
        assert torch.equal(runner.run(fresh)[1], (n * (s.rectified_scale * shares)).float())
        assert 0 < int(n.max()) <= steps
        deployed.reset_counts()
        deployed(fresh)
    (health,), counts = deployed.health(), deployed.counts()
    assert health.clipped_inputs == clipped > 0
    assert sum(c.events for c in counts) == sum(p.events for p in whole.projections.values())
    assert sum(c.synops for c in counts) == sum(p.events if k == "hold" else p.synops for k, p in whole.projections.items())
    assert sum(c.neuron_updates_active for c in counts) == sum(p.updates_active for p in whole.populations.values())
    assert sum(c.neuron_updates_inactive for c in counts) == sum(p.updates_inactive for p in whole.populations.values())
    assert health.wide == sum(p.saturations_v + p.wide_v for p in whole.populations.values())
    assert not any(p.wide_a or p.wraps_u for p in whole.populations.values())  # 16-bit sums, always
    assert {c.tokens for c in counts} == {23}
    assert all(c.payload_bits == 1 and not c.graded for c in counts) == (code == "spikes")


@pytest.mark.parametrize("code", ["spikes", "analogue"])
def test_tokens_follow_each_other_in_one_stream(code: str) -> None:
    """Populations restart when a token's first step reaches them, so the order of tokens does not matter."""
    module = prepared("relu")[0]
    deployed = neuro.deploy(module, plan_of("relu", time_steps=7, input_code=code))
    x = torch.randn(6, 10)
    together = deployed(x)
    assert torch.equal(together, torch.cat([deployed(row[None]) for row in x]))
    assert torch.equal(together.flip(0), deployed(x.flip(0)))
    assert torch.equal(together.view(2, 3, 7), deployed(x.view(2, 3, 10)))


def test_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    module, x = prepared("relu")[0], torch.randn(50, 10)
    for code in ("spikes", "analogue"):
        plan = plan_of("relu", time_steps=6, input_code=code)
        whole, parts = neuro.deploy(module, plan), neuro.deploy(module, plan)
        wanted = whole(x)
        with monkeypatch.context() as patch:
            patch.setattr("neuro.deployment.spike_counts.CHUNK_VALUES", 6 * 24 * 7)
            assert torch.equal(parts(x), wanted)
        assert parts.counts() == whole.counts()


def t_level_network(module: nn.Module, s: neuro.Segment, x: Tensor) -> np.ndarray:
    """The twin in numpy: int8 weights, inputs on their grid, an activation of T levels that rounds half down."""
    fc1, fc2, steps = module[0], module[2], s.time_steps  # type: ignore[index]
    most = 127 if s.input_code == "analogue" else steps
    level = np.clip(np.rint(x.numpy() / np.float32(s.input_scale)), -most, most)
    w1, w2 = (
        np.rint(layer.weight.detach().double().numpy() / scale) * scale
        for layer, scale in zip((fc1, fc2), s.weight_scales, strict=True)
    )
    charge = level * s.input_scale @ w1.T + fc1.bias.detach().double().numpy()
    n = np.clip(np.ceil(charge / s.rectified_scale + 0.5) - 1, 0, steps)
    return n * s.rectified_scale @ w2.T + fc2.bias.detach().double().numpy()


@pytest.mark.parametrize("code", ["spikes", "analogue"])
@pytest.mark.parametrize("steps", [4, 16, 32])
def test_the_twin_is_a_network_of_t_levels(steps: int, code: str) -> None:
    """But for the rounding of biases and currents, which moves few counts and those by one."""
    module, x = prepared("relu")[0], torch.randn(60, 10)
    plan = plan_of("relu", time_steps=steps, input_code=code)
    (s,) = plan.segments
    twin = neuro.deploy(module, plan, "quantised")(x).double().numpy()
    wanted = t_level_network(module, s, x)
    one_count = s.rectified_scale * float(module[2].weight.detach().abs().max())  # type: ignore[index, operator]
    assert np.abs(twin - wanted).max() <= 2 * one_count
    assert np.abs(twin - wanted).mean() < 0.15 * one_count


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 40), st.booleans())
def test_soft_reset_with_constant_current_is_its_twin(seed: int, steps: int, per_channel: bool) -> None:
    module = prepared("relu")[0]
    plan = plan_of("relu", time_steps=steps, input_code="analogue", per_channel=per_channel)
    x = 1.5 * torch.randn(30, 10, generator=torch.Generator().manual_seed(seed))
    assert torch.equal(neuro.deploy(module, plan)(x), neuro.deploy(module, plan, "quantised")(x))


def test_where_the_twin_is_not_reached() -> None:
    """Spikes that arrive unevenly make neurons fire too early; hard reset throws charge away. Both are what they are."""
    module, x = prepared("relu")[0], torch.randn(200, 10)
    error = {}
    for reset, code, steps in (("soft", "spikes", 32), ("hard", "analogue", 32), ("hard", "analogue", 256)):
        plan = plan_of("relu", time_steps=steps, reset=reset, input_code=code)
        simulated, twin = neuro.deploy(module, plan)(x), neuro.deploy(module, plan, "quantised")(x)
        error[reset, steps] = float((simulated - twin).square().mean() / twin.square().mean())
        assert error[reset, steps] > 0
    assert error["soft", 32] < 0.01
    assert min(error["hard", 32], error["hard", 256]) > 3 * error["soft", 32]  # more steps do not help


def test_more_steps_come_closer_with_soft_reset() -> None:
    module, x = prepared("relu")[0], torch.randn(200, 10)
    errors = []
    for steps in (4, 16, 64):
        out = neuro.deploy(module, plan_of("relu", time_steps=steps))(x)
        errors.append(float((out - module(x).detach()).square().mean()))
    assert errors[0] > 4 * errors[1] > 4 * errors[2]


def test_a_membrane_beyond_its_register_is_stepped() -> None:
    """Where a sum may leave the membrane, the graph itself runs: clipped v and all, and it is said."""
    module = nn.Sequential(nn.Linear(4, 3000), nn.ReLU(), nn.Linear(3000, 3))
    with torch.no_grad():
        module[0].weight.uniform_(0.5, 1.0)
        module[2].weight.copy_(torch.where(torch.arange(3000) % 2 > 0, -1.0, 1.0).expand(3, 3000))
        module[2].weight[2] = 1.0
    x = torch.rand(10, 4) * torch.tensor([1.0, 1e-3, 1e-3, 1e-3])
    ranges, report = neuro.calibrate(module, [x]), neuro.analyse(module, x)
    ranges = dataclasses.replace(
        ranges, layers={**ranges.layers, "2": dataclasses.replace(ranges.layers["2"], output_max=1.0)}
    )
    plan = neuro.convert(module, ranges, report, RateConfig(time_steps=64, input_code="analogue"))
    (s,) = plan.segments
    assert any("'out'; saturations are counted" in note for note in plan.notes)
    deployed = neuro.deploy(module, plan)
    with pytest.warns(RuntimeWarning, match=r"segment '0': 0 wrapped sums, \d+ values beyond 24 bits"):
        out = deployed(x)
    whole = run_pipelined(s.graph, encode(s, x)[0], record=("out.v",))
    assert torch.equal(out, (whole.states["out"]["v"][0, 63::64].double() * s.output_scale).float())
    assert deployed.health()[0].wide == sum(p.saturations_v + p.wide_v for p in whole.populations.values()) > 0


def test_squared_relu_is_squared_by_the_host() -> None:
    class Squared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc1, self.fc2 = nn.Linear(10, 30), nn.Linear(30, 10)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc2(torch.relu(self.fc1(x)).square())

    torch.manual_seed(1)
    module, x = Squared(), torch.randn(90, 10)
    plan = neuro.convert(module, neuro.calibrate(module, [x]), neuro.analyse(module, x), RateConfig(time_steps=64))
    assert [s.modules for s in plan.segments] == [("fc1",), ("fc2",)]
    assert any("the host computes relu2 between them" in note for note in plan.notes)
    out, wanted = neuro.deploy(module, plan)(x), module(x).detach()
    assert float((out - wanted).square().mean()) < 0.01 * float(wanted.square().mean())


def test_the_loihi_1_route() -> None:
    module, x, ranges, report = prepared("relu")
    loihi1 = neuro.analyse(module, x, chip="loihi1")
    assert (loihi1.mapped, loihi1.pairs) == (report.mapped, report.pairs)
    plan = neuro.convert(module, ranges, loihi1)
    assert (plan.route, plan.chip, plan.segments[0].input_code) == ("rate", "loihi1", "spikes")
    assert all(p.num_message_bits == 0 for p in plan.segments[0].graph.projections)
    assert {p.kind for p in plan.segments[0].graph.populations} == {"input", "lif_soft", "lif_reset"}
    assert float((neuro.deploy(module, plan)(x) - module(x).detach()).abs().mean()) < 0.1
    with pytest.raises(ValueError, match="loihi1 has binary spikes, so its input cannot be analogue"):
        neuro.convert(module, ranges, loihi1, RateConfig(input_code="analogue"))
    for config in (neuro.GradedConfig(), neuro.SigmaDeltaConfig()):
        with pytest.raises(ValueError, match=r"loihi1 has binary spikes .*RateConfig\(\)"):
            neuro.convert(module, ranges, loihi1, config)
    with pytest.raises(TypeError, match="config is dict"):
        neuro.convert(module, ranges, report, {})  # type: ignore[arg-type]


def test_what_is_refused() -> None:
    for wrong, message in (
        ({"time_steps": 0}, r"time_steps is 0; it lies in 1\.\.1024"),
        ({"reset": "none"}, "reset is 'none'; it is one of soft, hard"),
        ({"input_code": "ttfs"}, "input_code is 'ttfs'; it is one of spikes, analogue"),
        ({"hidden_factor": 0.0}, "hidden_factor is 0.0"),
    ):
        with pytest.raises(ValueError, match=message):
            RateConfig(**wrong)  # type: ignore[arg-type]
    module, _, ranges, report = prepared("relu")
    bare = dataclasses.replace(ranges.layers["0"], output_channel_max=())
    without = dataclasses.replace(ranges, layers={**ranges.layers, "0": bare})
    with pytest.raises(ValueError, match="per_channel: the calibration kept no channels of layer '0'"):
        neuro.convert(module, without, report, RateConfig(per_channel=True))
    (s,) = plan_of("relu").segments
    with pytest.raises(ValueError, match="NaN or infinite"):
        neuro.deploy(module, plan_of("relu"))(torch.full((1, 10), float("inf")))
    assert int(levels(s, torch.tensor([[1e9, -1e9]]).repeat(1, 5))[0].abs().max()) == s.time_steps


@pytest.mark.lava
def test_hard_reset_equals_lava_and_soft_is_refused_there(lava: LavaWorker) -> None:
    module, x = prepared("relu")[0], torch.randn(6, 10)
    for name, code in (("relu", "spikes"), ("relu", "analogue"), ("linear", "spikes"), ("linear", "analogue")):
        module = prepared(name)[0]
        plan = plan_of(name, time_steps=8, reset="hard", input_code=code)
        (s,) = plan.segments
        inputs = encode(s, x)[0]
        flush = {k: torch.nn.functional.pad(v, (0, 0, 0, 3)) for k, v in inputs.items()}
        ours = simulate(s.graph, flush, record=("spikes", "v"))
        found = compare(lava.run(s.graph, flush, record=("spikes", "v")), ours)
        assert found.equal, f"{name}, {code}: {found}"
        depth = 1 if not s.n_hidden else 2 if code == "spikes" else 3
        v = ours.states["out"]["v"][0, depth + s.time_steps - 1 :: s.time_steps][: len(x)]
        assert torch.equal(neuro.deploy(module, plan)(x), (v.double() * s.output_scale).float())
    soft = plan_of("relu", time_steps=8).segments[0]
    with pytest.raises(LavaUnsupported, match=r"'hidden' \(lif_soft\).*reset='hard' in the rate route"):
        lava.run(soft.graph, encode(soft, x)[0])
    (linear,) = plan_of("linear", time_steps=8).segments  # no reset at all: runs on Lava as it is
    assert not unsupported(linear.graph)


def test_no_warning_on_calibration_like_data() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for name, code, reset, more in CASES:
            neuro.deploy(prepared(name)[0], plan_of(name, input_code=code, reset=reset, **more))(prepared(name)[1])
