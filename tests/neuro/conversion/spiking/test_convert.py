"""Spiking networks in integers: equal to snnTorch's on the grid, close to it elsewhere, and what is said of the rest."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch

from neuro.conversion.lif import convert_lif
from neuro.conversion.spiking.convert import FEW_LEVELS, PrecisionWarning, WinnersWarning, convert_spiking
from neuro.conversion.spiking.description import INPUT, Description, Neurons, NotConvertible, Synapses, run_float
from neuro.graph import Population, Projection, SpikingGraph, identical, load_graph, save_graph
from neuro.graph.synapses import Convolution
from neuro.simulators.activity import compare
from neuro.simulators.fixed_point import simulate
from neuro.simulators.support import refusals
from tests.neuro.conversion.spiking.snntorch_networks import KINDS, RESETS, layer, network, snntorch_spikes

snntorch = pytest.importorskip("snntorch", reason="snntorch is not installed")


def assert_equal(pairs, x, mode: str) -> int:
    """Every layer's spikes are snnTorch's; how many there were."""
    expected, _ = snntorch_spikes(pairs, x)
    made = convert_lif(pairs, steps=x.shape[1])
    names = [record.name for record in made.layers]
    activity = simulate(made.graph, made.present(x), mode=mode, strict=True, record=("spikes",))
    for name, spikes in zip(names, expected, strict=True):
        depth = made.depths[name]
        got = activity.spikes[name][:, depth : depth + x.shape[1]].double()
        assert torch.equal(got, spikes), f"{name}: {int((got != spikes).sum())} differ; {made.table()}"
    return int(sum(spikes.sum() for spikes in expected))


@pytest.mark.parametrize("mode", ["lava", "chip"])
def test_on_the_grid_all_spikes_are_snntorchs(mode):
    """150 networks: four kinds of neuron, three resets, with and without bias, decays and thresholds per neuron."""
    spikes = [assert_equal(*network(seed), mode) for seed in range(150)]
    assert sum(count > 10 for count in spikes) > 100


@pytest.mark.soak
def test_on_the_grid_all_spikes_are_snntorchs_at_length():
    for seed in range(150, 4000):
        assert_equal(*network(seed), ("lava", "chip")[seed % 2])


def test_all_kinds_and_resets_are_among_them():
    found = set()
    for seed in range(150):
        for _, neuron in network(seed)[0]:
            found.add((type(neuron).__name__, neuron.reset_mechanism))
    assert len(found) == len(KINDS) * len(RESETS)


def test_the_second_subtraction_of_snntorch_is_the_named_difference():
    """reset_delay=False: above two thresholds snnTorch subtracts once more before it compares; the chip does not."""
    rng = np.random.default_rng(0)
    pairs = [layer(rng, 1, 1, False, "Leaky", "subtract", delayed=False)]
    neuron = pairs[0][1]
    neuron.beta, neuron.threshold = torch.tensor(1.0).double(), torch.tensor(1.0).double()
    with torch.no_grad():
        pairs[0][0].weight.fill_(0.75)
    x = torch.tensor([[[1.0], [1.0], [0.0], [1.0], [1.0], [1.0]]]).double()
    assert_equal(pairs, x, "lava")  # v stays below two thresholds
    with torch.no_grad():
        pairs[0][0].weight.fill_(3.0)
    once = torch.tensor([[[1.0], [0.0], [0.0]]]).double()
    expected, _ = snntorch_spikes(pairs, once)
    made = convert_lif(pairs, steps=3)
    ours, _ = made.run(once)
    assert expected[0].flatten().tolist() == [1, 0, 0]
    assert ours["layer1"].flatten().tolist() == [1, 1, 0]
    assert any("two thresholds" in note for note in made.notes)


def test_a_delayed_subtraction_is_a_synapse_of_minus_the_threshold():
    """lif_general with reset 1 a step later against one that never resets and feeds -vth back to itself: bit for bit."""
    rng = np.random.default_rng(3)
    common = {"du": 4095, "dv": 300, "vth": 100, "bias_mant": 5}
    weight = 2 * rng.integers(-20, 40, (6, 4))
    wire = Projection("w", "x", "n", "a_in", weight)
    x = Population("x", "input", 4)
    own = SpikingGraph((x, Population("n", "lif_general", 6, {**common, "reset": 1, "reset_delay": 1})), (wire,), ("n",))
    loop = Projection("reset", "n", "n", "a_in", -100 * np.eye(6, dtype=np.int64))
    free = SpikingGraph((x, Population("n", "lif_general", 6, {**common, "reset": 2})), (wire, loop), ("n",))
    inputs = {"x": rng.integers(0, 2, (5, 40, 4))}
    for mode in ("lava", "chip"):
        found = [simulate(graph, inputs, mode=mode, record=("v",)) for graph in (own, free)]
        assert found[0].spikes["n"].float().mean() > 0.1
        assert torch.equal(found[0].spikes["n"], found[1].spikes["n"])
        assert torch.equal(found[0].states["n"]["v"], found[1].states["n"]["v"])


def chain(*neurons: Neurons, weights, input_size: int) -> Description:
    names = [INPUT, *(one.name for one in neurons)]
    synapses = tuple(Synapses(f"w{n}", names[n], names[n + 1], weight) for n, weight in enumerate(weights))
    return Description((input_size,), neurons, synapses, (neurons[-1].name,))


def test_a_read_out_gives_its_potential_on_a_kind_of_lavas():
    rng = np.random.default_rng(4)
    hidden = Neurons("hidden", (12,), beta=0.9, reset="zero")
    out = Neurons("out", (3,), beta=0.8, threshold=np.inf, bias=[0.1, -0.2, 0.0])
    weights = (rng.normal(0, 0.4, (12, 6)), rng.normal(0, 0.5, (3, 12)))
    description = chain(hidden, out, weights=weights, input_size=6)
    x = torch.from_numpy(rng.integers(0, 2, (8, 20, 6))).double()
    made = convert_spiking(description, steps=20)
    assert made.readouts == ("out",)
    assert refusals(made.graph, "lava", "lava") == ()
    values, activity = made.run(x)
    floats = run_float(description, x)
    same = (made.collect(activity.spikes["out"]) == 0).all()
    assert bool(same)  # it never spikes
    close = (values["out"] - floats.potentials["out"]).abs()
    assert float(floats.potentials["out"].abs().max()) > 1
    assert float(close.mean()) < 0.05


def test_two_pieces_hold_what_one_rounds():
    rng = np.random.default_rng(5)
    description = chain(Neurons("a", (20,), beta=0.9), weights=(rng.normal(0, 0.4, (20, 10)),), input_size=10)
    x = torch.from_numpy(rng.integers(0, 2, (20, 25, 10))).double()
    one, two = (convert_spiking(description, steps=25, calibration=x, pieces=n) for n in (1, 2))
    wanted = description.synapses[0].weight
    errors = []
    for made in (one, two):
        held = sum(p.weight * 2.0**p.weight_exp for p in made.graph.projections) * 64 / made.layers[0].units
        errors.append(np.abs(held - wanted).max())
    assert errors[1] < errors[0] / 16
    assert two.synapses > 1.8 * one.synapses
    assert two.check.spike_agreement["a"] > one.check.spike_agreement["a"] > 0.9
    assert two.check.wraps == two.check.clips == 0
    for mode in ("lava", "chip"):
        values, _ = two.run(x, mode=mode)
        assert (values["a"] != run_float(description, x).spikes["a"]).double().mean() < 0.01


def test_auto_takes_two_pieces_only_where_they_help():
    rng = np.random.default_rng(6)
    x = torch.from_numpy(rng.integers(0, 2, (20, 30, 10))).double()
    on_grid = chain(Neurons("a", (5,), beta=1.0), weights=(rng.integers(-60, 60, (5, 10)) / 128,), input_size=10)
    made = convert_spiking(on_grid, steps=30, calibration=x, pieces="auto")
    assert made.check.spike_agreement["a"] == 1
    assert len(made.graph.projections) == 1
    assert "one synapse per weight is enough" in made.table()
    loop = Neurons("a", (40,), beta=0.97, reset="subtract", reset_delayed=True)
    synapses = (
        Synapses("w", INPUT, "a", rng.normal(0, 0.5, (40, 10))),
        Synapses("r", "a", "a", rng.normal(0, 0.35, (40, 40))),
    )
    chaotic = Description((10,), (loop,), synapses, ("a",))
    made = convert_spiking(chaotic, steps=30, calibration=x, pieces="auto")
    assert [p.name for p in made.graph.projections] == ["w", "w_fine", "r", "r_fine"]
    assert "two synapses per weight" in made.table()
    with pytest.warns(WinnersWarning, match=r"loses winners: 80 % .* keep their winner; give pieces=2"):
        single = convert_spiking(chaotic, steps=30, calibration=x)
    assert made.check.spike_agreement["a"] > single.check.spike_agreement["a"]


def test_an_if_network_keeps_its_eight_bits_over_300_steps():
    """Where inhibition piles up, a bound over all inputs leaves a few levels; calibration keeps 8 bits."""
    rng = np.random.default_rng(7)
    weights = (rng.normal(0, 0.2, (30, 16)), rng.normal(0, 0.3, (4, 30)))
    description = chain(Neurons("a", (30,)), Neurons("b", (4,)), weights=weights, input_size=16)
    x = torch.from_numpy(rng.random((12, 300, 16)) < 0.2).double()
    made = convert_spiking(description, steps=300, calibration=x)
    assert all(record.levels[name] >= 64 for record, name in zip(made.layers, ("w0", "w1"), strict=True))
    assert not all(record.safe for record in made.layers)
    assert made.check.class_agreement == 1
    assert made.check.clips == 0


def driven(inputs: int, low: float, high: float) -> Description:
    """Three neurons without leak and weights within low..high."""
    weight = np.random.default_rng(8).uniform(low, high, (3, inputs))
    return chain(Neurons("a", (3,), beta=1.0), weights=(weight,), input_size=inputs)


@pytest.mark.parametrize(
    ("inputs", "message"), [(100, ""), (1000, r"a: its largest weight keeps \d+ of 127 levels"), (4000, "refused")]
)
def test_few_levels_are_warned_of_and_fewer_refused(inputs, message):
    """All inputs at all steps: a sum of 0.75 x inputs weights of 127 steps at most; 16 bits hold 32,767, one is spare."""
    description, x = driven(inputs, 0.5, 1.0), torch.ones(1, 4, inputs, dtype=torch.float64)
    if message == "refused":
        with pytest.raises(NotConvertible, match="of 127 levels, which is another network"):
            convert_spiking(description, steps=4, calibration=x)
    elif message:
        with pytest.warns(PrecisionWarning, match=message):
            convert_spiking(description, steps=4, calibration=x)
    else:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            made = convert_spiking(description, steps=4, calibration=x)
        assert made.layers[0].levels["w0"] >= FEW_LEVELS


def test_clips_of_v_are_counted_and_warned_of_and_weights_keep_their_bits():
    """3,000 steps of inhibition: v falls by 15 thresholds a step; 24 bits hold 1,032 where weights have 8 bits."""
    x = torch.ones(2, 3000, 20, dtype=torch.float64)
    with pytest.warns(PrecisionWarning, match=r"v was clipped [\d,]+ times in [\d,]+ updates.*same winner in 100.0 %"):
        made = convert_spiking(driven(20, -1.0, -0.5), steps=3000, calibration=x)
    assert made.layers[0].levels["w0"] >= 63
    assert made.check.clips > 0.5 * made.check.updates
    assert made.check.wraps == 0
    assert made.check.spike_agreement["a"] == 1  # none


def test_ways_that_skip_layers_pass_relays():
    """A residual way around two layers and one from graded input: all spikes are the float network's, on the grid."""
    rng = np.random.default_rng(9)

    def grid(*shape: int) -> np.ndarray:
        return rng.integers(-8, 16, shape) / 16

    layers = tuple(Neurons(name, (5,), reset="subtract") for name in ("a", "b", "c"))
    synapses = (
        Synapses("1", INPUT, "a", grid(5, 4) / 4),
        Synapses("2", "a", "b", grid(5, 5)),
        Synapses("3", "b", "c", grid(5, 5)),
        Synapses("skip", "a", "c", grid(5, 5)),
        Synapses("direct", INPUT, "c", grid(5, 4) / 4),
    )
    description = Description((4,), layers, synapses, ("c", "a"))
    x = torch.from_numpy(rng.integers(-3, 4, (6, 9, 4))).double()
    made = convert_spiking(description, steps=9, input_range=(-3, 3))
    assert made.graph.population("x_relay2").kind == "graded"
    assert made.graph.population("a_relay1").kind == "lif"
    assert {name: made.depths[name] for name in "abc"} == {"a": 1, "b": 2, "c": 3}
    expected = run_float(description, x)
    for mode in ("lava", "chip"):
        values, _ = made.run(x, mode=mode)
        for name in ("c", "a"):
            assert values[name].any()
            assert torch.equal(values[name], expected.spikes[name])
    assert torch.equal(
        made.split(simulate(made.graph, made.stream(x)).spikes["c"], "c").double(), expected.spikes["c"]
    )  # one behind the other


