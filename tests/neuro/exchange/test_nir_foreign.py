"""Graphs of other tools: the same spikes on the chip, refusals by name, files that are damaged or claim too much."""

from __future__ import annotations

from importlib import import_module

import numpy as np
import pytest
import torch

from neuro.conversion.lif import NotConvertible, convert_lif
from neuro.exchange.nir import NirFileError, NotInNir, from_nir, load_nir, nir_from_snntorch
from neuro.exchange.nir.describing import describe
from neuro.exchange.nir.nesting import flattened
from neuro.graph import SpikingGraph, identical
from neuro.modules.spiking import SpikingLayer
from neuro.simulators.fixed_point import simulate

h5py = pytest.importorskip("h5py")
nir = pytest.importorskip("nir")
pytest.importorskip("snntorch")
reference = import_module("tests.neuro.exchange.nir_reference")
DT_S = 1e-4


def foreign(*nodes, shape=(3,)):
    return nir.NIRGraph.from_list(nir.Input({"input": np.array(shape)}), *nodes, type_check=False)


def lif(n: int, tau=4 * DT_S, r: float = 1.0, v_threshold: float = 1.0, v_leak: float = 0.0, v_reset: float = 0.0):
    each = [np.full(n, float(value)) for value in (tau, r, v_leak, v_threshold, v_reset)]
    return nir.LIF(tau=each[0], r=each[1], v_leak=each[2], v_threshold=each[3], v_reset=each[4])


def grid_weights(rng, *shape):
    return rng.integers(-5, 11, shape) / 16


@pytest.mark.parametrize("seed", range(4))
def test_a_foreign_chain_spikes_alike_on_the_chip(seed):
    rng = np.random.default_rng(seed)
    first, second = rng.normal(0.3, 0.5, (7, 4)), rng.normal(0.5, 0.5, (3, 7))  # no sum meets a threshold exactly
    made = foreign(nir.Linear(weight=2 * first), lif(7, 2 * DT_S), nir.Linear(weight=second * 4), lif(3, r=1.0), shape=(4,))
    network = from_nir(made)
    x = (rng.random((20, 10, 4)) < 0.5).astype(np.float32)
    out = network.collect(simulate(network.graph, network.present(torch.from_numpy(x)), mode="chip").spikes["lif_1"])
    theirs = np.stack([next(iter(reference.run(made, sample).values())) for sample in x])
    assert theirs.sum() > 20
    assert (out.numpy() != theirs).mean() < 0.03  # 8-bit weights; one flipped spike flips others


def integers(graph: SpikingGraph) -> list:
    """All of a graph but its names."""
    populations = [(p.kind, p.size, {k: np.asarray(v).tolist() for k, v in p.params.items()}) for p in graph.populations]
    return populations + [(p.kind, p.weight.tolist(), p.weight_exp, p.num_message_bits) for p in graph.projections]


def nested(rng, typed: bool, dotted: bool = False):
    """input -> outer [fc -> deep [lif -> w] -> lif] -> same [input -> output] -> w -> lif -> output."""

    def graph(edges, **nodes):
        return nir.NIRGraph(nodes, edges, type_check=False)

    def ends(takes, gives):
        known = (np.array([takes]), np.array([gives])) if typed else (None, None)
        return {"input": nir.Input({"input": known[0]}), "output": nir.Output({"output": known[1]})}

    deep = graph(
        [("input", "lif"), ("lif", "w"), ("w", "output")],
        lif=lif(6, 2 * DT_S),
        w=nir.Linear(4 * rng.normal(0.3, 0.5, (5, 6))),
        **ends(6, 5),
    )
    into, out = ("deep.input", "deep.output") if dotted else ("deep", "deep")
    outer = graph(
        [("input", "fc"), ("fc", into), (out, "lif"), ("lif", "output")],
        fc=nir.Affine(2 * rng.normal(0.3, 0.5, (6, 4)), np.full(6, 0.1)),
        deep=deep,
        lif=lif(5),
        **ends(4, 5),
    )
    same = graph([("input", "output")], **ends(5, 5))
    whole = {"outer": outer, "same": same, "w": nir.Linear(4 * rng.normal(0.4, 0.5, (3, 5))), "lif": lif(3)}
    edges = [("input", "outer"), ("outer", "same"), ("same", "w"), ("w", "lif"), ("lif", "output")]
    return graph(edges, **whole, **ends(4, 3))


