"""Per-layer errors and one segment at a time, against the same worked out by hand."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from neuro.analysis.compatibility import analyse
from neuro.conversion.calibration import calibrate
from neuro.conversion.graded import GradedConfig, convert
from neuro.conversion.plan import Plan
from neuro.deployment.deployed import deploy
from neuro.deployment.sensitivity import layer_errors, one_at_a_time, part_of


class Net(nn.Module):
    """A linear layer, an MLP pair read twice, and a head."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(12, 16)
        self.fc1, self.fc2 = nn.Linear(16, 32), nn.Linear(32, 16)
        self.norm, self.head = nn.LayerNorm(16), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for _ in range(2):
            x = x + self.fc2(torch.relu(self.fc1(self.norm(x))))
        return self.head(x)


@pytest.fixture(scope="module")
def converted() -> tuple[Net, Plan, list[Tensor]]:
    net = Net().eval()
    batches = list(torch.randn(40, 12, generator=torch.Generator().manual_seed(1)).split(10))
    plan = convert(net, calibrate(net, batches), analyse(net, batches[0]), GradedConfig(weight_bits=4))
    return net, plan, batches


def test_errors_are_those_of_the_layers_outputs(converted: tuple[Net, Plan, list[Tensor]]) -> None:
    net, plan, batches = converted
    found = {e.segment: e for e in layer_errors(net, plan, batches)}
    assert list(found) == ["first", "fc1", "head"]
    assert [e.rows for e in found.values()] == [40, 80, 40]
    x = torch.cat(batches)
    first = deploy(net, plan)
    with torch.no_grad():
        wanted, got = net.first(x), first.module.get_submodule("first")(x)
        relative = float((got - wanted).norm() / wanted.norm())
        whole = float((deploy(net, plan)(x) - net(x)).norm() / net(x).norm())
    assert found["first"].relative_rms == pytest.approx(relative, rel=1e-5)
    assert found["first"].own_relative_rms == pytest.approx(relative, rel=1e-5)  # nothing is converted before it
    assert found["head"].relative_rms == pytest.approx(whole, rel=1e-5)
    assert 0 < found["head"].own_relative_rms < found["head"].relative_rms
    model = deploy(net, plan)
    model(x)
    counts = {c.layer: c for c in model.counts()}
    assert found["first"].events_per_row == counts["first"].events / 40
    assert found["fc1"].synops_per_row == (counts["fc1"].synops + counts["fc2"].synops) / 80
    assert layer_errors(net, plan, batches[:1], "quantised")[0].events_per_row is None
    with pytest.raises(ValueError, match="no batch to compare on"):
        layer_errors(net, plan, [])
    assert not net.first._forward_hooks


def test_one_segment_at_a_time_is_that_segment_alone(converted: tuple[Net, Plan, list[Tensor]]) -> None:
    net, plan, batches = converted
    x = torch.cat(batches)

    def loss(module: nn.Module) -> float:
        with torch.no_grad():
            return float((module(x) - net(x)).square().mean())

    found = one_at_a_time(net, plan, loss, backend="fixed_point")
    assert [(f.segment, f.layers) for f in found] == [("first", ("first",)), ("fc1", ("fc1", "fc2")), ("head", ("head",))]
    assert sum(f.mac_share for f in found) == pytest.approx(1)
    assert found[1].mac_share == pytest.approx(2 * 2 * 16 * 32 / (12 * 16 + 2 * 2 * 16 * 32 + 16 * 5))
    for record in found:
        with torch.no_grad():
            model = Net().eval()
            parts = deploy(net, plan).module
            for name in record.layers:
                setattr(model, name, parts.get_submodule(name))
        assert record.loss_nats == record.delta_nats == pytest.approx(loss(model))
        assert record.delta_nats > 0


def test_a_part_of_a_plan_counts_the_rest_on_the_host(converted: tuple[Net, Plan, list[Tensor]]) -> None:
    net, plan, batches = converted
    x = torch.cat(batches)
    whole, part = deploy(net, plan), deploy(net, part_of(plan, ("fc1",)))
    whole(x), part(x)
    assert isinstance(part.module.head, nn.Linear)
    assert sum(c.dense_macs for c in part.counts()) == sum(c.dense_macs for c in whole.counts())
    assert {c.layer for c in part.counts() if c.host} >= {"first:linear", "head:linear"}
    assert [c.layer for c in part.counts() if not c.host] == ["fc1", "fc2"]
    with pytest.raises(ValueError, match="no segment 'fc3'; it has: first, fc1, head"):
        part_of(plan, ("fc3",))
