"""Networks of convolutions: their integers against torch's own convolutions, every multiply-accumulate counted once."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_linear_bn_eval
from torch.utils.flop_counter import FlopCounterMode

import neuro
from neuro.conversion.plan import load_plan, save_plan
from neuro.deployment import networks
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
    record = [f"{stage.name}.spikes" for stage in segment.stages]
    activity = run_pipelined(segment.graph, networks.encode(segment, x)[0], mode=mode, record=record)
    return {stage.name: networks.to_torch(activity.spikes[stage.name][0], stage.shape).long() for stage in segment.stages}


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