@pytest.mark.parametrize("typed", [True, False])
@pytest.mark.parametrize("dotted", [False, True])
def test_graphs_within_a_graph_count_as_what_they_hold(typed, dotted, tmp_path):
    made = nested(np.random.default_rng(3), typed, dotted)
    nodes, edges = flattened(made)
    inner = made.nodes["outer"].nodes
    parts = [
        inner["fc"],
        *(inner["deep"].nodes[key] for key in ("lif", "w")),
        inner["lif"],
        *map(made.nodes.get, ("w", "lif")),
    ]
    flat = foreign(*parts, shape=(4,))
    assert sorted(nodes) == ["input", "lif", "outer.deep.lif", "outer.deep.w", "outer.fc", "outer.lif", "output", "w"]
    assert ("outer.lif", "w") in edges
    network = from_nir(made, steps=12)
    assert integers(network.graph) == integers(from_nir(flat, steps=12).graph)
    x = (np.random.default_rng(4).random((12, 12, 4)) < 0.5).astype(np.float32)
    shown = network.present(torch.from_numpy(x))
    ours = network.collect(simulate(network.graph, shown, mode="chip").spikes["lif"]).numpy()
    theirs = np.stack([next(iter(reference.run(flat, sample).values())) for sample in x])
    assert theirs.sum() > 20
    assert (ours != theirs).mean() < 0.05  # 8-bit weights
    if typed and not dotted:  # by NIR's own check, file, and the nodes' definitions run graph by graph
        nir.NIRGraph(made.nodes, made.edges, type_check=True)
        nir.write(tmp_path / "nested.nir", made)
        back = load_nir(tmp_path / "nested.nir")
        assert identical(from_nir(back, steps=12).graph, network.graph)
        apart = np.stack([next(iter(reference.run(back, sample).values())) for sample in x])
        np.testing.assert_array_equal(apart, theirs)


def test_an_input_without_a_shape_takes_that_of_the_node_behind_it():
    whole = [("input", "w"), ("w", "n"), ("n", "output")]
    assert from_nir(_joined(nir.Input(None), whole)).graph.populations[0].size == 3


def test_through_nir_or_not_the_integers_are_the_same():
    torch.manual_seed(1)
    layers = [SpikingLayer(5, 9, beta=0.875), SpikingLayer(9, 4, beta=0.75, threshold=0.5)]
    made = nir_from_snntorch([module for layer in layers for module in (layer.linear, layer.neuron)], (5,))
    direct = convert_lif([(layer.linear, layer.neuron) for layer in layers], steps=10).graph
    assert integers(from_nir(made, steps=10).graph) == integers(direct)


def test_if_needs_the_length_of_a_sample():
    fire = nir.IF(r=np.ones(2), v_threshold=np.ones(2), v_reset=np.zeros(2))
    made = foreign(nir.Linear(weight=np.full((2, 3), 0.25)), fire)
    with pytest.raises(NotConvertible, match="give steps or a calibration"):
        from_nir(made)
    network = from_nir(made, steps=12)
    x = torch.ones(1, 12, 3)
    spikes = network.collect(simulate(network.graph, network.present(x), mode="chip").spikes["if"])
    assert spikes[0].T.tolist() == [[0, 1] * 6] * 2  # 0.75, 1.5: over 1 at each second step