def test_convolutions_stay_convolutions_and_thresholds_may_differ_within_a_channel():
    rng = np.random.default_rng(10)
    geometry = Convolution((6, 5, 2), padding=(1, 1))
    kernel = rng.integers(-10, 25, (3, 3, 3, 2)) / 32
    size = 6 * 5 * 3
    for threshold in (1.0, np.resize([1.0, 2.0, 0.5], size), rng.choice([0.5, 1.0, 1.5], size)):
        neurons = Neurons("a", (6, 5, 3), threshold=threshold, beta=1.0)
        description = Description((6, 5, 2), (neurons,), (Synapses("w", INPUT, "a", kernel, geometry),), ("a",))
        x = torch.from_numpy(rng.random((4, 8, 60)) < 0.15).double()
        made = convert_spiking(description, steps=8)
        assert made.graph.projections[0].kind == "conv"
        assert made.graph.projections[0].weight_exp == 0  # which is what Lava's Conv computes
        assert made.synapses < 60 * 9 * 3
        expected = run_float(description, x).spikes["a"]
        assert expected.mean() > 0.02
        for mode in ("lava", "chip"):
            assert torch.equal(made.run(x, mode=mode)[0]["a"], expected)


def test_a_loop_behind_an_early_bias_gets_its_bias_by_synapses():
    loop = Synapses("r", "a", "a", [[0.5]])
    layers = (Neurons("a", (1,), bias=1.25),)
    description = Description((1,), layers, (Synapses("w", INPUT, "a", [[0.5]]), loop), ("a",))
    x = torch.tensor([[[1.0], [0.0], [1.0], [0.0]]])
    made = convert_spiking(description, steps=4)
    assert made.graph.inputs == ("x", "one")
    assert torch.equal(made.run(x)[0]["a"], run_float(description, x).spikes["a"])
    with pytest.raises(NotConvertible, match="samples cannot follow each other without a gap: by r"):
        made.stream(x)
    layers = (Neurons("a", (1,), bias=1.25, alpha=0.5),)
    with pytest.raises(NotConvertible, match="its bias alone makes it spike before"):
        convert_spiking(Description((1,), layers, description.synapses, ("a",)), steps=4)


