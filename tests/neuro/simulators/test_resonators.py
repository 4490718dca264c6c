"""Resonate-and-fire neurons: against Python's own integers, against Lava itself, and where they are refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from hardware.chips.chip import load_chip
from hardware.placement import place
from neuro.exchange.nir import NotInNir, write_nir
from neuro.graph import (
    GraphError,
    Population,
    Projection,
    SpikingGraph,
    identical,
    load_graph,
    save_graph,
)
from neuro.graph.demand import layer_demands
from neuro.graph.kinds import RESONATORS
from neuro.simulators.activity import RECORD_ALL, compare
from neuro.simulators.fixed_point import FixedPointOverflow, run_pipelined, simulate
from neuro.simulators.lava.client import LavaWorker
from tests.neuro.networks import RING_SIZE as SIZE
from tests.neuro.networks import RING_SOURCES as SOURCES
from tests.neuro.networks import resonators
from tests.neuro.networks import rings as sent

LIMIT = 2**23 - 1


def shrunk(product: int) -> int:
    return (abs(product) >> 12) * (1 if product >= 0 else -1)


def reference(graph: SpikingGraph, x_TS: np.ndarray) -> dict[tuple[str, str], np.ndarray]:
    """The populations "rf" and "next" in Python's integers, written from the equations: (T, N) of every variable."""
    weights = {(p.source, p.target, p.port): p.weight.tolist() for p in graph.projections}
    names = ("rf", "next")
    state = {name: [(0, 0)] * SIZE for name in names}
    spikes = {"x": [0] * SOURCES, "rf": [0] * SIZE, "next": [0] * SIZE}  # of the step before
    found: dict[tuple[str, str], list[list[int]]] = {(n, v): [] for n in names for v in ("real", "imag", "spikes")}
    for t in range(len(x_TS)):
        now = {"x": [int(value) for value in x_TS[t]]}
        for name in names:
            population = graph.population(name)
            rows = []
            for i in range(SIZE):
                into = {"a_real_in": 0, "a_imag_in": 0}
                for (source, target, port), weight in weights.items():
                    if target == name:
                        into[port] += sum(w * s for w, s in zip(weight[i], spikes[source], strict=True))
                sin, cos = (int(np.broadcast_to(population.params[key], (SIZE,))[i]) for key in ("sin_decay", "cos_decay"))
                exponent = int(population.params["state_exp"])
                threshold = int(population.params["vth"]) << exponent
                real, imag = state[name][i]
                new_real = shrunk(cos * real) - shrunk(sin * imag) + (into["a_real_in"] << exponent)
                new_imag = shrunk(sin * real) + shrunk(cos * imag) + (into["a_imag_in"] << exponent)
                new_real, new_imag = (min(max(part, -LIMIT), LIMIT) for part in (new_real, new_imag))
                if population.kind == "rf":
                    fire = new_real >= threshold and new_imag >= 0 and imag < 0
                else:
                    fire = new_imag >= threshold
                    if fire:
                        new_real, new_imag = 0, threshold - 1
                rows.append((new_real, new_imag, int(fire)))
            state[name] = [(real, imag) for real, imag, _ in rows]
            now[name] = [fire for _, _, fire in rows]
            for variable, values in zip(("real", "imag", "spikes"), zip(*rows, strict=True), strict=True):
                found[name, variable].append(list(values))
        spikes = now
    return {key: np.array(rows) for key, rows in found.items()}


@pytest.mark.parametrize("mode", ["lava", "chip"])
@pytest.mark.parametrize("kind", RESONATORS)
@pytest.mark.parametrize(("each", "loop"), [(False, False), (True, False), (True, True)])
def test_every_state_of_every_step_is_that_of_the_equations(kind: str, each: bool, loop: bool, mode: str) -> None:
    fired = 0
    for seed in range(3):
        graph, inputs = resonators(kind, seed, each, loop), sent(seed, batch=2)
        result = simulate(graph, inputs, mode=mode, record=("spikes", "real", "imag"))
        for sample in range(2):
            for (name, variable), expected in reference(graph, inputs["x"][sample]).items():
                got = result.variables()[name, variable][sample].numpy()
                np.testing.assert_array_equal(got, expected, err_msg=f"seed {seed}, {name}.{variable}")
        fired += int(result.spikes["rf"].sum())
        assert result.populations["rf"].updates_active == int(result.spikes["rf"].sum())
    assert fired > 20, "neurons that never fire show nothing"


