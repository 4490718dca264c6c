"""Networks of convolutions: their integers against torch's own convolutions, every multiply-accumulate counted once."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_linear_bn_eval
from torch.utils.flop_counter import FlopCounterMode

import neuro
from neuro.conversion.plan import load_plan, save_plan
from neuro.conversion.rate import RateConfig
from neuro.conversion.sigma_delta import SigmaDeltaConfig
from neuro.deployment import networks, networks_over_time
from neuro.simulators.activity import compare
from neuro.simulators.fixed_point import run_pipelined, simulate
from neuro.simulators.schedule import depths
from tests.neuro.conversion.random_pictures import random_network

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths:UserWarning")


ROUTES = [("graded", None), ("sigma_delta", SigmaDeltaConfig()), ("rate", RateConfig(64))]


def planned(module, x, config=None, **options):
    report = neuro.analyse(module, x, **options)
    return neuro.convert(module, neuro.calibrate(module, [x]), report, config), report


def macs_of(deployed, host):
    return sum(c.dense_macs for c in deployed.counts() if c.host is host)


def counted_by_torch(module, x):
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        y = module(x)
    return y, counter.get_total_flops() // 2


def evaluated(module, segment, x):
    """Messages of every stage as whole numbers, int64 in torch's order: by torch, from the module's own float weights."""
    values = {"x": torch.round(x.double() / segment.input_scale).clamp(-127, 127)}
    for stage in segment.stages:
        total = 0
        for link in stage.links:
            value = values[link.source]
            if link.module:
                layer = fused(module.get_submodule(link.module), module.get_submodule(link.norm) if link.norm else None)
                whole = 2 * torch.round(layer.weight.double() / link.weight_scale)
                if isinstance(layer, nn.Linear):
                    part = F.linear(value.flatten(1), whole)
                else:
                    function = F.conv1d if isinstance(layer, nn.Conv1d) else F.conv2d
                    part = function(value, whole, None, layer.stride, layer.padding, layer.dilation, layer.groups)
                if layer.bias is not None:
                    bias = 2 * torch.round(layer.bias.double() / (2 * stage.sum_unit))
                    part = part + bias.reshape(-1, *(1,) * (part.dim() - 2))
            elif link.gain:
                part = link.gain * value
            else:  # a pooling by itself
                part = windows(value, stage, segment, link)
            total = total + part
        total = total.clamp(min=0) if stage.relu else total
        if stage.pool:
            total = sums(total, stage.pool[:2], stage.pool[2:4], stage.pool[4:])
        values[stage.name] = torch.floor((total + stage.half) / 2.0**stage.shift).reshape(len(x), *stage.shape)
    return {name: value.long() for name, value in values.items()}


def fused(layer, norm):
    """A copy of the layer in float64 with torch's own fusion of a batch norm."""
    layer = copy.deepcopy(layer).double()
    if norm is None:
        return layer
    norm = copy.deepcopy(norm).double()
    fuse = fuse_linear_bn_eval if isinstance(layer, nn.Linear) else fuse_conv_bn_eval
    return fuse(layer.eval(), norm.eval())


def sums(value, kernel, stride, padding):
    lines = value.dim() == 3
    found = F.avg_pool2d(value[:, :, None] if lines else value, kernel, stride, padding, divisor_override=1)
    return found[:, :, 0] if lines else found


def windows(value, stage, segment, link):
    conv = next(p for p in segment.graph.projections if p.name == link.projection)
    kernel = conv.weight.shape[2], conv.weight.shape[1]
    return sums(value, kernel, conv.conv.stride[::-1], conv.conv.padding[::-1])


def simulated(segment, x, mode="lava"):
    record = [f"{stage.held}.spikes" for stage in segment.stages]
    encode = networks.encode if segment.code == "graded" else networks_over_time.encode
    activity = run_pipelined(segment.graph, encode(segment, x)[0], mode=mode, record=record)
    return {stage.name: networks.to_torch(activity.spikes[stage.held][0], stage.shape).long() for stage in segment.stages}