def test_neurons_that_always_fire_become_a_bias_of_the_current():
    """As NIR files hold the biases of networks with synaptic currents; a loop must not hear them before its first step."""
    layers = (
        Neurons("ticks", (1,), beta=0.0, threshold=0.5, bias=1.0),
        Neurons("a", (2,), alpha=0.5, beta=0.5),
        Neurons("b", (2,), alpha=0.5, beta=0.5),
    )
    synapses = (
        Synapses("w", INPUT, "a", [[0.5], [0.25]]),
        Synapses("wb", "a", "b", [[0.5, 0.5], [-0.5, 1.0]]),
        Synapses("loop", "b", "b", [[0.25, 0.5], [0.5, -0.25]]),
        Synapses("ta", "ticks", "a", [[0.25], [0.5]]),
        Synapses("tb", "ticks", "b", [[0.5], [0.75]]),
    )
    description = Description((1,), layers, synapses, ("b",))
    x = torch.from_numpy(np.random.default_rng(0).integers(0, 2, (9, 6, 1))).double()
    made = convert_spiking(description, steps=6)
    assert made.graph.inputs == ("x", "one")
    assert [layer.name for layer in made.layers] == ["a", "b"]
    expected = run_float(description, x).spikes["b"]
    assert 0.2 < expected.mean() < 0.9
    for mode in ("lava", "chip"):
        assert torch.equal(made.run(x, mode=mode)[0]["b"], expected)
    assert "ticks: fire at every step" in made.table()


