"""The loops in C give the bits and counts of torch, whichever way a product is made, for random graphs of every kind."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from neuro.graph import Convolution, Population, Projection, SpikingGraph, truncate_weights
from neuro.simulators import fixed_point
from neuro.simulators.activity import RECORD_ALL, compare
from neuro.simulators.compiled import calls, program, signals
from neuro.simulators.compiled.library import library
from neuro.simulators.compiled.structures import AMX, EVENTS, VNNI
from neuro.simulators.fixed_point import run_pipelined, simulate
from tests.neuro.simulators import xylo_networks

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    WAYS = (EVENTS, VNNI, AMX)[: calls.best_product() + 1] if library() is not None else ()
pytestmark = pytest.mark.skipif(not WAYS, reason="no C compiler here")

LIF = ["lif", "ternary_lif", "lif_reset", "lif_soft"]
KINDS = [
    *LIF,
    "sigma",
    "delta",
    "sigma_delta",
    "graded",
    "graded_relu",
    "product",
    "norm",
]
RECORDS = (RECORD_ALL, ("spikes",), ("u", "v"), ())
FEW = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture
def ways(monkeypatch: Any) -> list[int]:
    """Whichever way of a product stands in the list is taken; its rows are added up behind it: [way, by events, dense]."""
    found = [EVENTS, 0, 0]
    original = program.run_members

    def noted(*given: Any) -> list[list[int]]:
        numbers = original(*given)
        for each in numbers:
            found[1:] = [found[1] + each[6], found[2] + each[7]]
        return numbers

    monkeypatch.setattr(calls, "best_product", lambda: found[0])
    monkeypatch.setattr(program, "run_members", noted)
    return found


def assert_same(graph: SpikingGraph, inputs: Any, mode: str, record: Any, run: Any = simulate) -> Any:
    plain = run(graph, inputs, mode=mode, record=record, fused=False)
    found = run(graph, inputs, mode=mode, record=record)
    assert compare(plain, found).equal, str(compare(plain, found))
    assert (plain.populations, plain.projections, plain.cores) == (found.populations, found.projections, found.cores)
    return found


@FEW
@given(
    seed=st.integers(0, 10**6),
    kinds=st.sampled_from([LIF, KINDS, ["lif"]]),
    mode=st.sampled_from(["lava", "chip"]),
    record=st.sampled_from(RECORDS),
    batch=st.integers(1, 7),
    steps=st.integers(1, 40),
    rate=st.sampled_from([0.0, 0.02, 0.5, 1.0]),
    held=st.sampled_from([2**23, 40, 700]),
    way=st.sampled_from(WAYS or [EVENTS]),
)
def test_random_graphs(
    seed: int,
    kinds: list[str],
    mode: str,
    record: Any,
    batch: int,
    steps: int,
    rate: float,
    held: int,
    way: int,
    networks: Any,
    ways: list[int],
) -> None:
    graph = networks.network(seed, kinds)
    given = networks.messages(graph, seed, batch, steps)["x"]
    ways[0] = way
    generator = np.random.default_rng(seed)
    kept = generator.random(given.shape) < rate
    values = np.where(kept, np.where(given == 0, 1, given), 0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fixed_point, "CHUNK_VALUES", held)  # blocks that do not divide the steps
        assert_same(graph, {"x": values}, mode, record)


@FEW
@given(seed=st.integers(0, 10**6), reset=st.integers(0, 2), late=st.integers(0, 1), interval=st.sampled_from([0, 3]))
def test_general_and_refractory_neurons_on_a_loop(seed: int, reset: int, late: int, interval: int) -> None:
    rng, size = np.random.default_rng(seed), int(np.random.default_rng(seed).integers(1, 40))
    general = {
        "du": rng.integers(0, 4096, size),
        "dv": rng.integers(0, 4096, size),
        "vth": rng.integers(0, 3000, size),
        "bias_mant": rng.integers(-200, 400, size),
        "bias_exp": rng.integers(0, 8, size),
        "reset": reset,
        "reset_delay": late,
        "reset_interval": interval,
        "reset_offset": 2,
    }
    refractory = {"du": 900, "dv": 70, "vth": 300, "refractory": 1 + seed % 5}
    populations = (
        Population("x", "input", 5),
        Population("a", "lif_general", size, general),
        Population("b", "lif_refractory", size, refractory),
    )

    def join(name: str, source: str, target: str, sources: int, **extra: Any) -> Projection:
        weight = truncate_weights(np.rint(rng.normal(0, 90, (size, sources))).astype(np.int64), "mixed")
        return Projection(name, source, target, "a_in", weight, int(rng.integers(-2, 3)), **extra)

    delays = rng.integers(0, 6, (size, size))
    projections = (
        join("w", "x", "a", 5, num_message_bits=8),
        join("f", "a", "b", size),
        join("r", "b", "a", size, kind="delay_dense", delays=delays),
        join("s", "a", "a", size),
    )
    graph = SpikingGraph(populations, projections, ("b",))
    batch, steps = int(rng.integers(1, 5)), int(rng.integers(1, 50))
    values = rng.integers(-100, 101, (batch, steps, 5))
    assert_same(graph, {"x": values}, "chip", RECORD_ALL)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("sources", "targets"), [(1, 1), (63, 31), (65, 600), (700, 65), (300, 129)])
def test_products_are_exact_at_every_rate(way: int, sources: int, targets: int, ways: list[int]) -> None:
    rng = np.random.default_rng(sources)
    weight = 2 * rng.integers(-128, 128, (targets, sources))
    weight[0] = -256  # the hardest sums for bytes
    ways[0] = way
    for kind in ("dense", "sparse"):
        kept = weight * (rng.random(weight.shape) < 0.05) if kind == "sparse" else weight
        graph = SpikingGraph(
            (Population("x", "input", sources), Population("y", "graded", targets, {"vth": 0})),
            (Projection("w", "x", "y", "a_in", kept, kind=kind, num_message_bits=8),),
            ("y",),
        )
        for low, high in ((1, 1), (-1, 1), (-128, 127)):
            for rate in (0, 0.02, 0.3, 1):
                x = rng.integers(low, high + 1, (3, 21, sources)) * (rng.random((3, 21, sources)) < rate)
                found = simulate(graph, {"x": x})
                assert np.array_equal(found.spikes["y"][:, 1:].numpy(), x[:, :-1] @ kept.T)
    assert ways[1] > 0
    assert (ways[2] > 0) == (way != EVENTS)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("groups", [1, 2, 6])
def test_convolutions_are_exact_at_every_rate(way: int, groups: int, ways: list[int]) -> None:
    rng = np.random.default_rng(groups)
    ways[0] = way
    geometry = Convolution((9, 8, 6), (2, 1), (1, 2), (1, 2), groups)
    weight = rng.integers(-128, 128, (36, 3, 2, 6 // groups))
    width, height, channels = geometry.output_shape(weight.shape)
    graph = SpikingGraph(
        (Population("x", "input", 9 * 8 * 6), Population("y", "graded", width * height * channels, {"vth": 0})),
        (Projection("w", "x", "y", "a_in", weight, kind="conv", conv=geometry, num_message_bits=8),),
        ("y",),
    )
    kernel = torch.from_numpy(weight).permute(0, 3, 1, 2).flip(2, 3).double()  # Lava flips it
    for low, high in ((1, 1), (-128, 127)):
        for rate in (0, 0.02, 0.3, 1):
            x = rng.integers(low, high + 1, (3, 11, 9, 8, 6)) * (rng.random((3, 11, 9, 8, 6)) < rate)
            pictures = torch.from_numpy(x).flatten(0, 1).permute(0, 3, 1, 2).double()
            wanted = torch.nn.functional.conv2d(pictures, kernel, None, (2, 1), (1, 2), (1, 2), groups)
            found = simulate(graph, {"x": x.reshape(3, 11, -1)}).spikes["y"]
            assert torch.equal(found[:, 1:], wanted.permute(0, 2, 3, 1).reshape(3, 11, -1)[:, :-1].to(torch.int32))
    assert ways[1] > 0
    if groups == 1:  # else patches cost more than events
        assert (ways[2] > 0) == (way != EVENTS)


@pytest.mark.parametrize("threads", [2, 3])
def test_threads_share_the_samples_and_change_nothing(threads: int, networks: Any, monkeypatch: Any) -> None:
    before = torch.get_num_threads()
    for name in ("THREAD_NEURONS", "THREAD_SYNAPSES", "THREAD_COPIES"):
        monkeypatch.setattr(calls, name, 1)
    torch.set_num_threads(threads)
    try:
        for seed in range(12):
            graph = networks.network(seed, LIF)
            assert_same(graph, networks.messages(graph, seed, 7, 20), ("lava", "chip")[seed % 2], RECORD_ALL)
    finally:
        torch.set_num_threads(before)


def test_a_pipeline_counts_its_window_only(networks: Any) -> None:
    rng = np.random.default_rng(3)
    populations = [Population("x", "input", 20)]
    projections = []
    for layer in range(3):
        populations.append(Population(f"p{layer}", "lif", 20, {"du": 400, "dv": 100, "vth": 90}))
        weight = 2 * rng.integers(-60, 90, (20, 20))
        projections.append(Projection(f"w{layer}", populations[-2].name, f"p{layer}", "a_in", weight))
    graph = SpikingGraph(tuple(populations), tuple(projections), ("p2",))
    values = (rng.random((3, 17, 20)) < 0.4).astype(np.int8)
    found = assert_same(graph, {"x": values}, "lava", RECORD_ALL, run_pipelined)
    assert found.populations["p2"].updates_active > 0


def test_a_placement_counts_each_neuron(networks: Any) -> None:
    for seed in range(6):
        graph = networks.network(seed, LIF)
        placed = {p.name: np.arange(p.size) % 3 for p in graph.populations}
        values = networks.messages(graph, seed, 2, 15)
        cores = [simulate(graph, values, placement=placed, fused=fused).cores for fused in (False, None)]
        assert cores[0] == cores[1]
        assert cores[0]


@pytest.mark.parametrize("strength", [40, 900])
def test_resonators_with_and_without_saturation(strength: int, networks: Any) -> None:
    for seed in range(8):
        graph = networks.resonators(["rf", "rf_iz"][seed % 2], seed, each=seed % 3 == 0, loop=seed > 3, strength=strength)
        assert_same(graph, networks.rings(seed, 3), ("lava", "chip")[seed // 2 % 2], RECORDS[seed % 4])


@FEW
@given(
    kind=st.sampled_from(["sigma", "delta", "sigma_delta"]),
    mode=st.sampled_from(["lava", "chip"]),
    most=st.sampled_from([30, 5000, 2**20, 2**27]),
    seed=st.integers(0, 10**6),
    record=st.sampled_from(RECORDS),
)
def test_differences_and_sums_up_to_and_beyond_their_registers(
    kind: str, mode: str, most: int, seed: int, record: Any
) -> None:
    rng = np.random.default_rng(seed)
    params: dict[str, Any] = {}
    if kind != "sigma":
        corrected, exponents = int(rng.integers(2)), rng.integers(0, 8, 2)
        room = 2 ** (23 - int(exponents.sum()))
        params = {"vth": int(rng.integers(0, min(most, room))), "corrected": corrected}
        params |= {"spike_exp": int(exponents[0]), "state_exp": int(exponents[1])}
        params |= {"cum_error": int(rng.integers(2)) * (1 - corrected)}
        if kind == "sigma_delta":
            highest = min(room, 2**15)
            params |= {"bias": rng.integers(1 - highest, highest, 7), "relu": int(rng.integers(2))}
    weight = 2 * np.eye(7, dtype=np.int64)
    graph = SpikingGraph(
        (Population("x", "input", 7), Population("y", kind, 7, params)),
        (Projection("w", "x", "y", "a_in", weight, int(rng.integers(-2, 2)), num_message_bits=32),),
        ("y",),
    )
    values = rng.integers(-most, most, (3, 30, 7)) * (rng.random((3, 30, 7)) < 0.6)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fixed_point, "CHUNK_VALUES", int(rng.choice([2**23, 300])))
        assert_same(graph, {"x": values}, mode, record)


def test_xylo_with_and_without_saturation(monkeypatch: Any) -> None:
    taken = {True: 0, False: 0}
    original = signals.advance_xylo

    def noted(*given: Any) -> Any:
        found = original(*given)
        taken[found is not None] += 1
        return found

    monkeypatch.setattr("neuro.simulators.xylo.neurons.advance_xylo", noted)
    for seed in range(45):
        graph = xylo_networks.network(seed)
        assert_same(graph, xylo_networks.spikes(graph, seed, 3, 20), "xylo", RECORDS[seed % 4])
    assert min(taken.values()) > 10


@pytest.mark.parametrize("size", [1, 63, 4096, 4097])
@pytest.mark.parametrize("types", [(torch.int8, torch.int8), (torch.int8, torch.int32), (torch.int32, torch.int32)])
def test_copies_count_what_is_not_zero_of_each_neuron(size: int, types: tuple[torch.dtype, torch.dtype]) -> None:
    generator = torch.Generator().manual_seed(size)
    rows = torch.randint(-1, 2, (15, 37, size), generator=generator).to(types[0])  # 555 of them: more than a byte counts
    given = rows.transpose(0, 1)
    copy, each = torch.empty(37, 15, size, dtype=types[1]), torch.ones(size, dtype=torch.int32)
    assert calls.spread(given, copy, True, each) == int(given.ne(0).sum())
    assert torch.equal(copy, given.to(types[1]))
    assert torch.equal(each - 1, given.ne(0).sum((0, 1), dtype=torch.int32))
    copy.zero_()
    assert calls.spread(given, copy) == 0
    assert torch.equal(copy, given.to(types[1]))
