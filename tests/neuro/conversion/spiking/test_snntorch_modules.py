"""Whole snnTorch networks as descriptions: convolutions, pools and norms against torch itself, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from neuro.conversion.spiking.convert import convert_spiking
from neuro.conversion.spiking.describing import describe
from neuro.conversion.spiking.description import INPUT, NotConvertible, run_float, weighted
from neuro.conversion.spiking.layers import Path

snntorch = pytest.importorskip("snntorch", reason="snntorch is not installed")


def leaky(**settings) -> nn.Module:
    return snntorch.Leaky(**{"beta": 0.5, "init_hidden": True, **settings})


@torch.no_grad()
def stepped(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """A model whose neurons keep their own states, over (B, T, ...) from rest."""
    for module in model.modules():
        if hasattr(module, "reset_mem"):
            module.reset_mem()
    return torch.stack([model(x[:, t]).double() for t in range(x.shape[1])], dim=1)


def on_grid(model: nn.Module, seed: int) -> nn.Module:
    rng = np.random.default_rng(seed)
    with torch.no_grad():
        for name, value in model.named_parameters():
            low, high = (-4, 4) if name.endswith("bias") else (-8, 16)
            value.copy_(torch.from_numpy(rng.integers(low, high, tuple(value.shape)) / 16))
    return model


@pytest.mark.parametrize("seed", range(4))
def test_a_convolutional_network_spikes_as_snntorch_does(seed):
    """Two convolutions, pools before and behind one, a flatten and a dense layer; resets of all kinds; on the grid."""
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1),
        leaky(),
        nn.AvgPool2d(2),
        nn.Conv2d(4, 4, (3, 2), groups=2),
        leaky(reset_mechanism="zero", threshold=torch.tensor([0.5, 1.0, 1.0, 2.0]).reshape(4, 1, 1)),
        nn.Dropout(0.5),
        nn.Flatten(),
        nn.Linear(4 * 2 * 2, 5),
        leaky(reset_mechanism="none"),
    )
    on_grid(model, seed).eval()
    x = torch.from_numpy(np.random.default_rng(seed).random((3, 5, 2, 8, 6)) < 0.3).float()  # exact on the grid
    expected = stepped(model, x)
    description = describe(model, (2, 8, 6))
    assert torch.equal(run_float(description, x).spikes["layer8"], expected)
    assert expected.any()
    made = convert_spiking(description, steps=5)
    kinds = {p.name: p.kind for p in made.graph.projections}
    assert (kinds["to_layer1"], kinds["to_layer4"], kinds["to_layer8"]) == ("conv", "conv", "dense")
    for mode in ("lava", "chip"):
        assert torch.equal(made.run(x, mode=mode)[0]["layer8"], expected)


def ways() -> dict[str, tuple[list[nn.Module], tuple[int, ...], bool]]:
    """Linear layers, the shape that reaches them, and whether they are one convolution."""
    norm = nn.BatchNorm2d(3)
    norm.running_mean.uniform_(-1, 1)
    norm.running_var.uniform_(0.5, 2)
    return {
        "conv": ([nn.Conv2d(2, 3, (3, 2), (1, 2), (1, 0), (2, 1))], (2, 7, 6), True),
        "same": ([nn.Conv2d(2, 3, 3, padding="same")], (2, 5, 4), True),
        "conv and norm": ([nn.Conv2d(2, 3, 3), norm], (2, 5, 4), True),
        "pool": ([nn.AvgPool2d(2)], (2, 5, 4), True),
        "pool with padding": ([nn.AvgPool2d(3, 2, 1)], (2, 5, 4), True),
        "pool, conv": ([nn.AvgPool2d(2), nn.Conv2d(2, 4, 3, padding=1, groups=2)], (2, 8, 6), True),
        "pool with a rest, conv": ([nn.AvgPool2d(2), nn.Conv2d(2, 4, 2)], (2, 9, 7), True),
        "pool with a rest, padded conv": ([nn.AvgPool2d(2), nn.Conv2d(2, 4, 3, padding=1)], (2, 9, 7), False),
        "overlapping pool, conv": ([nn.AvgPool2d(3, 2), nn.Conv2d(2, 4, 2, stride=2)], (2, 9, 8), True),
        "conv, pool": ([nn.Conv2d(2, 3, 3, 2, 1), nn.AvgPool2d(2)], (2, 9, 8), True),
        "pool, conv, pool": ([nn.AvgPool2d(2), nn.Conv2d(2, 3, 2), nn.AvgPool2d(2, 1)], (2, 9, 8), True),
        "two convs": ([nn.Conv2d(2, 3, 2), nn.Conv2d(3, 2, 2)], (2, 4, 4), False),
        "flatten": ([nn.Flatten(), nn.Linear(40, 3)], (2, 5, 4), False),
        "pool, flatten": ([nn.AvgPool2d(2), nn.Flatten(), nn.Linear(8, 3)], (2, 5, 4), False),
        "linear": ([nn.Linear(4, 3)], (4,), False),
        "linear and norm": ([nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Linear(3, 2, bias=False)], (4,), False),
        "one to one": ([], (2, 3, 2), False),
        "length": ([nn.Conv1d(2, 3, 3, 2, 1), nn.AvgPool1d(2)], (2, 9), True),
    }


@pytest.mark.parametrize("name", ways())
def test_a_way_between_neurons_is_what_torch_computes(name):
    torch.manual_seed(0)
    modules, shape, is_conv = ways()[name]
    path = Path(INPUT, shape)
    for number, module in enumerate(modules):
        path.add(str(number), module.double().eval())
    item, bias = path.synapses("w", "a")
    x = torch.randn(2, *shape).double()
    with torch.no_grad():
        expected = nn.Sequential(*modules)(x)
    assert (item.conv is not None) == is_conv
    wide = x if len(shape) != 2 else x[:, :, None]
    flat = wide.permute(0, 3, 2, 1).reshape(2, 1, -1) if wide.ndim == 4 else wide[:, None]
    got = weighted(item, flat)[:, 0] + torch.from_numpy(bias)
    out = expected if expected.ndim != 3 else expected[:, :, None]
    flat_out = out.permute(0, 3, 2, 1).reshape(2, -1) if out.ndim == 4 else out
    assert torch.allclose(got, flat_out, atol=1e-12)


def test_a_read_out_is_the_last_potential():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 20), leaky(beta=0.9), nn.Linear(20, 2), leaky(beta=0.8, reset_mechanism="none"))
    x = (torch.rand(5, 15, 6) < 0.5).float()
    potentials = []
    with torch.no_grad():
        for t in range(15):
            model(x[:, t])
            potentials.append(model[3].mem.clone())
    made = convert_spiking(describe(model, readout=True), steps=15)
    values, activity = made.run(x)
    expected = torch.stack(potentials, dim=1).double()
    assert made.readouts == ("layer3",)
    assert expected.abs().max() > 0.3
    assert (values["layer3"] - expected).abs().mean() < 0.05 * expected.abs().mean()
    assert int(activity.spikes["layer3"].abs().max()) == 0


def test_what_has_no_counterpart_is_refused_by_name():
    one = leaky()
    refused = {
        "does not say in which order": lambda: describe(nn.ModuleList([nn.Linear(2, 2), one])[0]),
        "input_shape is needed": lambda: describe(nn.Sequential(nn.Conv2d(1, 1, 2), one)),
        r"0 \(MaxPool2d\) has no counterpart .*use an average pool": lambda: describe([nn.MaxPool2d(2), one], (1, 4, 4)),
        r"1 \(Linear\) is reached by a grid \(1, 4, 4\); put nn.Flatten": lambda: describe(
            [nn.Identity(), nn.Linear(4, 2), one], (1, 4, 4)
        ),
        r"0 \(Linear\) does not fit what reaches it, \(3,\)": lambda: describe([nn.Linear(2, 2), one], (3,)),
        "2: weights behind the last neurons": lambda: describe([nn.Linear(2, 2), one, nn.Linear(2, 2)]),
        "padding_mode is 'reflect'": lambda: describe(
            [nn.Conv2d(1, 1, 3, padding=1, padding_mode="reflect"), one], (1, 4, 4)
        ),
        "divide by different numbers": lambda: describe([nn.AvgPool2d(2, ceil_mode=True), one], (1, 5, 5)),
        "it folds into a Linear or convolution": lambda: describe([nn.BatchNorm1d(2), one], (2,)),
        "neurons are Alpha": lambda: describe([nn.Linear(2, 2), snntorch.Alpha(alpha=0.9, beta=0.8)]),
        r"input_shape is 2; whole numbers": lambda: describe([nn.Linear(2, 2), one], 2),
        "3 is no module": lambda: describe(3, (2,)),
        r"layer1: threshold has shape \(3,\), its neurons \(2,\)": lambda: describe(
            [nn.Linear(2, 2), leaky(threshold=torch.ones(3))]
        ),
    }
    for message, make in refused.items():
        with pytest.raises(NotConvertible, match=message):
            make()


@pytest.mark.parametrize("seed", range(3))
def test_a_recurrent_convolution_spikes_as_snntorch_does(seed):
    """All to all by a kernel: a projection to itself that stays a convolution."""
    torch.manual_seed(seed)
    settings = {"conv2d_channels": 3, "kernel_size": 3, "beta": 0.5, "init_hidden": True}
    model = on_grid(nn.Sequential(nn.Conv2d(1, 3, 3, padding=1), snntorch.RLeaky(**settings)), seed)
    x = torch.from_numpy(np.random.default_rng(seed).random((2, 6, 1, 4, 5)) < 0.3).float()
    expected = stepped(model, x).permute(0, 1, 4, 3, 2).flatten(2)  # (W, H, C)
    description = describe(model, (1, 4, 5))
    assert 0.05 < expected.mean() < 0.9
    assert torch.equal(run_float(description, x).spikes["layer1"], expected)
    made = convert_spiking(description, steps=6)
    assert {p.name: p.kind for p in made.graph.projections}["layer1_own"] == "conv"
    for mode in ("lava", "chip"):
        assert torch.equal(made.run(x, mode=mode)[0]["layer1"], expected)


def test_rsynaptic_at_once_is_what_it_computes():
    """snnTorch 1.0.0: reset_delay=False of RSynaptic changes an argument, and its own state is reset a step later."""
    made = describe([nn.Linear(2, 2), snntorch.RSynaptic(alpha=0.5, beta=0.5, linear_features=2, reset_delay=False)])
    assert made.neurons[0].reset_delayed
    assert "RSynaptic computes reset_delay=False as True" in made.notes[0]


@pytest.mark.filterwarnings(
    "ignore:`torch.jit.script_method` is deprecated:DeprecationWarning"
)  # torch's own, of its compiler
def test_a_compiled_module_is_described_as_what_was_compiled():
    model = nn.Sequential(nn.Linear(3, 2), leaky())
    plain, compiled = describe(model), describe(torch.compile(model))
    assert [item.name for item in compiled.synapses] == [item.name for item in plain.synapses]
    assert np.array_equal(compiled.synapses[0].weight, plain.synapses[0].weight)


def test_samples_of_a_line_may_keep_their_channels():
    """(samples, steps, C, L) is what Conv1d takes at each step; a gradient of the calibration is not wanted."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv1d(2, 4, 3, padding=1), snntorch.Leaky(beta=0.5, init_hidden=True))
    x = (torch.rand(3, 6, 2, 9) < 0.4).float().requires_grad_()
    made = convert_spiking(describe(model, (2, 9)), steps=6, calibration=x)
    expected = stepped(model, x.detach()).transpose(2, 3).flatten(2)  # (L, C)
    assert 0 < expected.mean() < 1
    assert (made.run(x)[0]["layer1"] == expected).double().mean() > 0.99
    with pytest.raises(NotConvertible, match=r"\(samples, steps, 18\), or \(samples, steps, 2, 9\), is needed"):
        made.run(x[:, :, :1])
