"""The graded route's widths, scales and thresholds: against integers worked out in numpy, the quantised twin, and Lava."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from neuro.conversion.calibration import calibrate
from neuro.conversion.graded import GradedConfig
from neuro.conversion.integers import constant_lines, weight_levels, weight_scales
from neuro.conversion.plan import load_plan, save_plan
from neuro.deployment.deployed import deploy
from neuro.deployment.segments import encode
from neuro.graph import truncate_weights
from neuro.modules.thresholds import EventThreshold
from neuro.simulators.activity import RECORD_ALL
from neuro.simulators.fixed_point import run_pipelined, simulate
from neuro.simulators.lava.client import LavaWorker, compare
from tests.neuro.conversion.graded_networks import (
    SCALES,
    WIDTHS,
    Mlp,
    by_hand,
    hidden_of,
    planned,
    rows,
    twins,
    units,
)


def test_widths_have_the_levels_that_a_synapse_holds() -> None:
    assert [weight_levels(b) for b in WIDTHS] == [(8, -127, 127), (4, -8, 7), (3, -4, 3), (2, -2, 1), (2, -1, 1)]
    for bad in (5, 16, "binary", True):
        with pytest.raises(ValueError, match=r"weight_bits is .* one of 8, 4, 3, 2, ternary"):
            GradedConfig(weight_bits=bad)


@pytest.mark.parametrize("scales", SCALES)
@pytest.mark.parametrize("bits", WIDTHS)
def test_stored_weights_are_the_rounded_float_ones(bits: int | str, scales: str) -> None:
    torch.manual_seed(1)
    layer = nn.Linear(30, 12)
    (segment,) = planned(layer, rows(50, 30), weight_bits=bits, scales=scales).segments
    (projection,) = segment.graph.projections
    width, low, high = weight_levels(bits)
    assert projection.num_weight_bits == segment.weight_bits == width
    stored = projection.weight[:, :30]
    np.testing.assert_array_equal(truncate_weights(projection.weight, "mixed", width), projection.weight)
    scale = np.array(segment.channel_scales[0] if scales == "channel" else [segment.weight_scales[0]] * 12)
    wanted = np.clip(np.rint(layer.weight.detach().double().numpy() / scale[:, None]), low, high)
    np.testing.assert_array_equal(stored // 2 ** (9 - width), wanted)
    assert len(np.unique(stored)) > 2 if width < 4 else len(np.unique(stored)) > 10
    if scales == "power_of_two":
        assert {np.log2(v) % 1 for v in (segment.weight_scales[0], segment.input_scale)} == {0.0}


@pytest.mark.parametrize("bits", [8, 4, 2, "ternary"])
def test_searched_scales_are_about_the_best_ones(bits: int | str) -> None:
    weight = torch.from_numpy(np.random.default_rng(0).standard_t(4, (3, 500)))
    _, low, high = weight_levels(bits)
    found = weight_scales(weight, low, high, search=True).numpy()
    for row, scale in zip(weight.numpy(), found, strict=True):

        def error(s: float, row: np.ndarray = row) -> float:
            return float(((row - s * np.clip(np.rint(row / s), low, high)) ** 2).sum())

        tried = np.abs(row).max() / high * np.linspace(0.02, 1, 2000)
        assert error(scale) <= (1.1 if bits == 8 else 1.03) * min(error(s) for s in tried)  # jagged with 8 bits
        assert bits == 8 or error(scale) < 0.9 * error(np.abs(row).max() / high)
    powers = weight_scales(weight, low, high, search=True, power_of_two=True)
    assert (torch.log2(powers) % 1 == 0).all()
    assert (weight_scales(torch.zeros(2, 5).double(), low, high, search=True) == 1).all()


@given(st.lists(st.integers(-(3**9), 3**9), min_size=1, max_size=8), st.sampled_from([(128, 1), (32, 7), (64, 3)]))
def test_constant_lines_of_narrow_weights_add_up(values: list[int], width: tuple[int, int]) -> None:
    step, largest = width
    constants = step * np.array(values, dtype=np.int64)
    payloads, weights = constant_lines(constants, step, largest)
    assert (weights.astype(np.int64) @ np.array(payloads, dtype=np.int64) == constants).all()
    assert not weights.size or (np.abs(weights).max() <= step * largest and not (weights % step).any())
    with pytest.raises(ValueError, match=f"multiples of {step}"):
        constant_lines(constants + 1, step, largest)
    with pytest.raises(ValueError, match="beyond 1. lines" if largest == 1 else "lines"):
        constant_lines(np.array([step * 2**25]), step, largest)


# Channels


def test_channels_of_a_linear_layer_cost_the_chip_nothing() -> None:
    torch.manual_seed(2)
    layer, x = nn.Linear(20, 16, bias=False), rows(100, 20)
    with torch.no_grad():
        layer.weight.mul_(10.0 ** -(torch.arange(16) % 3)[:, None])
    single, each = (planned(layer, x, scales=s) for s in ("tensor", "channel"))
    (segment,) = each.segments
    assert [p.name for p in segment.graph.populations] == ["x", "out"]
    assert (np.abs(segment.graph.projections[0].weight[:, :20]).max(axis=1) == 254).all()  # every row uses its range
    errors = [(deploy(layer, plan)(x) - layer(x).detach()).square().sum(dim=0) for plan in (single, each)]
    small = torch.arange(16) % 3 == 2
    assert (errors[1][small] < 0.05 * errors[0][small]).all()
    np.testing.assert_array_equal(
        deploy(layer, each)(x).numpy(),
        ((by_hand(segment, x)[0] + segment.output_offset) * units(segment)).astype(np.float32),
    )


@pytest.mark.parametrize("search", ["max", "mse"])
def test_hidden_channels_are_grouped_by_powers_of_two(search: str) -> None:
    module, x = Mlp(sizes=(24, 40, 10)), rows(100, 24)
    (segment,) = planned(module, x, channel_groups=8, weight_clip=search).segments
    members = segment.graph.meta["hidden_channels"]
    assert sorted(c for group in members for c in group) == list(range(40))
    assert len(members) >= 4
    first = [p for p in segment.graph.projections if p.name.startswith("fc1")]
    scales = np.array(segment.channel_scales[0])
    for projection, channels in zip(first, members, strict=True):
        stored = projection.weight[:, :24]
        assert stored.shape[0] == len(channels)
        unit = segment.input_scale * scales[channels] / 2 * 2.0**-projection.weight_exp
        np.testing.assert_allclose(unit, segment.rectified_scale, rtol=1e-12)  # one unit for all groups
        if search == "max":
            assert (np.abs(stored).max(axis=1) >= 126).all()  # at least half of the range
    assert len(planned(module, x, channel_groups=2).segments[0].graph.meta["hidden_channels"]) == 2


def test_ungrouped_hidden_channels_are_refused_by_name() -> None:
    module, x = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4)), rows(20, 6)
    with pytest.raises(
        ValueError, match=r"segment '0': '0' feeds '2' on the chip.*not split into power-of-two groups.*Lava"
    ):
        planned(module, x, scales="channel", channel_groups=0)
    assert planned(nn.Linear(6, 8), x, scales="channel", channel_groups=0).segments  # a host factor is enough


# Twin and graph


@st.composite
def cases(draw: Any) -> tuple[Mlp | nn.Linear, Tensor, Tensor, dict[str, Any]]:
    seed = draw(st.integers(0, 2**20))
    sizes = tuple(draw(st.integers(1, 40)) for _ in range(3))
    bias = draw(st.booleans())
    kind = draw(st.sampled_from(["linear", "relu", "relu2", "gate"]))
    config = {
        "weight_bits": draw(st.sampled_from(WIDTHS)),
        "scales": draw(st.sampled_from(SCALES)),
        "channel_groups": draw(st.sampled_from([1, 2, 8])),
        "drop_input": draw(st.sampled_from([0, 0, 3, 20])),
        "drop_hidden": draw(st.sampled_from([0, 0, 5])),
        "hidden_bits": draw(st.integers(4, 15)),
    }
    theta = draw(st.sampled_from([None, 0.3])) if kind != "gate" else 0.3
    mlp = Mlp(kind, bias, theta, (sizes[0], sizes[1], sizes[2]), seed)
    module: Mlp | nn.Linear = mlp.fc1 if kind == "linear" else mlp
    return module.double(), rows(30, sizes[0], seed).double(), rows(20, sizes[0], seed + 1).double(), config


@settings(max_examples=60, deadline=None)
@given(cases())
def test_the_twin_equals_the_graph_but_for_the_last_shift(case: tuple[Any, Tensor, Tensor, dict[str, Any]]) -> None:
    module, seen, fresh, config = case
    plan = planned(module, seen, **config)
    (segment,) = plan.segments
    simulated, twin = twins(module, plan)
    got, wanted = simulated(fresh), twin(fresh)
    integers, _ = by_hand(segment, fresh)
    np.testing.assert_array_equal(got.numpy(), (integers + segment.output_offset) * units(segment))
    health = simulated.health()[0]
    if health.wraps or health.payload_overflows:
        return  # a message beyond 16 bits: the twin keeps to 16
    lossless = {8: 1, 4: 5, 3: 6, 2: 7}[segment.weight_bits]
    if segment.shifts[-1] <= lossless:
        assert torch.equal(got, wanted)
    else:
        groups = len(segment.graph.meta.get("hidden_channels", [0]))
        bound = torch.from_numpy(np.broadcast_to(0.5 * groups * units(segment), (segment.n_out,)).copy())
        assert ((got - wanted).abs() <= bound * (1 + 1e-9)).all()
    if segment.n_hidden:
        assert torch.equal(hidden_of(simulated, fresh), hidden_of(twin, fresh))  # the hidden layer, always


@pytest.mark.parametrize(
    ("width", "bits", "bias"), [(1, 8, False), (3, 4, True), (1, "ternary", True), (5, "ternary", True)]
)
def test_short_sums_are_equal_exactly(width: int, bits: int | str, bias: bool) -> None:
    """No last shift to speak of: the property above in cases that are sure to take its first branch."""
    torch.manual_seed(0)
    layer, x = nn.Linear(width, 50, bias=bias), rows(200, width)
    plan = planned(layer, x, weight_bits=bits)
    assert plan.segments[0].shifts[0] <= {8: 1, 4: 5, "ternary": 7}[bits]
    simulated, twin = twins(layer, plan)
    assert torch.equal(simulated(x), twin(x))
    assert simulated(x).any()


@pytest.mark.parametrize("bits", WIDTHS)
def test_narrow_weights_lose_what_their_grid_loses(bits: int | str) -> None:
    """Against torch with the weights put on the plan's grid in float: what is left is the rounding of activations."""
    module, x = Mlp("relu2", sizes=(48, 96, 16)), rows(300, 48)
    plan = planned(module, x, weight_bits=bits, hidden_bits=15, scales="tensor")
    (segment,) = plan.segments
    rounded = Mlp("relu2", sizes=(48, 96, 16))
    _, low, high = weight_levels(bits)
    with torch.no_grad():
        for name, scale in zip(("fc1", "fc2"), segment.weight_scales, strict=True):
            weight: Tensor = getattr(rounded, name).weight
            weight.copy_(scale * torch.clamp(torch.round(weight / scale), low, high))
    wanted, got = rounded(x).detach(), deploy(module, plan)(x)
    assert (got - wanted).square().mean() < 5e-4 * wanted.square().mean()


