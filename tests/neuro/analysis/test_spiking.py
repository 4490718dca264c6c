"""Networks of spiking neurons: one operation a call, MACs as torch counts them, other libraries by path."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import neuro
from hardware.placement import Connection, DoesNotFit, LayerDemand, place
from neuro.analysis.spiking.neurons import numbered, spiking_layers, spiking_neurons
from neuro.conversion.spiking.describing import describe
from neuro.conversion.spiking.description import NotConvertible
from neuro.graph.demand import layer_demands

snn = pytest.importorskip("snntorch")


class Loop(nn.Module):
    """Two layers in a loop over time, states handed on."""

    def __init__(self, branch: bool = False) -> None:
        super().__init__()
        self.fc1, self.lif1 = nn.Linear(12, 9), snn.Leaky(beta=0.9)
        self.fc2, self.lif2 = nn.Linear(9, 4), snn.Synaptic(alpha=0.8, beta=0.9, reset_mechanism="none")
        self.branch = branch

    def forward(self, x_BTF: Tensor) -> Tensor:
        v1 = self.lif1.reset_mem()
        i2, v2 = self.lif2.reset_mem()
        found = []
        for x_BF in x_BTF.unbind(1):
            if self.branch and float(x_BF.sum()) < 0:
                return x_BF
            spikes, v1 = self.lif1(self.fc1(x_BF), v1)
            _, i2, v2 = self.lif2(self.fc2(spikes), i2, v2)
            found.append(v2)
        return torch.stack(found, 1)


def macs_of(module: nn.Module, x: Tensor) -> float:
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), counter:
        module(x)
    return counter.get_total_flops() / 2


def kinds(report: Any) -> Counter[str]:
    return Counter(op.kind for op in report.operations)


def test_neurons_in_a_loop_over_time_are_one_operation_a_call() -> None:
    x = torch.rand(2, 3, 12)
    report = neuro.analyse(Loop(), x)
    found = kinds(report)
    assert (report.route, report.traced) == ("lif", True)
    assert found["linear"] == 6
    assert (found["spiking neurons (snntorch Leaky)"], found["spiking neurons (snntorch Synaptic)"]) == (3, 3)
    assert set(found) - {"linear", "data movement", "mask or position"} == {
        "spiking neurons (snntorch Leaky)",
        "spiking neurons (snntorch Synaptic)",
    }
    assert len(report.rows()) <= 6
    assert report.macs_per_token * 2 == macs_of(Loop(), x)
    assert report.share("macs") == report.share("parameters") == 1
    assert report.mapped == ("fc1", "fc2")
    assert report.rows_per_token == (("fc1", 3), ("fc2", 3))
    assert report.crossings_per_token == 2 * 3  # a step goes in and comes out; between the layers nothing crosses
    demands = (
        LayerDemand("x", 12, on_chip=False),
        LayerDemand("a", 9, (Connection("x", 12),)),
        LayerDemand("b", 4, (Connection("a", 9),)),
    )
    assert report.cores == len(place(demands, "loihi2").cores)
    table = report.table()
    assert "reset by subtraction" in table
    assert "no reset" in table
    assert "unknown" not in table


def test_convolutions_and_recurrent_neurons() -> None:
    hidden = {"beta": 0.9, "init_hidden": True}
    module = nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1, stride=2),
        snn.Leaky(**hidden),
        nn.Flatten(),
        nn.Linear(4 * 4 * 4, 6),
        snn.RLeaky(**hidden, linear_features=6, output=True),
    )
    x = torch.rand(3, 2, 8, 8)
    report = neuro.analyse(module, x)
    assert report.mapped == ("0", "3")
    assert report.share("macs") == 1
    assert report.macs_per_token * 3 == macs_of(module, x)
    assert {op.runs_on for op in report.operations} == {"chip"}
    assert sum(op.parameters for op in report.operations) == sum(p.numel() for p in module.parameters())
    assert report.crossings_per_token == 2


@pytest.mark.filterwarnings("ignore:Inhibition is an unstable feature")
@pytest.mark.parametrize(
    ("neurons", "reason"),
    [
        (lambda: snn.Alpha(alpha=0.9, beta=0.8, init_hidden=True), "sum of an exciting and an inhibiting current"),
        (lambda: snn.Leaky(beta=0.9, init_hidden=True, inhibition=True), "one neuron of a layer fire at a time"),
        (lambda: snn.Leaky(beta=0.9, init_hidden=True, graded_spikes_factor=2.0), "spikes of the chip are 0 or 1"),
        (lambda: type("Mine", (snn.Leaky,), {})(beta=0.9, init_hidden=True), "a class derived from snnTorch's"),
    ],
)
def test_neurons_that_the_chip_has_no_equivalent_of(neurons: Any, reason: str) -> None:
    module = nn.Sequential(nn.Linear(6, 5), snn.Leaky(beta=0.9, init_hidden=True), nn.Linear(5, 3), neurons())
    report = neuro.analyse(module, torch.rand(2, 6))
    assert report.mapped == ("0",)
    last, before = report.operations[-1], report.operations[-2]
    assert (last.name, last.runs_on) == ("3", "host")
    assert reason in last.reason
    assert last.remedy
    assert (before.name, before.runs_on) == ("2", "host")
    assert report.mac_share == 30 / 45
    with pytest.raises(neuro.NothingToMap, match="nothing that the lif route can map"):
        neuro.analyse(nn.Sequential(nn.Linear(6, 5), neurons()), torch.rand(2, 6))


def test_a_layer_that_more_than_neurons_read_stays_on_the_host() -> None:
    class Skip(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.lif = nn.Linear(6, 6), snn.Leaky(beta=0.9, init_hidden=True)
            self.head = nn.Linear(6, 2)

        def forward(self, x_BF: Tensor) -> Tensor:
            sums = self.fc(x_BF)
            return self.head(self.lif(sums) + sums)

    report = neuro.analyse(Skip(), torch.rand(2, 6), strict=False)
    assert report.mapped == ()
    assert {op.runs_on for op in report.operations} == {"host"}
    reasons = {op.name: op.reason for op in report.operations}
    assert "more than a layer of spiking neurons" in reasons["fc"]
    assert "computed on the host" in reasons["lif"]


class Branches(nn.Module):
    """Two ways from one layer meet in the next; `scaled` leaves the chip on one of them."""

    def __init__(self, scaled: bool) -> None:
        super().__init__()
        self.fc, self.lif = nn.Linear(6, 5), snn.Leaky(beta=0.9, init_hidden=True)
        self.one, self.two, self.end = nn.Linear(5, 4), nn.Linear(5, 4), snn.Leaky(beta=0.9, init_hidden=True)
        self.scaled = scaled

    def forward(self, x_BF: Tensor) -> Tensor:
        spikes = self.lif(self.fc(x_BF))
        other = self.two(spikes)
        return self.end(self.one(spikes) + (torch.tanh(other) if self.scaled else other))


def test_branches_that_meet_in_neurons_are_chip_work_whole_or_not_at_all() -> None:
    x = torch.rand(2, 6)
    report = neuro.analyse(Branches(False), x)
    assert report.mapped == ("fc", "two", "one")  # as they are called
    assert {op.runs_on for op in report.operations} == {"chip"}
    assert len(neuro.describe(Branches(False), example=x).synapses) == 3
    other = neuro.analyse(Branches(True), x)
    assert other.mapped == ("fc",)
    assert {op.name: op.runs_on for op in other.operations if op.name in ("fc", "lif", "one", "two", "end")} == {
        "fc": "chip",
        "lif": "chip",
        "one": "host",
        "two": "host",
        "end": "host",
    }
    with pytest.raises(NotConvertible):
        neuro.describe(Branches(True), example=x)


def test_a_report_of_this_route_is_no_plan_for_layers_one_by_one() -> None:
    x = torch.rand(2, 3, 12)
    with pytest.raises(ValueError, match=r"the report is of route 'lif'.*analyse\(module, example, route='graded'\)"):
        neuro.convert(Loop(), neuro.calibrate(Loop(), [x]), neuro.analyse(Loop(), x, route="lif"))


def test_a_report_whose_route_nobody_chose_converts_the_layers_one_by_one() -> None:
    torch.manual_seed(0)
    model, x = Loop(), torch.rand(2, 3, 12)
    report = neuro.analyse(model, x)
    assert report.route == "lif"
    plan = neuro.convert(model, neuro.calibrate(model, [x]), report)
    assert [segment.modules for segment in plan.segments] == [("fc1",), ("fc2",)]
    assert "neuro.convert_spiking" in plan.notes[-1]
    neuro.deploy(model, plan)(x)
    assert "layer_by_layer" not in report.to_dict()


def test_another_route_takes_neurons_as_one_operation_too() -> None:
    report = neuro.analyse(Loop(), torch.rand(2, 3, 12), route="graded")
    neurons = [op for op in report.operations if op.kind.startswith("spiking neurons")]
    assert len(neurons) == 6
    assert {(op.verdict, op.runs_on) for op in neurons} == {("after transform", "host")}
    assert "route='lif'" in neurons[0].remedy
    assert report.mapped == ("fc1", "fc2")
    assert not [op for op in report.operations if op.kind.startswith("unknown")]


def test_a_network_that_cannot_be_exported_is_seen_by_its_layers() -> None:
    x = torch.rand(2, 3, 12)
    report = neuro.analyse(Loop(branch=True), x)
    assert not report.traced
    assert report.mapped == ("fc1", "fc2")
    assert kinds(report)["spiking neurons (snntorch Leaky)"] == 3
    assert report.mac_share == 1
    assert report.macs_per_token * 2 == macs_of(Loop(), x)


def of_library(path: str, base: str, name: str) -> nn.Module:
    """A stand-in for a neuron of a library that is not installed here: its base class's name and path."""
    parent = type(base, (nn.Module,), {"__module__": path, "forward": lambda self, x: (x > 0.5).float()})
    return type(name, (parent,), {"__module__": path.rpartition(".")[0]})()


