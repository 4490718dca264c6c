"""snnTorch as a simulator: the very states of ours where nothing is rounded, within a bound elsewhere, refusals by name."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch

from neuro.graph import Convolution, Population, Projection, SpikingGraph
from neuro.graph.kinds import KINDS, PROJECTIONS
from neuro.simulators import snntorch_backend
from neuro.simulators.activity import compare
from neuro.simulators.fixed_point import InputError, simulate
from neuro.simulators.snntorch_backend import NOT_HERE, NotInSnnTorch, SnnTorchUnavailable, differences, run

EVERYTHING = ("spikes", "u", "v", "a_in")
EXACT = {"du": 4095, "dv": 0}


SEEDS = [2, 6, 15, 21, 25, 32, 36, 39]  # in which v stays within its 24 bits


def exact(graph: SpikingGraph) -> SpikingGraph:
    """The graph with neurons and exponents that floating point computes without a difference."""
    populations = tuple(
        p if p.kind == "input" else Population(p.name, p.kind, p.size, {**p.params, **EXACT}) for p in graph.populations
    )
    projections = tuple(Projection(**{**vars(p), "weight_exp": 0}) for p in graph.projections)
    return SpikingGraph(populations, projections, graph.outputs)


@pytest.mark.parametrize("seed", SEEDS)
def test_without_decays_and_divisions_every_state_equals_ours(networks, seed):
    graph = exact(networks.network(seed, ["lif", "lif_reset"]))
    assert differences(graph) == ()
    inputs = networks.messages(graph, seed, 2, 20)
    result = compare(
        simulate(graph, inputs, record=EVERYTHING, fused=False), theirs := run(graph, inputs, record=EVERYTHING)
    )
    assert result.equal, result
    assert result.skipped == ()
    assert theirs.notes == ()
    assert (theirs.ran_on, theirs.mode) == ("snnTorch 1.0.0 (float64)", "float")


def test_those_networks_spike_and_have_loops_resets_and_sparse_synapses(networks):
    """What the test above compares is no silence."""
    graphs = {seed: exact(networks.network(seed, ["lif", "lif_reset"])) for seed in SEEDS}
    assert {p.kind for graph in graphs.values() for p in graph.projections} == {"dense", "sparse"}
    assert {p.kind for graph in graphs.values() for p in graph.populations} == set(snntorch_backend.POPULATIONS)
    assert any(p.source == p.target for graph in graphs.values() for p in graph.projections)
    runs = [run(graph, networks.messages(graph, seed, 2, 20)) for seed, graph in graphs.items()]
    assert sum(int(torch.count_nonzero(value)) > 0 for activity in runs for value in activity.spikes.values()) >= 6


@pytest.mark.parametrize(
    ("stride", "padding", "dilation", "groups"), [((1, 1), (0, 0), (1, 1), 1), ((2, 1), (1, 2), (1, 2), 2)]
)
def test_convolutions_equal_ours(stride, padding, dilation, groups):
    rng = np.random.default_rng(0)
    geometry = Convolution((5, 4, 2), stride, padding, dilation, groups)
    weight = rng.integers(-128, 128, (4, 2, 3, 2 // groups))
    size = int(np.prod(geometry.output_shape(weight.shape)))
    graph = SpikingGraph(
        (Population("x", "input", 40), Population("n", "lif", size, {**EXACT, "vth": 150})),
        (Projection("w", "x", "n", "a_in", weight, kind="conv", conv=geometry, num_message_bits=4),),
        ("n",),
    )
    inputs = {"x": rng.integers(-3, 4, (3, 12, 40))}
    theirs = run(graph, inputs, record=EVERYTHING)
    result = compare(simulate(graph, inputs, record=EVERYTHING, fused=False), theirs)
    assert result.equal, result
    assert 0.05 < theirs.spikes["n"].double().mean() < 0.95
    assert theirs.notes == ("w: a conv sum is not kept modulo 2^24",)


def chain(weight_exp: int = 0, **params: int) -> SpikingGraph:
    return SpikingGraph(
        (Population("x", "input", 1), Population("n", "lif", 1, params)),
        (Projection("w", "x", "n", "a_in", np.array([[2]]), weight_exp, num_message_bits=16),),
        ("n",),
    )


def test_decays_are_exact_fractions():
    """By hand: u = 128, 64, 32 ... and v adds them up; 7/8 of v is kept."""
    graph = chain(du=2047, dv=512, vth=2**17 - 1)
    activity = run(graph, {"x": np.array([1, 0, 0, 0])[None, :, None]}, record=("u", "v"))
    assert activity.states["n"]["u"].flatten().tolist() == [0, 128, 64, 32]
    assert activity.states["n"]["v"].flatten().tolist() == [0, 128, 128 * 0.875 + 64, (128 * 0.875 + 64) * 0.875 + 32]
    assert activity.notes == (
        "n: u decays by 2048/4096 without dropping fractions",
        "n: v decays by 512/4096 without dropping fractions",
    )


def test_dropped_fractions_pile_up_to_a_bound():
    """Each step drops less than 1 of u and of v; over time less than 1 / decay, and u's loss enters v."""
    rng = np.random.default_rng(0)
    graph = chain(du=1023, dv=512, vth=2**17 - 1)
    inputs = {"x": rng.integers(-200, 200, (8, 60, 1))}
    ours, theirs = simulate(graph, inputs, record=("u", "v")).states["n"], run(graph, inputs, record=("u", "v")).states["n"]
    for variable, bound in (("u", 4096 / 1024), ("v", (4096 / 1024 + 1) * 4096 / 512)):
        gap = (ours[variable].double() - theirs[variable]).abs().max()
        assert 0 < gap < bound