def test_the_graph_survives_its_file(tmp_path):
    pairs, x = network(3)
    made = convert_lif(pairs, steps=x.shape[1])
    assert identical(load_graph(save_graph(made.graph, tmp_path / "n.graph.npz")), made.graph)


@pytest.mark.parametrize(
    ("changes", "settings", "message"),
    [
        ({}, {"calibration": torch.zeros(0, 6, 2)}, "the calibration holds no sample"),
        ({}, {"calibration": torch.zeros(1, 5, 2)}, "samples have 5 steps; the network was converted for 6"),
        ({}, {"calibration": torch.zeros(1, 6, 3)}, r"\(samples, steps, 2\) is needed"),
        ({}, {"calibration": torch.full((1, 6, 2), 0.3)}, r"whole numbers 0\.\.1 of 1"),
        ({}, {"calibration": torch.full((1, 6, 2), torch.nan)}, "not finite"),
        ({}, {"calibration": np.zeros((1, 6, 2))}, "a tensor is needed"),
        ({}, {"input_range": (0.5, 1)}, r"input_range is \(0\.5, 1\); two whole numbers"),
        ({}, {"input_range": (1,)}, "two whole numbers are needed"),
        ({}, {"input_scale": float("nan")}, "input_scale is nan"),
        ({}, {"headroom_bits": float("nan")}, "headroom_bits is nan; a finite number"),
        ({}, {"steps": 10.5}, r"steps is 10\.5; a whole number 1\.\.65535"),
        ({}, {"steps": 70_000}, r"steps is 70000; a whole number 1\.\.65535"),
        ({}, {"pieces": True}, "pieces is True; it is one of 1, 2, auto"),
        ({"threshold": 1e-9}, {}, r"a: with weights up to 1e\+09 thresholds, no exponent"),
        ({"bias": 1e6}, {}, "and biases up to 1e"),
        ({"beta": 1.0, "bias": 0.5}, {"steps": None}, "a has a bias, which acts before"),
        ({"beta": 1.0}, {"steps": None}, "v never decays and steps is None"),
    ],
)
def test_what_does_not_convert_is_refused_with_the_remedy(changes, settings, message):
    description = chain(Neurons("a", (2,), **{"beta": 0.5, **changes}), weights=(np.ones((2, 2)),), input_size=2)
    with pytest.raises(NotConvertible, match=message):
        convert_spiking(description, **{"steps": 6, **settings})


