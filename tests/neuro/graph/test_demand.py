"""Graphs become demands: every kind of population and projection, measured rates, and cores back to neurons."""

from __future__ import annotations

import numpy as np
import pytest

from hardware.placement import Connection, Convolution, DoesNotFit, place
from neuro.graph import Population, SpikingGraph
from neuro.graph.demand import core_map, layer_demands, stored_bits
from neuro.graph.kinds import KINDS, LIF_KINDS, XYLO_KINDS
from neuro.graph.synapses import Convolution as Geometry
from neuro.graph.synapses import Projection
from neuro.simulators.fixed_point import simulate

LIF = {"du": 0, "dv": 0, "vth": 4}


@pytest.mark.parametrize(
    ("weights", "sign_mode", "bits"),
    [
        ([-2, 0, 2], "mixed", 2),
        ([-256, 254], "mixed", 8),
        ([-128, 64], "mixed", 2),  # -2, 1
        ([-2, 0], "mixed", 1),  # -1, 0
        ([3, -1], "mixed", 3),
        ([-256, 255], "mixed", 9),
        ([0, 0], "mixed", 1),
        ([0, 255], "excitatory", 8),
        ([0, 128], "excitatory", 1),
        ([-12, 0, -4], "inhibitory", 2),
    ],
)
def test_stored_bits(weights, sign_mode, bits):
    assert stored_bits(np.array(weights), sign_mode) == bits


def graph() -> SpikingGraph:
    rng = np.random.default_rng(3)
    sparse = 2 * rng.integers(-9, 9, (50, 192)) * (rng.random((50, 192)) < 0.3)
    return SpikingGraph(
        (
            Population("in", "input", 6 * 6 * 2),
            Population("c", "lif", 4 * 4 * 12, LIF),
            Population("r", "lif", 50, LIF),
            Population("o", "lif", 5, LIF),
        ),
        (
            Projection(
                "conv",
                "in",
                "c",
                "a_in",
                rng.integers(-7, 8, (12, 3, 3, 1)),
                kind="conv",
                conv=Geometry((6, 6, 2), groups=2),
            ),
            Projection("sparse", "c", "r", "a_in", sparse, kind="sparse"),
            Projection("loop", "r", "r", "a_in", 2 * rng.integers(-9, 9, (50, 50))),
            Projection(
                "late",
                "r",
                "o",
                "a_in",
                2 * rng.integers(1, 9, (5, 50)),
                kind="delay_dense",
                delays=np.arange(250).reshape(5, 50) % 31,
            ),
        ),
        ("o",),
    )


def test_every_kind_of_projection():
    made = graph()
    by_name = {demand.name: demand for demand in layer_demands(made)}
    assert not by_name["in"].on_chip
    (conv,) = by_name["c"].connections
    assert isinstance(conv, Convolution)
    assert by_name["c"].box == (4, 4, 12)
    assert (conv.groups, conv.kernel, conv.input_shape) == (2, (3, 3), (6, 6, 2))
    sparse, loop = by_name["r"].connections
    assert isinstance(sparse, Connection)
    assert (sparse.mask == (made.projections[1].weight != 0)).all()
    assert loop.source == "r"
    assert by_name["o"].connections[0].max_delay == 30


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "input"])
def test_every_kind_of_population(kind):
    """Loihi 2 takes all but those of another chip; Loihi 1 the leaky integrate-and-fire kinds of binary messages."""
    parameters = {name: p.low if p.default is None else p.default for name, p in KINDS[kind].parameters.items()}
    ports = KINDS[kind].ports
    weight = np.full((3, 4), 2)
    made = SpikingGraph(
        (Population("in", "input", 4), Population("x", kind, 3, parameters)),
        tuple(Projection(f"p{port}", "in", "x", port, weight) for port in ports),
        ("x",),
    )
    if kind in XYLO_KINDS:
        with pytest.raises(ValueError, match=f"'x' \\({kind}\\) is of Xylo.* place it with chip xylo_audio2"):
            layer_demands(made)
        return
    placement = place(layer_demands(made), "loihi2")
    assert placement.cores[0].used["axon_in"].used == 4 * len(ports)
    if kind in LIF_KINDS and kind != "lif_general":  # its resets are programs
        assert len(place(layer_demands(made), "loihi1").cores) == 1
    else:
        with pytest.raises(DoesNotFit, match="programmable_neurons 3 of 0"):
            place(layer_demands(made), "loihi1")


def dense() -> SpikingGraph:
    rng = np.random.default_rng(5)
    return SpikingGraph(
        (Population("in", "input", 40), Population("h", "lif", 300, LIF), Population("o", "lif", 700, LIF)),
        (
            Projection("a", "in", "h", "a_in", 2 * rng.integers(-9, 20, (300, 40))),
            Projection("b", "h", "o", "a_in", 2 * rng.integers(-100, 100, (700, 300))),
        ),
        ("o",),
    )


@pytest.mark.parametrize("record", [("spikes",), ()])
def test_a_measured_run_gives_the_simulators_own_counts(record):
    made = dense()
    inputs = {"in": np.random.default_rng(1).integers(0, 2, (3, 20, 40))}
    activity = simulate(made, inputs, record=record)
    placement = place(layer_demands(made, activity), "loihi2")
    counted = sum(counts.synops for counts in activity.projections.values()) / (3 * 20)
    assert placement.measured
    assert placement.synops == pytest.approx(counted)
    sent = activity.projections["b"].events / 60 * len(placement.layers[1].cores)
    assert placement.messages_between_cores == pytest.approx(sent)
    assert placement.messages_between_cores > 0


def test_activity_of_another_graph_is_refused():
    activity = simulate(dense(), {"in": np.ones((1, 3, 40), dtype=np.int64)})
    with pytest.raises(ValueError, match="run this graph"):
        layer_demands(graph(), activity)


def test_cores_of_neurons():
    made = dense()
    placement = place(layer_demands(made), "loihi2")
    cores = core_map(made, placement)
    assert set(cores) == {"in", "h", "o"}
    assert (cores["in"] == -1).all()
    assert [cores[name].shape for name in ("h", "o")] == [(300,), (700,)]
    for layer in placement.layers:
        assert sorted(set(cores[layer.name].tolist())) == list(layer.cores)
    assert len(set(cores["o"].tolist())) > 1
    with pytest.raises(ValueError, match="population 'c' is not in the placement"):
        core_map(graph(), placement)


def test_a_prefix_places_two_graphs_together():
    both = (*layer_demands(dense(), prefix="one/"), *layer_demands(dense(), prefix="two/"))
    placement = place(both, "loihi2")
    assert len(placement.cores) == 2 * len(place(layer_demands(dense()), "loihi2").cores)
    assert set(core_map(dense(), placement, "two/")["h"]).isdisjoint(core_map(dense(), placement, "one/")["h"])