@pytest.mark.parametrize("seed", [*range(20), *(pytest.param(s, marks=pytest.mark.soak) for s in range(20, 200))])
def test_integers_of_random_networks_are_those_of_torch(seed, tmp_path):
    module, x = random_network(seed)
    plan, report = planned(module, x)
    plan = load_plan(save_plan(plan, tmp_path))
    y, macs = counted_by_torch(module, x)
    deployed = neuro.deploy(module, plan, mode="lava" if seed % 2 else "chip")
    got = deployed(x)
    assert set(plan.modules) == set(report.mapped) == set(plan.layers)
    assert (macs_of(deployed, False), macs_of(deployed, True)) == (macs, 0)
    for segment, health in zip(deployed.segments, deployed.health(), strict=True):
        assert (health.wraps, health.wide, health.payload_overflows) == (0, 0, 0)
        if segment.input_scale and segment is deployed.segments[0]:
            wanted = evaluated(module, segment, x)
            for name, value in simulated(segment, x, deployed.mode).items():
                assert torch.equal(value, wanted[name]), name
    assert (got - y).norm() < 0.03 * y.norm() + 1e-3
    quantised = neuro.deploy(module, plan, "quantised")(x)
    if len(plan.segments) == 1:
        assert (got - quantised).abs().max() <= 4.04 * max(s.unit for s in plan.segments[0].stages)


@pytest.mark.parametrize("seed", range(8))
def test_changes_add_up_to_the_same_integers(seed):
    module, x = random_network(seed)
    plan, report = planned(module, x, SigmaDeltaConfig(), route="sigma_delta")
    y, macs = counted_by_torch(module, x)
    deployed = neuro.deploy(module, plan, mode="chip" if seed % 2 else "lava")
    got = deployed(x)
    assert set(plan.modules) == set(report.mapped) == set(plan.layers)
    assert (macs_of(deployed, False), macs_of(deployed, True)) == (macs, 0)
    assert all((h.wraps, h.wide, h.payload_overflows) == (0, 0, 0) for h in deployed.health())
    wanted = evaluated(module, plan.segments[0], x)
    for name, value in simulated(plan.segments[0], x, deployed.mode).items():
        assert torch.equal(value, wanted[name]), name
    assert (got - y).norm() < 0.05 * y.norm() + 1e-3
    assert torch.equal(got, neuro.deploy(module, plan, "quantised")(x))
    deployed.reset_counts()
    deployed(x[:1].expand(4, *x.shape[1:]))  # a still picture: nothing changes after the first frame
    still = {name: p.events for name, p in deployed._runners[0]._projections_sum.items() if name.startswith("layer.")}
    deployed.reset_counts()
    deployed(x[:1])
    first = {name: p.events for name, p in deployed._runners[0]._projections_sum.items() if name.startswith("layer.")}
    assert still == first
    assert sum(first.values()) > 0


def spikes(segment, x):
    """Spikes of every stage in all steps, (T, N, *shape), and charges of membranes: step by step, by torch's
    convolutions.
    """
    steps = segment.time_steps
    level = torch.round(x.double() / segment.input_scale).clamp(-steps, steps)
    done = [torch.floor((2 * t * level.abs() + steps) / (2 * steps)) for t in range(steps + 1)]
    trains = {"x": torch.stack([(b - a) * level.sign() for a, b in itertools.pairwise(done)])}
    graph = {p.name: p for p in segment.graph.populations}
    found = {}
    for stage in segment.stages:
        v = torch.zeros(len(x), *stage.shape, dtype=torch.float64)
        params = graph[stage.name].params
        bias = torch.from_numpy(params["bias_mant"].astype(float) * 2.0 ** params["bias_exp"].astype(float))
        bias = networks.to_torch(bias[None], stage.shape)
        fired = []
        for t in range(steps):
            v = v + 64 * sum(charge(segment, stage, link, trains[link.source][t]) for link in stage.links) + bias
            v = v.clamp(1 - 2**23, 2**23 - 1)
            spike = v > 64 * params["vth"]
            v = v - spike * 64 * params["vth"] if graph[stage.name].kind == "lif_soft" else v * ~spike
            fired.append(spike.double())
        trains[stage.name] = torch.stack(fired)
        found[stage.name] = trains[stage.name].sum(dim=0) if stage.threshold else v
    return found


def charge(segment, stage, link, value):
    if link.module:
        layer = WEIGHTS[link.module]
        whole = 2 * torch.round(layer.weight.double() / link.weight_scale)
        if isinstance(layer, nn.Linear):
            return F.linear(value.flatten(1), whole)
        function = F.conv1d if isinstance(layer, nn.Conv1d) else F.conv2d
        return function(value, whole, None, layer.stride, layer.padding, layer.dilation, layer.groups)
    if link.gain:
        return link.gain * value
    weight = next(p for p in segment.graph.projections if p.name == link.projection).weight.flat[0]
    return int(weight) * windows(value, stage, segment, link)