REFUSED_NODES = {
    "dt": (lambda: foreign(nir.Linear(np.ones((2, 3))), lif(2, tau=1e-5)), "shorter than the step"),
    "IF r": (
        lambda: foreign(nir.Linear(np.ones((2, 3))), nir.IF(np.full(2, 7.0), np.ones(2), np.zeros(2))),
        "r is 7",
    ),
    "LI": (
        lambda: foreign(nir.Linear(np.ones((2, 3))), nir.LI(np.full(2, DT_S), np.ones(2), np.zeros(2))),
        "no spiking neurons; LIF, IF, CubaLIF or Threshold are needed",
    ),
    "Delay": (
        lambda: foreign(nir.Delay(np.full(3, DT_S)), nir.Linear(np.ones((2, 3))), lif(2)),
        r"'delay' \(Delay\): 1 steps between 'input' and 'lif'; .* Take it out",
    ),
    "size": (lambda: foreign(nir.Linear(np.ones((2, 5))), lif(2)), "'linear' .* does not fit"),
    "NaN": (lambda: foreign(nir.Linear(np.full((2, 3), np.nan)), lif(2)), "weight holds NaN"),
    "nothing": (lambda: foreign(), "no spiking neurons"),
    "no shape": (
        lambda: _joined(nir.Input(None), [("input", "n"), ("n", "output")], w=None, n=nir.AvgPool2d(2, 2, 0)),
        r"node 'input' \(Input\) has the shape None; .* give it whole numbers from 1",
    ),
    "edge twice": (
        lambda: _joined(nir.Input(np.array([3])), [("input", "w"), ("w", "n"), ("w", "n"), ("n", "output")]),
        "the edge 'w' -> 'n' stands 2 times",
    ),
    "edge twice within": (
        lambda: foreign(_joined(nir.Input(np.array([3])), [("input", "w"), ("w", "n"), ("w", "n"), ("n", "output")])),
        "the edge 'w' -> 'n' in 'nirgraph' stands 2 times",
    ),
    "edge to nothing within": (
        lambda: foreign(_joined(nir.Input(np.array([3])), [("input", "w"), ("w", "m"), ("n", "output")])),
        "the edge 'w' -> 'm' in 'nirgraph' names a node that is not there",
    ),
    "two inputs within": (
        lambda: foreign(_joined(nir.Input(np.array([3])), [("input", "w")], more=nir.Input(np.array([3])))),
        r"node 'nirgraph': a graph within the graph with 2 nodes of type Input \(input, more\); one is needed",
    ),
    "nothing from within": (
        lambda: foreign(_joined(nir.Input(np.array([3])), [("input", "w"), ("w", "n")])),
        "node 'nirgraph.output': nothing leads to it",
    ),
    "name twice": (lambda: _same_name(), r"node 'a\.n' stands twice"),
}


def _joined(entry, edges, **other):
    nodes = {"input": entry, "w": nir.Linear(np.ones((2, 3))), "n": lif(2), "output": nir.Output(np.array([2]))}
    nodes = {name: node for name, node in (nodes | other).items() if node is not None}
    return nir.NIRGraph(nodes=nodes, edges=edges, type_check=False)


def _same_name():
    whole = [("input", "w"), ("w", "n"), ("n", "output")]
    nodes = {"input": nir.Input(np.array([3])), "a.n": lif(2), "a": _joined(nir.Input(np.array([3])), whole)}
    edges = [("input", "a"), ("a", "a.n"), ("a.n", "output")]
    return nir.NIRGraph(nodes | {"output": nir.Output(np.array([2]))}, edges, type_check=False)


@pytest.mark.parametrize("case", REFUSED_NODES)
def test_a_foreign_node_without_a_counterpart_is_named(case):
    make, message = REFUSED_NODES[case]
    with pytest.raises(NotInNir, match=message):
        from_nir(make())


def test_tau_in_another_step_is_another_network():
    made = foreign(nir.Linear(np.ones((2, 3))), lif(2, tau=4e-3, r=4.0))
    for dt_s, beta in ((1e-3, 0.75), (1e-4, 0.975)):
        assert describe(made, dt_s).description.layer("lif").beta.tolist() == pytest.approx([beta, beta])


def test_a_file_that_claims_too_much_or_points_elsewhere_is_refused_before_it_is_read(tmp_path):
    path, other = tmp_path / "x.nir", tmp_path / "other.h5"
    nir.write(path, foreign(nir.Linear(np.ones((2, 3))), lif(2)))
    whole = path.read_bytes()
    with h5py.File(path, "a") as file:
        file.create_dataset("node/nodes/huge", shape=(10**12,), dtype="f4", chunks=(1000,))
    with pytest.raises(
        NirFileError, match=r"with 'node/nodes/huge' its values take 4,000,000,\d{3},\d{3} bytes; .* are the limit"
    ):
        load_nir(path)
    with h5py.File(other, "w") as file:
        file["values"] = np.ones(3)
    path.write_bytes(whole)
    with h5py.File(path, "a") as file:
        file["node/nodes/linear/more"] = h5py.ExternalLink(other, "values")
    with pytest.raises(NirFileError, match="'node/nodes/linear/more' points to another file"):
        load_nir(path)


def test_files_cut_short_end_in_one_error(tmp_path):
    path = tmp_path / "x.nir"
    nir.write(path, foreign(nir.Linear(np.ones((2, 3))), lif(2)))
    whole = path.read_bytes()
    for kept in [0, 1, 8, 100, *range(600, len(whole), 1511), len(whole) - 1]:
        path.write_bytes(whole[:kept])
        with pytest.raises(NirFileError, match=r"x\.nir: not a readable NIR file"):
            load_nir(path)
