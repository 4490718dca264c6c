"""Every layer that runs is in the plan or on the host, once, and every multiply-accumulate is counted once."""

from __future__ import annotations

import dataclasses
from collections import Counter

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import neuro
from neuro.analysis import compatibility
from neuro.conversion.plan import LostLayer, load_plan, save_plan
from neuro.conversion.rate import RateConfig
from neuro.conversion.sigma_delta import SigmaDeltaConfig
from neuro.deployment.sensitivity import part_of
from tests.neuro.deployment.random_chains import Chain, random_chain

CONFIGS = {"graded": None, "sigma_delta": SigmaDeltaConfig(), "rate": RateConfig(time_steps=8)}


def deployed_and_report(module, x, route, backend="fixed_point"):
    report = neuro.analyse(module, x, route=route)
    plan = neuro.convert(module, neuro.calibrate(module, [x]), report, CONFIGS[route])
    return neuro.deploy(module, plan, backend), report


def watched(module, x):
    """What the float module gives, rows that each nn.Linear computed, and torch's own count."""
    rows = Counter()
    handles = [
        layer.register_forward_hook(lambda _, __, y, name=name: rows.update({name: y[..., 0].numel()}))
        for name, layer in module.named_modules()
        if isinstance(layer, nn.Linear)
    ]
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        y = module(x)
    for handle in handles:
        handle.remove()
    return y, rows, counter.get_total_flops() // 2


def macs_of(deployed, host):
    return sum(c.dense_macs for c in deployed.counts() if c.host is host)


@pytest.mark.parametrize("seed", range(16))
def test_layers_and_operations_of_random_chains_are_counted_once(seed, monkeypatch):
    module, x = random_chain(seed)
    traced = compatibility.trace(module, x)
    monkeypatch.setattr(compatibility, "trace", lambda *_: traced)  # the same for all routes
    y, rows, macs = watched(module, x)
    weights = {name: layer.weight.numel() for name, layer in module.named_modules() if name in rows}
    for route in CONFIGS:
        deployed, report = deployed_and_report(module, x, route, "fixed_point" if seed % 4 else "quantised")
        plan = deployed.plan
        got = deployed(x)
        on_host = Counter(work.layer for work in plan.host if work.macs_per_token)
        in_report = {op.name: op for op in report.operations if op.macs_per_token}
        assert Counter(plan.modules) + on_host == Counter(set(plan.modules) | set(on_host))  # none twice
        assert set(plan.modules) | set(on_host) == set(in_report) == set(plan.layers)
        assert rows.keys() == in_report.keys() - {"(root)", "(functional)"}
        assert set(plan.modules) == set(report.mapped)
        assert plan.layers | {n: rows[n] * weights[n] / 10 for n in rows} == pytest.approx(plan.layers)
        counted = {c.layer: c.dense_macs for c in deployed.counts()}
        assert {n: counted[n] for n in plan.modules} == {n: rows[n] * weights[n] for n in plan.modules}
        assert macs_of(deployed, True) + macs_of(deployed, False) == macs, route
        if route == "graded":
            assert (got - y).norm() < 0.1 * y.norm() + 0.02


@pytest.mark.parametrize("layers", range(2, 9))
@pytest.mark.parametrize("route", CONFIGS)
def test_a_chain_is_pairs_from_its_start_and_a_last_layer_alone(route, layers):
    torch.manual_seed(layers)
    parts = [part for _ in range(layers) for part in (nn.Linear(5, 5), nn.ReLU())][:-1]
    module, x = nn.Sequential(*parts), torch.randn(1, 6, 5)
    deployed, report = deployed_and_report(module, x, route)
    names = [str(2 * n) for n in range(layers)]
    wanted = [tuple(names[n : n + 2]) for n in range(0, layers, 2)]
    assert [s.modules for s in deployed.segments] == wanted
    assert [(p.fc1, p.fc2) for p in report.pairs] == [w for w in wanted if len(w) == 2]
    assert report.crossings_per_token == 2 * len(wanted)
    deployed(x)
    assert (macs_of(deployed, False), macs_of(deployed, True)) == (6 * 25 * layers, 0)


def test_a_pair_that_a_route_cannot_take_leaves_its_second_layer_to_the_next():
    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6)

        def forward(self, x):
            return self.c(self.b(self.a(x).relu().square()).relu())

    module, x = Mixed(), torch.randn(2, 4, 6)
    for route, wanted in (("graded", [("a", "b"), ("c",)]), ("rate", [("a",), ("b", "c")])):
        deployed, _ = deployed_and_report(module, x, route)
        assert [s.modules for s in deployed.segments] == wanted


def chain_plan():
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 3))
    deployed, _ = deployed_and_report(module, torch.randn(4, 6), "graded")
    return module, deployed.plan


def test_deploy_names_the_layer_that_a_plan_lost(tmp_path):
    module, plan = chain_plan()
    lost = dataclasses.replace(plan, segments=plan.segments[:1])
    with pytest.raises(LostLayer, match=r"'4' would be lost: the report counts 18 .* of the plan 0"):
        neuro.deploy(module, lost)
    twice = dataclasses.replace(plan, host=part_of(plan, [plan.segments[0].name]).host)
    with pytest.raises(LostLayer, match="'4' would be counted too often"):
        neuro.deploy(module, twice)
    neuro.deploy(module, part_of(plan, [plan.segments[1].name]))  # its layers are listed with the host's work
    assert load_plan(save_plan(plan, tmp_path / "whole")).layers == plan.layers == {"0": 48, "2": 48, "4": 18}
    with pytest.raises(LostLayer, match="'4'"):
        neuro.deploy(module, load_plan(save_plan(lost, tmp_path / "lost")))


def test_a_layer_that_the_plan_knows_nothing_of_is_counted_where_it_runs():
    module, plan = chain_plan()
    old = dataclasses.replace(plan, segments=plan.segments[:1], layers={})  # as an older version wrote it
    deployed = neuro.deploy(module, old)
    deployed(torch.randn(7, 6))
    last = deployed.counts()[-1]
    assert (last.layer, last.tokens, last.dense_macs, last.weight_bytes, last.host) == ("4:linear", 7, 126, 72, True)
    deployed.reset_counts()
    assert all(c.layer != "4:linear" for c in deployed.counts())

    rare = Chain([nn.Linear(6, 6)], None, True).eval()
    x = torch.randn(3, 6)
    deployed, _ = deployed_and_report(rare, x, "graded")
    for given, macs in ((x, 0), (x.abs() + 200, 108)):
        deployed.reset_counts()
        deployed(given)
        assert (macs_of(deployed, False), macs_of(deployed, True)) == (108, macs)