WEIGHTS: dict[str, nn.Module] = {}


@pytest.mark.parametrize("seed", range(8))
def test_spikes_are_those_of_neurons_stepped_by_hand(seed, monkeypatch):
    module, x = random_network(seed)
    config = RateConfig(time_steps=16, reset="hard" if seed % 4 == 3 else "soft")
    plan, report = planned(module, x, config, route="rate", chip="loihi1")
    y, macs = counted_by_torch(module, x)
    deployed = neuro.deploy(module, plan)
    got = deployed(x)
    assert set(plan.modules) == set(report.mapped) == set(plan.layers)
    assert (macs_of(deployed, False), macs_of(deployed, True)) == (macs, 0)
    segment = plan.segments[0]
    for stage in segment.stages:
        for link in stage.links:
            if link.module:
                norm = module.get_submodule(link.norm) if link.norm else None
                monkeypatch.setitem(WEIGHTS, link.module, fused(module.get_submodule(link.module), norm))
    runner = networks_over_time.RateNetworkRunner(segment, "fixed_point")
    runner.run(x)
    for name, wanted in spikes(segment, x).items():
        stage = next(s for s in segment.stages if s.name == name)
        assert torch.equal(runner._sent[name].double(), (wanted * stage.unit).to(x.dtype).double()), name
    if config.reset == "soft":
        assert (got - y).norm() < 0.35 * y.norm() + 1e-2


class Residual(nn.Module):
    """A block of ResNet-18: two convolutions with norms around which the input goes, or a convolution of it."""

    def __init__(self, width, out, stride=1):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(width, out, 3, stride, 1, bias=False), nn.BatchNorm2d(out)
        self.conv2, self.bn2 = nn.Conv2d(out, out, 3, 1, 1, bias=False), nn.BatchNorm2d(out)
        self.down = None
        if stride > 1 or width != out:
            self.down = nn.Sequential(nn.Conv2d(width, out, 1, stride, bias=False), nn.BatchNorm2d(out))

    def forward(self, x):
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        y += x if self.down is None else self.down(x)
        return F.relu(y)


def small_resnet(head=True):
    torch.manual_seed(0)
    stem = [nn.Conv2d(3, 8, 3, 1, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU(inplace=True)]
    blocks = [Residual(8, 8), Residual(8, 12, 2), Residual(12, 12)]
    tail = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.2), nn.Linear(12, 10)] if head else []
    module = nn.Sequential(*stem, *blocks, *tail)
    for part in module.modules():
        if isinstance(part, nn.BatchNorm2d):
            part.running_mean.normal_(0, 0.1)
            part.running_var.uniform_(0.5, 1.5)
    return module.eval(), torch.randn(6, 3, 10, 10)


CONFIGS = {"graded": None, "sigma_delta": SigmaDeltaConfig(), "rate": RateConfig(time_steps=48)}


@pytest.mark.parametrize(("route", "most"), [("graded", 0.01), ("sigma_delta", 0.03), ("rate", 0.15)])
def test_a_residual_network_is_one_graph_on_every_route(route, most):
    module, x = small_resnet()
    plan, report = planned(module, x, CONFIGS[route], route=route)
    assert [len(s.modules) for s in plan.segments] == [9]
    assert (report.mac_share, report.crossings_per_token, plan.host) == (1.0, 2.0, ())
    assert report.tokens == len(x)
    y, macs = counted_by_torch(module, x)
    deployed = neuro.deploy(module, plan)
    got = deployed(x)
    assert (macs_of(deployed, False), macs_of(deployed, True)) == (macs, 0)
    assert (got - y).norm() < most * y.norm()
    assert sum(c.tokens == len(x) for c in deployed.counts()) == 8  # conv2 and down of a block share a line
    kinds = {(op.kind, op.runs_on) for op in report.operations if op.kind != "data movement"}
    assert all(place == "chip" for _, place in kinds)


