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
from neuro.simulators.fixed_point import run_pipelined
from tests.neuro.conversion.random_pictures import random_network

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths:UserWarning")


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


@pytest.mark.parametrize("seed", range(20))
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