def test_a_division_is_not_rounded():
    graph = chain(-2, **EXACT, vth=2**17 - 1)
    assert differences(graph) == ("w: weight_exp -2 divides without rounding down",)
    inputs = {"x": np.array([3, 0])[None, :, None]}
    assert run(graph, inputs, record=("a_in",)).states["n"]["a_in"].flatten().tolist() == [0, 1.5]
    assert simulate(graph, inputs, record=("a_in",)).states["n"]["a_in"].flatten().tolist() == [0, 1]
    assert differences(chain(-1, **EXACT, vth=1)) == ()  # even weights, halved


def test_registers_do_not_end_and_the_result_says_so():
    graph = chain(7, **EXACT, vth=2**17 - 1)
    activity = run(graph, {"x": np.array([1000, 0])[None, :, None]}, record=("u",))
    assert activity.states["n"]["u"].flatten().tolist() == [0, 1000 * 2 * 128 * 64]
    assert "n: u lay beyond 24 bits 1 times; the chip would not hold it" in activity.notes


NEURON = {
    "ternary_lif": {**EXACT, "vth_hi": 1, "vth_lo": -1},
    "lif_refractory": {**EXACT, "vth": 1, "refractory": 2},
    "lif_soft": {**EXACT, "vth": 1},
    "lif_general": {**EXACT, "vth": 1},
    "rf": {"sin_decay": 1, "cos_decay": 1, "vth": 1},
    "rf_iz": {"sin_decay": 1, "cos_decay": 1, "vth": 1},
    "delta": {"vth": 1},
    "sigma_delta": {"vth": 1},
    "sigma": {},
    "product": {"vth": 1, "exp": 0},
    "xylo": {"dash_mem": 4, "dash_syn": 2, "vth": 1},
    "xylo_out": {"dash_mem": 4, "dash_syn": 2, "vth": 1},
}


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind in NOT_HERE])
def test_a_population_it_does_not_have_is_refused_by_name(kind):
    ports = KINDS[kind].ports
    graph = SpikingGraph(
        (Population("x", "input", 1), Population("odd", kind, 1, NEURON.get(kind, {"vth": 1}))),
        tuple(Projection(port, "x", "odd", port, np.array([[2]])) for port in ports),
        ("odd",),
    )
    with pytest.raises(NotInSnnTorch, match=rf"population 'odd' \({kind}\): snnTorch.*backend fixed_point"):
        run(graph, {"x": np.ones((1, 2, 1), dtype=int)})


def test_delays_are_refused_by_name():
    graph = SpikingGraph(
        (Population("x", "input", 1), Population("n", "lif", 1, {**EXACT, "vth": 1})),
        (Projection("late", "x", "n", "a_in", np.array([[2]]), kind="delay_dense", delays=np.array([[3]])),),
        ("n",),
    )
    with pytest.raises(NotInSnnTorch, match=r"projection 'late' \(delay_dense\): snnTorch has no synaptic delays"):
        run(graph, {"x": np.ones((1, 2, 1), dtype=int)})


def test_every_kind_is_either_run_or_refused_for_a_reason():
    assert set(KINDS) | set(PROJECTIONS) == set(snntorch_backend.POPULATIONS + snntorch_backend.PROJECTIONS) | set(NOT_HERE)


def test_inputs_are_checked_as_everywhere():
    with pytest.raises(InputError, match="needed"):
        run(chain(**EXACT, vth=1), {"x": np.ones((1, 2, 3), dtype=int)})


def test_without_snntorch_the_error_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "snntorch", None)
    with pytest.raises(SnnTorchUnavailable, match=r"pip install 'spikegate\[spiking\]'"):
        run(chain(**EXACT, vth=1), {"x": np.ones((1, 2, 1), dtype=int)})


def test_a_run_leaves_nothing_in_snntorchs_list_of_neurons():
    import snntorch

    before = len(snntorch.SpikingNeuron.instances)
    run(chain(**EXACT, vth=1), {"x": np.ones((1, 2, 1), dtype=int)})
    assert len(snntorch.SpikingNeuron.instances) == before