class Viewed(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.head = nn.Conv2d(2, 3, 3), nn.Linear(3 * 4 * 5, 4)

    def forward(self, x):
        return self.head(torch.relu(self.conv(x)).view(x.size(0), -1))


@pytest.mark.parametrize(("route", "config"), ROUTES)
def test_values_can_be_viewed_as_those_of_torch_can(route, config):
    torch.manual_seed(5)
    module, x = Viewed(), torch.rand(4, 2, 6, 7)
    plan, _ = planned(module, x, config, route=route)
    y = module(x).detach()
    for backend in ("fixed_point", "quantised"):
        assert (neuro.deploy(module, plan, backend)(x) - y).norm() < 0.05 * y.norm()


def test_what_the_host_reads_in_between_is_what_the_graph_has():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, _ = small_resnet(head=False)
            self.gate, self.last = nn.Conv2d(12, 12, 1), nn.Conv2d(12, 4, 1)

        def forward(self, x):
            y = self.body(x)
            z = torch.sigmoid(self.gate(y)) * y  # a product of activations: the host's
            return self.last(z), y

    module = Two().eval()
    x = torch.randn(4, 3, 10, 10)
    plan, report = planned(module, x)
    assert [s.modules[-1] for s in plan.segments] == ["gate", "last"]
    assert [len(s.outputs) for s in plan.segments] == [2, 1]
    assert report.crossings_per_token == 4
    y, macs = counted_by_torch(module, x)
    for backend in ("fixed_point", "quantised"):
        deployed = neuro.deploy(module, plan, backend)
        for got, wanted in zip(deployed(x), y, strict=True):
            assert (got - wanted).norm() < 0.02 * wanted.norm()
        assert macs_of(deployed, False) + macs_of(deployed, True) == macs


@pytest.mark.parametrize(
    ("layer", "reason"),
    [
        (nn.Conv2d(4, 4, 3, padding=1, padding_mode="circular"), "padding_mode 'circular'"),
        (nn.ConvTranspose2d(4, 4, 3, padding=1), "a transposed convolution"),
        (nn.MaxPool2d(3, 1, 1), "compares values of a window"),
    ],
)
def test_what_stays_on_the_host_says_why(layer, reason):
    module = nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.ReLU(), layer, nn.Conv2d(4, 3, 1)).eval()
    x = torch.randn(2, 2, 6, 6)
    plan, report = planned(module, x)
    assert [s.modules for s in plan.segments] == [("0",), ("3",)]
    assert reason in report.table()
    y, macs = counted_by_torch(module, x)
    deployed = neuro.deploy(module, plan)
    assert (deployed(x) - y).norm() < 0.02 * y.norm()
    assert macs_of(deployed, False) + macs_of(deployed, True) == macs
    assert (macs_of(deployed, True) > 0) == isinstance(layer, nn.Conv2d | nn.ConvTranspose2d)


def test_layers_that_are_called_otherwise_are_refused_by_name():
    module, x = small_resnet()
    plan, _ = planned(module, x)
    deployed = neuro.deploy(module, plan)
    with pytest.raises(ValueError, match=r"made for samples \(N, 3, 10, 10\), not \(2, 3, 12, 10\)"):
        deployed(torch.randn(2, 3, 12, 10))
    deployed.module[3].register_forward_hook(lambda _, __, y: y + 1)
    with pytest.raises(RuntimeError, match=r"'4\.conv1' was given something else"):
        deployed(x)
    changed, _ = small_resnet()
    changed[1].running_var += 1
    with pytest.raises(ValueError, match="layer '0' holds other weights"):
        neuro.deploy(changed, plan)
    with pytest.raises(ValueError, match="take input_code='spikes'"):
        planned(module, x, RateConfig(8, input_code="analogue"), route="rate")
    with pytest.raises(ValueError, match="take per_channel=False"):
        planned(module, x, RateConfig(8, per_channel=True), route="rate")
    shared = nn.Sequential(conv := nn.Conv2d(2, 2, 3, padding=1), nn.ReLU(), conv).eval()
    plan, _ = planned(shared, torch.randn(2, 2, 5, 5))
    assert [(s.modules, s.rows_per_token) for s in plan.segments] == [(("0",), 2.0)]
    y, macs = counted_by_torch(shared, x := torch.randn(3, 2, 5, 5))
    deployed = neuro.deploy(shared, plan)
    assert (deployed(x) - y).norm() < 0.05 * y.norm()
    assert macs_of(deployed, False) == macs