# Thresholds


@pytest.mark.parametrize("activation", ["relu", "relu2"])
def test_what_is_dropped_sends_no_event(activation: str) -> None:
    module, x = Mlp(activation), rows(60, 24)
    plan = planned(module, x, drop_input=12, drop_hidden=9)
    (segment,) = plan.segments
    model = deploy(module, plan)
    model(x)
    q = np.clip(np.rint(x.numpy() / np.float32(segment.input_scale)), -127, 127)
    lines = len(x) * len(segment.constant_lines)
    counts = {c.layer: c for c in model.counts()}
    assert counts["fc1"].events == (np.abs(q) > 12).sum() + lines
    free = replace(segment, input_threshold=0)
    assert encode(free, x)[0]["x"].count_nonzero() == np.count_nonzero(q) + lines
    # Of the same graph without hidden thresholds, the messages into fc2 above 9 are the ones that are left.
    without = planned(module, x, drop_input=12).segments[0]
    last = "square" if activation == "relu2" else "hidden"
    sent = run_pipelined(without.graph, encode(without, x)[0], record=(f"{last}.spikes",)).spikes[last]
    kept = int((sent > 9).sum())
    late = len(x) * len(segment.bias_lines)
    assert 0 < kept < int(sent.count_nonzero())
    # Bias lines pass their delay populations one by one.
    depth = 2 if activation == "relu2" else 1
    assert counts["fc2"].events == kept + (depth + 1) * late
    if activation == "relu2":
        assert counts["fc1:square"].events == 2 * kept  # nothing goes to be squared that would be dropped then