@pytest.mark.parametrize(
    ("path", "base", "name", "way"),
    [
        ("norse.torch.module.snn", "SNNCell", "LIFCell", "norse.torch.to_nir"),
        ("spikingjelly.activation_based.neuron.base_node", "BaseNode", "LIFNode", "export_to_nir"),
        ("sinabs.layers.stateful_layer", "StatefulLayer", "LIF", "sinabs.nir.to_nir"),
        ("lava.lib.dl.slayer.neuron.base", "Neuron", "Neuron", "export_hdf5"),
    ],
)
def test_neurons_of_other_libraries_are_known_by_path_and_told_the_way(path: str, base: str, name: str, way: str) -> None:
    module = nn.Sequential(nn.Linear(6, 5), of_library(path, base, name))
    library = path.partition(".")[0]
    report = neuro.analyse(module, torch.rand(2, 6), strict=False)
    assert (report.route, report.mapped) == ("lif", ())
    row = report.operations[-1]
    assert (row.kind, row.runs_on) == (f"spiking neurons ({library} {name})", "host")
    assert way in row.remedy
    assert "`spikegate import FILE`" in report.table()
    with pytest.raises(neuro.NothingToMap, match="spikegate import FILE"):
        neuro.analyse(module, torch.rand(2, 6))


SETTINGS = {
    "default": (snn.Leaky, {}),
    "zero": (snn.Leaky, {"reset_mechanism": "zero"}),
    "read-out": (snn.Leaky, {"reset_mechanism": "none"}),
    "at once": (snn.Leaky, {"reset_delay": False}),
    "per neuron": (snn.Leaky, {"beta": torch.linspace(0.2, 0.9, 4), "threshold": torch.linspace(0.5, 2, 4)}),
    "threshold": (snn.Leaky, {"threshold": -1.0}),
    "factor": (snn.Leaky, {"graded_spikes_factor": 0.5}),
    "quantised": (snn.Leaky, {"state_quant": lambda v: v.round()}),
    "synaptic": (snn.Synaptic, {"alpha": 0.8}),
    "recurrent": (snn.RLeaky, {"linear_features": 4}),
    "one to one": (snn.RLeaky, {"all_to_all": False, "V": 0.5}),
    "recurrent synaptic": (snn.RSynaptic, {"alpha": 0.8, "linear_features": 4}),
    "lapicque": (snn.Lapicque, {}),
    "alpha": (snn.Alpha, {"alpha": 0.95}),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_a_verdict_is_what_the_converter_does(name: str) -> None:
    make, settings = SETTINGS[name]
    layers = [nn.Linear(3, 4), make(**{"beta": 0.9, **settings})]
    try:
        describe(layers)
        converts = True
    except NotConvertible:
        converts = False
    known = spiking_neurons(layers[1])
    assert known is not None
    assert known.converts == converts, known.reason


@pytest.mark.parametrize(
    "name", [name for name in SETTINGS if name not in ("threshold", "factor", "quantised", "alpha", "lapicque")]
)
def test_a_verdict_on_loihi1_is_what_the_placement_of_the_converted_graph_does(name: str) -> None:
    make, settings = SETTINGS[name]
    module = nn.Sequential(nn.Linear(3, 4), make(**{"beta": 0.9, "init_hidden": True, **settings}))
    network = neuro.convert_spiking(neuro.describe(module), steps=5)
    try:
        place(layer_demands(network.graph), "loihi1")
        fits = True
    except DoesNotFit:
        fits = False
    report = neuro.analyse(module, torch.rand(2, 3), "loihi1", strict=False)
    assert {op.runs_on for op in report.operations} == {"chip" if fits else "host"}
    if not fits:
        assert "has none" in report.operations[-1].reason


def test_a_reset_that_was_changed_after_the_neuron_was_made_is_named() -> None:
    layer = snn.Leaky(beta=0.9, init_hidden=True)
    layer.state_function = layer._base_zero
    report = neuro.analyse(nn.Sequential(nn.Linear(3, 4), layer), torch.rand(2, 3), strict=False)
    assert report.mapped == ()
    assert "reset_mechanism says 'subtract', and the neuron computes 'zero'" in report.operations[-1].reason


def test_average_pools_and_norms_beside_synapses_fold() -> None:
    hidden = {"beta": 0.9, "init_hidden": True}
    layers = [nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.AvgPool2d(2), snn.Leaky(**hidden), nn.AvgPool2d(2)]
    module = nn.Sequential(*layers, nn.Flatten(), nn.Linear(16, 3), snn.Leaky(**hidden)).eval()
    report = neuro.analyse(module, torch.rand(2, 1, 8, 8))
    assert {op.runs_on for op in report.operations} == {"chip"}
    assert report.mapped == ("0", "6")
    assert describe(module, (1, 8, 8)).layer_names == ("layer3", "layer7")
    layers[2] = nn.AvgPool2d(2, ceil_mode=True)
    other = neuro.analyse(nn.Sequential(*layers[:4]).eval(), torch.rand(2, 1, 8, 8), strict=False)
    assert other.mapped == ()


def test_layers_within_neurons_and_modules_without_any() -> None:
    recurrent = snn.RLeaky(beta=0.9, linear_features=4)
    assert list(spiking_layers(nn.Sequential(nn.Linear(4, 4), recurrent))) == ["1"]
    assert spiking_layers(nn.Sequential(nn.Linear(4, 4), nn.ReLU())) == {}
    assert spiking_neurons(nn.LSTM(2, 2)) is None
    assert numbered(["a", "a", None, "a", "b"]) == [0, 0, 1, 2, 3]
    assert numbered([]) == []