def test_spikes_that_come_unevenly_are_no_error_of_the_module():
    module, x = small_resnet()
    y, errors = module(x).detach(), []
    for config in (RateConfig(64), RateConfig(6), RateConfig(32, reset="hard")):
        plan, _ = planned(module, x, config, route="rate")
        errors.append(float((neuro.deploy(module, plan)(x) - y).norm() / y.norm()))
    assert errors[0] < 0.05 < errors[1] < 0.5
    assert errors[2] > 2 * errors[0]  # what exceeds a threshold is lost in every layer
    assert "a spike loses what exceeds the threshold" in plan.table()


@pytest.mark.parametrize(("route", "config"), ROUTES)
def test_a_convolution_may_be_the_whole_module(route, config, tmp_path):
    torch.manual_seed(3)
    module, x = nn.Conv2d(2, 3, 3, padding=1, stride=2), torch.rand(4, 2, 7, 6)
    y, macs = counted_by_torch(module, x)
    plan, report = planned(module, x, config, route=route)
    deployed = neuro.deploy(module, load_plan(save_plan(plan, tmp_path)))
    assert (deployed(x) - y).norm() < 0.05 * y.norm()
    assert report.mac_share == 1
    assert (macs_of(deployed, host=False), macs_of(deployed, host=True)) == (macs, 0)


class Skipped(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(2, 2, 3, padding=1), nn.Conv2d(2, 2, 3, padding=1)
        self.second.weight.data *= 0.01

    def forward(self, x):
        return x + self.second(torch.relu(self.first(x)))


def test_the_twin_adds_an_input_that_takes_several_synapses():
    torch.manual_seed(6)
    module, x = Skipped(), torch.randn(5, 2, 6, 6)
    plan, _ = planned(module, x, RateConfig(64), route="rate")
    (link,) = [link for stage in plan.segments[0].stages for link in stage.links if not link.has_layer]
    assert link.gain > 254  # more than one synapse holds
    y = module(x).detach()
    for backend in ("fixed_point", "quantised"):
        assert (neuro.deploy(module, plan, backend)(x) - y).norm() < 0.05 * y.norm()


def test_prepare_gives_convolutions_their_norms():
    module, x = small_resnet()
    twin = neuro.prepare(module, x)
    with torch.no_grad():
        assert torch.allclose(twin(x), module(x), rtol=1e-4, atol=1e-5)
    norms = [name for name, part in twin.named_modules() if isinstance(part, nn.BatchNorm2d)]
    assert norms == [f"{block}.bn{n}" for block in (3, 4, 5) for n in (1, 2)]  # those that follow in an nn.Sequential went


@pytest.mark.lava
@pytest.mark.parametrize("route", CONFIGS)
def test_lava_sends_the_same_messages(route, lava):
    module = nn.Sequential(nn.Conv2d(2, 4, 3, 1, 1), nn.ReLU(), Residual(4, 6, 2), nn.AvgPool2d(2), nn.Conv2d(6, 3, 1))
    module, x = module.eval(), torch.randn(2, 2, 4, 4)
    config = RateConfig(4, reset="hard") if route == "rate" else CONFIGS[route]
    plan, _ = planned(module, x, config, route=route)
    segment = plan.segments[0]
    encode = networks.encode if segment.code == "graded" else networks_over_time.encode
    inputs = encode(segment, x)[0]
    room = {name: F.pad(value, (0, 0, 0, max(depths(segment.graph).values()))) for name, value in inputs.items()}
    record = ("spikes",)
    result = compare(lava.run(segment.graph, room, record=record), simulate(segment.graph, room, record=record))
    assert result.equal, result
    assert result.values > 3_000


def test_a_module_without_layers_is_told_which_ones_are_needed():
    with pytest.raises(ValueError, match=r"at least one nn\.Linear, nn\.Conv1d or nn\.Conv2d that forward calls"):
        neuro.analyse(nn.Softmax(-1), torch.rand(2, 3))


def test_the_rate_route_refuses_a_pooling_in_another_routes_report() -> None:
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(8, 3)).eval()
    x = torch.rand(4, 1, 6, 6)
    calibration = neuro.calibrate(model, [x])
    with pytest.raises(ValueError, match=r"the report is of route 'graded'.*Take the report of .*route='rate'"):
        neuro.convert(model, calibration, neuro.analyse(model, x), neuro.RateConfig())
    plan = neuro.convert(model, calibration, neuro.analyse(model, x, route="rate"), neuro.RateConfig())
    assert len(plan.segments) == 1