def test_a_square_that_would_be_nothing_is_not_computed() -> None:
    module, x = Mlp("relu2", sizes=(24, 60, 10)), rows(200, 24)
    plan = planned(module, x, hidden_bits=6)
    (segment,) = plan.segments
    assert segment.square_shift > 0
    plain = replace(
        segment.graph,
        populations=tuple(
            replace(p, params={"vth": 0}) if p.kind == "graded_relu" else p for p in segment.graph.populations
        ),
    )
    inputs = encode(segment, x)[0]
    ours, unthrifty = simulate(segment.graph, inputs), simulate(plain, inputs)
    assert torch.equal(ours.spikes["out"], unthrifty.spikes["out"])
    assert ours.projections["copy1"].events < 0.9 * unthrifty.projections["copy1"].events


@pytest.mark.parametrize("scales", ["tensor", "channel"])
@pytest.mark.parametrize("activation", ["relu", "relu2", "gate"])
def test_event_thresholds_become_the_neurons_own(activation: str, scales: str) -> None:
    module = Mlp(activation, theta=0.8, sizes=(24, 60, 10)).eval()
    x = rows(300, 24)
    assert isinstance(module.gate, EventThreshold)
    plan = planned(module, x, scales=scales, channel_groups=8)
    (segment,) = plan.segments
    assert segment.threshold_module == "gate"
    model = deploy(module, plan)
    assert isinstance(model.module.gate, nn.Identity)
    assert isinstance(module.gate, EventThreshold)
    got, wanted = model(x), module(x).detach()
    # Values at the threshold fall to either side by the rounding of inputs and weights; the rest must agree.
    assert (got - wanted).square().mean() < (2e-3 if activation != "relu2" else 4e-3) * wanted.square().mean()
    with torch.no_grad():
        h = torch.relu(module.fc1(x))
        h = h * h if activation == "relu2" else h
        least = segment.hidden_scale if activation == "relu2" else segment.hidden_scale / 2  # a floor, a rounding
        sent = int(torch.count_nonzero(module.gate(h) * (h >= least)))
        plain = int(torch.count_nonzero(h >= least))
    _, events = by_hand(segment, x)
    assert events == pytest.approx(sent, rel=0.02)
    assert events < 0.9 * plain
    assert next(c for c in model.counts() if c.layer == "fc1").neuron_updates_active == events
    assert torch.equal(hidden_of(model, x), hidden_of(deploy(module, plan, "quantised"), x))


