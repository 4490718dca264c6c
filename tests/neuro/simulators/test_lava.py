"""The integer simulator against Lava itself: live where Lava's interpreter is, and against files that Lava made.

To make the files of tests/neuro/golden again (with Lava):
    SPIKEGATE_WRITE_GOLDEN=1 python -m pytest tests/neuro/simulators/test_lava.py -k golden_files
"""

from __future__ import annotations

import os
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from neuro.graph import Population, Projection, SpikingGraph, identical, load_graph, save_graph
from neuro.graph.kinds import KINDS, PROJECTIONS, RESONATORS
from neuro.simulators.activity import RECORD_ALL, Activity
from neuro.simulators.fixed_point import simulate
from neuro.simulators.lava.client import LavaUnsupported, LavaWorker, compare

GOLDEN = {"lif_loop": 3, "lif_self_loop": 4, "lif_deep": 7, "mlp_relu": 1, "mlp_squared": 2}
GOLDEN |= {f"all_kinds_{seed}": seed for seed in (78, 200, 201, 121, 6, 33)} | {"rf": 3, "rf_iz": 5}
NETWORKS, PER_TEST, STEPS = 210, 5, 20
# Of the generated networks a small set that shows every trait of them all (a greedy cover) and reaches every line of the
# simulator that they all reach; the others run under soak.
CHOSEN = [1, 6, 7, 8, 12, 14, 15, 19, 20, 24, 35, 41, 42, 43, 45, 47, 48, 53, 56, 62, 69, 70, 78, 79, 82, 88, 89, 90]
CHOSEN += [98, 103, 104, 112, 114, 115, 126, 130, 138, 143, 157, 179, 183, 191, 194, 204, 208]
OTHERS = sorted(set(range(NETWORKS)) - set(CHOSEN))


@pytest.fixture
def cases(lif_graph: Any, mlp_graph: Any, messages: Any, networks: ModuleType) -> Any:
    """Name of a golden file -> (graph, inputs)."""

    def case(name: str) -> tuple[SpikingGraph, dict[str, np.ndarray]]:
        seed = GOLDEN[name]
        if name in RESONATORS:
            return networks.resonators(name, seed, each=True, loop=True), networks.rings(seed, 2)
        if name.startswith("all_kinds"):
            graph = networks.network(seed)
            return graph, networks.messages(graph, seed, 2, STEPS)
        graph = lif_graph(seed) if name.startswith("lif") else mlp_graph(seed, squared=name == "mlp_squared")
        return graph, messages(graph, seed, 2, 40)

    return case


def traits(graph: SpikingGraph) -> set[tuple[Any, ...]]:
    """What a network has of kinds, of their pairs along a projection, of ways, widths, exponents and switches."""
    kinds = {population.name: population.kind for population in graph.populations}
    found: set[tuple[Any, ...]] = set()
    for p in graph.projections:
        source, target = kinds[p.source], kinds[p.target]
        found |= {("way", p.kind, target), ("pair", source, target), ("loop", p.source == p.target, p.kind)}
        found |= {("sign", p.sign_mode), ("exponent", p.weight_exp), ("port", p.source_port), ("bits", p.num_weight_bits)}
        found.add(("message", p.num_message_bits, source))
    for population in graph.populations:
        switches = population.params.keys() & {"cum_error", "relu"}
        found |= {(population.kind, switch, int(population.params[switch])) for switch in switches}
    return found


def batches(seeds: list[int]) -> list[list[int]]:
    return [seeds[first : first + PER_TEST] for first in range(0, len(seeds), PER_TEST)]


@pytest.mark.lava
@pytest.mark.parametrize("seeds", [*batches(CHOSEN), *(pytest.param(b, marks=pytest.mark.soak) for b in batches(OTHERS))])
@pytest.mark.slow
def test_generated_networks_equal_lava_in_every_state_at_every_step(
    seeds: list[int], networks: ModuleType, lava: LavaWorker
) -> None:
    before = max(lava.started, 1)
    for seed in seeds:
        graph = networks.network(seed)
        inputs = networks.messages(graph, seed, 1, STEPS)
        ours = simulate(graph, inputs, record=RECORD_ALL)
        result = compare(lava.run(graph, inputs, record=RECORD_ALL), ours)
        assert result.equal, f"network {seed}: {result}"
        assert result.skipped == ()
        assert result.values <= 20_000
    assert lava.started == before  # one worker served them all