@pytest.mark.parametrize("kind", RESONATORS)
def test_a_state_that_leaves_24_bits_is_clipped_counted_and_refused_in_strict_mode(kind: str) -> None:
    graph = resonators(kind, 1, strength=120)
    wires = tuple(
        Projection(w.name, w.source, w.target, w.port, w.weight, 9, num_message_bits=w.num_message_bits)
        if w.source == "x"
        else w
        for w in graph.projections
    )
    graph = SpikingGraph(graph.populations, wires, graph.outputs)
    inputs = {"x": np.full((1, 40, SOURCES), 100)}
    result = simulate(graph, inputs, record=("real", "imag"))
    assert result.populations["rf"].saturations_v > 0
    assert int(result.states["rf"]["real"].abs().max()) == LIMIT
    with pytest.raises(FixedPointOverflow, match=r"population 'rf', step 1, .* outside the 24 bits of its register"):
        simulate(graph, inputs, strict=True)


@pytest.mark.lava
@pytest.mark.parametrize("kind", RESONATORS)
def test_lava_gives_the_same_bits(kind: str, lava: LavaWorker) -> None:
    values = fired = 0
    for seed, (each, loop) in enumerate([(False, False), (True, True)]):
        graph, inputs = resonators(kind, seed, each, loop), sent(seed)
        ours = simulate(graph, inputs, record=RECORD_ALL)
        result = compare(lava.run(graph, inputs, record=RECORD_ALL), ours)
        assert result.equal, str(result)
        assert result.skipped == ()
        values, fired = values + result.values, fired + int(ours.spikes["next"].sum())
    assert values > 5_000
    assert fired > 0


def test_a_silent_port_is_zero_and_a_graph_file_keeps_both_kinds(tmp_path: Any) -> None:
    weight = np.array([[200]])
    for kind in RESONATORS:
        graph = SpikingGraph(
            (Population("x", "input", 1), Population("rf", kind, 1, {"sin_decay": 2800, "cos_decay": 2900, "vth": 5})),
            (Projection("w", "x", "rf", "a_real_in", weight),),
            ("rf",),
        )
        again = load_graph(save_graph(graph, tmp_path / f"{kind}.graph.npz"))
        assert identical(again, graph)
        result = simulate(again, {"x": [[[1], *[[0]] * 11]]}, record=("real", "imag"))
        assert result.states["rf"]["real"][0, 1, 0] == 200 << 6
        assert result.states["rf"]["imag"][0, 1, 0] == 0
        # A turn of 44 degrees a step: rf_iz fires on the way up, rf as it comes round after 360 / 44 = 8.2 steps.
        assert int(torch.nonzero(result.spikes["rf"][0, :, 0])[0]) == (2 if kind == "rf_iz" else 10)


def test_tokens_of_a_pipeline_meet_the_states_that_steps_meet() -> None:
    graph, inputs = resonators("rf", 4), sent(4)
    aligned = run_pipelined(graph, inputs, record=("spikes",)).spikes["rf"][0]
    np.testing.assert_array_equal(
        aligned[:-1].numpy(), simulate(graph, inputs, record=("spikes",)).spikes["rf"][0, 1:].numpy()
    )


def test_placement_takes_them_as_neurons_with_a_programme_and_binary_messages() -> None:
    graph = resonators("rf_iz", 0)
    demands = {demand.name: demand for demand in layer_demands(graph)}
    assert demands["rf"].programmable
    assert demands["rf"].payload_bits == 1
    assert [c.source for c in demands["rf"].connections] == ["x", "x"]
    assert len(place(layer_demands(graph), load_chip("loihi2")).cores) == 2


def test_nir_refuses_them_by_name_with_the_remedy(tmp_path: Any) -> None:
    pytest.importorskip("nir")
    with pytest.raises(NotInNir, match=r"population 'rf' \(rf\): NIR has no resonate-and-fire neuron. Keep the graph file"):
        write_nir(resonators("rf", 0), tmp_path / "rf.nir")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("params", "text"),
    [
        ({"sin_decay": 4096, "cos_decay": 0, "vth": 1}, "sin_decay is 4096; its register holds 0..4095"),
        ({"sin_decay": 1, "cos_decay": -1, "vth": 1}, "cos_decay is -1; its register holds 0..4095"),
        ({"sin_decay": 1, "vth": 1}, "parameter 'cos_decay' is missing"),
    ],
)
def test_decays_out_of_their_register_are_refused(params: dict[str, int], text: str) -> None:
    with pytest.raises(GraphError, match=text):
        Population("rf", "rf", 2, params)