def test_thresholds_before_a_layer_stay_on_the_host_and_silence_it() -> None:
    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate, self.fc = EventThreshold(20, initial=0.7), nn.Linear(20, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(self.gate(x))

    torch.manual_seed(4)
    module, x = Gated().eval(), rows(80, 20)
    plan = planned(module, x)
    model = deploy(module, plan)
    assert isinstance(model.module.gate, EventThreshold)
    torch.testing.assert_close(model(x), module(x).detach(), rtol=0, atol=0.05)
    events = next(c for c in model.counts() if c.layer == "fc").events
    assert events == int((x.abs() > module.gate.theta_C).sum()) + len(x) * len(plan.segments[0].constant_lines)


def test_groups_count_an_event_once_and_narrow_weights_weigh_less() -> None:
    module, x = Mlp(bias=False, sizes=(24, 40, 10)), rows(50, 24)
    single, each = (deploy(module, planned(module, x, channel_groups=n)) for n in (1, 8))
    single(x), each(x)
    for a, b in zip(single.counts(), each.counts(), strict=True):
        assert (a.layer, a.dense_macs, a.weight_bytes) == (b.layer, b.dense_macs, b.weight_bytes) or a.layer == "fc1"
        assert b.events == pytest.approx(a.events, rel=0.1)
        assert b.synops == pytest.approx(a.synops, rel=0.1)
    narrow = deploy(module, planned(module, x, weight_bits=4))
    narrow(x)
    fc2 = [next(c for c in d.counts() if c.layer == "fc2").weight_bytes for d in (single, narrow)]
    assert fc2 == [400, 200]


def test_a_plan_with_everything_survives_its_folder(tmp_path: Path) -> None:
    module, x = Mlp("relu2", theta=0.5), rows(50, 24)
    plan = planned(module, x, channel_groups=8, weight_bits=4, drop_input=2, drop_hidden=3)
    back = load_plan(save_plan(plan, tmp_path))
    assert replace(back.segments[0], graph=plan.segments[0].graph) == plan.segments[0]
    assert torch.equal(deploy(module, plan)(x), deploy(module, back)(x))


@pytest.mark.parametrize("bits", [8, 4])
def test_overflows_of_other_widths_are_counted_and_said(bits: int | str) -> None:
    module, x = Mlp("relu2", bias=False, sizes=(24, 64, 24)), 0.01 * rows(40, 24)
    model = deploy(module, planned(module, x, weight_bits=bits, hidden_bits=15, scales="channel"))
    model(x)
    with pytest.warns(RuntimeWarning, match=r"segment 'fc1'.*messages beyond their width"):
        model(torch.sign(module.fc1.weight.detach()[:3]) * 10)
    (health,) = model.health()
    assert health.clipped_inputs >= 3 * 20
    assert health.payload_overflows > 0


# Calibration by error search


def test_error_search_finds_the_clip_of_least_error() -> None:
    x = torch.from_numpy(np.random.default_rng(1).standard_t(3, (400, 16))).float()
    layer = nn.Linear(16, 4)
    found = calibrate(layer, x.split(100), method="mse")
    clip = found.layers[""].input_clip
    values = np.abs(x.numpy().astype(np.float64)).ravel()

    def error(c: float) -> float:
        return float(((values - c / 127 * np.minimum(np.rint(values / (c / 127)), 127)) ** 2).sum())

    best = min(error(values.max() * s) for s in np.linspace(0.02, 1, 1500))
    assert error(clip) <= 1.03 * best
    assert clip < found.layers[""].input_max
    assert found.method == json.loads(json.dumps(found.to_dict()))["method"] == "mse"
    percentile = calibrate(layer, [x])
    assert percentile.layers[""].input_clip == percentile.layers[""].input_percentile
    y = layer(x).detach().numpy()
    np.testing.assert_allclose(found.layers[""].output_channel_max, np.abs(y).max(axis=0), rtol=1e-6)
    positive = y[y > 0]
    assert percentile.layers[""].output_positive_clip == pytest.approx(np.percentile(positive, 99.99), rel=0.05)
    with pytest.raises(ValueError, match="method is 'guess'; it is one of percentile, mse"):
        calibrate(layer, [x], method="guess")
    with pytest.raises(ValueError, match="calibration batch 1: example inputs are"):
        calibrate(layer, [x, "text"])


def test_settings_out_of_range_are_named() -> None:
    for wrong, text in (
        ({"drop_input": 127}, r"drop_input is 127; it lies in 0\.\.126"),
        ({"drop_hidden": -1}, r"drop_hidden is -1"),
        ({"channel_groups": 17}, r"channel_groups is 17; it lies in 0\.\.16"),
        ({"scales": "row"}, "scales is 'row'; it is one of tensor, power_of_two, channel"),
        ({"weight_clip": "best"}, "weight_clip is 'best'; it is one of auto, max, mse"),
    ):
        with pytest.raises(ValueError, match=text):
            GradedConfig(**wrong)


# Lava


LAVA_CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "8 bits": ({"activation": "relu"}, {}),
    "4 bits": ({"activation": "relu2"}, {"weight_bits": 4}),
    "2 bits": ({"activation": "relu"}, {"weight_bits": 2}),
    "ternary": ({"activation": "relu2"}, {"weight_bits": "ternary"}),
    "channel groups": ({"activation": "relu"}, {"channel_groups": 8}),
    "channel groups, squared, 4 bits": ({"activation": "relu2"}, {"channel_groups": 8, "weight_bits": 4}),
    "dropped": ({"activation": "relu2"}, {"drop_input": 6, "drop_hidden": 5}),
    "event thresholds": ({"activation": "relu", "theta": 0.6}, {}),
    "everything": ({"activation": "relu2", "theta": 0.6}, {"channel_groups": 8, "weight_bits": "ternary", "drop_input": 3}),
}


@pytest.mark.lava
@pytest.mark.parametrize("name", LAVA_CASES)
def test_whole_blocks_equal_lava(name: str, lava: LavaWorker) -> None:
    layers, config = LAVA_CASES[name]
    module, x = Mlp(**layers, sizes=(32, 48, 32)), rows(25, 32)
    (segment,) = planned(module, x, **config).segments
    inputs, _ = encode(segment, x)
    ours = simulate(segment.graph, inputs, record=RECORD_ALL)
    found = compare(lava.run(segment.graph, inputs, record=RECORD_ALL), ours)
    assert found.equal, f"{name}: {found}"
    assert found.skipped == ()
    depth = 3 if segment.activation == "relu2" else 2
    np.testing.assert_array_equal(ours.spikes["out"][0, depth:], by_hand(segment, x)[0][:-depth])
    assert torch.count_nonzero(ours.spikes["out"]) > 300