@pytest.mark.lava
def test_neurons_that_their_biases_drive_equal_lava_without_an_input(lava: LavaWorker) -> None:
    drive = {"du": 4095, "dv": 300, "vth": 30, "bias_mant": np.array([90, 200, 700]), "bias_exp": 2}
    graph = SpikingGraph(
        [Population("drive", "lif", 3, drive), Population("out", "lif", 2, {"du": 300, "dv": 0, "vth": 9})],
        [Projection("w", "drive", "out", "a_in", np.array([[2, 4, 8], [6, -4, 2]]))],
        ["out"],
    )
    ours = simulate(graph, {}, record=RECORD_ALL, steps=STEPS)
    result = compare(lava.run(graph, {}, record=RECORD_ALL, steps=STEPS), ours)
    assert result.equal, result
    assert torch.count_nonzero(ours.spikes["out"]) > 3


def test_the_generated_networks_hold_every_kind_and_are_not_silent(networks: ModuleType) -> None:
    kinds: set[str] = set()
    ways: set[str] = set()
    exponents: set[int] = set()
    loops = 0
    of_all: set[tuple[Any, ...]] = set()
    of_chosen: set[tuple[Any, ...]] = set()
    for seed in range(NETWORKS):
        graph = networks.network(seed)
        of_all |= traits(graph)
        of_chosen |= traits(graph) if seed in CHOSEN else set()
        kinds |= {population.kind for population in graph.populations}
        ways |= {projection.kind for projection in graph.projections}
        exponents |= {projection.weight_exp for projection in graph.projections}
        loops += any(p.source == p.target for p in graph.projections)
    active = []
    for seed in range(0, NETWORKS, 5):
        graph = networks.network(seed)
        sent = simulate(graph, networks.messages(graph, seed, 1, STEPS)).spikes[graph.outputs[0]]
        active.append(bool(torch.count_nonzero(sent)))
    assert kinds == {"input", *networks.LAVA_KINDS} == {n for n, k in KINDS.items() if k.lava and n not in RESONATORS}
    assert ways == set(PROJECTIONS)
    assert min(exponents) < 0 < max(exponents)
    assert loops > 20
    assert of_chosen == of_all
    assert len(of_all) > 150
    assert sum(active) > 0.8 * len(active)


def test_what_lava_lacks_is_refused_by_name_before_anything_starts() -> None:
    lif = {"du": 0, "dv": 0, "vth": 1}
    weight = np.array([[2]])
    worker = LavaWorker("/no/such/python")
    x, w = Population("x", "input", 1), Projection("w", "x", "y", "a_in", weight)
    for population, text in (
        (
            Population("y", "lif_refractory", 1, {**lif, "refractory": 2}),
            r"population 'y' \(lif_refractory\): lava-nc 0.10",
        ),
        (
            Population("y", "delta", 1, {"vth": 1, "corrected": 1}),
            r"population 'y' \(delta\): the corrected model is not in",
        ),
    ):
        with pytest.raises(LavaUnsupported, match=text):
            worker.run(SpikingGraph((x, population), (w,), ("y",)), {"x": np.ones((1, 2, 1), dtype=np.int64)})
    assert worker.started == 0


@pytest.mark.lava
@pytest.mark.parametrize("seed", range(8))
def test_lif_networks_equal_lava_in_every_state(seed: int, lif_graph: Any, messages: Any, lava: LavaWorker) -> None:
    graph = lif_graph(seed)
    inputs = messages(graph, seed, 1, 50)
    ours = simulate(graph, inputs, record=RECORD_ALL)
    result = compare(lava.run(graph, inputs, record=RECORD_ALL), ours)
    assert result.equal, str(result)
    assert result.skipped == ()
    assert result.values > 1500
    assert torch.count_nonzero(ours.spikes[graph.outputs[0]]) > 0  # a silent network would prove little


@pytest.mark.lava
@pytest.mark.parametrize("squared", [False, True])
@pytest.mark.parametrize("seed", [0, 1])
def test_graded_pipelines_equal_lava(seed: int, squared: bool, mlp_graph: Any, messages: Any, lava: LavaWorker) -> None:
    graph = mlp_graph(seed, squared, (32, 64, 16))
    inputs = messages(graph, seed, 1, 40)
    ours = simulate(graph, inputs, record=RECORD_ALL)
    result = compare(lava.run(graph, inputs, record=RECORD_ALL), ours)
    assert result.equal, str(result)
    assert torch.count_nonzero(ours.spikes["y"]) > 300


