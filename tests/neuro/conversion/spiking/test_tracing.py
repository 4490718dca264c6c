"""Whole modules with loops of their own, as descriptions: their spikes are the module's; what is lost is refused."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from neuro.conversion.spiking.describing import describe
from neuro.conversion.spiking.description import Description, NotConvertible, run_float
from neuro.modules.spiking import SpikingClassifier

snntorch = pytest.importorskip("snntorch", reason="snntorch is not installed")


class Loop(nn.Module):
    """snnTorch's usual form: a loop over steps, states by hand, steps first."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.lif1 = nn.Linear(6, 9), snntorch.Leaky(beta=0.9)
        self.fc2, self.lif2 = nn.Linear(9, 3), snntorch.Synaptic(alpha=0.5, beta=0.8)

    def forward(self, x_TBF):
        mem1, (syn2, mem2), spikes = self.lif1.reset_mem(), self.lif2.reset_mem(), []
        for step in range(x_TBF.size(0)):
            spk1, mem1 = self.lif1(self.fc1(x_TBF[step]), mem1)
            spk2, syn2, mem2 = self.lif2(self.fc2(spk1), syn2, mem2)
            spikes.append(spk2)
        return torch.stack(spikes)


class Residual(nn.Module):
    """Convolutions whose branches are added before neurons, pools, views; one step a call."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.lif1 = nn.Conv2d(2, 4, 3, padding=1), self.leaky()
        self.conv, self.norm, self.lif2 = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), self.leaky()
        self.short, self.drop = nn.Conv2d(4, 4, 1), nn.Dropout2d(0.5)
        self.pool, self.head, self.out = nn.AvgPool2d(2), nn.Linear(4 * 3 * 2, 5), self.leaky(reset_mechanism="zero")

    @staticmethod
    def leaky(**settings):
        return snntorch.Leaky(beta=0.7, init_hidden=True, **settings)

    def forward(self, x):
        a = self.lif1(self.stem(x))
        b = self.lif2(self.norm(self.conv(self.drop(a))) + self.short(a))
        return self.out(self.head(self.pool(b).view(len(x), -1)))


def spikes_of(description: Description, x_BTF: torch.Tensor) -> torch.Tensor:
    return run_float(description, x_BTF).spikes[description.outputs[0]]


@torch.no_grad()
def test_a_loop_over_steps():
    torch.manual_seed(0)
    model = Loop().double()
    model.fc1.weight.mul_(3)
    model.fc2.weight.mul_(3)
    x = (torch.rand(12, 4, 6) < 0.5).double()
    with pytest.raises(RuntimeError, match="dtype"):  # snnTorch's spikes are float32
        model(x)
    model.float()
    description = describe(model, example=x.float())
    assert [(layer.name, layer.reset, layer.reset_delayed) for layer in description.neurons] == [
        ("lif1", "subtract", True),
        ("lif2", "subtract", True),
    ]
    expected = model(x.float()).transpose(0, 1)
    assert expected.mean() > 0.05
    assert (spikes_of(description, x.transpose(0, 1)) != expected).double().mean() < 0.005  # float32 beside float64


@torch.no_grad()
def test_branches_meet_and_convolutions_stay():
    torch.manual_seed(1)
    model = Residual()
    model.norm.running_mean.uniform_(-0.2, 0.2)
    for weight in (model.stem.weight, model.conv.weight, model.head.weight):
        weight.mul_(3)
    model.head.weight.add_(0.2)
    x = (torch.rand(3, 8, 2, 6, 4) < 0.4).float()
    model.train()
    description = describe(model, example=x[:, 0])
    assert model.training
    assert {item.name: item.conv is not None for item in description.synapses} == {
        "to_lif1": True,
        "to_lif2": True,
        "to_lif2_2": True,
        "to_out": False,
    }
    model.eval()
    expected = torch.stack([model(step) for step in x.unbind(1)], dim=1)
    assert expected.mean() > 0.05
    assert (spikes_of(description, x) != expected).double().mean() < 0.01


@torch.no_grad()
def test_layers_that_take_all_steps_at_once():
    torch.manual_seed(2)
    model = SpikingClassifier((6, 10, 3))
    x = (torch.rand(4, 9, 6) < 0.5).float()
    description = describe(model, example=x)
    assert description.input_shape == (6,)
    assert (spikes_of(description, x) != model(x)).double().mean() < 0.01


@torch.no_grad()
def test_recurrent_neurons_and_a_read_out():
    model = nn.Sequential(
        nn.Linear(3, 4),
        snntorch.RLeaky(beta=0.5, linear_features=4, init_hidden=True),
        nn.Linear(4, 2),
        snntorch.Leaky(beta=0.9, reset_mechanism="none", init_hidden=True),
    )
    by_order, by_run = describe(model, readout=True), describe(model, example=torch.zeros(1, 3), readout=True)
    assert by_run.layer("layer3").is_readout
    x = (torch.rand(2, 5, 3) < 0.5).double()
    first, second = (run_float(one, x).potentials["layer3"] for one in (by_order, by_run))
    assert torch.equal(first, second)


class Odd(nn.Module):
    """One of several things that a description cannot say, between layers."""

    def __init__(self, what: str) -> None:
        super().__init__()
        self.what, self.a, self.b = what, nn.Linear(3, 3), nn.Linear(3, 3)
        self.pool = nn.MaxPool1d(1)
        self.lif1, self.lif2 = (snntorch.Leaky(beta=0.5, init_hidden=True) for _ in range(2))

    def forward(self, x):
        first = self.a(x)
        if self.what == "scaled in place":
            first *= 2
        spikes = self.lif1(torch.relu(first) if self.what == "relu" else first)
        if self.what == "product":
            return self.lif2(self.b(spikes * spikes))
        if self.what == "pool":
            return self.lif2(self.pool(spikes))
        if self.what == "twice":
            return self.lif1(self.b(spikes))
        return self.b(spikes) if self.what == "behind" else self.lif2(self.b(spikes))


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("relu", "lif1 hears the result of relu, which has no counterpart"),
        ("scaled in place", "lif1 hears the result of mul_,"),
        ("product", "lif2 hears the result of "),
        ("pool", r"pool \(MaxPool1d\) has no counterpart"),
        ("twice", "lif1 is called in two places"),
        ("behind", "b: weights behind the last neurons"),
    ],
)
def test_what_a_description_cannot_say_is_refused_by_name(what, message):
    with pytest.raises(NotConvertible, match=message):
        describe(Odd(what), example=torch.zeros(2, 3))
    with pytest.raises(NotConvertible, match="give an example"):
        describe(Odd(what))
    with pytest.raises(NotConvertible, match="no neurons of snnTorch were called"):
        describe(nn.Linear(2, 2), example=torch.zeros(1, 2))
    with pytest.raises(NotConvertible, match="an example belongs to a module"):
        describe([nn.Linear(2, 2)], example=torch.zeros(1, 2))


class Altered(nn.Module):
    """A loop over steps that does one thing which a converted network would not do."""

    def __init__(self, what: str) -> None:
        super().__init__()
        self.what, self.by_name = what, what.endswith("by name")
        self.fc1, self.lif1 = nn.Linear(6, 5), snntorch.Leaky(beta=0.9)
        self.fc2, self.lif2 = nn.Linear(6, 5), snntorch.RLeaky(beta=0.8, linear_features=5)

    def forward(self, x_BTF):
        mem1, (spk2, mem2) = self.lif1.reset_mem(), self.lif2.reset_mem()
        order = reversed(range(x_BTF.size(1))) if self.what == "backwards" else range(x_BTF.size(1))
        for step in order:
            x = x_BTF[:, step]
            spk1, mem1 = self.lif1(mem=mem1, input_=self.fc1(input=x)) if self.by_name else self.lif1(self.fc1(x), mem1)
            if self.what in ("scaled", "scaled, by name"):
                mem1 = 0.5 * mem1
            if self.what == "every other" and step % 2:
                continue
            drive = self.fc2(x)
            if self.what == "alpha":
                drive = torch.add(drive, self.fc1(x), alpha=0.5)
            if self.what == "dropout":
                drive = nn.functional.dropout(drive, 0.5)  # its own default is to be active
            spk2, mem2 = self.lif2(nn.functional.dropout(drive, 0.5, self.training), spk2, mem2)
        return spk1, spk2


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("scaled", "does not go on from the state that its step before left"),
        ("scaled, by name", "does not go on from the state that its step before left"),
        ("backwards", "hears the steps of its input in another order"),
        ("every other", "are not called equally often"),
        ("alpha", "add with alpha"),
        ("dropout", "lif2 hears the result of dropout that is on in evaluation too"),
    ],
)
def test_what_would_be_converted_as_something_else_is_refused(what, message):
    torch.manual_seed(0)
    x = torch.rand(2, 6, 6)
    with torch.no_grad():
        with pytest.raises(NotConvertible, match=message):
            describe(Altered(what), example=x)
        torch.manual_seed(1)
        plain, named = Altered("nothing"), Altered("by name")
        named.load_state_dict(plain.state_dict())
        by_place, by_name = describe(plain, example=x), describe(named, example=x)
    assert len(by_place.neurons) == 2
    spikes = [run_float(one, (x > 0.5).double()).spikes for one in (by_place, by_name)]
    assert all(torch.equal(spikes[0][name], spikes[1][name]) for name in by_place.outputs)
    assert any(bool(spikes[0][name].any()) for name in by_place.outputs)