def test_a_module_is_no_description_and_results_of_layers_that_are_not_there_are_refused():
    with pytest.raises(NotConvertible, match=r"neuro\.describe makes one of a module"):
        convert_spiking(torch.nn.Linear(2, 2), steps=6)
    made = convert_lif(network(3)[0], steps=network(3)[1].shape[1])
    with pytest.raises(NotConvertible, match="there is no layer 'none'; there is: "):
        made.collect(torch.zeros(1, 9, 2), "none")
    with pytest.raises(NotConvertible, match="not finite"):
        made.run(torch.full((1, made.steps, made.graph.population(INPUT).size), torch.nan))


def test_layers_without_weights_live_on_their_biases():
    layers = (Neurons("a", (2,), beta=0.5, bias=[0.75, 0.375]), Neurons("b", (2,), beta=1.0, bias=0.25))
    synapses = (Synapses("w", INPUT, "a", np.zeros((2, 2))),)
    description = Description((2,), layers, synapses, ("a", "b"))
    made = convert_spiking(description, steps=6)
    x = torch.ones(1, 6, 2)
    values, _ = made.run(x)
    for name, spikes in run_float(description, x).spikes.items():
        assert torch.equal(values[name], spikes)
        assert values[name].any()


def test_a_current_that_never_decays_is_named():
    description = chain(Neurons("a", (1,), alpha=1.0, beta=0.5), weights=([[0.25]],), input_size=1)
    assert "a current keeps 4095/4096" in convert_spiking(description, steps=4).table()


@pytest.mark.lava
def test_lava_computes_the_same_where_it_has_the_kinds(lava):
    """A convolution of graded input, a relay, a current that decays in a loop of two pieces, a bias line, a read-out."""
    rng = np.random.default_rng(11)
    geometry = Convolution((5, 4, 2), padding=(1, 1), stride=(2, 1))
    kernel = rng.normal(0, 0.1, (2, 3, 3, 2))
    width, height, channels = geometry.output_shape(kernel.shape)
    size = width * height * channels
    layers = (
        Neurons("conv", (width, height, channels), beta=0.9, bias=0.05),
        Neurons("loop", (6,), alpha=0.6, beta=0.8, current_bias=rng.normal(0, 0.05, 6)),
        Neurons("out", (2,), beta=0.9, threshold=np.inf),
    )
    synapses = (
        Synapses("c", INPUT, "conv", kernel, geometry),
        Synapses("w", "conv", "loop", rng.normal(0, 0.3, (6, size))),
        Synapses("r", "loop", "loop", rng.normal(0, 0.3, (6, 6))),
        Synapses("o", "loop", "out", rng.normal(0, 0.3, (2, 6))),
        Synapses("skip", "conv", "out", rng.normal(0, 0.1, (2, size)) * (rng.random((2, size)) < 0.3)),
    )
    description = Description((5, 4, 2), layers, synapses, ("out", "loop"))
    x = torch.from_numpy(rng.integers(-3, 4, (1, 25, 40))).double()
    made = convert_spiking(description, steps=25, input_range=(-3, 3), calibration=x, pieces=2)
    kinds = {p.kind for p in made.graph.populations} | {p.kind for p in made.graph.projections}
    assert kinds == {"input", "lif", "lif_reset", "conv", "dense", "sparse"}
    assert refusals(made.graph, "lava", "lava") == ()
    ours = simulate(made.graph, made.present(x), record=("spikes", "u", "v", "a_in"))
    assert ours.spikes["loop"].float().mean() > 0.02
    result = compare(lava.run(made.graph, made.present(x), record=("spikes", "u", "v", "a_in")), ours)
    assert result.equal, str(result)