@pytest.mark.lava
def test_registers_that_run_over_do_so_as_in_lava(lava: LavaWorker) -> None:
    """Wraps of u (one wrap only), clips of v, int32 wraps of sums and products, biases alone."""
    rng = np.random.default_rng(0)
    wide = {"num_message_bits": 32}
    weight = 2 * rng.integers(-128, 128, (6, 6))
    graph = SpikingGraph(
        (
            Population("x", "input", 6),
            Population("lif", "lif", 6, {"du": 10, "dv": 3, "vth": 131071}),
            Population("alone", "lif", 3, {"du": 0, "dv": 0, "vth": 9, "bias_mant": -4096, "bias_exp": 7}),
            Population("graded", "graded", 6, {"vth": 5}),
            Population("relu", "graded_relu", 6, {"vth": 5}),
            Population("product", "product", 6, {"vth": 7, "exp": 3}),
        ),
        (
            Projection("w1", "x", "lif", "a_in", weight, 4, **wide),
            Projection("w2", "x", "graded", "a_in", weight, 5, **wide),
            Projection("w3", "x", "graded", "a_in", weight, -20, **wide),
            Projection("w4", "x", "relu", "a_in", weight, -1, **wide),
            Projection("w5", "graded", "product", "a_in1", weight, -3, **wide),
            Projection("w6", "relu", "product", "a_in2", weight, 0, **wide),
        ),
        ("lif", "alone", "product"),
    )
    inputs = {"x": rng.integers(-(2**31), 2**31, (1, 30, 6))}
    ours = simulate(graph, inputs, record=RECORD_ALL)
    result = compare(lava.run(graph, inputs, record=RECORD_ALL), ours)
    assert result.equal, str(result)
    assert ours.populations["lif"].wraps_u > 0
    assert ours.populations["alone"].saturations_v > 0
    assert ours.populations["product"].wraps_sum > 0


def golden_arrays(name: str, folder: Path) -> dict[str, np.ndarray]:
    with np.load(folder / "activities" / f"{name}.activity.npz", allow_pickle=False) as archive:
        return dict(archive)


@pytest.mark.lava
@pytest.mark.parametrize("name", GOLDEN)
def test_golden_files_are_what_lava_says(name: str, cases: Any, lava: LavaWorker, golden_folder: Path) -> None:
    graph, inputs = cases(name)
    activity = lava.run(graph, inputs, record=RECORD_ALL)
    arrays = {f"state/{population}/{variable}": v.numpy() for (population, variable), v in activity.variables().items()}
    arrays.update({f"input/{key}": value for key, value in inputs.items()})
    if os.environ.get("SPIKEGATE_WRITE_GOLDEN"):
        save_graph(graph, golden_folder / "graphs" / f"{name}.graph.npz")
        np.savez_compressed(golden_folder / "activities" / f"{name}.activity.npz", **arrays)  # type: ignore[arg-type]
    kept = golden_arrays(name, golden_folder)
    assert identical(load_graph(golden_folder / "graphs" / f"{name}.graph.npz"), graph)
    assert set(kept) == set(arrays)
    for key, value in arrays.items():
        assert np.array_equal(kept[key], value), key


def test_the_golden_files_hold_every_kind(golden_folder: Path) -> None:
    graphs = [load_graph(golden_folder / "graphs" / f"{name}.graph.npz") for name in GOLDEN]
    assert {p.kind for graph in graphs for p in graph.populations} == {name for name, kind in KINDS.items() if kind.lava}
    assert {p.kind for graph in graphs for p in graph.projections} == set(PROJECTIONS)


@pytest.mark.parametrize("name", GOLDEN)
def test_what_lava_once_computed_is_what_we_compute(name: str, golden_folder: Path) -> None:
    graph = load_graph(golden_folder / "graphs" / f"{name}.graph.npz")
    arrays = {tuple(key.split("/")): value for key, value in golden_arrays(name, golden_folder).items()}
    inputs = {key[1]: value for key, value in arrays.items() if key[0] == "input"}
    ours = simulate(graph, inputs, record=RECORD_ALL).variables()
    states = {(key[1], key[2]): value for key, value in arrays.items() if key[0] == "state"}
    assert set(states) == set(ours)
    assert sum(value.size for value in states.values()) > 2000
    for key, value in states.items():
        assert np.array_equal(ours[key].numpy(), value), key


def test_the_first_divergence_is_named() -> None:
    def activity(**spikes: list[list[int]]) -> Activity:
        tensors = {name: torch.tensor([rows], dtype=torch.int32) for name, rows in spikes.items()}
        return Activity(tensors, {}, 1, 3, "test")

    first = activity(a=[[0, 0], [0, 0], [5, 0]], b=[[0], [7], [0]], c=[[1], [1], [1]])
    second = activity(a=[[0, 0], [0, 0], [6, 1]], b=[[0], [8], [0]])
    result = compare(first, second)
    assert (result.values, result.mismatches, result.skipped) == (9, 3, ("c.spikes",))
    assert str(result.first) == "population 'b', spikes, sample 0, step 1, neuron 0: expected 7, got 8"
    assert str(compare(first, first)) == "equal over 12 values"
    with pytest.raises(ValueError, match="no variable in common"):
        compare(activity(a=[[1]]), activity(b=[[1]]))
    with pytest.raises(ValueError, match="shapes differ"):
        compare(activity(a=[[1]]), activity(a=[[1, 2]]))
