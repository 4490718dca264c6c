"""Float lif networks to integers: exact where the float values lie on the integers' grid, safe for every input."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from neuro.conversion.lif import NotConvertible, convert_lif
from neuro.graph import identical, load_graph, save_graph
from neuro.modules.spiking import SpikingClassifier, SpikingLayer, current_code, rate_code
from neuro.simulators.fixed_point import simulate


def pairs(model: SpikingClassifier) -> list[tuple]:
    return [(layer.linear, layer.neuron) for layer in model.layers]


def single(weight: list[list[float]], bias: list[float] | None = None, **settings) -> SpikingLayer:
    layer = SpikingLayer(len(weight[0]), len(weight), bias=bias is not None, **settings)
    with torch.no_grad():
        layer.linear.weight.copy_(torch.tensor(weight))
        if bias is not None:
            layer.linear.bias.copy_(torch.tensor(bias))
    return layer


def random_model(seed: int, sizes=(6, 12, 4), **settings) -> SpikingClassifier:
    torch.manual_seed(seed)
    model = SpikingClassifier(sizes, **settings)
    with torch.no_grad():
        for layer in model.layers:
            layer.linear.weight.mul_(3)
    return model


def outputs(network, x_BTF, mode="lava") -> torch.Tensor:
    activity = simulate(network.graph, network.present(x_BTF), mode=mode, strict=True)
    return network.collect(activity.spikes[network.graph.outputs[0]])


def test_numbers_by_hand():
    """Largest weight 0.5 thresholds; with weights 0.5 and 0.3 the worst sum is 0.8 S / 64, to stay below 2^15."""
    layer = single([[0.5, 0.3]], beta=0.9)
    network = convert_lif([(layer.linear, layer.neuron)], steps=None, headroom_bits=0)
    # The largest exponent whose full weight, 254, still keeps 0.8 S / 64 within 32767 (S = 254 * 64 * 2^e / 0.5): e = 6.
    # v reaches 0.9 S + 0.8 S at most, below 2^23: S <= 4.93e6. So both allow e = 6 (S = 2.08e6); e = 7 breaks the sum.
    (record,) = network.layers
    assert (record.weight_exp, record.units, record.dv) == (6, 254 * 64 * 64 * 2, 410)
    (projection,) = network.graph.projections
    assert projection.weight.tolist() == [[254, 152]]  # 152.4
    assert network.graph.population("layer1").params["vth"] == record.units // 64
    worst = (254 + int(projection.weight[0, 1])) * 2**6
    assert record.spare_bits_sum == pytest.approx(math.log2(32767 / worst))
    assert record.spare_bits_v == pytest.approx(math.log2((2**23 - 1) / (3686 / 4096 * record.units + worst * 64)))


def test_weights_on_a_binary_grid_are_not_rounded():
    """0.5 and 0.25: the largest power of two that keeps 0.75 S / 64 within 2^15 is 2^21: the weights are whole."""
    layer = single([[0.5, 0.25]], beta=0.9)
    network = convert_lif([(layer.linear, layer.neuron)], steps=None, headroom_bits=0)
    (record,), (projection,) = network.layers, network.graph.projections
    assert record.units == 2**21
    assert (projection.weight * 2.0**projection.weight_exp * 64 / record.units).tolist() == [[0.5, 0.25]]


@pytest.mark.parametrize("mode", ["lava", "chip"])
def test_on_the_grid_every_spike_is_that_of_the_float_network(mode):
    """Weights in 256ths of a threshold, no decay: nothing is rounded, over layers, in both modes."""
    rng = np.random.default_rng(1)
    model = SpikingClassifier((6, 10, 5), beta=1.0, bias=False)
    with torch.no_grad():
        for layer in model.layers:
            grid = rng.integers(-80, 128, tuple(layer.linear.weight.shape))
            grid[0, 0] = 127
            layer.linear.weight.copy_(torch.from_numpy(grid / 256))
        model.double()
        x = torch.from_numpy(rng.integers(0, 2, (20, 15, 6))).double()
        expected = model(x)
    network = convert_lif(pairs(model), steps=15)
    assert 0.05 < expected.mean() < 0.6
    assert torch.equal(outputs(network, x, mode).double(), expected)


@pytest.mark.parametrize("seed", range(6))
def test_off_the_grid_most_spikes_are(seed):
    model = random_model(seed)
    x = rate_code(torch.rand(40, 6, generator=torch.Generator().manual_seed(seed)), 12)
    expected = model(x).detach()
    network = convert_lif(pairs(model), steps=12)
    got = outputs(network, x)
    assert expected.mean() > 0.01
    assert (got != expected).double().mean() < 0.04
    assert torch.equal(got, outputs(network, x, "chip"))  # exponents from -1 on lose nothing per synapse


@pytest.mark.parametrize("beta", [0.5, 0.95])
@pytest.mark.parametrize("levels", [1, 16])
def test_no_input_makes_a_register_run_over(beta, levels):
    """The worst inputs there are, for each neuron in turn: all that excites it, and all that inhibits it, for all steps."""
    model = random_model(3, (20, 15, 4), beta=beta)
    network = convert_lif(pairs(model), steps=9, input_scale=1 / levels, input_range=(0, levels))
    weight = network.graph.projections[0].weight
    worst = np.concatenate([weight > 0, weight < 0]).astype(np.float64)
    assert all(layer.safe for layer in network.layers)
    x = torch.from_numpy(worst)[:, None].expand(-1, 9, -1)
    for mode in ("lava", "chip"):
        activity = simulate(network.graph, network.present(x), mode=mode, strict=True, record=("u", "v", "a_in"))
        first, record = activity.states["layer1"], network.layers[0]
        reached = first["a_in"].abs().max().item()
        assert record.spare_bits_sum == pytest.approx(math.log2(32767 / reached), abs=1e-9)  # met, not only kept
        assert first["v"].abs().max().item() <= (2**23 - 1) / 2**record.spare_bits_v + 1
        assert activity.populations["layer1"].wide_a == activity.populations["layer1"].saturations_v == 0


def test_headroom_is_left():
    model = random_model(3, (20, 15, 4))
    for bits in (0.0, 0.5, 2.0):
        for layer in convert_lif(pairs(model), steps=30, headroom_bits=bits).layers:
            assert min(layer.spare_bits_sum, layer.spare_bits_v) >= bits


def test_samples_in_a_stream_are_those_that_start_from_rest():
    model = random_model(5, (6, 12, 9, 4))  # biases, three layers
    assert all(bool(layer.linear.bias.any()) for layer in model.layers)
    x = current_code(torch.rand(7, 6, generator=torch.Generator().manual_seed(0)).mul(16).round() / 16, 9)
    network = convert_lif(pairs(model), steps=9, input_scale=1 / 16, input_range=(0, 16))
    inputs = network.stream(x)
    assert inputs["x"].shape == (1, 7 * 9 + 3, 6)
    streamed = simulate(network.graph, inputs).spikes["layer3"]
    alone = outputs(network, x)
    assert alone.any()
    assert torch.equal(network.split(streamed), alone)


def test_thresholds_of_their_own_are_folded_into_the_weights():
    layer, plain = single([[0.6], [0.3]]), single([[0.3], [0.3]])
    layer.neuron.threshold = torch.tensor([2.0, 1.0])
    own, same = (convert_lif([(part.linear, part.neuron)], steps=8) for part in (layer, plain))
    assert identical(own.graph, same.graph)


def test_biases_are_held_by_mantissa_and_exponent():
    layer = single([[0.5], [0.5], [0.5]], bias=[0.2, -0.001, 0.0])
    network = convert_lif([(layer.linear, layer.neuron)], steps=8)
    params, units = network.graph.population("layer1").params, network.layers[0].units
    held = params["bias_mant"] * 2.0 ** params["bias_exp"]
    step = 2.0 ** params["bias_exp"]
    assert np.all(np.abs(held - units * np.array([0.2, -0.001, 0.0])) <= step / 2 + 1e-3)
    assert np.all((params["bias_exp"] == 0) | (np.abs(params["bias_mant"]) > 2047))  # no finer exponent would do


def test_the_graph_survives_its_file(tmp_path):
    network = convert_lif(pairs(random_model(0)), steps=5)
    back = load_graph(save_graph(network.graph, tmp_path / "net.graph.npz"))
    assert identical(back, network.graph)
    assert back.meta["layers"][0]["units"] == network.layers[0].units
    assert "weight_exp" in network.table()


def altered(**changes) -> SpikingLayer:
    import snntorch

    layer = single([[0.5]], bias=[0.1])
    for key, value in changes.items():
        if key == "neuron":
            layer.neuron = value(snntorch)
        else:
            setattr(layer.neuron, key, value)
    return layer


@pytest.mark.filterwarnings("ignore:Inhibition is an unstable feature")
@pytest.mark.parametrize(
    ("layer", "settings", "message"),
    [
        ({"neuron": lambda s: s.Lapicque(beta=0.9)}, {}, "layer1: neurons are Lapicque; Leaky, Synaptic, RLeaky"),
        ({"reset_mechanism": "subtract"}, {}, "reset_mechanism says 'subtract', and the neuron computes 'zero'"),
        ({"neuron": lambda s: s.Leaky(0.9, inhibition=True, reset_mechanism="zero")}, {}, "inhibition is True"),
        ({"graded_spikes_factor": torch.tensor(2.0)}, {}, "graded_spikes_factor is 2.0"),
        ({"beta": torch.tensor([0.5, 0.9])}, {}, r"beta has shape \(2,\), its neurons \(1,\)"),
        ({"threshold": torch.tensor(-1.0)}, {}, "a threshold is -1"),
        ({}, {"steps": None}, "layer1 has a bias, which acts before the first message arrives; convert with steps=T"),
        ({}, {"steps": 0}, "steps is 0"),
        ({}, {"input_range": (1, 0)}, "input_range"),
        ({}, {"pieces": 3}, "pieces is 3; it is one of 1, 2, auto"),
        ({}, {"headroom_bits": 20.0}, "no exponent keeps its sums within 16 bits"),
    ],
)
def test_what_the_chip_has_no_neuron_for_is_refused(layer, settings, message):
    odd = altered(**layer)
    with pytest.raises(NotConvertible, match=message):
        convert_lif([(odd.linear, odd.neuron)], **{"steps": 8, **settings})


def test_more_refusals():
    layer = single([[0.5]], beta=1.0)
    with pytest.raises(NotConvertible, match="v never decays and steps is None"):
        convert_lif([(layer.linear, layer.neuron)], steps=None)
    with pytest.raises(NotConvertible, match="no layer was given"):
        convert_lif([], steps=3)
    layer.linear.weight.data.fill_(math.nan)
    with pytest.raises(NotConvertible, match="not finite"):
        convert_lif([(layer.linear, layer.neuron)], steps=3)
    network = convert_lif(pairs(random_model(0)), steps=5)
    with pytest.raises(NotConvertible, match=r"whole numbers 0\.\.1 of 1"):
        network.present(torch.full((1, 5, 6), 0.5))
    with pytest.raises(NotConvertible, match="samples have 4 steps; the network was converted for 5"):
        network.present(torch.zeros(1, 4, 6))
    plain = single([[0.5]])
    free = convert_lif([(plain.linear, plain.neuron)], steps=None)
    assert free.graph.population("layer1").kind == "lif"
    with pytest.raises(NotConvertible, match="convert with steps=T"):
        free.stream(torch.zeros(1, 5, 1))
