"""The float run of a description, against snnTorch's own neurons and torch's own convolution; what is refused."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from neuro.conversion.spiking.description import INPUT, Description, Neurons, NotConvertible, Synapses, run_float
from neuro.graph.synapses import Convolution

snntorch = pytest.importorskip("snntorch", reason="snntorch is not installed")

INPUTS, SIZE, SAMPLES, STEPS = 5, 7, 6, 12
DELAYS_DRIVE = ("Synaptic", "RLeaky", "RSynaptic")  # their delayed reset to zero loses a step's drive, Leaky's does not


def snntorch_run(kind: str, reset: str, delayed: bool, seed: int) -> tuple[Description, torch.Tensor, torch.Tensor]:
    """A description of one layer, snnTorch's spikes of it, and the input."""
    torch.manual_seed(seed)
    linear = torch.nn.Linear(INPUTS, SIZE).double()
    settings = {"beta": 0.8, "threshold": 0.7, "reset_mechanism": reset, "reset_delay": delayed}
    if "Synaptic" in kind:
        settings["alpha"] = 0.6
    if kind.startswith("R"):
        settings["linear_features"] = SIZE
    neuron = getattr(snntorch, kind)(**settings).double()
    x = torch.randn(SAMPLES, STEPS, INPUTS).double()
    state: tuple[torch.Tensor, ...] = ()
    spikes = []
    with torch.no_grad():
        for t in range(STEPS):
            spike, *state = neuron(linear(x[:, t]), *state)
            spikes.append(spike)
            if kind.startswith("R"):
                state = [spike.double(), *state]  # snnTorch gives float32
    own = getattr(neuron, "recurrent", None)
    bias = linear.bias if own is None else linear.bias + own.bias
    alpha = 0.6 if "Synaptic" in kind else 0.0
    late = delayed and (kind in DELAYS_DRIVE or reset != "zero")
    layer = Neurons("a", (SIZE,), alpha, 0.8, 0.7, 0.0, reset, late, bias.detach().numpy())
    synapses = [Synapses("w", INPUT, "a", linear.weight.detach().numpy())]
    if own is not None:
        synapses.append(Synapses("r", "a", "a", own.weight.detach().numpy()))
    return Description((INPUTS,), (layer,), tuple(synapses), ("a",)), torch.stack(spikes, 1), x


@pytest.mark.parametrize("reset", ["zero", "subtract", "none"])
@pytest.mark.parametrize("kind", ["Leaky", "Synaptic", "RLeaky", "RSynaptic"])
def test_the_float_run_gives_snntorchs_spikes(kind, reset):
    for delayed in (True,) if kind == "RSynaptic" else (True, False):
        for seed in range(3):
            description, expected, x = snntorch_run(kind, reset, delayed, seed)
            got = run_float(description, x)
            assert 0.02 < expected.mean() < 0.98
            if reset == "subtract" and not delayed:  # snnTorch's double-reset rule sets in above two thresholds
                assert (got.spikes["a"] != expected).double().mean() < 0.1
            else:
                assert torch.equal(got.spikes["a"], expected.double())


def test_a_convolution_lies_in_the_graphs_order():
    conv = torch.nn.Conv2d(4, 6, (3, 2), stride=(1, 2), padding=(1, 0), dilation=(2, 1), groups=2, bias=False).double()
    x = torch.randn(3, 4, 7, 8).double()  # (samples, channels, height, width)
    geometry = Convolution((8, 7, 4), (2, 1), (0, 1), (1, 2), 2)
    weight = conv.weight.detach().flip(2, 3).permute(0, 3, 2, 1).numpy()
    expected = conv(x)
    shape = geometry.output_shape(weight.shape)
    layer = Neurons("a", shape, threshold=np.inf)
    description = Description((8, 7, 4), (layer,), (Synapses("w", INPUT, "a", weight, geometry),), ("a",))
    run = run_float(description, x.permute(0, 3, 2, 1).reshape(3, 1, -1), currents=True)
    got = run.currents["a"].reshape(3, *shape).permute(0, 3, 2, 1)
    assert torch.allclose(got, expected, atol=1e-12)
    assert not run.spikes["a"].any()


def test_reset_none_of_a_read_out_integrates():
    layer = Neurons("a", (1,), beta=0.5, threshold=np.inf, bias=0.25)
    run = run_float(Description((1,), (layer,), (Synapses("w", INPUT, "a", [[1.0]]),), ("a",)), torch.ones(1, 3, 1))
    assert run.potentials["a"].flatten().tolist() == [1.25, 1.875, 2.1875]


def net(*synapses: Synapses, outputs=("b",), **changes) -> Description:
    layers = (Neurons("a", (2,), **changes), Neurons("b", (2,)))
    return Description((2,), layers, synapses, outputs)


EYE = np.eye(2)
CHAIN = (Synapses("1", INPUT, "a", EYE), Synapses("2", "a", "b", EYE))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Synapses("w", INPUT, "a", [[np.nan]]), r"weight is not finite"),
        (lambda: Synapses("w", INPUT, "a", [1.0]), r"weight has shape \(1,\)"),
        (lambda: Synapses("w", INPUT, "a", np.ones((1, 9, 1, 1)), Convolution((4, 4, 1))), "reaches over 9 positions"),
        (lambda: Neurons("a", (2,), beta=1.5), r"beta runs from 1.5 to 1.5; it is a share, 0\.\.1"),
        (lambda: Neurons("a", (2,), beta=[0.1, 0.2, 0.3]), "beta has 3 values, the layer has 2 neurons"),
        (lambda: Neurons("a", (2,), threshold=0), "a threshold is 0"),
        (lambda: Neurons("a", (2,), threshold=[1, np.inf]), "some thresholds are infinite"),
        (lambda: Neurons("a", (2,), reset="soft"), "reset is 'soft'; it is one of zero, subtract, none"),
        (lambda: Neurons("a", (2, 2)), "shape is"),
        (lambda: net(*CHAIN, outputs=()), "output '' is no layer"),
        (lambda: net(*CHAIN, Synapses("3", "b", "a", EYE)), "form a loop"),
        (lambda: net(CHAIN[0]), "layer 'b': nothing reaches it"),
        (lambda: net(*CHAIN, Synapses("2", "a", "b", EYE)), "two synapses are named '2'"),
        (lambda: net(CHAIN[0], Synapses("2", "c", "b", EYE)), "layer 'c' does not exist"),
        (lambda: net(CHAIN[0], Synapses("2", "a", INPUT, EYE)), "they end at the input"),
        (lambda: net(CHAIN[0], Synapses("2", "a", "b", np.ones((2, 3)))), "they join 3 sources to 2 neurons"),
        (lambda: net(*CHAIN, threshold=np.inf), "'a', a read-out, which sends nothing"),
        (lambda: Description((2,), (), (), ("a",)), "no layer was given"),
        (lambda: Description((2,), (Neurons("a", (2,)),) * 2, (), ("a",)), "two layers are named 'a'"),
        (lambda: run_float(net(*CHAIN), torch.zeros(1, 3, 4)), r"\(samples, steps, 2\) is needed"),
    ],
)
def test_what_is_no_network_is_refused(make, message):
    with pytest.raises(NotConvertible, match=message):
        make()
